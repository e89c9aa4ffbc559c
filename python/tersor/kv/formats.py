"""Formats of packed pages, and how numbers become codes: the reference, in float64, that kernels are tested against.

A vector is what shares one scale: a channel of keys over the tokens of a page, or a token's channels of one group.
Codes are integers between the vector's extremes (asymmetric, as in KIVI, arXiv 2402.02750), levels of the layer's own
between them (non-uniform, as in KVQuant, arXiv 2401.18079), or float8 e4m3 of the vector's largest magnitude.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..op_checks import fail
from .rotary import Rotary

BITS = (2, 3, 4, 8, 16)
E4M3 = "e4m3"
MAX_OUTLIERS, MAX_RANK, MAX_FORMATS = 8192, 16, 8
UNIFORM, LEVELS, FLOAT8 = range(3)  # enum tersor_kv_coding


@dataclass(frozen=True)
class PageFormat:
    """How the numbers of a packed page are stored.

    ``key_bits``, ``value_bits``: 2, 3, 4, 8, or 16 for as the model computes. ``key_axis``: ``"channel"`` (a scale for
    each channel over the page's tokens, or every ``key_tokens`` of them: CUDA alone) or ``"token"`` (a scale for each
    token and ``key_group`` channels; 0: all, as in QServe, arXiv 2405.04532). ``value_axis``: ``"token"`` (a scale for
    each token and ``value_group`` channels; 0: all) or ``"separable"`` (values are divided by sqrt(max |x|) of their
    channel in the page, then have one scale a token: ZipCache, arXiv 2405.14256). ``key_levels``, ``value_levels``:
    None (uniform), ascending int8 levels, as many as codes: -127 stands for a vector's smallest number, 127 for its
    largest, or ``"e4m3"`` (8 bits). ``key_outliers``, ``value_outliers``: numbers of a page and head whose difference
    to their code is stored apart in float16. ``rank``: of a residual, 0 to 16, that `Pages.set_segment` attaches (GEAR,
    arXiv 2403.05527).
    """

    key_bits: int
    value_bits: int
    key_axis: str = "channel"
    key_group: int = 0
    value_axis: str = "token"
    value_group: int = 0
    key_levels: tuple[int, ...] | str | None = None
    value_levels: tuple[int, ...] | str | None = None
    key_outliers: int = 0
    value_outliers: int = 0
    rank: int = 0
    key_tokens: int = 0

    @property
    def packs(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16

    def numbers(self, key_dim: int, value_dim: int) -> list[int]:
        """The fields of ``tersor_kv_format``, then the levels of keys and of values where they are given."""
        tables = [levels for levels in (self.key_levels, self.value_levels) if isinstance(levels, tuple)]
        return [self.key_bits, self.value_bits, (self.key_group or key_dim) * (self.key_axis == "token"),
                self.value_group or value_dim, self.value_axis == "separable", coding(self.key_levels),
                coding(self.value_levels), self.key_outliers, self.value_outliers, self.rank,
                *(level for table in tables for level in table)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> tuple[PageFormat, list[int]]:
        """The inverse, and what is left of ``numbers``."""
        fields, rest = numbers[:10], numbers[10:]
        tables = []
        for bits, code in ((fields[0], fields[5]), (fields[1], fields[6])):
            count = 2**bits if code == LEVELS and 0 <= bits <= 8 else 0
            tables.append((None, tuple(rest[:count]), E4M3)[code] if 0 <= code <= 2 else "")
            rest = rest[count:]
        key_bits, value_bits, key_group, value_group, separable, _, _, key_outliers, value_outliers, rank = fields
        return cls(key_bits, value_bits, "token" if key_group else "channel", key_group,
                   "separable" if separable else "token", 0 if separable else value_group, *tables, key_outliers,
                   value_outliers, rank), rest

    def check(self, op: str, key_dim: int, value_dim: int, tokens: int) -> None:
        """ValueError that names ``op`` and the field no kernel takes."""
        for name, axis, axes in (("key_axis", self.key_axis, ("channel", "token")),
                                 ("value_axis", self.value_axis, ("token", "separable"))):
            if axis not in axes:
                fail(op, name, repr(axis), " or ".join(axes))
        if self.key_group and self.key_axis == "channel":
            fail(op, "key_group", self.key_group, "0 for keys with a scale for each channel")
        if self.value_group and self.value_axis == "separable":
            fail(op, "value_group", self.value_group, "0 for separable values")
        for part, bits, dim, group, levels, outliers in (
                ("key", self.key_bits, key_dim, self.key_group, self.key_levels, self.key_outliers),
                ("value", self.value_bits, value_dim, self.value_group, self.value_levels, self.value_outliers)):
            if bits not in BITS:
                fail(op, f"{part}_bits", bits, ", ".join(map(str, BITS)))
            if group < 0 or group % 16 or group and dim % group:
                fail(op, f"{part}_group", group, f"a multiple of 16 that divides {part}_dim = {dim}, or 0 for all")
            if isinstance(levels, tuple):
                if bits > 4 or len(levels) != 2**bits or any(type(x) is not int or abs(x) > 127 for x in levels) \
                        or any(a >= b for a, b in zip(levels, levels[1:])):
                    fail(op, f"{part}_levels", levels, "2**bits ascending integers of -127 to 127, for 2 to 4 bits")
            elif levels is not None and (levels != E4M3 or bits != 8):
                fail(op, f"{part}_levels", f"{levels!r} of {bits} bits", f"None, a tuple of integers, or {E4M3!r} of 8")
            if not 0 <= outliers <= MAX_OUTLIERS or outliers and (bits == 16 or tokens * dim > 65536):
                fail(op, f"{part}_outliers", f"{outliers} of {tokens} x {dim} numbers of {bits} bits",
                     f"0 to {MAX_OUTLIERS} of at most 65536 packed numbers")
        if not 0 <= self.rank <= MAX_RANK:
            fail(op, "rank", self.rank, f"0 to {MAX_RANK}")


@lru_cache(maxsize=64)
def rotary_table(rotary: Rotary, tokens: int) -> Tensor:
    """float32 ``[tokens/16, pairs, 2, 16]``: cosines and sines for the 16 tokens of a tile, as kernels read them."""
    angles = torch.arange(tokens, dtype=torch.float64).view(-1, 1, 16) * torch.tensor(
        rotary.inv_freq, dtype=torch.float64).view(1, -1, 1)
    return torch.stack((angles.cos(), angles.sin()), 2).float().contiguous()


def coding(levels) -> int:
    return UNIFORM if levels is None else FLOAT8 if levels == E4M3 else LEVELS


@lru_cache(maxsize=64)
def normal_levels(bits: int, length: int = 64, outliers: float = 0.0) -> tuple[int, ...]:
    """Levels of least squared error (Lloyd-Max) for vectors of ``length`` numbers of a normal distribution, of which
    the share ``outliers`` is stored apart: -127 and 127 are where the largest number then lies on average."""
    normal, half = statistics.NormalDist(), 2**(bits - 1)
    end = normal.inv_cdf(max(0.75, (length * (1 - outliers) - 0.375) / (length + 0.25)))
    levels = [end * (i + 0.5) / half for i in range(half)]  # of the upper half; the lower one mirrors it
    for _ in range(500):
        borders = [0.0, *((a + b) / 2 for a, b in zip(levels, levels[1:])), end]
        levels = [(normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
                  for low, high in zip(borders, borders[1:])]
    upper = [round(level / end * 127) for level in levels]
    return (*(-level for level in reversed(upper)), *upper)


def positions(levels: tuple[int, ...]) -> Tensor:
    """Levels in units of a vector's scale above its minimum: -127 is 0, 127 is 2**bits - 1."""
    return (torch.tensor(levels, dtype=torch.float64) + 127) * ((len(levels) - 1) / 254)


def quantize(x: Tensor, bits: int, levels=None, removed: Tensor | None = None) \
        -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (uint8), and float16 scales and minima (none for e4m3) of the vectors along the last dimension (kept as 1).
    The minimum is rounded down and the scale up, so that the codes cover what is not ``removed``; a vector that is not
    finite has a NaN scale."""
    wide = x.double()
    finite = wide.isfinite().all(-1, keepdim=True)
    low, high = _extremes(wide.nan_to_num(0, 0, 0), removed)
    if levels == E4M3:
        scales = round_toward((torch.maximum(-low, high) / 448).clamp(0, 65504), float("inf"))
        quotient = (wide / scales.double().masked_fill(scales == 0, float("inf"))).nan_to_num(0)
        codes = quotient.clamp(-448, 448).float().to(torch.float8_e4m3fn).view(torch.uint8)
        return codes, scales.masked_fill(~finite, float("nan")), None
    top = 2**bits - 1
    minima = round_toward(low.clamp(-65504, 65504), -float("inf"))
    scales = round_toward(((high - minima.double()) / top).clamp(0, 65504), float("inf"))
    units = (wide - minima.double()) / scales.double().masked_fill(scales == 0, float("inf"))
    units = units.nan_to_num(0)
    if levels is None:
        codes = (units + 0.5).floor().clamp(0, top).to(torch.uint8)
    else:
        table = positions(levels)
        codes = torch.bucketize(units.contiguous(), (table[1:] + table[:-1]) / 2, right=True).to(torch.uint8)
    return codes, scales.masked_fill(~finite, float("nan")), minima.masked_fill(~finite, 0)


def dequantize(codes: Tensor, scales: Tensor, minima: Tensor | None, levels=None) -> Tensor:
    """The numbers that codes stand for, in the dtype of ``scales``."""
    if levels == E4M3:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).to(scales.dtype) * scales
    units = codes if levels is None else positions(levels)[codes.long()]
    return units.to(scales.dtype) * scales + minima


def _extremes(x: Tensor, removed: Tensor | None) -> tuple[Tensor, Tensor]:
    if removed is None:
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low = x.masked_fill(removed, math.inf).amin(-1, keepdim=True)
    high = x.masked_fill(removed, -math.inf).amax(-1, keepdim=True)
    return low.masked_fill(low == math.inf, 0), high.masked_fill(high == -math.inf, 0)


def choose_outliers(x: Tensor, count: int, levels=None) -> Tensor:
    """Up to ``count`` numbers of ``x [..., vectors, length]`` without which ranges shrink most, as a mask: again and
    again the largest or the smallest number of the vector whose squared range falls most (of the first of several)."""
    wide = x.double()
    finite = wide.isfinite().all(-1)
    wide = wide.nan_to_num(0, 0, 0)
    measure = wide.abs() if levels == E4M3 else wide
    shape, (vectors, length) = x.shape, x.shape[-2:]
    measure, finite = measure.reshape(-1, vectors, length), finite.reshape(-1, vectors)
    removed = torch.zeros(measure.shape, dtype=torch.bool)
    pages = torch.arange(len(measure))
    for _ in range(count):
        left = length - removed.sum(-1)
        highs, high_at = measure.masked_fill(removed, -math.inf).topk(2, -1)
        lows, low_at = measure.masked_fill(removed, math.inf).topk(2, -1, largest=False)
        if levels == E4M3:
            lows = torch.zeros_like(lows)
        span = highs[..., 0] - lows[..., 0]
        without_high, without_low = highs[..., 1] - lows[..., 0], highs[..., 0] - lows[..., 1]
        top = (without_high <= without_low) | (levels == E4M3)
        after = torch.where(top, without_high, without_low)
        gain = (span - after) * (span + after)
        gain = torch.where((left > 1) & finite, gain, -1.0)
        best = gain.argmax(-1)
        worth = gain[pages, best] > 0
        at = torch.where(top, high_at[..., 0], low_at[..., 0])[pages, best]
        removed[pages[worth], best[worth], at[worth]] = True
    return removed.view(shape)


def round_toward(x: Tensor, limit: float) -> Tensor:
    """float16 values at or beyond ``x`` on the side of ``limit`` (an infinity)."""
    near = x.half()
    wrong = near.double() > x if limit < 0 else near.double() < x
    return torch.where(wrong, torch.nextafter(near, torch.full_like(near, limit)), near)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., depth, 16 lanes]`` to bytes ``[..., 64 * words]``."""
    low = 2 if bits == 3 else bits
    planes = [_plane(codes.long() & (1 << low) - 1, low)]
    if bits == 3:
        planes.append(_plane(torch.nn.functional.pad(codes.long() >> 2, (0, 0, 0, -codes.shape[-2] % 32)), 1))
    return torch.cat(planes, -2).to(torch.int32).contiguous().flatten(-2).view(torch.uint8)


def _plane(codes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits).view(-1, 1)
    words = (codes.unflatten(-2, (-1, 32 // bits)) << shifts).sum(-2)
    return torch.where(words >= 2**31, words - 2**32, words)


def unpack_words(data: Tensor, depth: int, bits: int) -> Tensor:
    """Bytes ``[..., 64 * words]`` to codes ``[..., depth, 16 lanes]`` as int64."""
    lanes = (data.contiguous().view(torch.int32).long() & 0xFFFFFFFF).unflatten(-1, (-1, 16))
    if bits != 3:
        return _codes(lanes, bits)
    low, high = lanes.split([depth // 16, -(-depth // 32)], -2)
    return _codes(low, 2) + 4 * _codes(high, 1)[..., :depth, :]


def _codes(lanes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits).view(-1, 1)
    return (lanes.unsqueeze(-2) >> shifts & (1 << bits) - 1).flatten(-3, -2)


def words(depth: int, bits: int) -> int:
    """Words of 32 bits that hold ``depth`` codes of one lane."""
    return depth // 16 + -(-depth // 32) if bits == 3 else depth * bits // 32
