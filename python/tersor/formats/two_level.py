"""Two levels of scales: an integer for each group below a float for each channel (QServe, arXiv 2405.04532).

``w = (q - zero_point) * group_scale * channel_scale`` with group scales from 1 to `most_group_scale` (bits), so that
``(q - zero_point) * group_scale`` stays within -127 .. 127: integer products of such weights run over all of a row, and
floats scale them once. Channel scales are float32 with 16 significant bits: every weight is exact in float32.

Stored as one tensor, uint8 ``[tiles, groups + 4, 16]`` (cpp/cpu/int_scales.h): for each tile of 16 rows their group
scales, then in the last 64 bytes their channel scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 127  # the largest size of (q - zero_point) * group_scale
BITS = range(2, 7)  # of codes: with more, group scales would be one or two
CHANNEL_ROWS = 4  # rows of 16 bytes that hold a tile's 16 channel scales
_SHRINKS = (1.0, 0.92, 0.85)  # of the range that channel scales cover, in a search
_STEPS = 12  # group scales tried in a search, a sixteenth of the largest apart
_LEAST, _MOST = 2.0**-100, torch.finfo(torch.float32).max / 256


def most_group_scale(bits: int) -> int:
    """The largest group scale: symmetric codes and the middle code (what padding holds) then need no limit."""
    return TOP // 2 ** (bits - 1)


def channel_scales(ranges: Tensor, largest: Tensor, bits: int, shrink: float = 1.0) -> Tensor:
    """``[out, 1]`` from the ranges ``[out, groups]`` that codes span and the ``largest [out, 1]`` weights: the widest
    group of a row gets the largest group scale, unless products would leave -127 .. 127 then."""
    widest = ranges.amax(1, keepdim=True) / ((2**bits - 1) * most_group_scale(bits))
    found = torch.maximum(widest, largest / TOP) * shrink
    found = found.float().clamp(_LEAST, _MOST).contiguous().view(torch.int32)
    return ((found + 0x80) & ~0xFF).view(torch.float32).to(largest)  # 16 significant bits


def _grouped(w: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``w`` as ``[out, groups, group_size]`` (padded with 0), the lowest of each group, and the range of its codes."""
    grouped = torch.nn.functional.pad(w, (0, -w.shape[1] % group_size)).unflatten(1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    return grouped, low, torch.maximum(-low, high) * 2 if symmetric else high - low


def reach(group_scales: Tensor) -> Tensor:
    """How far a code may lie from its zero point."""
    return torch.div(TOP, group_scales, rounding_mode="floor")


def fit_groups(w: Tensor, channel: Tensor, bits: int, group_size: int, symmetric: bool, search: bool,
               importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Group scales and zero points ``[out, groups]`` of ``w [out, in]`` below ``channel [out, 1]``, and the squared
    error of each group (weighted by ``importance [in]``): the better one of the two group scales around the range's,
    or with ``search`` the best of `_STEPS` down to a third of it."""
    levels, most = 2**bits - 1, most_group_scale(bits)
    grouped, low, ranges = _grouped(w, group_size, symmetric)
    weight = torch.ones_like(w[0]) if importance is None else importance.to(w)
    weight = torch.nn.functional.pad(weight, (0, -w.shape[1] % group_size)).view(1, -1, group_size)
    full = ranges / (levels * channel)
    above = full.ceil().clamp(1, most)
    candidates = [above, full.floor().clamp(1, most)]
    if search:
        candidates += [(above * (1 - step / 16)).round().clamp(min=1) for step in range(1, _STEPS)]
    best = None
    for scale in candidates:
        step = (scale * channel)[..., None]
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / step[..., 0]).round().clamp(0, levels)
        z, limit = zero[..., None], reach(scale)[..., None]
        centred = (grouped / step).round().clamp(torch.maximum(-z, -limit), torch.minimum(levels - z, limit))
        error = (centred.mul_(step).sub_(grouped).square_() * weight).sum(-1)
        if best is None:
            best = scale, zero, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better, new, old) for new, old in zip((scale, zero, error), best))
    return best


def fit(w: Tensor, bits: int, group_size: int, symmetric: bool, search: bool,
        importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Channel scales ``[out, 1]``, group scales and zero points ``[out, groups]`` of ``w [out, in]``. ``search`` also
    tries channel scales for clipped ranges."""
    best, ranges, largest = None, _grouped(w, group_size, symmetric)[2], w.abs().amax(1, keepdim=True)
    for shrink in _SHRINKS if search else _SHRINKS[:1]:
        channel = channel_scales(ranges, largest, bits, shrink)
        scales, zeros, error = fit_groups(w, channel, bits, group_size, symmetric, search, importance)
        found = channel, scales, zeros, error.sum(1, keepdim=True)
        if best is None:
            best = found
        else:
            better = found[3] < best[3]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
    return best[:3]


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
