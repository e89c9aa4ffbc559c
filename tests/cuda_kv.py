"""The compressed cache's CUDA kernels, compiled for the host, as functions of tensors.

Tables hold addresses, so buffers are registered where they lie instead of being copied by the harness; each is padded
to a multiple of 256 bytes of its own, and the kernels are run for several orders of threads.
"""

import contextlib
import ctypes
import dataclasses
import functools
from types import SimpleNamespace

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


def fields(*values):
    """A struct of int64 and pointers; tensors are their addresses, None is null."""
    numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else int(v or 0) for v in values]
    return (ctypes.c_int64 * len(numbers))(*numbers)


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
           scale=None, mask=None, mask_first=0, seeds=(0,), count=False):
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
    hidden = [None] * 7 if mask is None else [
        mask, *(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())), mask_first, mask.shape[3]]
    arguments = [
        fields(table, pages, batch, table.shape[1], cache.kv_heads, dim, CODE[q.dtype]),
        fields(q, heads, queries, *q.stride()[:3], out, lse, positions, first, window, causal, *hidden, sinks, splits,
               partials, counters),
        ctypes.c_float(scale), ctypes.c_float(softcap), ctypes.c_void_p(None)]
    buffers = {"table": table, "pages": pages, "q": q, "out": out, "log_sum_exp": lse, "positions": positions,
               "first": first, "mask": mask, "sinks": sinks, **cache.pages}
    outputs = ["out", "log_sum_exp"]
    if splits > 1:
        buffers |= {"partials": partials, "counters": counters}
        outputs += ["counters"]
    if splits > 1:  # written, not compared: blocks leave them in any order
        outputs += ["partials"]
    made = launch(library, "tersor_cuda_kv_attention", arguments, buffers, outputs, seeds, count)
    assert not counters.any(), "the counters are not zero again"
    return out, lse, made


def truth(cache, q, *, window=0, causal=True, softcap=0.0, sinks=None, first=None, positions=None, scale=None,
          mask=None, mask_first=0):
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
        visible = visible.expand(1, 1, -1, -1)
        if mask is not None:
            whole = torch.zeros(1, mask.shape[1], q.shape[2], max(len(at), mask_first + mask.shape[3]), dtype=torch.bool)
            whole[..., mask_first : mask_first + mask.shape[3]] = mask[b % len(mask)]
            visible = visible & whole[..., : len(at)]
        out, total = reference_attention(q[b : b + 1], keys[None], values[None],
                                         q.shape[3] ** -0.5 if scale is None else scale, visible,
                                         softcap, sinks)
        outs.append(out)
        sums.append(total)
    return torch.cat(outs), torch.cat(sums)


def relative_error(out, expected):
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())


class Launchers:
    """`_C`'s functions of the cache, run by the emulated libraries on tensors where they lie. What a launch may touch is
    in `buffers`: tensors that the code under test makes come by themselves (`install`), others by the test."""

    def __init__(self):
        self.buffers, self.calls, self.splits = [], [], None

    def run(self, library, name, arguments):
        native = library.library
        native.tersor_last_error.restype = ctypes.c_char_p
        native.emulation_clear()
        for tensor in self.buffers:
            native.emulation_register(tensor.data_ptr(), tensor.nbytes, b"buffer", 1)
        status = getattr(native, name)(*arguments)
        assert status == 0, native.emulation_error().decode() or native.tersor_last_error().decode()
        self.calls.append(name)

    def append(self, table, pages, batch, table_pages, kv_heads, dim, keys, values, tokens, k, v, stream):
        self.run(page_library(), "tersor_cuda_kv_append",
                 ints(table, pages, batch, table_pages, kv_heads, dim, keys, values, tokens, *k, *v, stream))

    def pack(self, jobs, count, kv_heads, dim, dtype, key_bits, value_bits, stream):
        self.run(page_library(), "tersor_cuda_kv_pack",
                 [*ints(jobs, count, kv_heads, dim), ctypes.c_int(dtype), *ints(key_bits, value_bits, stream)])

    def plan(self, *numbers):
        made = [ctypes.c_int64() for _ in range(3)]
        native = attention_library(64).library
        assert native.tersor_cuda_kv_attention_plan(*ints(*numbers[:6]), ctypes.c_int(numbers[6]), *ints(numbers[7]),
                                                    ctypes.byref(made[0])) == 0
        assert native.tersor_cuda_kv_attention_workspace(*ints(*numbers[:5]), made[0], ctypes.byref(made[1]),
                                                         ctypes.byref(made[2])) == 0
        return tuple(value.value for value in made)

    def attention(self, cache, query, scale, softcap, stream):
        self.splits = query[-3]
        self.run(attention_library(cache[5]), "tersor_cuda_kv_attention", [
            fields(*cache), fields(*query), ctypes.c_float(scale), ctypes.c_float(softcap), *ints(stream)])

    def functions(self):
        return {"cuda_kv_append": self.append, "cuda_kv_pack": self.pack, "cuda_kv_attention_plan": self.plan,
                "cuda_kv_attention": self.attention}

    def install(self, monkeypatch):
        """In place of a GPU under `tersor.ops_kv_cuda`."""
        from tersor import ops_kv_cuda as ops

        monkeypatch.setattr(ops, "_C", SimpleNamespace(**self.functions()))
        monkeypatch.setattr(ops, "_device", lambda index: (8, 100 * 1024))
        monkeypatch.setattr(ops, "_on", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(ops, "_stream", lambda device: 0)
        whole, to, workspace = torch.Tensor.new_empty, torch.Tensor.to, ops._workspace

        def noticed(self_, *args, **options):
            self.buffers.append(whole(self_, *args, **options))
            return self.buffers[-1]

        def noticed_to(self_, *args, **options):
            tensor = to(self_, *args, **options)
            if self_.dtype is torch.int64 and self_.dim() == 2:  # the jobs of kv_pack
                self.buffers.append(tensor)
            return tensor

        def noticed_workspace(*args):
            tensors = workspace(*args)
            self.buffers.extend(tensor for tensor in tensors if tensor.numel())
            return tensors

        monkeypatch.setattr(torch.Tensor, "new_empty", noticed)
        monkeypatch.setattr(torch.Tensor, "to", noticed_to)
        monkeypatch.setattr(ops, "_workspace", noticed_workspace)
        ops._plan.cache_clear()
