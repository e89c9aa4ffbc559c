"""Two levels of scales: an integer for each group below a float for each channel (QServe, arXiv 2405.04532).

``w = (q - zero_point) * group_scale * channel_scale`` with group scales from 1 to `most_group_scale` (bits), so that
``(q - zero_point) * group_scale`` stays within -127 .. 127: integer products of such weights run over all of a row, and
floats scale them once. Channel scales are float32 with 16 significant bits: every weight is exact in float32.

Stored as one tensor, uint8 ``[tiles, groups + 4, 16]`` (cpp/cpu/int_scales.h): for each tile of 16 rows their group
scales, then in the last 64 bytes their channel scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops

TOP = 127  # the largest size of (q - zero_point) * group_scale
BITS = range(2, 7)  # of codes: with more, group scales would be one or two
CHANNEL_ROWS = 4  # rows of 16 bytes that hold a tile's 16 channel scales
_LEAST, _MOST = 2.0**-100, torch.finfo(torch.float32).max / 256


def most_group_scale(bits: int) -> int:
    """The largest group scale: symmetric codes and the middle code (what padding holds) then need no limit."""
    return TOP // 2 ** (bits - 1)


def channel_scales(scales: Tensor, zeros: Tensor | float, bits: int) -> Tensor:
    """``[out, 1]`` for scales and zero points ``[out, groups]`` of one level: the coarsest group of a row gets the
    largest group scale, unless products would leave -127 .. 127 then."""
    largest = torch.maximum(torch.as_tensor(zeros).to(scales), 2**bits - 1 - torch.as_tensor(zeros).to(scales)) * scales
    found = torch.maximum(scales / most_group_scale(bits), largest / TOP).amax(1, keepdim=True)
    found = found.float().clamp(_LEAST, _MOST).contiguous().view(torch.int32)
    return ((found + 0x80) & ~0xFF).view(torch.float32).to(scales)  # 16 significant bits


def reach(group_scales: Tensor) -> Tensor:
    """How far a code may lie from its zero point."""
    return torch.div(TOP, group_scales, rounding_mode="floor")


def fit_groups(w: Tensor, channel: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int,
               search: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Group scales and zero points ``[out, groups]`` (None where symmetric) of ``w [out, in]`` below ``channel [out,
    1]``, for ``scales`` and ``zeros`` of one level: the better of the two integers around a scale in squared error
    (weighted by ``importance [in]``), with ``search`` the best of the four."""
    levels, most, half = 2**bits - 1, most_group_scale(bits), 2 ** (bits - 1)
    padding = -w.shape[1] % group_size
    grouped = torch.nn.functional.pad(w, (0, padding)).unflatten(1, (-1, group_size))
    weight = torch.ones_like(w[0]) if importance is None else importance.to(w)
    weight = torch.nn.functional.pad(weight, (0, padding)).view(1, -1, group_size)
    below, best = (scales / channel).floor(), None
    for more in (1, 0, -1, 2) if search else (1, 0):
        scale = (below + more).clamp(1, most)
        step = scale * channel
        zero = None if zeros is None else (zeros * scales / step).round_().clamp_(0, levels)
        codes = (grouped / step[..., None]).round_()
        if zero is None:  # in reach: most_group_scale sees to it
            codes = codes.clamp_(-half, half - 1)
        else:
            least, largest = -torch.minimum(zero, reach(scale)), torch.minimum(levels - zero, reach(scale))
            codes = codes.clamp_(least[..., None], largest[..., None])
        error = (codes.mul_(step[..., None]).sub_(grouped).square_() * weight).sum(-1)
        if best is None:
            best = scale, zero, error
            continue
        better = error < best[2]
        best = tuple(None if old is None else torch.where(better, new, old)
                     for new, old in zip((scale, zero, error), best))
    return best[:2]


def store(group_scales: Tensor, channel: Tensor) -> Tensor:
    """Stored uint8 ``[tiles, groups + 4, 16]`` of ``group_scales [out, groups]`` and ``channel [out, 1]``."""
    from .integer import tile_rows

    rows = tile_rows(channel.float()).squeeze(1)  # [tiles, 16]
    return torch.cat([tile_rows(group_scales.to(torch.uint8)), rows.view(torch.uint8).unflatten(1, (-1, 16))], 1)


def parts(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Group scales uint8 ``[..., groups, 16]`` and channel scales float32 ``[..., 1, 16]`` of stored ones."""
    groups = scales.shape[-2] - CHANNEL_ROWS
    return scales[..., :groups, :], scales[..., groups:, :].flatten(-2).view(torch.float32).unsqueeze(-2)


def expanded(scales: Tensor) -> Tensor:
    """Float32 scales ``[..., groups, 16]`` that say the same as stored ones."""
    groups, channels = parts(scales)
    return groups * channels


def verify(tensors: Mapping[str, Tensor], rows: int, bits: int, group_size: int) -> None:
    """ValueError where stored tensors break what kernels rely on: group scales of the ``rows`` from 1 to
    `most_group_scale`, channel scales positive and finite, and (code - zero point) * group scale within -127 .. 127,
    padding included."""
    from .integer import BLOCK_COLUMNS, untile_rows

    groups, channels = parts(tensors["scales"])
    padded, most = 16 * len(groups), most_group_scale(bits)
    groups, channels = untile_rows(groups, padded).int(), untile_rows(channels, rows)
    real = groups[:rows]
    if not bool(((real >= 1) & (real <= most)).all()):
        raise ValueError(f"group scales: found {int(real.min())} to {int(real.max())}, accepted are 1 to {most}")
    wrong = channels[~((channels > 0) & (channels < float("inf")))]
    if len(wrong):
        raise ValueError(f"channel scales: found {float(wrong[0]):g}, accepted are positive finite numbers")
    zeros = tensors.get("zero_points")
    if zeros is None:  # codes lie at most 2^(bits - 1) from the zero point
        found = int(groups.max()) * 2 ** (bits - 1)
    else:
        # Codes are unpacked where the zero points would let some leave the range: for few tiles, where `fit` chose.
        zeros = untile_rows(zeros, padded).int()
        possible = (torch.maximum(zeros, 2**bits - 1 - zeros) * groups).view(len(tensors["scales"]), -1).amax(1)
        found, tiles = 0, (possible > TOP).nonzero().flatten()
        for some in tiles.split(64) if len(tiles) else ():
            qweight = tensors["qweight"][some]
            blocks = qweight.shape[1]
            codes = ops.int_unpack(qweight, 16 * len(some), BLOCK_COLUMNS * blocks, bits)
            low, high = codes.unflatten(1, (blocks, BLOCK_COLUMNS)).aminmax(dim=-1)
            of = torch.arange(blocks, device=codes.device) * BLOCK_COLUMNS // group_size
            zero, scale = (values.unflatten(0, (-1, 16))[some].flatten(0, 1)[:, of] for values in (zeros, groups))
            far = torch.maximum((low.int() - zero).abs(), (high.int() - zero).abs())
            found = max(found, int((far * scale).max()))
    if found > TOP:
        raise ValueError(f"(code - zero point) * group scale: found a size of {found}, accepted are up to {TOP}")
