"""How a page of the cache is stored, and its pure-torch reference: the truth that kernels are tested against.

The layout is that of ``cpp/cpu/kv_layout.h``; `formats` says how numbers become codes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..op_checks import fail
from .formats import (BITS, E4M3, MAX_FORMATS, PageFormat, Rotary, choose_outliers, dequantize, normal_levels,
                      pack_words, quantize, unpack_words, words)

__all__ = ["BITS", "E4M3", "Layout", "PageFormat", "Rotary", "normal_levels", "reference_attention", "reference_mass"]


@dataclass(frozen=True)
class Layout:
    """Shapes of one layer's pages.

    ``kv_heads``, ``key_dim`` and ``value_dim`` (multiples of 16), ``dtype`` of the model, ``page_tokens`` (a multiple
    of 32 to 256). A page is of a kind: 0 as the model computes, k packed in ``formats[k - 1]``. ``rotary``: packed keys
    are turned back to the position of their page's first slot, so that channels keep still inside a page. ``biased``:
    each slot of a head has a float32 number that is added to its scores.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    page_tokens: int
    formats: tuple[PageFormat, ...] = ()
    rotary: Rotary | None = None
    biased: bool = False

    @classmethod
    def uniform(cls, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, key_bits: int, value_bits: int,
                page_tokens: int, value_group: int) -> Layout:
        """One format: integers, keys per channel, values per token and ``value_group`` channels; none for 16 bits."""
        page = PageFormat(key_bits, value_bits, value_group=value_group)
        return cls(kv_heads, key_dim, value_dim, dtype, page_tokens, (page,) if page.packs else ())

    @property
    def packs(self) -> bool:
        return bool(self.formats)

    @property
    def rank(self) -> int:
        """Whether rows of the table have addresses of segments: the largest rank of a format."""
        return max((page.rank for page in self.formats), default=0)

    def check(self, op: str) -> Layout:
        """Itself; ValueError that names ``op`` for a layout that no kernel takes."""
        for name, dim in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if dim % 16 or not 16 <= dim <= 1024:
                fail(op, name, dim, "a multiple of 16 to 1024")
        if self.kv_heads < 1:
            fail(op, "kv_heads", self.kv_heads, "1 or more")
        if self.page_tokens % 32 or not 32 <= self.page_tokens <= 256:
            fail(op, "page_tokens", self.page_tokens, "a multiple of 32 to 256")
        if len(self.formats) > MAX_FORMATS:
            fail(op, "formats", f"{len(self.formats)} formats", f"at most {MAX_FORMATS}")
        for page in self.formats:
            page.check(op, self.key_dim, self.value_dim, self.page_tokens)
            if page.key_tokens and (page.key_axis != "channel" or page.key_tokens * 2 != self.page_tokens):
                fail(op, "key_tokens", page.key_tokens,
                     f"0, or {self.page_tokens // 2} for keys with a scale for each channel")
        if self.rotary is not None:
            self.rotary.check(op, self.key_dim)
        return self

    # -- as numbers, which operations take ----------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """The layout as the operations take it; inverse frequencies as the bits of their float64."""
        rotary = [] if self.rotary is None else [
            self.rotary.dim, int(self.rotary.interleaved),
            *struct.unpack(f"<{len(self.rotary.inv_freq)}q", struct.pack(f"<{len(self.rotary.inv_freq)}d",
                                                                        *self.rotary.inv_freq))]
        result = [self.kv_heads, self.key_dim, self.value_dim, self.page_tokens, int(self.biased),
                  max(0, len(rotary) - 2), *rotary]
        for page in self.formats:
            result += page.numbers(self.key_dim, self.value_dim)
        return [int(number) for number in result]

    @classmethod
    def of_numbers(cls, op: str, numbers, dtype: torch.dtype) -> Layout:
        """The inverse, checked."""
        return _of_numbers(op, tuple(numbers), dtype)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def format(self, kind: int) -> PageFormat | None:
        return self.formats[kind - 1] if kind else None

    def parts(self, kind: int) -> dict[str, tuple[int, int]]:
        """``{part: (first byte, bytes)}`` of a page for one sequence and one head, and its size as ``"page"``."""
        size, tokens, page = self.dtype.itemsize, self.page_tokens, self.format(kind)
        lengths = {"keys": tokens * self.key_dim * size, "values": tokens * self.value_dim * size}
        if page is not None:
            lengths = {}
            keys, values = page.key_bits < 16, page.value_bits < 16
            count = self.key_dim if page.key_axis == "channel" else self.key_dim // self.key_group(page) * tokens
            lengths["keys"] = tokens // 16 * words(self.key_dim, page.key_bits) * 64 if keys \
                else tokens * self.key_dim * size
            lengths["key_scales"] = count * 2 * keys
            lengths["key_minima"] = count * 2 * (keys and page.key_levels != E4M3)
            count = self.value_dim // self.value_group(page) * tokens
            lengths["values"] = self.value_dim // 16 * words(tokens, page.value_bits) * 64 if values \
                else tokens * self.value_dim * size
            lengths["value_scales"] = count * 2 * values
            lengths["value_minima"] = count * 2 * (values and page.value_levels != E4M3)
            lengths["value_factors"] = self.value_dim * 2 * (values and page.value_axis == "separable")
            lengths["key_rank"] = lengths["value_rank"] = page.rank * tokens * 2
            lengths["key_index"] = lengths["key_delta"] = page.key_outliers * 2
            lengths["value_index"] = lengths["value_delta"] = page.value_outliers * 2
        result, at = {}, 0
        for name, length in lengths.items():
            result[name] = at, length
            at += length
        if self.biased:
            at = -(-at // 4) * 4
            result["bias"] = at, tokens * 4
            at += tokens * 4
        result["page"] = 0, -(-at // 64) * 64
        return result

    def key_group(self, page: PageFormat) -> int:
        return page.key_group or self.key_dim

    def value_group(self, page: PageFormat) -> int:
        return page.value_group or self.value_dim

    def page_bytes(self, kind: int) -> int:
        return self.parts(kind)["page"][1]

    def bits(self, kind: int | None = None) -> float:
        """Stored bits per cached number in a page of ``kind`` (the first format; scales, minima and padding
        counted)."""
        kind = int(self.packs) if kind is None else kind
        return self.page_bytes(kind) * 8 / (self.page_tokens * (self.key_dim + self.value_dim))

    # -- the reference ----------------------------------------------------------------------------------------------

    def decode(self, pages: Tensor, kind: int, dtype: torch.dtype = torch.float64,
               segment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys ``[..., page_tokens, key_dim]`` and values ``[..., page_tokens, value_dim]`` of uint8
        ``[..., page_bytes]``, computed in float64. ``segment`` float16 ``[..., rank, key_dim + value_dim]``."""
        at = {name: pages[..., first:first + length].contiguous()
              for name, (first, length) in self.parts(kind).items()}
        page, tokens = self.format(kind), self.page_tokens
        if page is not None and page.key_bits < 16:
            codes = unpack_words(at["keys"].unflatten(-1, (tokens // 16, -1)), self.key_dim, page.key_bits)
            codes = codes.transpose(-1, -2).flatten(-3, -2)  # [..., tokens, dim]
            keys = dequantize(codes, *(self._key_parameters(at[name], page) for name in ("key_scales", "key_minima")),
                              page.key_levels)
            keys = _add_entries(keys, at["key_index"], at["key_delta"])
            if self.rotary is not None:
                keys = self.rotary.turn(keys, torch.arange(tokens))
        else:
            keys = at["keys"].view(self.dtype).unflatten(-1, (tokens // 16, self.key_dim, 16))
            keys = keys.transpose(-1, -2).flatten(-3, -2).double()
        if page is not None and page.value_bits < 16:
            codes = unpack_words(at["values"].unflatten(-1, (self.value_dim // 16, -1)), tokens, page.value_bits)
            codes = codes.movedim(-3, -2).flatten(-2)  # [..., tokens, dim]
            values = dequantize(codes, *(_of_tokens(at[name], tokens, self.value_group(page))
                                         for name in ("value_scales", "value_minima")), page.value_levels)
            if page.value_axis == "separable":
                values = values * at["value_factors"].view(torch.float16).double().unsqueeze(-2)
            values = _add_entries(values, at["value_index"], at["value_delta"])
        else:
            values = at["values"].view(self.dtype).unflatten(-1, (tokens, self.value_dim)).double()
        if segment is not None and page is not None and page.rank:
            left = [at[name].view(torch.float16).double().unflatten(-1, (page.rank, tokens)).transpose(-1, -2)
                    for name in ("key_rank", "value_rank")]
            right = segment.double().split([self.key_dim, self.value_dim], -1)
            keys, values = keys + left[0] @ right[0], values + left[1] @ right[1]
        return keys.to(dtype), values.to(dtype)

    def decode_bias(self, pages: Tensor, kind: int) -> Tensor:
        """float32 ``[..., page_tokens]``; zeros for a layout without."""
        if not self.biased:
            return torch.zeros((*pages.shape[:-1], self.page_tokens))
        first, length = self.parts(kind)["bias"]
        return pages[..., first:first + length].contiguous().view(torch.float32)

    def encode(self, keys: Tensor, values: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
        """The inverse: ``keys [..., page_tokens, key_dim]``, ``values [..., page_tokens, value_dim]`` and ``bias
        [..., page_tokens]`` (None: 0) to a page."""
        page, parts = self.format(kind), {}
        if page is not None and page.key_bits < 16:
            self._encode_keys(keys.double(), page, parts)
        else:
            parts["keys"] = keys.to(self.dtype).unflatten(-2, (-1, 16)).transpose(-1, -2).flatten(-3)
        if page is not None and page.value_bits < 16:
            self._encode_values(values.double(), page, parts)
        else:
            parts["values"] = values.to(self.dtype).flatten(-2)
        if self.biased:
            parts["bias"] = values.new_zeros(values.shape[:-1], dtype=torch.float32) if bias is None else bias.float()
        result = torch.zeros((*keys.shape[:-2], self.page_bytes(kind)), dtype=torch.uint8)
        for name, part in parts.items():
            first, length = self.parts(kind)[name]
            if length:
                result[..., first:first + length] = part.contiguous().view(torch.uint8)
        return result

    def _encode_keys(self, x: Tensor, page: PageFormat, parts: dict[str, Tensor]) -> None:
        if self.rotary is not None:
            x = self.rotary.turn(x, torch.arange(self.page_tokens), back=True)
        channel = page.key_axis == "channel"
        if channel:
            def back(t):
                return t.transpose(-1, -2)
            vectors = back(x)
        else:
            def back(t):
                return t.unflatten(-2, (self.page_tokens, -1)).flatten(-2)
            vectors = x.unflatten(-1, (-1, self.key_group(page))).flatten(-3, -2)
        removed = choose_outliers(vectors, page.key_outliers, page.key_levels) if page.key_outliers else None
        codes, scales, minima = quantize(vectors, page.key_bits, page.key_levels, removed)
        parts["keys"] = pack_words(back(codes).unflatten(-2, (-1, 16)).transpose(-1, -2), page.key_bits).flatten(-2)
        for name, p in (("key_scales", scales), ("key_minima", minima)):
            if p is not None:
                p = p.squeeze(-1)
                parts[name] = p if channel else p.unflatten(-1, (self.page_tokens, -1)).transpose(-1, -2).flatten(-2)
        if removed is not None:
            dense = dequantize(codes, scales.double(), None if minima is None else minima.double(), page.key_levels)
            parts["key_index"], parts["key_delta"] = _entries(x - back(dense), back(removed), page.key_outliers)

    def _encode_values(self, x: Tensor, page: PageFormat, parts: dict[str, Tensor]) -> None:
        group, factors = self.value_group(page), None
        scaled = x
        if page.value_axis == "separable":
            factors = x.nan_to_num(0, 0, 0).abs().amax(-2, keepdim=True).sqrt().clamp(0, 65504).half()
            parts["value_factors"] = factors.squeeze(-2)
            factors = factors.double()
            scaled = torch.where((factors == 0) & x.isfinite(), 0.0, x / factors)
        vectors = scaled.unflatten(-1, (-1, group)).flatten(-3, -2)

        def back(t):
            return t.unflatten(-2, (self.page_tokens, -1)).flatten(-2)
        removed = choose_outliers(vectors, page.value_outliers, page.value_levels) if page.value_outliers else None
        codes, scales, minima = quantize(vectors, page.value_bits, page.value_levels, removed)
        blocks = back(codes).unflatten(-1, (-1, 16)).movedim(-2, -3)  # [..., dim/16, tokens, 16]
        parts["values"] = pack_words(blocks, page.value_bits).flatten(-2)
        for name, p in (("value_scales", scales), ("value_minima", minima)):
            if p is not None:
                parts[name] = p.squeeze(-1).unflatten(-1, (self.page_tokens, -1)).transpose(-1, -2).flatten(-2)
        if removed is not None:
            dense = dequantize(codes, scales.double(), None if minima is None else minima.double(), page.value_levels)
            dense = back(dense) if factors is None else back(dense) * factors
            parts["value_index"], parts["value_delta"] = _entries(x - dense, back(removed), page.value_outliers)

    def _key_parameters(self, data: Tensor, page: PageFormat) -> Tensor | None:
        if not data.shape[-1]:
            return None
        if page.key_axis == "token":
            return _of_tokens(data, self.page_tokens, self.key_group(page))
        return data.view(torch.float16).double().unsqueeze(-2)


def _of_tokens(data: Tensor, tokens: int, group: int) -> Tensor | None:
    """float16 ``[groups, tokens]`` as float64 ``[tokens, channels]``; None of nothing."""
    if not data.shape[-1]:
        return None
    return data.view(torch.float16).double().unflatten(-1, (-1, tokens)).transpose(-1, -2).repeat_interleave(group, -1)


def _entries(difference: Tensor, removed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices (token * dim + channel, ascending, as the bits of uint16) and float16 differences of what is removed;
    unused entries point to the last number, with a difference of 0."""
    difference, removed = difference.flatten(-2), removed.flatten(-2)
    index = torch.sort(~removed, dim=-1, stable=True).indices[..., :count]
    used = removed.gather(-1, index)
    delta = difference.gather(-1, index).clamp(-65504, 65504).half().masked_fill(~used, 0)
    index = index.masked_fill(~used, removed.shape[-1] - 1)
    return torch.where(index >= 32768, index - 65536, index).to(torch.int16), delta


def _add_entries(x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    if not index.shape[-1]:
        return x
    index = index.view(torch.int16).long() & 0xFFFF
    return x.flatten(-2).scatter_add(-1, index, delta.view(torch.float16).double()).unflatten(-1, x.shape[-2:])


@lru_cache(maxsize=256)
def _of_numbers(op: str, numbers: tuple[int, ...], dtype: torch.dtype) -> Layout:
    pairs = numbers[5] if len(numbers) > 5 else -1
    if pairs < 0 or len(numbers) < 6 + (2 + pairs if pairs else 0):
        fail(op, "layout", list(numbers), "what Layout.numbers() gives")
    kv_heads, key_dim, value_dim, tokens, biased = numbers[:5]
    rotary, rest = None, list(numbers[6:])
    if pairs:
        rotary = Rotary(struct.unpack(f"<{pairs}d", struct.pack(f"<{pairs}q", *rest[2:2 + pairs])), bool(rest[1]))
        rest = rest[2 + pairs:]
    formats = []
    while rest:
        if len(rest) < 10:
            fail(op, "layout", list(numbers), "what Layout.numbers() gives")
        page, rest = PageFormat.of_numbers(rest)
        formats.append(page)
    return Layout(kv_heads, key_dim, value_dim, dtype, tokens, tuple(formats), rotary, bool(biased)).check(op)


def _scores(query: Tensor, keys: Tensor, scale: float, visible: Tensor | None, softcap: float,
            bias: Tensor | None) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    scores = query.double() @ keys.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double().repeat_interleave(group, 1).unsqueeze(2)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None,
                        softcap: float = 0.0, sinks: Tensor | None = None,
                        bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64: ``query [batch, heads, queries, key_dim]``, keys and values ``[batch, kv_heads, tokens,
    dim]``, ``visible`` bool ``[batch, heads or 1, queries, tokens]``, ``sinks [heads]``, ``bias [batch, kv_heads,
    tokens]``. Returns ``[batch, queries, heads, value_dim]`` and the log-sum-exp ``[batch, heads, queries]``; 0 and
    -infinity where nothing is visible."""
    scores = _scores(query, keys, scale, visible, softcap, bias)
    values = values.double().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    total = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:3], -torch.inf)
    weights = torch.where(total.isneginf().unsqueeze(-1), 0.0, (scores - total.unsqueeze(-1)).exp())
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ values).transpose(1, 2), total


def reference_mass(query: Tensor, keys: Tensor, log_sum_exp: Tensor, scale: float, visible: Tensor | None = None,
                   softcap: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """What the queries of a key head's query heads give each token, float64 ``[batch, kv_heads, tokens]``: the sum of
    exp(score - log_sum_exp)."""
    total = log_sum_exp.double().unsqueeze(-1)
    weights = (_scores(query, keys, scale, visible, softcap, bias) - total).exp()
    return torch.where(total.isneginf(), 0.0, weights).unflatten(1, (keys.shape[1], -1)).sum((2, 3))
