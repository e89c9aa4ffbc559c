"""The compressed cache's CUDA kernels, compiled for the host, as functions of tensors.

Tables hold addresses, so buffers are registered where they lie instead of being copied by the harness; each is padded
to a multiple of 256 bytes of its own, and the kernels are run for several orders of threads.
"""

import ctypes
import dataclasses
import functools

import torch
from emulation import Violation, build

from tersor.kv import cuda_layout as layout
from tersor.kv.layout import reference_attention

CODE = {torch.bfloat16: 1, torch.float16: 2}
KERNEL = "cuda/kernels/sm80_kv_attention.cu"
SOURCES = [KERNEL, "cuda/dispatch/kv_attention.cu", "cpp/common/status.cpp"]
PAGE_SOURCES = ["cuda/kernels/kv_append.cu", "cuda/kernels/kv_pack.cu", "cuda/dispatch/kv_append.cu",
                "cpp/common/status.cpp"]


@functools.cache
def attention_library(dim):
    return build(SOURCES, {"TERSOR_HEAD_DIM": dim})


@functools.cache
def page_library(sanitize=False):
    return build(PAGE_SOURCES, sanitize=sanitize)


def ints(*values):
    return [ctypes.c_int64(v) for v in values]


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def launch(library, name, arguments, buffers, outputs, seeds=(0,), count=False):
    """Runs a launcher once for each seed on tensors where they are; `buffers`: {name: tensor}, of which those in
    `outputs` may be written and must come out alike. Returns the counters of the last run."""
    native, first = library.library, None
    native.tersor_last_error.restype = ctypes.c_char_p
    before = {key: buffers[key].clone() for key in outputs}
    for seed in seeds:
        for key in outputs:
            buffers[key].copy_(before[key])
        native.emulation_clear()
        native.emulation_seed(seed)
        native.emulation_count(int(count))
        for key, tensor in buffers.items():
            if tensor is not None and tensor.numel():
                native.emulation_register(tensor.data_ptr(), tensor.untyped_storage().nbytes(), key.encode(),
                                          int(key in outputs))
        status = getattr(native, name)(*arguments)
        error = native.emulation_error().decode()
        if error:
            raise Violation(f"{name}: {library._name_kernel(error)}")
        if status:
            raise ValueError(native.tersor_last_error().decode())
        bits = {key: buffers[key].view(torch.uint8).clone() for key in outputs}
        if first and any(not torch.equal(first[key], bits[key]) for key in bits):
            raise Violation(f"{name}: seeds {seeds[0]} and {seed} disagree: the result depends on the order of threads")
        first = bits
    return library.counters()


def table_of(rows):
    """int64 ``[batch, pages, 2]`` and int32 ``[batch]`` of entries ``(address, position, tokens, key_bits,
    value_bits)`` for each sequence."""
    table = torch.zeros(len(rows), max(1, *map(len, rows)), 2, dtype=torch.int64)
    for b, row in enumerate(rows):
        for p, (at, position, tokens, key_bits, value_bits) in enumerate(row):
            rest = position | tokens << 32 | key_bits << 48 | value_bits << 56
            table[b, p, 0], table[b, p, 1] = at, rest
    return table, torch.tensor([len(row) for row in rows], dtype=torch.int32)


@dataclasses.dataclass
class Cached:
    """Pages of several sequences, packed by the reference: ``keys``, ``values`` [heads, tokens, dim] of each in float64,
    as stored. Slots past a page's tokens hold NaN, or, packed, what they were before a crop."""

    dim: int
    kv_heads: int
    dtype: torch.dtype
    pages: dict
    rows: list
    keys: list
    values: list

    @property
    def table(self):
        return table_of(self.rows)


def cached(dim, kv_heads, dtype, sequences, scale=1.0, seed=0):
    """sequences: for each a list of pages (tokens, key_bits, value_bits). Keys' channels have unequal ranges and means,
    which is what quantization per channel is for."""
    random = torch.Generator().manual_seed(seed)
    made = Cached(dim, kv_heads, dtype, {}, [], [], [])
    spread = torch.rand(kv_heads, 1, dim, generator=random) * 2 + 0.2
    middle = torch.randn(kv_heads, 1, dim, generator=random)
    for b, pages in enumerate(sequences):
        row, keys, values, position = [], [torch.empty(kv_heads, 0, dim, dtype=torch.float64)], [], 0
        values = [keys[0]]
        for p, (tokens, key_bits, value_bits) in enumerate(pages):
            k = ((torch.randn(kv_heads, 64, dim, generator=random) * spread + middle) * scale).to(dtype)
            v = (torch.randn(kv_heads, 64, dim, generator=random) + 0.3).to(dtype)
            data = layout.encode(k, v, key_bits, value_bits)
            k, v = layout.decode(data, dim, key_bits, value_bits, dtype)
            if tokens < 64 and 16 in (key_bits, value_bits):
                k[:, tokens:] = v[:, tokens:] = float("nan")
                raw = layout.encode(k.to(dtype), v.to(dtype), 16, 16)
                half = layout.key_bytes(dim, 16)
                if key_bits == 16:
                    data[:, :half] = raw[:, :half]
                if value_bits == 16:
                    data[:, layout.key_bytes(dim, key_bits) :] = raw[:, half:]
            name = f"page {b}.{p}"
            made.pages[name] = torch.empty(data.numel() + 256, dtype=torch.uint8)
            at = made.pages[name].data_ptr() % 16
            store = made.pages[name][-at % 16 :][: data.numel()].view_as(data)
            store.copy_(data)
            row.append((store.data_ptr(), position, tokens, key_bits, value_bits))
            keys.append(k[:, :tokens])
            values.append(v[:, :tokens])
            position += tokens
        made.rows.append(row)
        made.keys.append(torch.cat(keys, 1))
        made.values.append(torch.cat(values, 1))
    return made


def attend(library, cache, q, splits=1, *, window=0, causal=True, softcap=0.0, sinks=None, first=None, positions=None,
           scale=None, seeds=(0,), count=False):
    """``(out, log_sum_exp, counters)`` of the emulated kernel. ``q [batch, heads, queries, dim]``."""
    batch, heads, queries, dim = q.shape
    table, pages = cache.table
    scale = dim**-0.5 if scale is None else scale
    sizes = [ctypes.c_int64(), ctypes.c_int64()]
    status = library.library.tersor_cuda_kv_attention_workspace(
        *ints(batch, heads, cache.kv_heads, dim, queries, splits), *map(ctypes.byref, sizes))
    assert status == 0
    out = torch.full((batch, queries, heads, dim), float("nan"), dtype=q.dtype)
    lse = torch.full((batch, heads, queries), float("nan"))
    partials = torch.full((sizes[0].value // 4 + 4,), float("nan"))
    partials = partials[-(partials.data_ptr() // 4) % 4 :]
    counters = torch.zeros(sizes[1].value // 4, dtype=torch.int32)
    arguments = [
        address(table), address(pages), *ints(batch, table.shape[1]), address(q), ctypes.c_int(CODE[q.dtype]),
        *ints(heads, cache.kv_heads, dim, queries, *q.stride()[:3]), address(out), address(lse), address(positions),
        address(first), address(sinks), *ints(window), ctypes.c_int(causal), ctypes.c_float(scale),
        ctypes.c_float(softcap), *ints(splits), address(partials), address(counters), ctypes.c_void_p(None)]
    buffers = {"table": table, "pages": pages, "q": q, "out": out, "log_sum_exp": lse, "positions": positions,
               "first": first, "sinks": sinks, **cache.pages}
    outputs = ["out", "log_sum_exp"]
    if splits > 1:
        buffers |= {"partials": partials, "counters": counters}
        outputs += ["counters"]
    if splits > 1:  # written, not compared: blocks leave them in any order
        outputs += ["partials"]
    made = launch(library, "tersor_cuda_kv_attention", arguments, buffers, outputs, seeds, count)
    assert not counters.any(), "the counters are not zero again"
    return out, lse, made


def truth(cache, q, *, window=0, causal=True, softcap=0.0, sinks=None, first=None, positions=None, scale=None):
    """The same in float64 over the numbers as stored."""
    outs, sums = [], []
    for b in range(len(q)):
        keys, values = cache.keys[b], cache.values[b]
        at = torch.arange(keys.shape[1])
        begin = keys.shape[1] - q.shape[2] if positions is None else int(positions[b])
        own = begin + torch.arange(q.shape[2]).view(-1, 1)
        visible = torch.ones(q.shape[2], len(at), dtype=torch.bool)
        if causal:
            visible &= at <= own
        if window:
            visible &= at > own - window
        if first is not None:
            visible &= at >= int(first[b])
        out, total = reference_attention(q[b : b + 1], keys[None], values[None],
                                         q.shape[3] ** -0.5 if scale is None else scale, visible.expand(1, 1, -1, -1),
                                         softcap, sinks)
        outs.append(out)
        sums.append(total)
    return torch.cat(outs), torch.cat(sums)


def relative_error(out, expected):
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())
