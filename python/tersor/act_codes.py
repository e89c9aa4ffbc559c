"""Low-bit activations as the CUDA kernels store them (cuda/tile/act_codes.h): the definition, in torch.

Producers round activations into this layout, the integer GEMM reads it. Channels are padded with zero codes to
``K = 128 * ceil(in / 128)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_CHANNELS = 128  # channels are padded to it; mixed widths change at its multiples
SUM_CHANNELS = 32
_BYTES = (0, 4, 1, 5, 2, 6, 3, 7)  # the channel of each byte of eight
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel of each nibble of eight, from bit 0


def padded_channels(in_features: int) -> int:
    return -(-in_features // BLOCK_CHANNELS) * BLOCK_CHANNELS


def row_bytes(in_features: int, width: int, block_bits: Tensor | None = None) -> int:
    """Bytes of a token: of codes of ``width`` 8 or 4 bits, or of blocks of 128 channels of ``block_bits``."""
    if block_bits is not None:
        return int((block_bits.to(torch.int64) * (BLOCK_CHANNELS // 8)).sum())
    return padded_channels(in_features) * width // 8


def stored_width(act_bits: int, bits: int, capability: tuple[int, int], act_group: int = 32, group_size: int = 0,
                 act_sym: bool = True, two_level: bool = False) -> int:
    """Bits in which a code is stored: 4 where the product is taken by 4-bit matrix instructions, else 8.

    Those exist on compute capability 8.0 to 8.9 (later GPUs run them as many others), take 4-bit weights and multiply
    64 channels at a time: groups of either side are multiples of 64 or whole. Codes that are not symmetric are stored
    less their zero point and need 8 bits; weights in two levels of scales become bytes, and take them. Mixed 4- and
    8-bit blocks are stored as such under the same conditions, with ``act_bits=4``, and in 8 bits throughout elsewhere.
    """
    native = (8, 0) <= tuple(capability) < (9, 0)
    fits = act_bits == 4 and bits == 4 and act_sym and not two_level and act_group % 64 == 0 and group_size % 64 == 0
    return 4 if native and fits else 8


def pack_codes(values: Tensor, width: int, block_bits: Tensor | None = None) -> Tensor:
    """Integers ``values [m, in]`` (any dtype) to stored codes: uint8 ``[m, row_bytes]``.

    ``block_bits`` uint8 ``[ceil(in / 128)]``, 4 or 8, gives each 128 channels a width of their own.
    """
    m, k = values.shape
    padded = torch.nn.functional.pad(values.to(torch.int16), (0, padded_channels(k) - k))
    if block_bits is None:
        return _pack(padded, width)
    blocks = padded.unflatten(1, (-1, BLOCK_CHANNELS)).unbind(1)
    return torch.cat([_pack(block, int(wide)) for block, wide in zip(blocks, block_bits.tolist())], dim=1)


def _pack(values: Tensor, width: int) -> Tensor:
    eights = values.unflatten(1, (-1, 8))
    if width == 8:
        return (eights[..., list(_BYTES)] & 255).to(torch.uint8).flatten(1)
    nibbles = (eights[..., list(_NIBBLES)] & 15).unflatten(-1, (4, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8).flatten(1)


def unpack_codes(codes: Tensor, in_features: int, width: int, block_bits: Tensor | None = None) -> Tensor:
    """`pack_codes` undone: int16 ``[m, in]``."""
    if block_bits is None:
        return _unpack(codes, width)[:, :in_features]
    sizes = [BLOCK_CHANNELS * int(wide) // 8 for wide in block_bits.tolist()]
    parts = [_unpack(part, size * 8 // BLOCK_CHANNELS) for part, size in zip(codes.split(sizes, dim=1), sizes)]
    return torch.cat(parts, dim=1)[:, :in_features]


def _unpack(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        stored, order = codes.to(torch.int16), _BYTES
    else:
        wide = codes.to(torch.int16)
        stored, order = torch.stack([wide & 15, wide >> 4], dim=-1).flatten(1), _NIBBLES
    half = 2 ** (width - 1)
    signed = (stored ^ half) - half
    values = torch.empty_like(signed).unflatten(1, (-1, 8))
    values[..., list(order)] = signed.unflatten(1, (-1, 8))
    return values.flatten(1)


def code_sums(values: Tensor) -> Tensor:
    """Sums of each 32 channels of ``values [m, in]``: int16 ``[m, K / 32]``."""
    padded = torch.nn.functional.pad(values.to(torch.int32), (0, padded_channels(values.shape[1]) - values.shape[1]))
    return padded.unflatten(1, (-1, SUM_CHANNELS)).sum(-1).to(torch.int16)
