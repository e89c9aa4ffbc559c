"""How a page of the cache is stored, and its pure-torch reference: the truth that kernels are tested against.

The layout is that of ``cpp/cpu/kv_layout.h``. Keys are integers per channel over the tokens of a page, values are
integers per token over groups of channels, both with a float16 scale and minimum (asymmetric, as in KIVI,
arXiv 2402.02750, and KVQuant, arXiv 2401.18079).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Layout:
    """Shapes of one layer's pages.

    ``kv_heads``, ``key_dim`` and ``value_dim`` (multiples of 16), ``dtype`` of the model; ``key_bits`` and
    ``value_bits`` (2, 3, 4, 8, or 16: as the model computes); ``page_tokens`` (a multiple of 32 to 256: the tokens of a
    page and the group of a key's scale); ``value_group``: channels that share a value's scale.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    key_bits: int
    value_bits: int
    page_tokens: int
    value_group: int

    @property
    def packs(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16

    def numbers(self) -> list[int]:
        """The layout as the operations take it."""
        return [self.kv_heads, self.key_dim, self.value_dim, self.key_bits, self.value_bits, self.page_tokens,
                self.value_group]

    def parts(self, packed: bool) -> dict[str, tuple[int, int]]:
        """``{part: (first byte, bytes)}`` of a page for one sequence and one head, and its size as ``"page"``."""
        size, tokens = self.dtype.itemsize, self.page_tokens
        keys, values = packed and self.key_bits < 16, packed and self.value_bits < 16
        lengths = {
            "keys": tokens // 16 * words(self.key_dim, self.key_bits) * 64 if keys else tokens * self.key_dim * size,
            "key_scales": self.key_dim * 2 * keys, "key_minima": self.key_dim * 2 * keys,
            "values": self.value_dim // 16 * words(tokens, self.value_bits) * 64 if values
            else tokens * self.value_dim * size,
            "value_scales": self.value_dim // self.value_group * tokens * 2 * values,
            "value_minima": self.value_dim // self.value_group * tokens * 2 * values,
        }
        result, at = {}, 0
        for name, length in lengths.items():
            result[name] = at, length
            at += length
        result["page"] = 0, -(-at // 64) * 64
        return result

    def page_bytes(self, packed: bool) -> int:
        return self.parts(packed)["page"][1]

    def bits(self) -> float:
        """Stored bits per cached number in a packed page (scales, minima and padding counted)."""
        return self.page_bytes(self.packs) * 8 / (self.page_tokens * (self.key_dim + self.value_dim))

    # -- the reference ----------------------------------------------------------------------------------------------

    def decode(self, pages: Tensor, packed: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Keys ``[..., page_tokens, key_dim]`` and values ``[..., page_tokens, value_dim]`` of uint8
        ``[..., page_bytes]``."""
        at = {name: pages[..., first:first + length].contiguous()
              for name, (first, length) in self.parts(packed).items()}
        tokens = self.page_tokens
        if packed and self.key_bits < 16:
            codes = unpack_words(at["keys"].unflatten(-1, (tokens // 16, -1)), self.key_dim, self.key_bits)
            codes = codes.transpose(-1, -2).flatten(-3, -2).to(dtype)  # [..., tokens, dim]
            scales, minima = (at[n].view(torch.float16).to(dtype).unsqueeze(-2) for n in ("key_scales", "key_minima"))
            keys = codes * scales + minima
        else:
            keys = at["keys"].view(self.dtype).unflatten(-1, (tokens // 16, self.key_dim, 16))
            keys = keys.transpose(-1, -2).flatten(-3, -2).to(dtype)
        if packed and self.value_bits < 16:
            codes = unpack_words(at["values"].unflatten(-1, (self.value_dim // 16, -1)), tokens, self.value_bits)
            codes = codes.movedim(-3, -2).flatten(-2).to(dtype)  # [..., tokens, dim]
            scales, minima = (
                at[n].view(torch.float16).unflatten(-1, (-1, tokens)).transpose(-1, -2)
                .repeat_interleave(self.value_group, -1).to(dtype) for n in ("value_scales", "value_minima"))
            values = codes * scales + minima
        else:
            values = at["values"].view(self.dtype).unflatten(-1, (tokens, self.value_dim)).to(dtype)
        return keys, values

    def encode(self, keys: Tensor, values: Tensor, packed: bool) -> Tensor:
        """The inverse: ``keys [..., page_tokens, key_dim]``, ``values [..., page_tokens, value_dim]`` to a page."""
        parts = []
        if packed and self.key_bits < 16:
            codes, scales, minima = quantize(keys.transpose(-1, -2), self.key_bits)  # [..., dim, tokens]
            parts += [pack_words(codes.unflatten(-1, (-1, 16)).movedim(-2, -3), self.key_bits).flatten(-2),
                      scales.squeeze(-1).view(torch.uint8), minima.squeeze(-1).view(torch.uint8)]
        else:
            tiles = keys.to(self.dtype).unflatten(-2, (-1, 16)).transpose(-1, -2)
            parts.append(tiles.flatten(-3).contiguous().view(torch.uint8))
        if packed and self.value_bits < 16:
            codes, scales, minima = quantize(values.unflatten(-1, (-1, self.value_group)), self.value_bits)
            blocks = codes.flatten(-2).unflatten(-1, (-1, 16)).movedim(-2, -3)  # [..., dim/16, tokens, 16]
            parts += [pack_words(blocks, self.value_bits).flatten(-2)]
            parts += [p.squeeze(-1).transpose(-1, -2).flatten(-2).contiguous().view(torch.uint8)
                      for p in (scales, minima)]
        else:
            parts.append(values.to(self.dtype).contiguous().flatten(-2).view(torch.uint8))
        page = torch.cat(parts, -1)
        return torch.nn.functional.pad(page, (0, self.page_bytes(packed) - page.shape[-1]))


def words(depth: int, bits: int) -> int:
    """Words of 32 bits that hold ``depth`` codes of one lane."""
    return depth // 16 + -(-depth // 32) if bits == 3 else depth * bits // 32


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), and float16 scales and minima of the groups along the last dimension (kept as 1). The minimum is
    rounded down and the scale up, so that the codes cover the group; a group that is not finite has a NaN scale."""
    levels, wide = 2**bits - 1, x.double()
    finite = wide.isfinite().all(-1, keepdim=True)
    low = wide.nan_to_num(0, 0, 0).amin(-1, keepdim=True).clamp(-65504, 65504)
    high = wide.nan_to_num(0, 0, 0).amax(-1, keepdim=True)
    minima = round_toward(low, -float("inf"))
    step = ((high - minima.double()) / levels).clamp(0, 65504)
    scales = round_toward(step, float("inf"))
    codes = (wide - minima.double()) / scales.double().masked_fill(scales == 0, float("inf"))
    codes = (codes.nan_to_num(0) + 0.5).floor().clamp(0, levels).to(torch.uint8)
    return codes, scales.masked_fill(~finite, float("nan")), minima.masked_fill(~finite, 0)


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


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None,
                        softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64: ``query [batch, heads, queries, key_dim]``, keys and values ``[batch, kv_heads, tokens,
    dim]``, ``visible`` bool ``[batch, heads or 1, queries, tokens]``, ``sinks [heads]``. Returns
    ``[batch, queries, heads, value_dim]`` and the log-sum-exp ``[batch, heads, queries]``; 0 and -infinity where
    nothing is visible."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    total = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:3], -torch.inf)
    weights = torch.where(total.isneginf().unsqueeze(-1), 0.0, (scores - total.unsqueeze(-1)).exp())
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ values).transpose(1, 2), total
