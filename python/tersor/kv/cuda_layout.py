"""How the CUDA kernels store a page of the cache, and its pure-torch reference: the truth that they are tested against.

The layout is that of ``cuda/tile/kv_layout.h``: 64 tokens in the order of the fragments of ``mma.m16n8k16``, so that
what a lane unpacks is an operand. The numbers are those of `tersor.kv.layout`: keys are integers per channel over the tokens
of a page, values per token over a group of channels, both with a float16 scale and minimum.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .layout import quantize

TOKENS = 64
DIMS = (64, 80, 96, 128, 256)
BITS = (2, 3, 4, 8, 16)
_RECORD = 16  # channels


def value_group(dim: int) -> int:
    """Channels that share the scale of a value: 64, or all of 80 and 96."""
    return 64 if dim % 64 == 0 else dim


def key_bytes(dim: int, bits: int) -> int:
    """Of a page's keys, of one head: records of 16 channels, each with its parameters."""
    return dim // _RECORD * (128 * bits + (64 if bits < 16 else 0))


def value_bytes(dim: int, bits: int) -> int:
    return dim // _RECORD * 128 * bits + (dim // value_group(dim) * 256 if bits < 16 else 0)


def page_bytes(dim: int, key_bits: int, value_bits: int) -> int:
    """Bytes of a page for one sequence and one head."""
    return key_bytes(dim, key_bits) + value_bytes(dim, value_bits)


@cache
def _places(values: bool) -> Tensor:
    """int64 ``[32 lanes, 16 pairs, 2]``: which of a record's numbers ``[64 tokens, 16 channels]`` a lane holds where."""
    lane, pair, two = torch.meshgrid(torch.arange(32), torch.arange(16), torch.arange(2), indexing="ij")
    g, t = lane // 4, lane % 4
    if values:
        token, channel = 16 * (pair // 4) + 8 * (pair % 2) + 2 * t + two, 8 * (pair // 2 % 2) + g
    else:
        token, channel = 8 * (pair // 2) + g, 4 * t + 2 * (pair % 2) + two
    return token * _RECORD + channel


def _to_lanes(x: Tensor, values: bool) -> Tensor:
    """``[..., 64, dim]`` to ``[..., records, 32, 16, 2]``."""
    records = x.unflatten(-1, (-1, _RECORD)).movedim(-2, -3).flatten(-2)
    return records[..., _places(values)]


def _from_lanes(x: Tensor, values: bool) -> Tensor:
    records = torch.empty_like(x).flatten(-3)
    records[..., _places(values).flatten()] = x.flatten(-3)
    return records.unflatten(-1, (TOKENS, _RECORD)).movedim(-3, -2).flatten(-2)


def _plane(codes: Tensor, width: int) -> Tensor:
    """Words ``[..., 32, width]`` of codes ``[..., 32, 16, 2]``: pairs from the lowest bits on, their halves 16 apart."""
    shifts = torch.arange(16) * width % 16
    halves = (codes.long() << shifts.view(-1, 1)).unflatten(-2, (width, -1)).sum(-2)
    words = halves[..., 0] | halves[..., 1] << 16
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unplane(words: Tensor, width: int) -> Tensor:
    shifts = torch.arange(16) * width % 16
    pairs = (words.long() & 0xFFFFFFFF).repeat_interleave(16 // width, -1)
    return torch.stack([pairs >> shifts + 16 * two & (1 << width) - 1 for two in (0, 1)], -1)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 32, 16, 2]`` to bytes ``[..., 128 * bits]``."""
    if bits == 3:
        parts = [_plane(codes.long() & 3, 2), _plane(codes.long() >> 2, 1)]
    else:
        words = _plane(codes ^ 128 if bits == 8 else codes, bits)
        parts = [words.unflatten(-1, (-1, min(bits, 4))).movedim(-2, -3)]
    return torch.cat([part.contiguous().flatten(codes.dim() - 3) for part in parts], -1).view(torch.uint8)


def _unpack_codes(data: Tensor, bits: int) -> Tensor:
    words = data.contiguous().view(torch.int32)
    if bits == 3:
        low, high = words[..., :64].unflatten(-1, (32, 2)), words[..., 64:].unflatten(-1, (32, 1))
        return _unplane(low, 2) + 4 * _unplane(high, 1)
    chunks = words.unflatten(-1, (-1, 32, min(bits, 4))).movedim(-3, -2).flatten(-2)
    codes = _unplane(chunks, bits)
    return codes ^ 128 if bits == 8 else codes


def _halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of numbers as they are."""
    return x.to(dtype).contiguous().view(torch.uint8)


def encode(keys: Tensor, values: Tensor, key_bits: int, value_bits: int) -> Tensor:
    """``[..., 64, dim]`` keys and values of one 16-bit dtype to uint8 ``[..., page_bytes]``; 16 bits: as they are."""
    dim, parts = keys.shape[-1], []
    if key_bits == 16:
        parts.append(_raw(keys, False))
    else:
        codes, scales, minima = quantize(keys.transpose(-1, -2), key_bits)  # [..., dim, 64], [..., dim, 1]
        four = [p.squeeze(-1).unflatten(-1, (-1, 4, 4)) for p in (scales, minima)]
        parameters = torch.cat(four, -1).flatten(-2).contiguous().view(torch.uint8)
        records = torch.cat((parameters, _pack_codes(_to_lanes(codes.transpose(-1, -2), False), key_bits)), -1)
        parts.append(records.flatten(-2))
    if value_bits == 16:
        parts.append(_raw(values, True))
    else:
        codes, scales, minima = quantize(values.unflatten(-1, (-1, value_group(dim))), value_bits)
        packed = _pack_codes(_to_lanes(codes.flatten(-2), True), value_bits)  # [..., records, bytes]
        groups = packed.unflatten(-2, (dim // value_group(dim), -1)).flatten(-2)
        # Of [..., 64, groups, 1]: tokens 8j + 2t + e in the order of t, j, e.
        parameters = [_halves(p.squeeze(-1).transpose(-1, -2).unflatten(-1, (8, 4, 2)).transpose(-2, -3).flatten(-3),
                              torch.float16) for p in (scales, minima)]
        parts.append(torch.cat((*parameters, groups), -1).flatten(-2))
    return torch.cat(parts, -1)


def _raw(x: Tensor, values: bool) -> Tensor:
    lanes = _to_lanes(x, values).unflatten(-2, (4, 4)).movedim(-3, -4)
    return _halves(lanes, x.dtype).flatten(x.dim() - 2)


def decode(pages: Tensor, dim: int, key_bits: int, value_bits: int, raw: torch.dtype,
           dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Keys and values ``[..., 64, dim]`` of uint8 ``[..., page_bytes]``; ``raw``: the dtype of what has 16 bits."""
    length = key_bytes(dim, key_bits)
    key_part, value_part = pages[..., :length], pages[..., length : page_bytes(dim, key_bits, value_bits)]
    if key_bits == 16:
        keys = _unraw(key_part, dim, False, raw, dtype)
    else:
        records = key_part.unflatten(-1, (dim // _RECORD, -1))
        four = records[..., :64].contiguous().view(torch.float16).unflatten(-1, (4, 2, 4)).to(dtype)
        scales, minima = (four[..., i, :].flatten(-3).unsqueeze(-2) for i in (0, 1))
        keys = _from_lanes(_unpack_codes(records[..., 64:], key_bits), False).to(dtype) * scales + minima
    if value_bits == 16:
        return keys, _unraw(value_part, dim, True, raw, dtype)
    groups = dim // value_group(dim)
    groups_data = value_part.unflatten(-1, (groups, -1))
    scales, minima = (
        groups_data[..., at : at + 128].contiguous().view(torch.float16).unflatten(-1, (4, 8, 2)).transpose(-2, -3)
        .flatten(-3).transpose(-1, -2).repeat_interleave(value_group(dim), -1).to(dtype) for at in (0, 128))
    codes = groups_data[..., 256:].unflatten(-1, (value_group(dim) // _RECORD, -1)).flatten(-3, -2)
    return keys, _from_lanes(_unpack_codes(codes, value_bits), True).to(dtype) * scales + minima


def _unraw(data: Tensor, dim: int, values: bool, raw: torch.dtype, dtype: torch.dtype) -> Tensor:
    lanes = data.contiguous().view(raw).unflatten(-1, (dim // _RECORD, 4, 32, 4, 2)).movedim(-4, -3).flatten(-3, -2)
    return _from_lanes(lanes.to(dtype), values)
