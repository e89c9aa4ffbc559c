"""Formats of the cache's CUDA pages, host-executed: levels, E4M3, scales of tokens, factors of channels, outliers,
biases, and several formats in one table, against float64 over the numbers as stored."""

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_kv import (CODE, address, attend, attention_library, cache_fields, cached_layout, fields, ints, launch,
                     layout, page_library, relative_error, truth)
from test_cuda_kv import LIMIT, queries

from tersor.kv.formats import PageFormat, normal_levels
from tersor.kv.layout import Layout
from tersor.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
UNEVEN = (-127, -90, -71, -44, -30, -21, -9, -2, 1, 5, 17, 33, 60, 88, 101, 127)


def layout_of(*formats, dim=64, kv_heads=1, dtype=torch.float16, biased=False, rotary=None):
    """Groups of 32 channels become what 80 and 96 have near it."""
    near = {80: 16, 96: 48, 256: 64}.get(dim, 32)
    formats = [replace(page, value_group=dim if (dim, page.value_bits) == (96, 8) else near)
               if page.value_group == 32 else page for page in formats]
    if dim == 256:
        formats = [replace(page, key_tokens=0) for page in formats]
    return layout.check("test", Layout(kv_heads, dim, dim, dtype, 64, tuple(formats), rotary, biased))


def rotary_of(dim, interleaved=False):
    return Rotary(tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2)), interleaved)


def agree(cache, q, splits=1, seeds=(0, 1), **options):
    expected, total = truth(cache, q, **options)
    library = attention_library(cache.dim, cache.in_formats)
    out, lse, counters = attend(library, cache, q, splits, seeds=seeds, **options)
    assert relative_error(out, expected) < LIMIT[q.dtype]
    assert torch.equal(lse.isneginf(), total.isneginf())
    assert torch.allclose(lse.double(), total, atol=5e-4, rtol=0)
    return counters


FORMATS = {
    "plain": PageFormat(4, 4),
    "nuq 4": PageFormat(4, 4, key_levels=UNEVEN, value_levels=normal_levels(4)),
    "nuq 3, 2": PageFormat(3, 2, key_levels=normal_levels(3), value_levels=(-127, -80, 5, 127)),
    "nuq 2, 3": PageFormat(2, 3, key_levels=(-100, -1, 60, 127), value_levels=UNEVEN[::2]),
    "e4m3": PageFormat(8, 8, key_levels="e4m3", value_levels="e4m3"),
    "token": PageFormat(4, 4, key_axis="token"),
    "token 8": PageFormat(8, 4, key_axis="token"),
    "token nuq": PageFormat(3, 16, key_axis="token", key_levels=UNEVEN[::2]),
    "token e4m3": PageFormat(8, 2, key_axis="token", key_levels="e4m3"),
    "separable": PageFormat(16, 4, value_axis="separable"),
    "separable 8": PageFormat(2, 8, value_axis="separable"),
    "separable nuq": PageFormat(4, 2, value_axis="separable", value_levels=(-127, -80, 5, 127)),
    "outliers": PageFormat(3, 3, key_outliers=80, value_outliers=90),
    "outliers nuq": PageFormat(4, 2, key_levels=UNEVEN, value_levels=(-127, -80, 5, 127), key_outliers=41),
    "outliers separable": PageFormat(8, 4, value_axis="separable", value_outliers=1),
    "halves": PageFormat(2, 2, key_tokens=32, value_group=32),
    "halves 8": PageFormat(8, 8, key_tokens=32, value_group=32),
    "halves outliers": PageFormat(4, 4, key_tokens=32, key_levels=UNEVEN, value_group=32, key_outliers=50,
                                  value_outliers=40),
    "halves e4m3": PageFormat(8, 3, key_tokens=32, key_levels="e4m3", value_group=32, value_levels=UNEVEN[::2]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name):
    """8 and 16 rows, raw pages beside packed ones, a page that was cropped, biases on half of them."""
    for i, (dtype, count) in enumerate(((torch.float16, 3), (torch.bfloat16, 1), (torch.float16, 7))):
        made = layout_of(FORMATS[name], dtype=dtype, kv_heads=2, biased=i != 1)
        cache = cached_layout(made, [[(64, 1), (64, 1), (17, 0)], [(64, 1), (30, 1)]], seed=i)
        agree(cache, queries(2, 4, count, 64, dtype))


@pytest.mark.parametrize("dim", (80, 96, 128, 256))
def test_head_dimensions(dim):
    """Every part of a page, and one group of values for all channels."""
    first = PageFormat(4, 4, key_levels=UNEVEN, key_outliers=50, value_outliers=60)
    second = PageFormat(8, 8, key_axis="token", key_levels="e4m3", value_axis="separable", value_outliers=9)
    least = min(layout.value_groups(dim, 4))
    halves = PageFormat(4, 3, key_tokens=32, value_group=least)
    wide = PageFormat(3, 4, key_tokens=32, value_group=max(x for x in layout.value_groups(dim, 4) if x <= 128))
    made = layout_of(first, second, PageFormat(2, 3), halves, wide, dim=dim, biased=True)
    cache = cached_layout(made, [[(64, 1), (64, 2), (64, 3), (64, 4), (64, 5), (64, 1), (9, 0)]])
    for count in (1, 5):
        agree(cache, queries(1, 4, count, dim, torch.float16), 2)


def test_formats_of_one_table():
    """All of them, seven at once, in several splits."""
    for i in range(0, len(FORMATS), 7):
        formats = list(FORMATS.values())[i : i + 7]
        kinds = torch.randperm(len(formats), generator=torch.Generator().manual_seed(i)).add(1).tolist()
        cache = cached_layout(layout_of(*formats, biased=i == 7), [[(64, kind) for kind in kinds] * 2 + [(5, 0)]])
        q = queries(1, 2, 2, 64, torch.float16)
        agree(cache, q, 3, seeds=range(4))
        agree(cache, q, window=300, softcap=4.0)
        agree(cache, q, mask=torch.rand(1, 1, 2, cache.keys[0].shape[1]) < 0.5)


TURNED = ["plain", "nuq 4", "nuq 3, 2", "nuq 2, 3", "e4m3", "separable 8", "outliers", "outliers nuq",
          "outliers separable", "token", "token nuq", "token e4m3", "halves", "halves outliers", "halves e4m3"]


@pytest.mark.parametrize("name", TURNED)
def test_keys_before_rotary_embedding(name):
    """Packed keys are turned to their slots; of halves and of neighbours, some channels left as they are."""
    for i, rotary in enumerate((rotary_of(64), rotary_of(20), rotary_of(64, True), rotary_of(16, True))):
        made = layout_of(FORMATS[name], kv_heads=2, rotary=rotary, biased=i == 1, dtype=list(CODE)[i % 2])
        cache = cached_layout(made, [[(64, 1), (64, 1), (17, 0)], [(64, 1), (30, 1)]], seed=i)
        agree(cache, queries(2, 4, 1 if i % 2 else 5, 64, made.dtype))


@pytest.mark.parametrize("dim", (80, 96, 128))
def test_turned_keys_of_every_head_dim(dim):
    made = layout_of(PageFormat(4, 4, key_levels=UNEVEN, key_outliers=40), PageFormat(8, 8), dim=dim,
                     rotary=rotary_of(dim))
    cache = cached_layout(made, [[(64, 1), (64, 2), (64, 1), (9, 0)]])
    for count in (1, 5):
        agree(cache, queries(1, 4, count, dim, torch.float16), 2)


def test_extreme_ranges():
    made = layout_of(FORMATS["outliers"], FORMATS["token nuq"], FORMATS["e4m3"], FORMATS["separable"])
    agree(cached_layout(made, [[(64, 1), (64, 2), (64, 3), (64, 4)]], scale=40.0), queries(1, 4, 1, 64, torch.float16),
          scale=0.05)


def test_biases_hide():
    """One of minus infinity hides a token, or a whole page."""
    made = layout_of(FORMATS["nuq 4"], biased=True)
    cache = cached_layout(made, [[(64, 1), (64, 1), (20, 0)]])
    at = layout.parts(made, 1)["bias"][0]
    page = cache.pages["page 0.1"]
    start = cache.rows[0][1][0] - page.data_ptr() + at
    page[start : start + 256].view(torch.float32)[:] = -torch.inf
    cache.biases[0][:, 64:128] = -torch.inf
    agree(cache, queries(1, 2, 1, 64, torch.float16))


@pytest.mark.parametrize("dim, turned", [(64, 0), (80, 0), (128, 64)])
def test_residuals(dim, turned):
    """Low-rank parts of some packed pages, of several ranks, in two sequences and as many heads; in several splits."""
    random = torch.Generator().manual_seed(dim)
    made = layout_of(PageFormat(4, 8, rank=4), PageFormat(4, 4, value_outliers=20, rank=2), dim=dim, kv_heads=2,
                     rotary=rotary_of(turned) if turned else None)
    cache = cached_layout(made, [[(64, 1), (64, 2), (64, 1), (64, 0), (9, 0)], [(64, 2), (64, 1), (30, 0)]])
    q = queries(2, 4, 3, dim, torch.float16)
    table = torch.zeros(2, 5, 4, dtype=torch.int64)
    products, keep = torch.randn(2, 4, 3, 12, generator=random), []
    for b, p, column, rank in ((0, 0, 0, 4), (0, 1, 4, 2), (0, 2, 7, 4), (1, 0, 3, 1)):
        left = torch.randn(2, 2, rank, 64, generator=random).half()
        keys, values = (torch.randn(2, rank, dim, generator=random).half() * 0.3 for _ in range(2))
        part = slice(column, column + rank)
        products[b, :, :, part] = torch.einsum("hgnd,hrd->hgnr", q[b].view(2, 2, 3, dim).float(),
                                               keys.float()).reshape(4, 3, rank)
        table[b, p] = torch.tensor([left.data_ptr(), values.data_ptr(), column, rank])
        keep += [left, values]
        for held, i, right in ((cache.keys, 0, keys), (cache.values, 1, values)):
            held[b][:, 64 * p:64 * p + 64] += left[:, i].double().transpose(-1, -2) @ right.double()
    cache.pages |= {f"factor {i}": tensor for i, tensor in enumerate(keep)}
    for splits, options in ((1, {}), (3, {}), (1, dict(window=120, softcap=4.0))):
        expected, total = truth(cache, q, **options)
        out, lse, _ = attend(attention_library(dim, True), cache, q, splits, residual=(table, products), seeds=(0, 1),
                             **options)
        assert relative_error(out, expected) < LIMIT[q.dtype]
        assert torch.allclose(lse.double(), total, atol=5e-4, rtol=0)


def test_counters():
    """Bytes are read once, 16 at a time, and codes cost no bank conflicts."""
    for name in ("nuq 4", "nuq 3, 2", "e4m3", "token", "separable"):
        cache = cached_layout(layout_of(FORMATS[name], biased=True), [[(64, 1)] * 6])
        counters = attend(attention_library(64, True), cache, queries(1, 4, 1, 64, torch.float16), count=True)[2]
        for page in cache.pages:
            read = counters["total"]["global"][page]
            assert read["loaded"] == layout.layout_bytes(cache.layout, 1) and read["repeated"] == 0
            assert read["load_widths"]["16"] == read["loaded"]
        assert counters["regions"]["pages"]["shared"]["extra_cycles"] == 0, name


def test_sizes_are_those_of_the_kernels():
    """Page sizes of all formats, and how many outliers there may be."""
    size = attention_library(64).library.tersor_cuda_kv_format_bytes
    size.restype = ctypes.c_int64
    for dim in layout.DIMS:
        for biased in (False, True):
            made = layout_of(*list(FORMATS.values())[-7:], dim=dim, biased=biased)
            cache = cached_layout(made, [])
            for kind in range(1, 8):
                page = made.format(kind)
                assert size(cache_fields(cache), *ints(kind, page.key_bits, page.value_bits)) == \
                    layout.layout_bytes(made, kind), (dim, kind)
        for part, most in zip(("key", "value"), layout.most_outliers(dim)):
            cache = cached_layout(layout_of(PageFormat(4, 4, **{f"{part}_outliers": most}), dim=dim), [])
            assert size(cache_fields(cache), *ints(1, 4, 4)) > 0
            made = cache_fields(cache)
            made.held[5 if part == "key" else 6] = most + 1
            assert size(made, *ints(1, 4, 4)) == -1


@pytest.mark.parametrize("page, words", [
    (PageFormat(4, 4, key_axis="token", key_group=16), "key_group: found 16"),
    (PageFormat(4, 4, value_group=16), "value_group: found 16, accepted is 32, 64 channels of 4 bits"),
    (PageFormat(4, 4, key_tokens=16), "key_tokens: found 16"),
    (PageFormat(4, 4, key_tokens=32, key_axis="token"), "key_tokens: found 32"),
    (PageFormat(4, 4, key_outliers=557), "key_outliers: found 557"),
])  # fmt: skip
def test_layouts_are_refused(page, words):
    with pytest.raises(ValueError, match=words):
        layout_of(page)


def test_turned_keys_are_refused():
    for dim, page, rotary, words in ((256, FORMATS["nuq 4"], rotary_of(256), "head dimensions to 128"),
                                     (64, FORMATS["nuq 4"], rotary_of(22), "found 22 channels")):
        with pytest.raises(ValueError, match=words):
            layout_of(page, dim=dim, rotary=rotary)


# ---- packing -------------------------------------------------------------------------------------------------------


def pack(made, keys, values, kind, bias=None, seeds=(0, 1)):
    """Pages packed by the emulated kernel, and by the reference."""
    raw = layout.encode_page(made, keys, values, 0, bias)
    expected = layout.encode_page(made, keys, values, kind, bias)
    packed = torch.zeros_like(expected)
    page, cache = made.format(kind), cached_layout(made, [])
    jobs = torch.tensor([[raw[i].data_ptr(), packed[i].data_ptr()] for i in range(len(raw))])
    launch(page_library(), "tersor_cuda_kv_pack", [
        cache_fields(cache), *ints(kind if layout.format_numbers(made) else 0, page.key_bits, page.value_bits),
        address(jobs), *ints(len(raw)), ctypes.c_void_p(None)],
        {"jobs": jobs, "raw": raw, "packed": packed, **cache.pages}, ["packed"], seeds)
    return packed, expected


def numbers(dim, dtype, seed=0, pages=2, heads=2):
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(pages, heads, 64, dim, generator=random) * (torch.rand(dim, generator=random) * 3 + 0.1)
    v = torch.randn(pages, heads, 64, dim, generator=random)
    v[0, 0, 5], k[0, 0, :, 3] = 0.5, 0.25  # no range at all
    k[-1, -1], v[-1, -1, 1:] = 0, 0  # fewer outliers than there may be
    return k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("name", [name for name, page in FORMATS.items() if page.value_axis == "token"])
def test_pack_equals_the_reference(name):
    """To the bit, but for differences of outliers, which are within one place of float16."""
    for i, (dim, dtype) in enumerate([(64, torch.float16), (128, torch.bfloat16), (80, torch.float16)]):
        made = layout_of(FORMATS[name], dim=dim, dtype=dtype, kv_heads=2, biased=i == 0)
        k, v = numbers(dim, dtype, i)
        packed, expected = pack(made, k, v, 1, torch.randn(2, 2, 64) if made.biased else None)
        parts = layout.parts(made, 1)
        for part in ("keys", "bias", "values"):
            first, length = parts[part]
            assert torch.equal(packed[..., first:first + length], expected[..., first:first + length]), (part, dim)
        for part, lines in (("key_outliers", 32), ("value_outliers", dim // 2)):
            first, length = parts[part]
            got, wanted = (x[..., first:first + length].contiguous().view(torch.int16) for x in (packed, expected))
            start = -(-(lines + 1) // 8) * 8 if length else 0
            assert torch.equal(got[..., :start], wanted[..., :start]), (part, dim)
            assert torch.equal(got[..., start::2], wanted[..., start::2]), (part, dim)
            far = got[..., start + 1 :: 2].int() - wanted[..., start + 1 :: 2].int()
            assert not length or int(far.abs().max()) <= 1


@pytest.mark.parametrize("name", ("plain", "nuq 4", "e4m3", "outliers", "token", "halves outliers"))
def test_pack_of_turned_keys(name):
    """Keys are turned back in fp32: a code of many may be its neighbour, and so may all of a channel where its scale
    rounds the other way."""
    for i, rotary in enumerate((rotary_of(64), rotary_of(48), rotary_of(64, True))):
        made = layout_of(FORMATS[name], kv_heads=2, rotary=rotary, biased=i == 0)
        k, v = numbers(64, torch.float16, i)
        packed, expected = pack(made, k, v, 1)
        assert packed.eq(expected).double().mean() > 0.97
        got, wanted = layout.decode_page(made, packed, 1), layout.decode_page(made, expected, 1)
        assert relative_error(got[0] - k.double(), wanted[0] - k.double()) < 2e-2
        assert relative_error(got[1], wanted[1]) < 1e-4


def test_append_of_turned_keys():
    """Raw keys lie in the order of pairs."""
    for rotary in (rotary_of(64), rotary_of(20), rotary_of(64, True)):
        made = layout_of(FORMATS["nuq 4"], kv_heads=2, rotary=rotary)
        cache = cached_layout(made, [[(64, 0)]])
        fresh = torch.randn(2, 1, 2, 64, 64).half()
        table, used = cache.table
        struct = cache_fields(cache, table, used)
        launch(page_library(), "tersor_cuda_kv_append", [
            struct, fields(fresh[0], fresh[1], 64, *fresh[0].stride()[:3], *fresh[1].stride()[:3], None),
            ctypes.c_void_p(None)], {"table": table, "pages": used, "fresh": fresh, **cache.pages}, ["page 0.0"])
        page = cache.pages["page 0.0"]
        data = page[cache.rows[0][0][0] - page.data_ptr() :][: 2 * layout.layout_bytes(made, 0)].view(2, -1)
        keys, values = layout.decode_page(made, data, 0)
        assert torch.equal(keys, fresh[0, 0].double()) and torch.equal(values, fresh[1, 0].double())


@pytest.mark.parametrize("name", [name for name, page in FORMATS.items() if page.value_axis == "separable"])
def test_pack_of_separable_values(name):
    """Quotients are fp32: a code of many may be its neighbour."""
    for dim, dtype in ((64, torch.float16), (96, torch.bfloat16)):
        made = layout_of(FORMATS[name], dim=dim, dtype=dtype)
        k, v = numbers(dim, dtype, heads=1)
        v[1, 0, :, 7] = 0
        packed, expected = pack(made, k, v, 1)
        assert packed.eq(expected).double().mean() > 0.995
        got, wanted = layout.decode_page(made, packed, 1), layout.decode_page(made, expected, 1)
        assert relative_error(got[0], wanted[0]) < 1e-9
        assert relative_error(got[1] - v.double(), wanted[1] - v.double()) < 2e-2


def test_pack_of_what_is_not_finite():
    for page in (FORMATS["nuq 4"], FORMATS["e4m3"], FORMATS["token"], FORMATS["outliers"]):
        k, v = numbers(64, torch.float16, 3, 1, 1)
        k[0, 0, 3, 5], v[0, 0, 9, 1] = float("inf"), float("nan")
        made = layout_of(page)
        got, wanted = (layout.decode_page(made, data, 1) for data in pack(made, k, v, 1))
        for x, y in zip(got, wanted):
            assert torch.equal(x.isnan(), y.isnan()) and x.isnan().any()
            finite = y.nan_to_num(0)  # which may be nothing
            assert (x.nan_to_num(0) - finite).norm() <= 1e-4 * finite.norm()


def test_append_of_biases():
    """Biases come with the tokens; zeros where none are given."""
    made = layout_of(FORMATS["nuq 4"], kv_heads=2, biased=True)
    cache = cached_layout(made, [[(64, 0), (9, 0)], [(64, 0), (20, 0)]])
    table, used = cache.table
    for bias in (torch.randn(2, 2, 30), None):
        fresh = torch.randn(2, 2, 2, 30, 64).half()
        buffers = {"table": table, "pages": used, "fresh": fresh, "bias": bias, **cache.pages}
        launch(page_library(), "tersor_cuda_kv_append", [
            cache_fields(cache, table, used),
            fields(fresh[0], fresh[1], 30, *fresh[0].stride()[:3], *fresh[1].stride()[:3], bias),
            ctypes.c_void_p(None)],
            buffers, [name for name in buffers if name.startswith("page ")], (0, 1))
        for b, row in enumerate(cache.rows):
            held = []
            for p, (at, _, count, *_) in enumerate(row):
                page = cache.pages[f"page {b}.{p}"]
                size = 2 * layout.layout_bytes(made, 0)
                data = page[at - page.data_ptr() :][:size].view(2, -1)
                k, v = layout.decode_page(made, data, 0)
                held.append((k[:, :count], v[:, :count], layout.decode_bias(made, data, 0)[:, :count]))
            keys, values, biases = (torch.cat(x, 1)[:, -30:] for x in zip(*held))
            assert torch.equal(keys, fresh[0, b].double()) and torch.equal(values, fresh[1, b].double())
            assert torch.equal(biases, torch.zeros(2, 30) if bias is None else bias[b])
