"""Operations of the KV cache, in the table of `tersor.ops`: `kv_append`, `kv_pack`, `kv_attention`, `kv_mass`.

Pages are uint8 ``[sequences, kv_heads, bytes]`` as `tersor.kv.layout` describes them. ``layout`` is `Layout.numbers()`;
a page's kind is 0 (raw) or the number of its format from 1 on. `tersor.kv.pages` keeps a table of pages and calls the
kernels on it without the lists.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from . import _C
from .kv.formats import rotary_table
from .kv.layout import Layout, reference_attention, reference_mass
from .op_checks import CODE, FLOATS, fail
from .ops import Op

_threads = torch.get_num_threads
NO_STRIDES, NO_MASK = (0, 0, 0), (0, 0, 0, 0)


def make_layout(op: str, numbers, dtype: torch.dtype) -> Layout:
    """`Layout` of its numbers; ValueError that names the operation for one that no kernel takes."""
    if dtype not in CODE:
        fail(op, "dtype", dtype, FLOATS)
    return Layout.of_numbers(op, numbers, dtype)


def native(layout: Layout, batch: int):
    """The kernels' view of a layer's cache, with an empty page table. The rotary table stays cached with the layout."""
    rotary = layout.rotary
    table = None if rotary is None else rotary_table(rotary, layout.page_tokens)
    kv = _C.Kv(batch, layout.kv_heads, layout.key_dim, layout.value_dim, CODE[layout.dtype], layout.page_tokens,
               layout.biased, [page.numbers(layout.key_dim, layout.value_dim) for page in layout.formats],
               0 if rotary is None else rotary.dim, rotary is not None and rotary.interleaved,
               0 if table is None else table.data_ptr())
    return kv, table


def check_page(op: str, name: str, page: Tensor, layout: Layout, kind: int) -> None:
    if not 0 <= kind <= len(layout.formats):
        fail(op, f"kind of {name}", kind, f"0 to {len(layout.formats)}")
    shape = [layout.kv_heads, layout.page_bytes(kind)]
    if page.dtype is not torch.uint8 or page.dim() != 3 or list(page.shape[1:]) != shape or not page.is_cpu \
            or not page.is_contiguous():
        fail(op, name, f"{page.dtype} {list(page.shape)} on {page.device}",
             f"contiguous torch.uint8 [sequences, {shape[0]}, {shape[1]}] on cpu")


def check_tokens(op: str, keys: Tensor, values: Tensor, layout: Layout, batch: int) -> None:
    """Fresh tokens that a kernel can read: dtype, shapes, unit stride along the channels."""
    for name, x, dim in (("keys", keys, layout.key_dim), ("values", values, layout.value_dim)):
        wanted = (batch, layout.kv_heads, keys.shape[2] if keys.dim() == 4 else -1, dim)
        if x.dtype is not layout.dtype or x.shape != wanted or not x.is_cpu or x.stride(3) != 1:
            fail(op, name, f"{x.dtype} {list(x.shape)} on {x.device}",
                 f"{layout.dtype} [{batch}, {layout.kv_heads}, tokens, {dim}] on cpu, of unit stride along the last")


def check_bias(op: str, bias: Tensor, layout: Layout, batch: int, tokens: int) -> None:
    if not layout.biased:
        fail(op, "bias", "a tensor", "None: the layout is not biased")
    if bias.dtype is not torch.float32 or bias.shape != (batch, layout.kv_heads, tokens) or not bias.is_contiguous() \
            or not bias.is_cpu:
        fail(op, "bias", f"{bias.dtype} {list(bias.shape)} on {bias.device}",
             f"contiguous torch.float32 [{batch}, {layout.kv_heads}, {tokens}] on cpu")


def _address(page: Tensor, row: int) -> int:
    return page.data_ptr() + row * page.stride(0)


def page_table(op: str, pages, tokens, kinds, segments, layout: Layout, batch: int) -> array:
    """The rows of the table that the kernels read."""
    if not len(pages) == len(tokens) == len(kinds) or segments and len(segments) != len(pages):
        fail(op, "pages, tokens, kinds, segments", [len(pages), len(tokens), len(kinds), len(segments)],
             "lists of one length, the last one perhaps empty")
    table = array("q")
    for i, page in enumerate(pages):
        check_page(op, f"pages[{i}]", page, layout, kinds[i])
        if len(page) != batch:
            fail(op, f"pages[{i}]", f"{len(page)} sequences", f"{batch}")
        if not 0 <= tokens[i] <= layout.page_tokens:
            fail(op, f"tokens[{i}]", tokens[i], f"0 to {layout.page_tokens}")
        table.extend([tokens[i], kinds[i], *(_address(page, row) for row in range(batch))])
        segment = segments[i] if segments else None
        if segment is not None and segment.numel():
            rank = layout.format(kinds[i]).rank if kinds[i] else 0
            shape = (batch, layout.kv_heads, rank, layout.key_dim + layout.value_dim)
            if segment.dtype is not torch.float16 or segment.shape != shape or not rank or not segment.is_contiguous() \
                    or not segment.is_cpu:
                fail(op, f"segments[{i}]", f"{segment.dtype} {list(segment.shape)} of rank {rank}",
                     f"contiguous torch.float16 {list(shape)} on cpu, of a rank of at least 1")
        if layout.rank:
            step = 0 if segment is None or not segment.numel() else segment.stride(0) * 2
            table.extend(segment.data_ptr() + row * step if step else 0 for row in range(batch))
    return table


# -- kv_append --------------------------------------------------------------------------------------------------------


def _kv_append_cpu(page, keys, values, bias, slot, layout):
    op = "kv_append"
    shape = make_layout(op, layout, keys.dtype)
    check_page(op, "page", page, shape, 0)
    check_tokens(op, keys, values, shape, len(page))
    count = keys.shape[2]
    if bias is not None:
        check_bias(op, bias, shape, len(page), count)
    if slot < 0 or slot + count > shape.page_tokens:
        fail(op, "slot", f"{slot} for {count} tokens", f"room in a page of {shape.page_tokens}")
    if not count or not len(page):
        return
    table = page_table(op, [page], [slot + count], [0], [], shape, len(page))
    kv, _rotary = native(shape, len(page))
    kv.set_table(table.buffer_info()[0], 1)
    kv.append(0, slot, keys.data_ptr(), values.data_ptr(), count, keys.stride()[:3], values.stride()[:3],
              0 if bias is None else bias.data_ptr(), _threads())


def _kv_append_reference(page, keys, values, bias, slot, layout):
    shape = make_layout("kv_append", layout, keys.dtype)
    old_keys, old_values = shape.decode(page, 0, keys.dtype)
    old_bias = shape.decode_bias(page, 0)
    end = slot + keys.shape[2]
    old_keys[:, :, slot:end], old_values[:, :, slot:end] = keys, values
    old_bias[:, :, slot:end] = 0 if bias is None else bias
    page.copy_(shape.encode(old_keys, old_values, 0, old_bias))


kv_append = Op("kv_append", "(Tensor(a!) page, Tensor keys, Tensor values, Tensor? bias, int slot, int[] layout) -> ()",
               _kv_append_cpu, lambda page, keys, values, bias, slot, layout: None, _kv_append_reference)


# -- kv_pack ----------------------------------------------------------------------------------------------------------


def _kv_pack_cpu(raw, kind, layout, dtype):
    op = "kv_pack"
    shape = make_layout(op, layout, dtype)
    check_page(op, "raw", raw, shape, 0)
    if not 1 <= kind <= len(shape.formats):
        fail(op, "kind", kind, f"1 to {len(shape.formats)}")
    packed = torch.zeros((len(raw), shape.kv_heads, shape.page_bytes(kind)), dtype=torch.uint8)
    if len(raw):
        kv, _rotary = native(shape, len(raw))
        kv.pack(kind, [_address(raw, row) for row in range(len(raw))],
                [_address(packed, row) for row in range(len(raw))], _threads())
    return packed


def _kv_pack_fake(raw, kind, layout, dtype):
    return raw.new_empty((raw.shape[0], layout[0], make_layout("kv_pack", layout, dtype).page_bytes(kind)))


def _kv_pack_reference(raw, kind, layout, dtype):
    shape = make_layout("kv_pack", layout, dtype)
    return shape.encode(*shape.decode(raw, 0), kind, shape.decode_bias(raw, 0))


kv_pack = Op("kv_pack", "(Tensor raw, int kind, int[] layout, ScalarType dtype) -> Tensor", _kv_pack_cpu, _kv_pack_fake,
             _kv_pack_reference)


# -- kv_attention -----------------------------------------------------------------------------------------------------


def check_query(op: str, query: Tensor, layout: Layout, batch: int) -> None:
    if query.dtype is not layout.dtype or query.dim() != 4 or len(query) != batch or not query.is_cpu \
            or query.shape[3] != layout.key_dim or query.shape[1] % layout.kv_heads or not query.shape[1]:
        fail(op, "query", f"{query.dtype} {list(query.shape)} on {query.device}",
             f"{layout.dtype} [{batch}, a multiple of {layout.kv_heads}, queries, {layout.key_dim}] on cpu")


def check_mask(op: str, mask: Tensor, query: Tensor) -> None:
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[0] not in (1, len(query)) \
            or mask.shape[1] not in (1, query.shape[1]) or mask.shape[2] != query.shape[2] or not mask.is_cpu:
        fail(op, "mask", f"{mask.dtype} {list(mask.shape)} on {mask.device}",
             f"torch.bool [{len(query)}, 1 or {query.shape[1]}, {query.shape[2]}, positions] on cpu")


def mask_strides(mask: Tensor) -> tuple[int, int, int, int]:
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


def check_sinks(op: str, sinks: Tensor, query: Tensor) -> None:
    if sinks.dtype is not torch.float32 or sinks.shape != query.shape[1:2] or not sinks.is_contiguous() \
            or not sinks.is_cpu:
        fail(op, "sinks", f"{sinks.dtype} {list(sinks.shape)} on {sinks.device}",
             f"contiguous torch.float32 [{query.shape[1]}] on cpu")


def check_options(op: str, query: Tensor, mask: Tensor | None, sinks: Tensor | None, window: int,
                  softcap: float) -> None:
    if mask is not None:
        check_mask(op, mask, query)
    if sinks is not None:
        check_sinks(op, sinks, query)
    if window < 0 or not softcap >= 0:
        fail(op, "window, softcap", [window, softcap], "0 or more")


def check_positions(op: str, positions: Tensor, query: Tensor) -> None:
    if positions.dtype is not torch.int64 or positions.shape != query.shape[2:3] or not positions.is_contiguous() \
            or not positions.is_cpu:
        fail(op, "positions", f"{positions.dtype} {list(positions.shape)} on {positions.device}",
             f"contiguous torch.int64 [{query.shape[2]}] on cpu")


def _prepare(op, query, pages, tokens, kinds, segments, mask, positions, window, softcap, layout):
    """Checks all, and gives the layout, the query as kernels take it, and the cache with its table (to be kept)."""
    shape = make_layout(op, layout, query.dtype)
    batch = len(query) if query.dim() == 4 else -1
    check_query(op, query, shape, batch)
    table = page_table(op, pages, tokens, kinds, segments, shape, batch)
    check_options(op, query, mask, None, window, softcap)
    if positions is not None:
        check_positions(op, positions, query)
    kv = None
    if batch:
        kv, rotary = native(shape, batch)
        kv.set_table(table.buffer_info()[0], len(pages))
        table = table, rotary
    return shape, query if query.stride(3) == 1 else query.contiguous(), kv, table


def restrictions(mask: Tensor | None, first: int) -> tuple:
    """A mask as the kernels take it: address, strides, the position of its first column, columns."""
    return (0, NO_MASK, first, 0) if mask is None else (mask.data_ptr(), mask_strides(mask), first, mask.shape[3])


def _kv_attention_cpu(query, pages, tokens, kinds, segments, mask, sinks, positions, scale, softcap, causal, window,
                      first, position, layout):
    op = "kv_attention"
    shape, query, kv, _kept = _prepare(op, query, pages, tokens, kinds, segments, mask, positions, window, softcap,
                                       layout)
    if sinks is not None:
        check_sinks(op, sinks, query)
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, shape.value_dim))
    log_sum_exp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if batch:
        kv.attention(query.data_ptr(), heads, queries, query.stride()[:3], out.data_ptr(), log_sum_exp.data_ptr(),
                     first, position, 0 if positions is None else positions.data_ptr(), window, causal,
                     *restrictions(mask, first), 0 if sinks is None else sinks.data_ptr(), scale, softcap, 0, 0, 0, 0,
                     0, NO_STRIDES, NO_STRIDES, 0, _threads())
    return out, log_sum_exp


def _kv_attention_fake(query, pages, tokens, kinds, segments, mask, sinks, positions, scale, softcap, causal, window,
                       first, position, layout):
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, layout[2])), \
        query.new_empty((batch, heads, queries), dtype=torch.float32)


def _gather(op, query, pages, tokens, kinds, segments, mask, positions, causal, window, first, position, layout):
    """Keys, values, what each query sees, and biases, in float64."""
    shape = make_layout(op, layout, query.dtype)
    parts = []
    for i, (page, count, kind) in enumerate(zip(pages, tokens, kinds)):
        segment = segments[i] if segments and segments[i].numel() else None
        parts.append([t[:, :, :count] for t in (*shape.decode(page, kind, segment=segment),
                                                shape.decode_bias(page, kind).unsqueeze(-1).double())])
    batch, heads, queries, _ = query.shape
    empty = [query.new_empty((batch, shape.kv_heads, 0, dim), dtype=torch.float64)
             for dim in (shape.key_dim, shape.value_dim, 1)]
    keys, values, bias = (torch.cat([e, *(p[i] for p in parts)], 2) for i, e in enumerate(empty))
    at = first + torch.arange(keys.shape[2])
    own = (position + torch.arange(queries) if positions is None else positions).view(-1, 1)
    visible = torch.ones(queries, len(at), dtype=torch.bool)
    if causal:
        visible &= at <= own
    if window:
        visible &= at > own - window
    visible = visible.expand(batch, 1, -1, -1)
    if mask is not None:
        visible = visible & torch.nn.functional.pad(mask, (0, max(0, len(at) - mask.shape[3])))[..., :len(at)]
    return keys, values, visible, bias.squeeze(-1)


def _kv_attention_reference(query, pages, tokens, kinds, segments, mask, sinks, positions, scale, softcap, causal,
                            window, first, position, layout):
    keys, values, visible, bias = _gather("kv_attention", query, pages, tokens, kinds, segments, mask, positions,
                                          causal, window, first, position, layout)
    out, log_sum_exp = reference_attention(query, keys, values, scale, visible, softcap, sinks, bias)
    return out.to(query.dtype).contiguous(), log_sum_exp.float()


kv_attention = Op(
    "kv_attention",
    "(Tensor query, Tensor[] pages, int[] tokens, int[] kinds, Tensor[] segments, Tensor? mask, Tensor? sinks, "
    "Tensor? positions, float scale, float softcap, bool causal, int window, int first, int position, int[] layout) "
    "-> (Tensor, Tensor)",
    _kv_attention_cpu, _kv_attention_fake, _kv_attention_reference,
)


# -- kv_mass ----------------------------------------------------------------------------------------------------------


def check_log_sum_exp(op: str, log_sum_exp: Tensor, query: Tensor) -> None:
    if log_sum_exp.dtype is not torch.float32 or log_sum_exp.shape != query.shape[:3] or not log_sum_exp.is_cpu \
            or not log_sum_exp.is_contiguous():
        fail(op, "log_sum_exp", f"{log_sum_exp.dtype} {list(log_sum_exp.shape)} on {log_sum_exp.device}",
             f"contiguous torch.float32 {list(query.shape[:3])} on cpu")


def _kv_mass_cpu(query, log_sum_exp, pages, tokens, kinds, segments, mask, positions, scale, softcap, causal, window,
                 first, position, layout):
    op = "kv_mass"
    shape, query, kv, _kept = _prepare(op, query, pages, tokens, kinds, segments, mask, positions, window, softcap,
                                       layout)
    check_log_sum_exp(op, log_sum_exp, query)
    batch, heads, queries, _ = query.shape
    mass = query.new_empty((batch, shape.kv_heads, sum(tokens)), dtype=torch.float32)
    if mass.numel():
        kv.mass(query.data_ptr(), heads, queries, query.stride()[:3], log_sum_exp.data_ptr(), first, position,
                0 if positions is None else positions.data_ptr(), window, causal, *restrictions(mask, first), scale,
                softcap, mass.data_ptr(), _threads())
    return mass


def _kv_mass_fake(query, log_sum_exp, pages, tokens, kinds, segments, mask, positions, scale, softcap, causal, window,
                  first, position, layout):
    return query.new_empty((len(query), layout[0], sum(tokens)), dtype=torch.float32)


def _kv_mass_reference(query, log_sum_exp, pages, tokens, kinds, segments, mask, positions, scale, softcap, causal,
                       window, first, position, layout):
    keys, _, visible, bias = _gather("kv_mass", query, pages, tokens, kinds, segments, mask, positions, causal, window,
                                     first, position, layout)
    return reference_mass(query, keys, log_sum_exp, scale, visible, softcap, bias).float()


kv_mass = Op(
    "kv_mass",
    "(Tensor query, Tensor log_sum_exp, Tensor[] pages, int[] tokens, int[] kinds, Tensor[] segments, Tensor? mask, "
    "Tensor? positions, float scale, float softcap, bool causal, int window, int first, int position, int[] layout) "
    "-> Tensor",
    _kv_mass_cpu, _kv_mass_fake, _kv_mass_reference,
)
