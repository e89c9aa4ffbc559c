"""The compressed cache on CUDA: page tables, `kv_append`, `kv_pack`, `kv_attention`, `kv_mass`, with every check.

A cache is a table of entries on the device (`page_table`), each with the address of a page of up to 64 tokens of one
sequence, its format, and how many bits its keys and values have; pages lie as `tersor.kv.cuda_layout` describes. A
``layout`` names formats other than integers with keys by channel and values by token and group, and a bias
(`cuda_layout.check`: which there are); None: none of them. The caller keeps pages alive. Nothing here waits for the
GPU, so contents of a table are checked where it is made, not where it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C
from .kv import cuda_layout
from .kv.layout import Layout
from .op_checks import CODE, fail
from .ops_cuda import _device, _workspace

_HALVES = (torch.bfloat16, torch.float16)
Entry = tuple[int, ...]


def page_table(rows: Sequence[Sequence[Entry]], device: torch.device, room: int = 0) -> tuple[Tensor, Tensor]:
    """Entries ``(address, position, tokens, key_bits, value_bits)``, or with a format's number at their end, of each
    sequence as int64 ``[batch, pages, 2]``, with room for at least ``room`` pages, and their numbers as int32
    ``[batch]``. ValueError for an entry that no kernel takes: addresses are multiples of 16, tokens 1 to 64, positions
    ascend without overlap."""
    op = "page_table"
    table = torch.zeros(len(rows), max(1, room, *map(len, rows)), 2, dtype=torch.int64)
    for b, row in enumerate(rows):
        free = 0
        for p, (address, position, tokens, key_bits, value_bits, *kind) in enumerate(row):
            name = f"rows[{b}][{p}]"
            if address <= 0 or address % 16:
                fail(op, name, f"address {address}", "a multiple of 16")
            if not 1 <= tokens <= cuda_layout.TOKENS:
                fail(op, name, f"{tokens} tokens", f"1 to {cuda_layout.TOKENS}")
            if not free <= position <= 2**31 - 1 - cuda_layout.TOKENS:
                fail(op, name, f"position {position}", f"{free} to 2^31 - 65")
            if key_bits not in cuda_layout.BITS or value_bits not in cuda_layout.BITS:
                fail(op, name, f"{key_bits}, {value_bits} bits", ", ".join(map(str, cuda_layout.BITS)))
            table[b, p, 0] = address
            if kind and not 0 <= kind[0] < 8:
                fail(op, name, f"format {kind[0]}", "0 to 7")
            table[b, p, 1] = position | tokens << 32 | sum(kind) << 40 | key_bits << 48 | value_bits << 56
            free = position + tokens
    return table.to(device), torch.tensor([len(row) for row in rows], dtype=torch.int32).to(device)


def _check_table(op: str, table: Tensor, pages: Tensor) -> int:
    """The batch size."""
    if table.dtype is not torch.int64 or table.dim() != 3 or table.shape[2] != 2 or not table.shape[1] \
            or not table.is_contiguous():
        fail(op, "table", f"{table.dtype} {list(table.shape)}", "contiguous torch.int64 [batch, pages, 2]")
    if pages.dtype is not torch.int32 or pages.shape != table.shape[:1] or not pages.is_contiguous() \
            or pages.device != table.device:
        fail(op, "pages", f"{pages.dtype} {list(pages.shape)} on {pages.device}",
             f"contiguous torch.int32 [{len(table)}] on {table.device}")
    return len(table)


def _check_numbers(op: str, name: str, x: Tensor, batch: int, device: torch.device) -> None:
    if x.dtype not in _HALVES or x.dim() != 4 or len(x) != batch or x.device != device:
        fail(op, name, f"{x.dtype} {list(x.shape)} on {x.device}",
             f"torch.bfloat16 or torch.float16 [{batch}, heads, tokens, head_dim] on {device}")
    if x.shape[3] not in cuda_layout.DIMS:
        fail(op, name, f"head dimension {x.shape[3]}", ", ".join(map(str, cuda_layout.DIMS)))


def _rows(x: Tensor) -> Tensor:
    """Rows that start at multiples of 8 bytes; a copy where they do not."""
    if x.stride(3) == 1 and x.data_ptr() % 8 == 0 and not any(stride % 4 for stride in x.stride()[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _on(device: torch.device):
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


@functools.lru_cache(maxsize=256)
def _formats(op: str, layout: Layout) -> list[int]:
    """A checked layout's formats as numbers."""
    return list(cuda_layout.format_numbers(cuda_layout.check(op, layout)))


@functools.lru_cache(maxsize=64)
def _rotary(layout: Layout, device: torch.device) -> Tensor:
    """The cosines and sines that launches read, kept for all layers with the same frequencies."""
    table = cuda_layout.rotary_table(layout)
    return torch.empty(0, device=device).new_empty(table.shape).copy_(table)


def _cache(op: str, table: Tensor | None, pages: Tensor | None, kv_heads: int, head_dim: int, dtype: torch.dtype,
           layout: Layout | None, device: torch.device) -> tuple[list[int], list[int]]:
    """The fields of ``tersor_cuda_kv_cache``, and its formats."""
    where = [0, 0, 0, 0] if table is None else [table.data_ptr(), pages.data_ptr(), len(table), table.shape[1]]
    fields = [*where, kv_heads, head_dim, CODE[dtype]]
    if layout is None:
        return [*fields, 0, 0, 0, 0, 0, 0], []
    formats = _formats(op, layout)
    if (layout.kv_heads, layout.key_dim, layout.dtype) != (kv_heads, head_dim, dtype):
        fail(op, "layout", f"{layout.kv_heads} heads of {layout.key_dim}, {layout.dtype}",
             f"{kv_heads} heads of {head_dim}, {dtype}")
    rotary = layout.rotary
    turned = [0, 0, 0] if rotary is None else [rotary.dim, int(rotary.interleaved), _rotary(layout, device).data_ptr()]
    return [*fields, int(layout.biased), *turned, len(formats) // cuda_layout.FORMAT_NUMBERS, 0], formats


def kv_append(table: Tensor, pages: Tensor, keys: Tensor, values: Tensor, *, layout: Layout | None = None,
              bias: Tensor | None = None) -> None:
    """Writes ``keys`` and ``values [batch, kv_heads, tokens, head_dim]`` to the raw pages that the table, which counts
    them already, gives the last ``tokens`` tokens of each sequence; ``bias`` float32 ``[batch, kv_heads, tokens]`` of a
    biased layout (None: 0)."""
    op = "kv_append"
    batch = _check_table(op, table, pages)
    _check_numbers(op, "keys", keys, batch, table.device)
    if values.shape != keys.shape or values.dtype is not keys.dtype or values.device != keys.device:
        fail(op, "values", f"{values.dtype} {list(values.shape)} on {values.device}",
             f"{keys.dtype} {list(keys.shape)} on {keys.device}")
    if bias is not None:
        if layout is None or not layout.biased:
            fail(op, "bias", "a tensor", "None for a layout that is not biased")
        if bias.dtype is not torch.float32 or bias.shape != keys.shape[:3] or bias.device != keys.device:
            fail(op, "bias", f"{bias.dtype} {list(bias.shape)} on {bias.device}",
                 f"torch.float32 {list(keys.shape[:3])} on {keys.device}")
        bias = bias.contiguous()
    cache, _ = _cache(op, table, pages, keys.shape[1], keys.shape[3], keys.dtype, layout, keys.device)
    cache[-2] = 0  # raw pages have no format
    keys, values = _rows(keys), _rows(values)
    with _on(table.device):
        _C.cuda_kv_append(
            cache, [keys.data_ptr(), values.data_ptr(), keys.shape[2], *keys.stride()[:3], *values.stride()[:3],
                    0 if bias is None else bias.data_ptr()], _stream(table.device))


def kv_pack(raw: Sequence[Tensor], head_dim: int, key_bits: int, value_bits: int, dtype: torch.dtype) -> Tensor:
    """uint8 ``[pages, kv_heads, page_bytes]`` of full raw pages uint8 ``[kv_heads, raw bytes]`` of ``dtype``, as plain
    integers."""
    op = "kv_pack"
    if dtype not in _HALVES:
        fail(op, "dtype", dtype, "torch.bfloat16, torch.float16")
    if head_dim not in cuda_layout.DIMS:
        fail(op, "head_dim", head_dim, ", ".join(map(str, cuda_layout.DIMS)))
    if key_bits not in cuda_layout.BITS or value_bits not in cuda_layout.BITS:
        fail(op, "key_bits, value_bits", [key_bits, value_bits], ", ".join(map(str, cuda_layout.BITS)))
    if not len(raw):
        fail(op, "raw", "no page", "1 or more")
    first, size = raw[0], cuda_layout.page_bytes(head_dim, 16, 16)
    for i, page in enumerate(raw):
        if page.dtype is not torch.uint8 or page.dim() != 2 or page.shape != (len(first), size) \
                or not page.is_contiguous() or page.device != first.device or page.data_ptr() % 16:
            fail(op, f"raw[{i}]", f"{page.dtype} {list(page.shape)} on {page.device}",
                 f"contiguous torch.uint8 [{len(first)}, {size}] on {first.device}, 16-byte aligned")
    packed = first.new_empty((len(raw), len(first), cuda_layout.page_bytes(head_dim, key_bits, value_bits)))
    jobs = torch.tensor([[page.data_ptr(), to.data_ptr()] for page, to in zip(raw, packed)]).to(first.device)
    kv_pack_jobs(jobs, len(first), head_dim, key_bits, value_bits, dtype)
    return packed


def kv_pack_jobs(jobs: Tensor, kv_heads: int, head_dim: int, key_bits: int, value_bits: int, dtype: torch.dtype, *,
                 layout: Layout | None = None, kind: int = 0) -> None:
    """`kv_pack` by addresses, which the caller vouches for: int64 ``[count, 2]`` on the device, a full raw page's (0:
    no job) and that of the page it becomes. With a ``layout``: in its format ``kind``, whose bits the two are."""
    op = "kv_pack"
    if jobs.dtype is not torch.int64 or jobs.dim() != 2 or jobs.shape[1] != 2 or not jobs.is_contiguous():
        fail(op, "jobs", f"{jobs.dtype} {list(jobs.shape)}", "contiguous torch.int64 [count, 2]")
    cache, formats = _cache(op, None, None, kv_heads, head_dim, dtype, layout, jobs.device)
    page = layout and kind and layout.format(kind)
    if layout is not None and (not page or (page.key_bits, page.value_bits) != (key_bits, value_bits)):
        fail(op, "kind", f"{kind} and {key_bits}, {value_bits} bits", "a format of the layout, and its bits")
    with _on(jobs.device):
        _C.cuda_kv_pack(cache, formats, kind if formats else 0, key_bits, value_bits, jobs.data_ptr(), len(jobs),
                        _stream(jobs.device))


@functools.lru_cache(maxsize=4096)
def _plan(batch, heads, kv_heads, head_dim, queries, pages, index):
    return _C.cuda_kv_attention_plan(batch, heads, kv_heads, head_dim, queries, pages, *_device(index))


def _optional(op: str, name: str, x: Tensor | None, dtype: torch.dtype, length: int, device: torch.device) -> int:
    """The address, 0 for None."""
    if x is None:
        return 0
    if x.dtype is not dtype or x.shape != (length,) or x.device != device or not x.is_contiguous():
        fail(op, name, f"{x.dtype} {list(x.shape)} on {x.device}", f"contiguous {dtype} [{length}] on {device}")
    return x.data_ptr()


def _mask(op: str, mask: Tensor | None, first: int, shape: tuple[int, int, int], device: torch.device) -> list[int]:
    """The mask's address, four strides, first position and length."""
    if mask is None:
        return [0] * 7
    batch, heads, queries = shape
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[0] not in (1, batch) \
            or mask.shape[1] not in (1, heads) or mask.shape[2] != queries or mask.device != device:
        fail(op, "mask", f"{mask.dtype} {list(mask.shape)} on {mask.device}",
             f"torch.bool [{batch} or 1, {heads} or 1, {queries}, tokens] on {device}")
    if not 0 <= first <= 2**31 - 1 - mask.shape[3]:
        fail(op, "mask_first", first, "positions from 0 to 2^31 - 1")
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
    # One without columns has no address, and hides everything all the same.
    return [mask.data_ptr() or 1, *strides, first, mask.shape[3]]


def _residual(op: str, residual: tuple[Tensor, Tensor] | None, table: Tensor,
              shape: tuple[int, int, int]) -> list[int]:
    """The address of its table, that of the products of queries, and their width."""
    if residual is None:
        return [0, 0, 0]
    pages, products = residual
    wanted = (*table.shape[:2], 4)
    if pages.dtype is not torch.int64 or pages.shape != wanted or not pages.is_contiguous() \
            or pages.device != table.device:
        fail(op, "residual", f"{pages.dtype} {list(pages.shape)} on {pages.device}",
             f"contiguous torch.int64 {list(wanted)} on {table.device}")
    if products.dtype is not torch.float32 or products.shape[:-1] != shape or not products.is_contiguous() \
            or products.device != table.device:
        fail(op, "residual", f"{products.dtype} {list(products.shape)} on {products.device}",
             f"contiguous torch.float32 {[*shape, 'width']} on {table.device}")
    return [pages.data_ptr(), products.data_ptr(), products.shape[-1]]


def _query(op: str, query: Tensor, table: Tensor, pages: Tensor, kv_heads: int, softcap: float, window: int,
           positions: Tensor | None, first: Tensor | None, mask: Tensor | None, mask_first: int,
           layout: Layout | None) -> tuple[list[int], list[int], list[int], list[int]]:
    """The cache's fields and formats, addresses of ``positions`` and ``first``, and the mask's fields, all checked."""
    device = table.device
    batch = _check_table(op, table, pages)
    _check_numbers(op, "query", query, batch, device)
    heads, queries, dim = query.shape[1:]
    if kv_heads < 1 or not heads or heads % kv_heads:
        fail(op, "kv_heads", kv_heads, f"a divisor of the {heads} query heads")
    if window < 0 or not softcap >= 0:
        fail(op, "window, softcap", [window, softcap], "0 or more")
    places = [_optional(op, "positions", positions, torch.int32, batch, device),
              _optional(op, "first", first, torch.int32, batch, device)]
    hidden = _mask(op, mask, mask_first, (batch, heads, queries), device)
    return *_cache(op, table, pages, kv_heads, dim, query.dtype, layout, device), places, hidden


def kv_attention(query: Tensor, table: Tensor, pages: Tensor, kv_heads: int, scale: float, *, softcap: float = 0.0,
                 causal: bool = True, window: int = 0, positions: Tensor | None = None, first: Tensor | None = None,
                 sinks: Tensor | None = None, mask: Tensor | None = None, mask_first: int = 0,
                 residual: tuple[Tensor, Tensor] | None = None,
                 layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """``(out [batch, queries, heads, head_dim], log_sum_exp [batch, heads, queries])`` of attention of ``query [batch,
    heads, queries, head_dim]`` over all tokens of the table. The queries are each sequence's last tokens, or begin at
    ``positions`` int32 ``[batch]``; ``first`` int32 ``[batch]``: the first position that is seen (left padding);
    ``window``: positions that a query sees, its own included, 0 for all; ``sinks`` float32 ``[heads]``: logits that
    only take part in the denominator; ``mask``: bool ``[batch or 1, heads or 1, queries, tokens]``, of any strides,
    which of the positions from ``mask_first`` on a query sees, others it does not; ``residual``: int64 ``[batch, pages,
    4]``, for the packed page at each position / 64 the addresses of its left factors float16 ``[kv_heads, 2, rank,
    64]`` of keys and values and of the right ones of values ``[kv_heads, rank, head_dim]``, the first column and the
    rank (0: none) of its products of queries with the right factors of keys, float32 ``[batch, heads, queries,
    width]``, all of which the caller vouches for. A query that sees nothing gives 0 and -infinity."""
    op, device = "kv_attention", table.device
    cache, formats, places, hidden = _query(op, query, table, pages, kv_heads, softcap, window, positions, first, mask,
                                            mask_first, layout)
    batch, heads, queries, dim = query.shape
    sink_address = _optional(op, "sinks", sinks, torch.float32, heads, device)
    extra = _residual(op, residual, table, (batch, heads, queries))
    query = _rows(query)
    out = query.new_empty((batch, queries, heads, dim))
    log_sum_exp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if not out.numel():
        return out, log_sum_exp
    splits, partial_bytes, counter_bytes = _plan(batch, heads, kv_heads, dim, queries, table.shape[1], device.index)
    with _on(device):
        partials, counters = _workspace(device, partial_bytes, counter_bytes)
        _C.cuda_kv_attention(
            cache, formats,
            [query.data_ptr(), heads, queries, *query.stride()[:3], out.data_ptr(), log_sum_exp.data_ptr(), *places,
             window, int(causal), *hidden, sink_address, splits, partials.data_ptr() if splits > 1 else 0,
             counters.data_ptr() if splits > 1 else 0, *extra], scale, softcap, _stream(device))
    return out, log_sum_exp


def kv_mass(query: Tensor, table: Tensor, pages: Tensor, log_sum_exp: Tensor, kv_heads: int, scale: float,
            tokens: int, *, softcap: float = 0.0, causal: bool = True, window: int = 0, positions: Tensor | None = None,
            first: Tensor | None = None, mask: Tensor | None = None, mask_first: int = 0,
            layout: Layout | None = None) -> Tensor:
    """float32 ``[batch, kv_heads, tokens]``: for each token, counted from the first of its sequence's first page, the
    sum over all queries of all query heads that read its head of keys of exp(score - log_sum_exp), where ``log_sum_exp
    [batch, heads, queries]`` float32 is what `kv_attention` gave with the same query, table and restrictions."""
    op, device = "kv_mass", table.device
    cache, formats, places, hidden = _query(op, query, table, pages, kv_heads, softcap, window, positions, first, mask,
                                            mask_first, layout)
    batch, heads, queries, dim = query.shape
    if log_sum_exp.dtype is not torch.float32 or log_sum_exp.shape != query.shape[:3] or log_sum_exp.device != device \
            or not log_sum_exp.is_contiguous():
        fail(op, "log_sum_exp", f"{log_sum_exp.dtype} {list(log_sum_exp.shape)} on {log_sum_exp.device}",
             f"contiguous torch.float32 {list(query.shape[:3])} on {device}")
    if tokens < 0:
        fail(op, "tokens", tokens, "0 or more")
    query = _rows(query)
    mass = query.new_empty((batch, kv_heads, tokens), dtype=torch.float32).zero_()
    if not mass.numel() or not queries:
        return mass
    splits = _plan(batch, kv_heads, kv_heads, dim, 1, table.shape[1], device.index)[0]
    with _on(device):
        _C.cuda_kv_mass(
            cache, formats, [query.data_ptr(), heads, queries, *query.stride()[:3], 0, log_sum_exp.data_ptr(), *places,
                             window, int(causal), *hidden, 0, splits, 0, 0, 0, 0, 0],
            scale, softcap, mass.data_ptr(), tokens, _stream(device))
    return mass
