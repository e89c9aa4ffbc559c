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
from tersor.kv.layout import Layout, reference_attention, reference_mass

CODE = {torch.bfloat16: 1, torch.float16: 2}
KERNEL = "cuda/kernels/sm80_kv_attention.cu"
SOURCES = [KERNEL, "cuda/dispatch/kv_attention.cu", "cpp/common/status.cpp"]
FORMAT_SOURCES = [KERNEL.replace(".cu", "_formats.cu"), *SOURCES[1:]]
MASS_SOURCES = ["cuda/kernels/kv_mass.cu", *SOURCES[1:]]
PAGE_SOURCES = ["cuda/kernels/kv_append.cu", "cuda/kernels/kv_pack.cu", "cuda/kernels/kv_pack_formats.cu",
                "cuda/dispatch/kv_append.cu",
                "cpp/common/status.cpp"]


@functools.cache
def attention_library(dim, formats=False):
    return build(FORMAT_SOURCES if formats else SOURCES, {"TERSOR_HEAD_DIM": dim})


@functools.cache
def mass_library(dim):
    return build(MASS_SOURCES, {"TERSOR_HEAD_DIM": dim})


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
        for p, (at, position, tokens, key_bits, value_bits, *kind) in enumerate(row):
            rest = position | tokens << 32 | (kind or [0])[0] << 40 | key_bits << 48 | value_bits << 56
            table[b, p, 0], table[b, p, 1] = at, rest
    return table, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def cache_fields(cache, table=None, pages=None):
    """The struct of a `Cached`."""
    formats = cache.formats
    where = [table, pages, len(table), table.shape[1]] if table is not None else [None] * 4
    turned, table = [0, 0, None], None
    if cache.layout is not None and cache.layout.rotary is not None:
        rotary, table = cache.layout.rotary, layout.rotary_table(cache.layout)
        turned = [rotary.dim, rotary.interleaved, table]
        cache.pages["rotary"] = table
    return with_formats([*where, cache.kv_heads, cache.dim, CODE[cache.dtype], cache.biased, *turned,
                         len(formats) // 11, 0], formats)


def with_formats(cache, formats):
    """The struct of a cache, whose formats (and tensors) live as long as it."""
    held = fields(*formats)
    made = fields(*cache[:-1], ctypes.addressof(held))
    made.held, made.tensors = held, cache
    return made


@dataclasses.dataclass
class Cached:
    """Pages of several sequences, packed by the reference: ``keys``, ``values`` [heads, tokens, dim] (and ``biases``
    [heads, tokens]) of each in float64, as stored. Slots past a page's tokens hold NaN, or, packed, what they were
    before a crop. ``rows``: entries (address, position, tokens, key_bits, value_bits, format)."""

    dim: int
    kv_heads: int
    dtype: torch.dtype
    pages: dict
    rows: list
    keys: list
    values: list
    layout: Layout | None = None
    biases: list | None = None

    @property
    def table(self):
        return table_of(self.rows)

    @property
    def formats(self):
        return [] if self.layout is None else list(layout.format_numbers(self.layout))

    @property
    def biased(self):
        return self.layout is not None and self.layout.biased

    @property
    def in_formats(self):
        return bool(self.formats or self.biased or self.layout is not None and self.layout.rotary)


def cached(dim, kv_heads, dtype, sequences, scale=1.0, seed=0):
    """sequences: for each a list of plain pages (tokens, key_bits, value_bits). Keys' channels have unequal ranges and
    means, which is what quantization per channel is for."""
    made = Cached(dim, kv_heads, dtype, {}, [], [], [])

    def encoded(k, v, page, _):
        data = layout.encode(k, v, *page[1:])
        return data, *layout.decode(data, dim, *page[1:], dtype), page[1:]

    return _fill(made, sequences, encoded, scale, seed)


def cached_layout(made_of, sequences, scale=1.0, seed=0):
    """Of a `Layout`: sequences are lists of pages (tokens, kind)."""
    made = Cached(made_of.key_dim, made_of.kv_heads, made_of.dtype, {}, [], [], [], made_of, [])

    def encoded(k, v, page, bias):
        data = layout.encode_page(made_of, k, v, page[1], bias)
        entry = layout.entry_kind(made_of, page[1])
        return data, *layout.decode_page(made_of, data, page[1]), (entry >> 8 & 255, entry >> 16, entry & 255)

    return _fill(made, sequences, encoded, scale, seed)


def _spoil_entries(made_of, kind, data, tokens):
    """Outliers of tokens from `tokens` on become NaN: nobody may see them."""
    for part, lines in (("key_outliers", 32), ("value_outliers", made_of.key_dim // 2)):
        first, length = layout.parts(made_of, kind)[part]
        if length:
            start = first + -(-2 * (lines + 1) // 16) * 16
            entries = data[:, start : first + length].clone().view(torch.int16).unflatten(-1, (-1, 2))
            past = (entries[..., 0].int() & 0xFFFF) // made_of.key_dim >= tokens
            entries[..., 1][past] = 0x7E00
            data[:, start : first + length] = entries.flatten(-2).view(torch.uint8)


def _fill(made, sequences, encoded, scale, seed):
    random = torch.Generator().manual_seed(seed)
    dim, kv_heads, dtype = made.dim, made.kv_heads, made.dtype
    spread = torch.rand(kv_heads, 1, dim, generator=random) * 2 + 0.2
    middle = torch.randn(kv_heads, 1, dim, generator=random)
    for b, pages in enumerate(sequences):
        row, keys, position = [], [torch.empty(kv_heads, 0, dim, dtype=torch.float64)], 0
        values, biases = [keys[0]], [torch.empty(kv_heads, 0, dtype=torch.float64)]
        for p, page in enumerate(pages):
            tokens = page[0]
            k = ((torch.randn(kv_heads, 64, dim, generator=random) * spread + middle) * scale).to(dtype)
            v = (torch.randn(kv_heads, 64, dim, generator=random) + 0.3).to(dtype)
            bias = torch.randn(kv_heads, 64, generator=random) if made.biased else None
            data, k, v, kind = encoded(k, v, page, bias)
            if tokens < 64 and 16 in kind[:2]:
                k[:, tokens:] = v[:, tokens:] = float("nan")
                half, order = layout.key_bytes(dim, 16), slice(None)
                if made.layout is not None and layout.channel_order(made.layout) is not None:
                    order = layout.channel_order(made.layout)
                raw = layout.encode(k.to(dtype)[..., order], v.to(dtype), 16, 16)
                if kind[0] == 16:
                    data[:, :half] = raw[:, :half]
                if kind[1] == 16:
                    data[:, -half:] = raw[:, half:]
            if made.layout is not None and tokens < 64:
                _spoil_entries(made.layout, page[1], data, tokens)
            name = f"page {b}.{p}"
            made.pages[name] = torch.empty(data.numel() + 256, dtype=torch.uint8)
            at = made.pages[name].data_ptr() % 16
            store = made.pages[name][-at % 16 :][: data.numel()].view_as(data)
            store.copy_(data)
            row.append((store.data_ptr(), position, tokens, *kind))
            keys.append(k[:, :tokens])
            values.append(v[:, :tokens])
            biases += [bias[:, :tokens].double()] if made.biased else []
            position += tokens
        made.rows.append(row)
        made.keys.append(torch.cat(keys, 1))
        made.values.append(torch.cat(values, 1))
        if made.biased:
            made.biases.append(torch.cat(biases, 1))
    return made


def attend(library, cache, q, splits=1, *, window=0, causal=True, softcap=0.0, sinks=None, first=None, positions=None,
           scale=None, mask=None, mask_first=0, residual=(None, None), seeds=(0,), count=False):
    """``(out, log_sum_exp, counters)`` of the emulated kernel. ``q [batch, heads, queries, dim]``; ``residual``: its
    table and the products of queries."""
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
        mask, *(stride * (size > 1) for size, stride in zip(mask.shape, mask.stride())), mask_first, mask.shape[3]]
    arguments = [
        cache_fields(cache, table, pages),
        fields(q, heads, queries, *q.stride()[:3], out, lse, positions, first, window, causal, *hidden, sinks, splits,
               partials, counters, *residual, 0 if residual[1] is None else residual[1].shape[-1]),
        ctypes.c_float(scale), ctypes.c_float(softcap), ctypes.c_void_p(None)]
    buffers = {"table": table, "pages": pages, "q": q, "out": out, "log_sum_exp": lse, "positions": positions,
               "first": first, "mask": mask, "sinks": sinks, "residuals": residual[0], "products": residual[1],
               **cache.pages}
    outputs = ["out", "log_sum_exp"]
    if splits > 1:
        buffers |= {"partials": partials, "counters": counters}
        outputs += ["counters"]
    if splits > 1:  # written, not compared: blocks leave them in any order
        outputs += ["partials"]
    made = launch(library, "tersor_cuda_kv_attention", arguments, buffers, outputs, seeds, count)
    assert not counters.any(), "the counters are not zero again"
    return out, lse, made


def attention_mass(library, cache, q, log_sum_exp, tokens, splits=1, *, window=0, causal=True, softcap=0.0, first=None,
                   positions=None, scale=None, mask=None, mask_first=0, seeds=(0,), count=False):
    """``(mass, counters)`` of the emulated kernel; `log_sum_exp` float32 as `attend` gives it."""
    batch, heads, queries, dim = q.shape
    table, pages = cache.table
    mass = torch.zeros(batch, cache.kv_heads, tokens)
    hidden = [None] * 7 if mask is None else [
        mask, *(stride * (size > 1) for size, stride in zip(mask.shape, mask.stride())), mask_first, mask.shape[3]]
    arguments = [
        cache_fields(cache, table, pages),
        fields(q, heads, queries, *q.stride()[:3], None, log_sum_exp, positions, first, window, causal, *hidden, None,
               splits, None, None, None, None, 0),
        ctypes.c_float(dim**-0.5 if scale is None else scale), ctypes.c_float(softcap), address(mass), *ints(tokens),
        ctypes.c_void_p(None)]
    buffers = {"table": table, "pages": pages, "q": q, "log_sum_exp": log_sum_exp, "positions": positions,
               "first": first, "mask": mask, "mass": mass, **cache.pages}
    return mass, launch(library, "tersor_cuda_kv_mass", arguments, buffers, ["mass"], seeds, count)


def visible_to(cache, q, b, *, window=0, causal=True, first=None, positions=None, mask=None, mask_first=0):
    """bool ``[1, heads or 1, queries, tokens]`` of sequence b."""
    at = torch.arange(cache.keys[b].shape[1])
    begin = len(at) - q.shape[2] if positions is None else int(positions[b])
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
        whole = torch.zeros(1, *mask.shape[1:3], max(len(at), mask_first + mask.shape[3]), dtype=torch.bool)
        whole[..., mask_first : mask_first + mask.shape[3]] = mask[b % len(mask)]
        visible = visible & whole[..., : len(at)]
    return visible


def truth(cache, q, *, softcap=0.0, sinks=None, scale=None, **limits):
    """Attention in float64 over the numbers as stored."""
    made = [reference_attention(q[b : b + 1], cache.keys[b][None], cache.values[b][None],
                                q.shape[3] ** -0.5 if scale is None else scale, visible_to(cache, q, b, **limits),
                                softcap, sinks, cache.biases[b][None] if cache.biased else None)
            for b in range(len(q))]
    return torch.cat([out for out, _ in made]), torch.cat([total for _, total in made])


def true_mass(cache, q, log_sum_exp, tokens, *, softcap=0.0, scale=None, **limits):
    """Mass in float64."""
    made = torch.zeros(len(q), cache.kv_heads, tokens, dtype=torch.float64)
    for b in range(len(q)):
        held = cache.keys[b].shape[1]
        made[b : b + 1, :, :held] = reference_mass(
            q[b : b + 1], cache.keys[b][None], log_sum_exp[b : b + 1], q.shape[3] ** -0.5 if scale is None else scale,
            visible_to(cache, q, b, **limits), softcap, cache.biases[b][None] if cache.biased else None)
    return made


def relative_error(out, expected):
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())


class Launchers:
    """`_C`'s functions of the cache, run by the emulated libraries on tensors where they lie. What a launch may touch
    is in `buffers`: tensors that the code under test makes come by themselves (`install`), others by the test."""

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

    def append(self, cache, tokens, stream):
        self.run(page_library(), "tersor_cuda_kv_append", [fields(*cache), fields(*tokens), *ints(stream)])

    def pack(self, cache, formats, kind, key_bits, value_bits, jobs, count, stream):
        self.run(page_library(), "tersor_cuda_kv_pack", [
            with_formats(cache, formats), *ints(kind, key_bits, value_bits, jobs, count, stream)])

    def plan(self, *numbers):
        made = [ctypes.c_int64() for _ in range(3)]
        native = attention_library(64).library
        assert native.tersor_cuda_kv_attention_plan(*ints(*numbers[:6]), ctypes.c_int(numbers[6]), *ints(numbers[7]),
                                                    ctypes.byref(made[0])) == 0
        assert native.tersor_cuda_kv_attention_workspace(*ints(*numbers[:5]), made[0], ctypes.byref(made[1]),
                                                         ctypes.byref(made[2])) == 0
        return tuple(value.value for value in made)

    def attention(self, cache, formats, query, scale, softcap, stream):
        self.splits = query[-6]
        self.run(attention_library(cache[5], bool(formats or cache[7] or cache[8] or query[-3])), "tersor_cuda_kv_attention", [
            with_formats(cache, formats), fields(*query), ctypes.c_float(scale), ctypes.c_float(softcap),
            *ints(stream)])

    def mass(self, cache, formats, query, scale, softcap, mass, tokens, stream):
        self.run(mass_library(cache[5]), "tersor_cuda_kv_mass", [
            with_formats(cache, formats), fields(*query), ctypes.c_float(scale), ctypes.c_float(softcap),
            *ints(mass, tokens, stream)])

    def functions(self):
        return {"cuda_kv_append": self.append, "cuda_kv_pack": self.pack, "cuda_kv_attention_plan": self.plan,
                "cuda_kv_attention": self.attention, "cuda_kv_mass": self.mass}

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
        ops._rotary.cache_clear()
