"""How the CUDA kernels store a page of the cache, and its pure-torch reference: the truth that they are tested against.

The layout is that of ``cuda/tile/kv_layout.h``: 64 tokens in the order of the fragments of ``mma.m16n8k16``, so that
what a lane unpacks is an operand. The numbers are those of `tersor.kv.layout`: keys are integers per channel over the
tokens of a page, or of each half of it, values per token over a group of channels, both with a float16 scale and
minimum.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from ..op_checks import fail
from .formats import E4M3, PageFormat, choose_outliers, coding, dequantize, quantize
from .layout import Layout

TOKENS = 64
DIMS = (64, 80, 96, 128, 256)
BITS = (2, 3, 4, 8, 16)
FORMAT_NUMBERS = 11  # int64 of a tersor_cuda_kv_format
_RECORD = 16  # channels


def value_group(dim: int) -> int:
    """Channels that share the scale of a value: 64, or all of 80 and 96."""
    return 64 if dim % 64 == 0 else dim


def value_groups(dim: int, bits: int) -> list[int]:
    """Channels that may share the scale of a value: whole units of the kernels' stream, or whole parts of one."""
    least = {80: 16, 96: 48, 256: 64}.get(dim, 32)
    found = [group for group in range(least, dim + 1, least) if dim % group == 0]
    return [group for group in found if (dim, bits, group) != (96, 8, 48)]


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
    """int64 ``[32 lanes, 16 pairs, 2]``: where a lane holds a record's numbers ``[64 tokens, 16 channels]``."""
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
    """Words ``[..., 32, width]`` of codes ``[..., 32, 16, 2]``: pairs from the lowest bits on, halves 16 apart."""
    shifts = torch.arange(16, device=codes.device) * width % 16
    halves = (codes.long() << shifts.view(-1, 1)).unflatten(-2, (width, -1)).sum(-2)
    words = halves[..., 0] | halves[..., 1] << 16
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unplane(words: Tensor, width: int) -> Tensor:
    shifts = torch.arange(16, device=words.device) * width % 16
    pairs = (words.long() & 0xFFFFFFFF).repeat_interleave(16 // width, -1)
    return torch.stack([pairs >> shifts + 16 * two & (1 << width) - 1 for two in (0, 1)], -1)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., 32, 16, 2]`` to bytes ``[..., 128 * bits]``."""
    if bits == 3:
        parts = [_plane(codes.long() & 3, 2), _plane(codes.long() >> 2, 1)]
    else:
        words = _plane(codes, bits)
        parts = [words.unflatten(-1, (-1, min(bits, 4))).movedim(-2, -3)]
    return torch.cat([part.contiguous().flatten(codes.dim() - 3) for part in parts], -1).view(torch.uint8)


def _unpack_codes(data: Tensor, bits: int) -> Tensor:
    words = data.contiguous().view(torch.int32)
    if bits == 3:
        low, high = words[..., :64].unflatten(-1, (32, 2)), words[..., 64:].unflatten(-1, (32, 1))
        return _unplane(low, 2) + 4 * _unplane(high, 1)
    chunks = words.unflatten(-1, (-1, 32, min(bits, 4))).movedim(-3, -2).flatten(-2)
    return _unplane(chunks, bits)


def _exchanged(codes: Tensor, bits: int, levels=None) -> Tensor:
    """Integers of 8 bits are stored as signed bytes."""
    return codes ^ 128 if bits == 8 and levels is None else codes


# -- pages of a layout -----------------------------------------------------------------------------------------------


def check(op: str, layout: Layout) -> Layout:
    """Itself; ValueError that names ``op`` for a layout that no CUDA kernel takes."""
    layout.check(op)
    if layout.dtype not in (torch.bfloat16, torch.float16):
        fail(op, "dtype", layout.dtype, "torch.bfloat16, torch.float16 on CUDA")
    if layout.key_dim != layout.value_dim or layout.key_dim not in DIMS:
        fail(op, "head dimension", f"{layout.key_dim} for keys and {layout.value_dim} for values",
             f"the same of {', '.join(map(str, DIMS))} on CUDA")
    dim = layout.key_dim
    if layout.page_tokens != TOKENS:
        fail(op, "page_tokens", layout.page_tokens, f"{TOKENS} on CUDA")
    if layout.rotary is not None and dim == 256:
        fail(op, "rotary", "keys stored before rotary embedding, of 256 channels", "head dimensions to 128 on CUDA")
    if layout.rotary is not None and layout.rotary.dim % 4:
        fail(op, "rotary", f"{layout.rotary.dim} channels that are turned", "a multiple of 4 on CUDA")
    if len(layout.formats) > 7:
        fail(op, "formats", f"{len(layout.formats)} formats", "at most 7 on CUDA")
    for page in layout.formats:
        if page.key_bits < 16 and page.key_axis == "token" and layout.key_group(page) != dim:
            fail(op, "key_group", page.key_group, f"{dim} (0), all channels of a token, on CUDA")
        groups = value_groups(dim, page.value_bits)
        if page.value_bits < 16 and layout.value_group(page) not in groups:
            fail(op, "value_group", layout.value_group(page),
                 f"{', '.join(map(str, groups))} channels of {page.value_bits} bits on CUDA")
        if page.key_tokens and page.key_bits < 16 and dim == 256:
            fail(op, "group", f"{page.key_tokens} tokens with 256 channels",
                 f"{TOKENS} for head dimensions above 128 on CUDA")
        if page.rank and dim == 256:
            fail(op, "rank", f"{page.rank} of 256 channels", "0 for head dimensions above 128 on CUDA")
        for part, count, most in (("key", page.key_outliers, most_outliers(dim)[0]),
                                  ("value", page.value_outliers, most_outliers(dim)[1])):
            if count > most:
                fail(op, f"{part}_outliers", f"{count} of a page and head", f"at most {most} on CUDA")
    return layout


def most_outliers(dim: int) -> tuple[int, int]:
    """Outliers that a page and head may have, of keys and of values: what a unit of the kernels' stream holds."""
    unit = 2368 if dim == 96 else 2560
    return (unit - 4 * TOKENS - _starts(TOKENS // 2)) // 4, (unit - _starts(dim // 2)) // 4


def _starts(pairs: int) -> int:
    return -(-2 * (pairs + 1) // 16) * 16


def is_plain(layout: Layout, kind: int) -> bool:
    """Whether entries of pages of this kind name no format: raw, or integers with keys by channel and values by token
    and group."""
    page = layout.format(kind)
    return page is None or PageFormat(page.key_bits, page.value_bits, value_group=page.value_group) == page and (
        page.value_bits == 16 or layout.value_group(page) == value_group(layout.value_dim))


@lru_cache(maxsize=256)
def format_numbers(layout: Layout) -> tuple[int, ...]:
    """The layout's ``tersor_cuda_kv_format`` structs, one after another; nothing where all are plain."""
    if all(is_plain(layout, kind) for kind in range(1, len(layout.formats) + 1)):
        return ()
    numbers: list[int] = []
    for page in layout.formats:
        keys, values = page.key_bits < 16, page.value_bits < 16
        group = layout.value_group(page)
        records = 0 if group == value_group(layout.value_dim) or not values else group // _RECORD
        axis = 1 if page.key_axis == "token" else 2 if page.key_tokens else 0
        numbers += [coding(page.key_levels) * keys, coding(page.value_levels) * values, axis * keys, records,
                    int(values and page.value_axis == "separable"), page.key_outliers, page.value_outliers]
        for levels in (page.key_levels, page.value_levels):
            table = bytes(level & 255 for level in levels) if isinstance(levels, tuple) else b""
            table = table.ljust(16, b"\0")
            numbers += [int.from_bytes(table[at:at + 8], "little", signed=True) for at in (0, 8)]
    return tuple(numbers)


def entry_kind(layout: Layout, kind: int) -> int:
    """What an entry of the table has for pages of this kind in its fields ``format``, ``key_bits`` and ``value_bits``:
    the number to shift up by 40 beside ``position | tokens << 32``."""
    page = layout.format(kind)
    bits = (16, 16) if page is None else (page.key_bits, page.value_bits)
    return (kind if format_numbers(layout) and page is not None else 0) | bits[0] << 8 | bits[1] << 16


def parts(layout: Layout, kind: int) -> dict[str, tuple[int, int]]:
    """``{part: (first byte, bytes)}`` of a page of one sequence and head, and its size as ``"page"``. Keys, values:
    parameters and codes together."""
    page, dim = layout.format(kind) or PageFormat(16, 16), layout.key_dim
    lengths = {"keys": key_bytes(dim, page.key_bits), "values": value_bytes(dim, page.value_bits)}
    if page.key_bits < 16 and (page.key_axis == "token" or page.key_tokens):
        lengths["keys"] = dim * 8 * page.key_bits + (dim * 8 if page.key_tokens else 256)
    if page.value_bits < 16:
        lengths["values"] = dim * 8 * page.value_bits + dim // layout.value_group(page) * 256 \
            + dim * 2 * (page.value_axis == "separable")
    keys, values = page.key_outliers, page.value_outliers
    tails = {"key_outliers": keys and _starts(TOKENS // 2) + -(-4 * keys // 16) * 16,
             "bias": 4 * TOKENS * layout.biased,
             "value_outliers": values and _starts(dim // 2) + -(-4 * values // 16) * 16}
    result, at = {}, 0
    for name in ("keys", *tails, "values"):
        result[name] = at, (lengths | tails)[name]
        at += result[name][1]
    result["page"] = 0, at
    return result


def layout_bytes(layout: Layout, kind: int) -> int:
    """Bytes of a page of a kind for one sequence and one head."""
    return parts(layout, kind)["page"][1]


def channel_order(layout: Layout) -> Tensor | None:
    """Which channel of keys lies where: pairs of the rotary embedding side by side; None for all as they come."""
    if layout.rotary is None or layout.rotary.interleaved:
        return None
    half = layout.rotary.dim // 2
    pairs = torch.arange(2 * half).view(2, half).T.flatten()
    return torch.cat((pairs, torch.arange(2 * half, layout.key_dim)))


def rotary_table(layout: Layout) -> Tensor:
    """float32 ``[64, pairs, 2]``: cosines and sines of slots."""
    angles = torch.arange(TOKENS, dtype=torch.float64).view(-1, 1) * torch.tensor(layout.rotary.inv_freq,
                                                                                dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()), -1).float()


def encode_page(layout: Layout, keys: Tensor, values: Tensor, kind: int, bias: Tensor | None = None) -> Tensor:
    """``keys``, ``values [..., 64, dim]`` and ``bias [..., 64]`` (None: 0) to uint8 ``[..., layout_bytes]``."""
    page, at = layout.format(kind) or PageFormat(16, 16), parts(layout, kind)
    made, order = {}, channel_order(layout)
    if layout.rotary is not None and page.key_bits < 16:
        keys = layout.rotary.turn(keys.double(), torch.arange(TOKENS), back=True)
    keys = keys if order is None else keys[..., order]
    if page.key_bits == 16:
        made["keys"] = _raw(keys.to(layout.dtype), False)
    else:
        made["keys"], made["key_outliers"] = _encode_keys(keys.double(), page)
    if page.value_bits == 16:
        made["values"] = _raw(values.to(layout.dtype), True)
    else:
        made["values"], made["value_outliers"] = _encode_values(values.double(), page, layout.value_group(page))
    if layout.biased:
        bias = keys.new_zeros(keys.shape[:-1]) if bias is None else bias
        made["bias"] = bias.float().contiguous().view(torch.uint8)
    result = torch.zeros((*keys.shape[:-2], layout_bytes(layout, kind)), dtype=torch.uint8, device=keys.device)
    for name, data in made.items():
        first, length = at[name]
        if length:
            result[..., first:first + data.shape[-1]] = data
    return result


def decode_page(layout: Layout, pages: Tensor, kind: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Keys and values ``[..., 64, dim]`` of uint8 ``[..., layout_bytes]``, computed in float64."""
    page, dim = layout.format(kind) or PageFormat(16, 16), layout.key_dim
    at = {name: pages[..., first:first + length] for name, (first, length) in parts(layout, kind).items()}
    if page.key_bits == 16:
        keys = _unraw(at["keys"], dim, False, layout.dtype, torch.float64)
    else:
        keys = _decode_keys(at["keys"], dim, page)
        keys = _add_entries(keys, at["key_outliers"], page.key_outliers, TOKENS // 2)
    order = channel_order(layout)
    if order is not None:
        keys = torch.empty_like(keys).index_copy_(-1, order.to(keys.device), keys)
    if layout.rotary is not None and page.key_bits < 16:
        keys = layout.rotary.turn(keys, torch.arange(TOKENS))
    if page.value_bits == 16:
        values = _unraw(at["values"], dim, True, layout.dtype, torch.float64)
    else:
        values = _decode_values(at["values"], dim, page, layout.value_group(page))
        values = _add_entries(values, at["value_outliers"], page.value_outliers, dim // 2)
    return keys.to(dtype), values.to(dtype)


def decode_bias(layout: Layout, pages: Tensor, kind: int) -> Tensor:
    """float32 ``[..., 64]`` of a biased layout's pages."""
    first, length = parts(layout, kind)["bias"]
    return pages[..., first:first + length].contiguous().view(torch.float32)


def _of_tokens(p: Tensor) -> Tensor:
    """float16 ``[..., 64]`` of tokens to bytes ``[..., 128]``: tokens 8j + 2t + e in the order of t, j, e."""
    return p.half().unflatten(-1, (8, 4, 2)).transpose(-2, -3).flatten(-3).contiguous().view(torch.uint8)


def _to_tokens(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).unflatten(-1, (4, 8, 2)).transpose(-2, -3).flatten(-3).double()


def _encode_keys(x: Tensor, page: PageFormat) -> tuple[Tensor, Tensor]:
    channel, bits, levels = page.key_axis == "channel", page.key_bits, page.key_levels
    vectors, halves = x.transpose(-1, -2) if channel else x, 2 if page.key_tokens else 1
    if halves == 2:
        vectors = vectors.unflatten(-1, (2, -1)).flatten(-3, -2)  # [..., channels * 2, 32]
    removed = choose_outliers(vectors, page.key_outliers, levels) if page.key_outliers else None
    codes, scales, minima = quantize(vectors, bits, levels, removed)
    dense = dequantize(codes, scales.double(), None if minima is None else minima.double(), levels)
    if channel:
        def back(t):
            return t.unflatten(-2, (-1, halves)).flatten(-2).transpose(-1, -2)
        codes, dense = back(codes), back(dense)
        removed = None if removed is None else back(removed)
    packed = _pack_codes(_to_lanes(_exchanged(codes, bits, levels), False), bits)  # [..., records, bytes]
    minima = torch.zeros_like(scales) if minima is None else minima
    if channel:
        # [..., records, halves, 4 times scales and minima of 4 channels]
        four = [p.squeeze(-1).unflatten(-1, (-1, 4, 4, halves)).movedim(-1, -3) for p in (scales, minima)]
        data = torch.cat((torch.cat(four, -1).flatten(-3).contiguous().view(torch.uint8), packed), -1).flatten(-2)
    else:
        data = torch.cat((*(_of_tokens(p.squeeze(-1)) for p in (scales, minima)), packed.flatten(-2)), -1)
    return data, _entries(x - dense, removed, page.key_outliers, False)


def _decode_keys(data: Tensor, dim: int, page: PageFormat) -> Tensor:
    bits, levels = page.key_bits, page.key_levels
    if page.key_axis == "channel":
        records, halves = data.unflatten(-1, (dim // _RECORD, -1)), 2 if page.key_tokens else 1
        four = records[..., :64 * halves].contiguous().view(torch.float16).unflatten(-1, (halves, 4, 2, 4)).double()
        scales, minima = (four[..., i, :].movedim(-3, -4).flatten(-3) for i in (0, 1))  # [..., halves, channels]
        if halves == 2:
            scales, minima = (p.repeat_interleave(TOKENS // 2, -2) for p in (scales, minima))
        packed = records[..., 64 * halves:]
    else:
        scales, minima = (_to_tokens(data[..., at:at + 128]).unsqueeze(-1) for at in (0, 128))
        packed = data[..., 256:].unflatten(-1, (dim // _RECORD, -1))
    codes = _exchanged(_from_lanes(_unpack_codes(packed, bits), False), bits, levels)
    return dequantize(codes, scales, None if levels == E4M3 else minima, levels)


def _encode_values(x: Tensor, page: PageFormat, group: int) -> tuple[Tensor, Tensor]:
    dim, bits, levels, factors = x.shape[-1], page.value_bits, page.value_levels, None
    scaled = x
    if page.value_axis == "separable":
        factors = x.nan_to_num(0, 0, 0).abs().amax(-2, keepdim=True).sqrt().clamp(0, 65504).half()
        wide = factors.double()
        scaled = torch.where((wide == 0) & x.isfinite(), 0.0, x / wide)
    vectors = scaled.unflatten(-1, (-1, group)).flatten(-3, -2)

    def back(t):
        return t.unflatten(-2, (TOKENS, -1))  # [..., 64, groups, channels]
    removed = choose_outliers(vectors, page.value_outliers, levels) if page.value_outliers else None
    codes, scales, minima = quantize(vectors, bits, levels, removed)
    dense = back(dequantize(codes, scales.double(), None if minima is None else minima.double(), levels)).flatten(-2)
    dense = dense if factors is None else dense * factors.double()
    packed = _pack_codes(_to_lanes(_exchanged(back(codes).flatten(-2), bits, levels), True), bits)
    if factors is not None:
        of_records = factors.squeeze(-2).unflatten(-1, (-1, _RECORD)).contiguous().view(torch.uint8)
        packed = torch.cat((of_records, packed), -1)
    groups = packed.unflatten(-2, (dim // group, -1)).flatten(-2)
    minima = torch.zeros_like(scales) if minima is None else minima
    tokens = [_of_tokens(back(p).squeeze(-1).transpose(-1, -2)) for p in (scales, minima)]
    data = torch.cat((*tokens, groups), -1).flatten(-2)
    removed = None if removed is None else back(removed).flatten(-2)
    return data, _entries(x - dense, removed, page.value_outliers, True)


def _decode_values(data: Tensor, dim: int, page: PageFormat, group: int) -> Tensor:
    bits, levels = page.value_bits, page.value_levels
    groups = data.unflatten(-1, (dim // group, -1))
    scales, minima = (_to_tokens(groups[..., at:at + 128]).transpose(-1, -2).repeat_interleave(group, -1)
                      for at in (0, 128))
    records = groups[..., 256:].unflatten(-1, (group // _RECORD, -1)).flatten(-3, -2)
    factors = None
    if page.value_axis == "separable":
        factors = records[..., :32].contiguous().view(torch.float16).flatten(-2).double().unsqueeze(-2)
        records = records[..., 32:]
    codes = _exchanged(_from_lanes(_unpack_codes(records, bits), True), bits, levels)
    values = dequantize(codes, scales, None if levels == E4M3 else minima, levels)
    return values if factors is None else values * factors


def _entries(difference: Tensor, removed: Tensor | None, count: int, values: bool) -> Tensor:
    """Starts and entries of what is ``removed`` of numbers ``[..., 64, dim]``: of keys in order of tokens, of values in
    order of channels."""
    shape, dim = difference.shape[:-2], difference.shape[-1]
    if removed is None:
        return torch.zeros((*shape, 0), dtype=torch.uint8, device=difference.device)
    pairs = (dim if values else TOKENS) // 2
    order = removed.transpose(-1, -2) if values else removed
    flat = order.flatten(-2)
    at = torch.sort(~flat, dim=-1, stable=True).indices[..., :count]
    used = flat.gather(-1, at)
    if values:
        at = at % TOKENS * dim + at // TOKENS
    delta = difference.flatten(-2).gather(-1, at).clamp(-65504, 65504).half().masked_fill(~used, 0)
    index = at.masked_fill(~used, TOKENS * dim - 1)
    index = torch.where(index >= 32768, index - 65536, index).to(torch.int16)
    counts = order.unflatten(-2, (pairs, 2)).sum((-1, -2))
    starts = torch.zeros((*shape, _starts(pairs) // 2), dtype=torch.int16, device=difference.device)
    starts[..., 1:pairs + 1] = counts.cumsum(-1)
    entries = torch.stack((index, delta.view(torch.int16)), -1).flatten(-2)
    entries = torch.nn.functional.pad(entries, (0, -entries.shape[-1] % 8))
    return torch.cat((starts, entries), -1).contiguous().view(torch.uint8)


def _add_entries(x: Tensor, data: Tensor, count: int, pairs: int) -> Tensor:
    if not count:
        return x
    numbers = data.contiguous().view(torch.int16)
    entries = numbers[..., _starts(pairs) // 2:][..., :2 * count].unflatten(-1, (-1, 2))
    index = entries[..., 0].long() & 0xFFFF
    delta = entries[..., 1].contiguous().view(torch.float16).double()
    return x.flatten(-2).scatter_add(-1, index, delta).unflatten(-1, x.shape[-2:])


# -- plain pages, by their bits --------------------------------------------------------------------------------------


@cache
def _plain(dim: int, key_bits: int, value_bits: int, dtype: torch.dtype) -> tuple[Layout, int]:
    layout = Layout.uniform(1, dim, dim, dtype, key_bits, value_bits, TOKENS, value_group(dim))
    return layout, int(layout.packs)


def encode(keys: Tensor, values: Tensor, key_bits: int, value_bits: int) -> Tensor:
    """``[..., 64, dim]`` keys and values of one 16-bit dtype to uint8 ``[..., page_bytes]``; 16 bits: as they are."""
    layout, kind = _plain(keys.shape[-1], key_bits, value_bits, keys.dtype)
    return encode_page(layout, keys, values, kind)


def decode(pages: Tensor, dim: int, key_bits: int, value_bits: int, raw: torch.dtype,
           dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Keys and values ``[..., 64, dim]`` of uint8 ``[..., page_bytes]``; ``raw``: the dtype of what has 16 bits."""
    layout, kind = _plain(dim, key_bits, value_bits, raw)
    return decode_page(layout, pages[..., :page_bytes(dim, key_bits, value_bits)], kind, dtype)


def _raw(x: Tensor, values: bool) -> Tensor:
    lanes = _to_lanes(x, values).unflatten(-2, (4, 4)).movedim(-3, -4)
    return lanes.contiguous().view(torch.uint8).flatten(x.dim() - 2)


def _unraw(data: Tensor, dim: int, values: bool, raw: torch.dtype, dtype: torch.dtype) -> Tensor:
    lanes = data.contiguous().view(raw).unflatten(-1, (dim // _RECORD, 4, 32, 4, 2)).movedim(-4, -3).flatten(-3, -2)
    return _from_lanes(lanes.to(dtype), values)
