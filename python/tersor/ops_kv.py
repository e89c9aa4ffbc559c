"""Operations of the KV cache, in the table of `tersor.ops`: `kv_append`, `kv_pack`, `kv_attention`.

Pages are uint8 ``[sequences, kv_heads, bytes]`` as `tersor.kv.layout` describes them. ``layout`` is `Layout.numbers()`.
`tersor.kv.pages` keeps a table of pages and calls the kernels on it without the lists.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from . import _C
from .kv.layout import BITS, Layout, reference_attention
from .op_checks import CODE, FLOATS, fail
from .ops import Op

_threads = torch.get_num_threads
NO_STRIDES, NO_MASK = (0, 0, 0), (0, 0, 0, 0)


def make_layout(op: str, numbers, dtype: torch.dtype) -> Layout:
    """`Layout` of seven numbers; ValueError that names the operation for one that no kernel takes."""
    if dtype not in CODE:
        fail(op, "dtype", dtype, FLOATS)
    if len(numbers) != 7:
        fail(op, "layout", list(numbers),
             "kv_heads, key_dim, value_dim, key_bits, value_bits, page_tokens, value_group")
    heads, key_dim, value_dim, key_bits, value_bits, tokens, group = numbers
    for name, dim in (("key_dim", key_dim), ("value_dim", value_dim)):
        if dim % 16 or not 16 <= dim <= 1024:
            fail(op, name, dim, "a multiple of 16 to 1024")
    for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
        if bits not in BITS:
            fail(op, name, bits, ", ".join(map(str, BITS)))
    if heads < 1:
        fail(op, "kv_heads", heads, "1 or more")
    if tokens % 32 or not 32 <= tokens <= 256:
        fail(op, "page_tokens", tokens, "a multiple of 32 to 256")
    if group < 16 or group % 16 or value_dim % group:
        fail(op, "value_group", group, f"a multiple of 16 that divides value_dim = {value_dim}")
    return Layout(heads, key_dim, value_dim, dtype, key_bits, value_bits, tokens, group)


def native(layout: Layout, batch: int):
    """The kernels' view of a layer's cache, with an empty page table."""
    return _C.Kv(batch, layout.kv_heads, layout.key_dim, layout.value_dim, CODE[layout.dtype], layout.key_bits,
                 layout.value_bits, layout.page_tokens, layout.value_group)


def check_page(op: str, name: str, page: Tensor, layout: Layout, packed: bool) -> None:
    shape = [layout.kv_heads, layout.page_bytes(packed)]
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


def _address(page: Tensor, row: int) -> int:
    return page.data_ptr() + row * page.stride(0)


# -- kv_append --------------------------------------------------------------------------------------------------------


def _kv_append_cpu(page, keys, values, slot, layout):
    op = "kv_append"
    shape = make_layout(op, layout, keys.dtype)
    check_page(op, "page", page, shape, False)
    check_tokens(op, keys, values, shape, len(page))
    count = keys.shape[2]
    if slot < 0 or slot + count > shape.page_tokens:
        fail(op, "slot", f"{slot} for {count} tokens", f"room in a page of {shape.page_tokens}")
    if not count or not len(page):
        return
    table = array("q", [slot + count, 0, *(_address(page, row) for row in range(len(page)))])
    kv = native(shape, len(page))
    kv.set_table(table.buffer_info()[0], 1)
    kv.append(0, slot, keys.data_ptr(), values.data_ptr(), count, keys.stride()[:3], values.stride()[:3], _threads())


def _kv_append_reference(page, keys, values, slot, layout):
    shape = make_layout("kv_append", layout, keys.dtype)
    old_keys, old_values = shape.decode(page, False, keys.dtype)
    end = slot + keys.shape[2]
    old_keys[:, :, slot:end], old_values[:, :, slot:end] = keys, values
    page.copy_(shape.encode(old_keys, old_values, False))


kv_append = Op("kv_append", "(Tensor(a!) page, Tensor keys, Tensor values, int slot, int[] layout) -> ()",
               _kv_append_cpu, lambda page, keys, values, slot, layout: None, _kv_append_reference)


# -- kv_pack ----------------------------------------------------------------------------------------------------------


def _kv_pack_cpu(raw, layout, dtype):
    op = "kv_pack"
    shape = make_layout(op, layout, dtype)
    check_page(op, "raw", raw, shape, False)
    packed = torch.empty((len(raw), shape.kv_heads, shape.page_bytes(True)), dtype=torch.uint8)
    if len(raw):
        native(shape, len(raw)).pack([_address(raw, row) for row in range(len(raw))],
                                     [_address(packed, row) for row in range(len(raw))], _threads())
    return packed


def _kv_pack_fake(raw, layout, dtype):
    return raw.new_empty((raw.shape[0], layout[0], make_layout("kv_pack", layout, dtype).page_bytes(True)))


def _kv_pack_reference(raw, layout, dtype):
    shape = make_layout("kv_pack", layout, dtype)
    return shape.encode(*shape.decode(raw, False), True)


kv_pack = Op("kv_pack", "(Tensor raw, int[] layout, ScalarType dtype) -> Tensor", _kv_pack_cpu, _kv_pack_fake,
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


def _kv_attention_cpu(query, pages, tokens, packed, mask, sinks, scale, softcap, causal, window, first, position,
                      layout):
    op = "kv_attention"
    shape = make_layout(op, layout, query.dtype)
    batch, heads, queries = query.shape[:3] if query.dim() == 4 else (-1, 0, 0)
    check_query(op, query, shape, batch)
    if not len(pages) == len(tokens) == len(packed):
        fail(op, "pages, tokens, packed", [len(pages), len(tokens), len(packed)], "lists of one length")
    table = array("q")
    for i, page in enumerate(pages):
        check_page(op, f"pages[{i}]", page, shape, packed[i])
        if len(page) != batch:
            fail(op, f"pages[{i}]", f"{len(page)} sequences", f"{batch}")
        if not 0 <= tokens[i] <= shape.page_tokens:
            fail(op, f"tokens[{i}]", tokens[i], f"0 to {shape.page_tokens}")
        table.extend([tokens[i], int(packed[i]), *(_address(page, row) for row in range(batch))])
    check_options(op, query, mask, sinks, window, softcap)
    if query.stride(3) != 1:
        query = query.contiguous()
    out = query.new_empty((batch, queries, heads, shape.value_dim))
    log_sum_exp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    if not batch:
        return out, log_sum_exp
    kv = native(shape, batch)
    kv.set_table(table.buffer_info()[0], len(pages))
    kv.attention(query.data_ptr(), heads, queries, query.stride()[:3], out.data_ptr(), log_sum_exp.data_ptr(), first,
                 position, window, causal, 0 if mask is None else mask.data_ptr(),
                 NO_MASK if mask is None else mask_strides(mask), first, 0 if mask is None else mask.shape[3],
                 0 if sinks is None else sinks.data_ptr(), scale, softcap, 0, 0, 0, 0, 0, NO_STRIDES, NO_STRIDES,
                 _threads())
    return out, log_sum_exp


def _kv_attention_fake(query, pages, tokens, packed, mask, sinks, scale, softcap, causal, window, first, position,
                       layout):
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, layout[2])), \
        query.new_empty((batch, heads, queries), dtype=torch.float32)


def _kv_attention_reference(query, pages, tokens, packed, mask, sinks, scale, softcap, causal, window, first,
                            position, layout):
    shape = make_layout("kv_attention", layout, query.dtype)
    parts = [tuple(t[:, :, :count].double() for t in shape.decode(page, is_packed))
             for page, count, is_packed in zip(pages, tokens, packed)]
    batch, heads, queries, _ = query.shape
    empty = [query.new_empty((batch, shape.kv_heads, 0, dim), dtype=torch.float64)
             for dim in (shape.key_dim, shape.value_dim)]
    keys, values = (torch.cat([e, *(p[i] for p in parts)], 2) for i, e in enumerate(empty))
    at = first + torch.arange(keys.shape[2])
    own = position + torch.arange(queries).view(-1, 1)
    visible = torch.ones(queries, len(at), dtype=torch.bool)
    if causal:
        visible &= at <= own
    if window:
        visible &= at > own - window
    visible = visible.expand(batch, 1, -1, -1)
    if mask is not None:
        visible = visible & torch.nn.functional.pad(mask, (0, max(0, len(at) - mask.shape[3])))[..., :len(at)]
    out, log_sum_exp = reference_attention(query, keys, values, scale, visible, softcap, sinks)
    return out.to(query.dtype).contiguous(), log_sum_exp.float()


kv_attention = Op(
    "kv_attention",
    "(Tensor query, Tensor[] pages, int[] tokens, bool[] packed, Tensor? mask, Tensor? sinks, float scale, "
    "float softcap, bool causal, int window, int first, int position, int[] layout) -> (Tensor, Tensor)",
    _kv_attention_cpu, _kv_attention_fake, _kv_attention_reference,
)
