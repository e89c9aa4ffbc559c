"""The cache on CUDA, host-executed: attention, append and pack against float64 and the reference of the layout."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_kv import (CODE, address, attend, attention_library, cached, fields, ints, launch, layout, page_library,
                     relative_error, table_of, truth)

pytestmark = pytest.mark.usefixtures("one_thread")
# The output's own rounding is 2e-4 and 1.7e-3 of it.
LIMIT = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
RAW, FOUR = (64, 16, 16), (64, 4, 4)


def agree(cache, q, splits=1, seeds=(0, 1), **options):
    expected, total = truth(cache, q, **options)
    out, lse, counters = attend(attention_library(cache.dim), cache, q, splits, seeds=seeds, **options)
    assert relative_error(out, expected) < LIMIT[q.dtype]
    assert torch.equal(lse.isneginf(), total.isneginf())
    assert torch.allclose(lse.double(), total, atol=5e-4, rtol=0)
    assert not out[total.isneginf().transpose(1, 2)].any()
    return out, counters


def queries(batch, heads, count, dim, dtype, seed=1):
    return torch.randn(batch, heads, count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("dim", layout.DIMS)
def test_every_head_dim_and_bits(dim, bits):
    """8 and 16 rows a block, groups of 1, 4 and 8 query heads, a page that is being filled, two lengths."""
    page = (64, bits, bits)
    for dtype, (group, count) in zip(itertools.cycle(CODE), ((1, 1), (4, 2), (8, 3))):
        cache = cached(dim, 2, dtype, [[page, page, (17, 16, 16)], [page, (1, 16, 16)]], seed=bits)
        agree(cache, queries(2, 2 * group, count, dim, dtype))


@pytest.mark.parametrize("key_bits, value_bits", [(8, 4), (4, 2), (16, 8), (2, 16), (3, 8)])
def test_mixed_bits_within_a_table(key_bits, value_bits):
    page = (64, key_bits, value_bits)
    cache = cached(64, 1, torch.bfloat16, [[page, RAW, (64, value_bits, key_bits), page, (9, 16, 16)]])
    agree(cache, queries(1, 4, 2, 64, torch.bfloat16))


@pytest.mark.parametrize("last", (1, 63, 64))
def test_page_borders(last):
    """One page, and pages that a crop left unfilled, raw and packed."""
    for pages in ([(last, 16, 16)], [(last, 4, 4)], [RAW, (last, 8, 8)], [FOUR, (last, 4, 4), (last, 16, 16)]):
        agree(cached(64, 1, torch.float16, [pages]), queries(1, 4, 1, 64, torch.float16))


def test_lengths_from_nothing_to_many_pages():
    """A sequence without pages gives zeros; the list of pages of a warp goes round several times."""
    cache = cached(64, 1, torch.float16, [[], [(1, 16, 16)], [(64, 2, 2)] * 170 + [(5, 16, 16)], [FOUR] * 7])
    for splits in (1, 3):
        agree(cache, queries(4, 2, 1, 64, torch.float16), splits, seeds=(0,))


@pytest.mark.parametrize("splits", (1, 2, 3, 7))
def test_splits(splits):
    """The result is the same to the bit in eight orders of threads and blocks (asserted by `launch`)."""
    cache = cached(64, 2, torch.float16, [[FOUR] * 9 + [(3, 16, 16)], [FOUR] * 2])
    agree(cache, queries(2, 8, 1, 64, torch.float16), splits, seeds=range(8))
    agree(cache, queries(2, 2, 11, 64, torch.float16), splits, sinks=torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize("window", (1, 64, 65, 200))
def test_windows(window):
    cache = cached(64, 1, torch.float16, [[FOUR] * 5 + [(10, 16, 16)], [FOUR, (64, 16, 16)]])
    for count, splits in ((1, 1), (70, 2)):
        agree(cache, queries(2, 2, count, 64, torch.float16), splits, window=window)


def test_pages_that_nobody_sees_are_not_read():
    cache = cached(64, 1, torch.float16, [[FOUR] * 6 + [(10, 16, 16)]])
    q = queries(1, 4, 1, 64, torch.float16)
    counters = attend(attention_library(64), cache, q, window=80, count=True)[2]
    read = counters["total"]["global"]
    assert [p for p in range(7) if read.get(f"page 0.{p}", {}).get("loaded")] == [4, 5, 6]


def test_softcap_sinks_and_scale():
    cache = cached(64, 2, torch.float16, [[FOUR, FOUR, (20, 16, 16)]])
    q = queries(1, 8, 2, 64, torch.float16)
    agree(cache, q, softcap=3.0)
    agree(cache, q, softcap=30.0, sinks=torch.linspace(-3, 6, 8), scale=0.4)
    agree(cache, q, 2, sinks=torch.linspace(-3, 6, 8))


def test_padding_and_positions():
    """`first` hides what comes before; rows that see nothing give zeros. Queries may sit anywhere."""
    cache = cached(64, 1, torch.float16, [[FOUR, FOUR, (20, 16, 16)], [FOUR, FOUR, (20, 16, 16)]])
    q = queries(2, 2, 6, 64, torch.float16)
    agree(cache, q, first=torch.tensor([70, 145], dtype=torch.int32))
    agree(cache, q, positions=torch.tensor([30, 64], dtype=torch.int32))
    agree(cache, q, causal=False, positions=torch.tensor([30, 64], dtype=torch.int32), window=40)


def test_masks():
    """Beside causal order, window and padding; of one batch entry or head for all, transposed, of some positions only;
    a row that sees nothing, and pages seen whole by position alone."""
    cache = cached(64, 2, torch.float16, [[FOUR, (64, 2, 8), FOUR, (20, 16, 16)], [FOUR, FOUR, RAW, (20, 16, 16)]])
    random = torch.Generator().manual_seed(5)
    for count, splits in ((1, 2), (3, 1), (6, 1)):
        q, mask = queries(2, 8, count, 64, torch.float16), torch.rand(2, 8, count, 212, generator=random) < 0.6
        agree(cache, q, splits, mask=mask)
        agree(cache, q, mask=mask[:1, :1].expand(2, 8, -1, -1), causal=False, window=100)
        agree(cache, q, mask=mask[:1], mask_first=30, first=torch.tensor([70, 0], dtype=torch.int32))
        agree(cache, q, mask=mask[:, :, :, 50:150].mT.contiguous().mT, mask_first=50)
        mask[1, 3, 0] = False
        agree(cache, q, mask=mask, sinks=torch.linspace(-2, 2, 8))


@pytest.mark.parametrize("dim", (64, 256))
def test_prefill_over_packed_history(dim):
    """Fresh tokens after history: causal within the fresh part, several row tiles, queries of any stride."""
    cache = cached(dim, 1, torch.bfloat16, [[FOUR] * 3 + [(64, 16, 16), (6, 16, 16)]])
    q = queries(1, 70, 4, dim, torch.bfloat16).transpose(1, 2)
    agree(cache, q, seeds=(0,))


@pytest.mark.parametrize("dtype", CODE)
def test_extreme_ranges(dtype):
    """Channels of very unequal size, and logits far apart: maxima that move from page to page."""
    cache = cached(64, 1, dtype, [[FOUR, (64, 2, 8), (64, 8, 4), RAW]], scale=40.0)
    agree(cache, queries(1, 4, 1, 64, dtype), scale=0.05)
    agree(cached(64, 1, dtype, [[(64, 8, 8)] * 2], scale=2e-3), queries(1, 4, 1, 64, dtype))


@pytest.mark.parametrize("bits", (16, 4))
def test_what_is_not_finite_stays_so(bits):
    """A NaN reaches the sequence and head that it is in, and no other; one past a page's tokens reaches nobody."""
    for part in ("keys", "values"):
        cache = cached(64, 2, torch.float16, [[(64, bits, bits)] * 2] * 2)
        k, v = torch.randn(2, 2, 64, 64).half().unbind()
        (k if part == "keys" else v)[1, 5, 7] = float("nan")
        data = layout.encode(k, v, bits, bits)
        page = cache.pages["page 1.0"]
        begin = cache.rows[1][0][0] - page.data_ptr()
        page[begin : begin + data.numel()] = data.flatten()
        out, lse, _ = attend(attention_library(64), cache, queries(2, 4, 1, 64, torch.float16))
        bad = out.isnan().any(-1)[:, 0]
        assert bad.tolist() == [[False] * 4, [False, False, True, True]]
        assert not lse[0].isnan().any()


def test_counters():
    """Each byte of a page is read once, 16 at a time, and no cycle of shared memory is lost in the loop over pages."""
    for dim, bits in itertools.product(layout.DIMS, (2, 3, 4, 8, 16)):
        cache = cached(dim, 2, torch.float16, [[(64, bits, bits)] * 6], seed=2)
        _, _, counters = attend(attention_library(dim), cache, queries(1, 8, 1, dim, torch.float16), 2, count=True)
        total = counters["total"]["global"]
        for name in cache.pages:
            read = total[name]
            assert read["loaded"] == 2 * layout.page_bytes(dim, bits, bits), (dim, bits)
            assert read["repeated"] == 0 and read["load_widths"]["16"] == read["loaded"]
            assert read["sectors"] == read["minimum_sectors"]
        loop = counters["regions"]["pages"]
        assert loop["shared"]["matrix"]["requests"] == 0
        assert loop["shared"]["extra_cycles"] == 0 < loop["shared"]["cycles"], (dim, bits)
        # For each record 8 products of keys and 8 of values; below 8 bits one of keys with ones.
        products = 2 * 6 * dim // 16 * (16 + (bits < 8))
        assert sum(counters["total"]["mma"].values()) == products
        assert counters["total"]["barriers"] <= 2 * 2 * 12


# ---- append and pack -----------------------------------------------------------------------------------------------


def raw_pages(kv_heads, dim, counts):
    return [[torch.full((kv_heads, layout.page_bytes(dim, 16, 16) // 2), float("nan"), dtype=torch.float16)
             for _ in row] for row in counts]


@pytest.mark.parametrize("dim", layout.DIMS)
@pytest.mark.parametrize("fresh", (1, 7, 150))
def test_append(dim, fresh):
    """The last tokens of unequal sequences, across pages; slots before and after keep what they held."""
    counts = [[64, 64, 64, 20], [30, 64, 64, 3]]
    pages = raw_pages(2, dim, counts)
    rows = [[(page.data_ptr(), sum(row[:i]), row[i], 16, 16) for i, page in enumerate(mine)]
            for row, mine in zip(counts, pages)]
    table, used = table_of(rows)
    x = torch.randn(2, fresh, 2, 2, dim + 4).half()[..., :dim]
    keys, values = x[:, :, 0].transpose(1, 2), x[:, :, 1].transpose(1, 2)
    buffers = {"table": table, "pages": used, "fresh": x,
               **{f"page {b}.{p}": page for b, mine in enumerate(pages) for p, page in enumerate(mine)}}
    launch(page_library(), "tersor_cuda_kv_append", [
        fields(table, used, 2, table.shape[1], 2, dim, 2, *[0] * 6),
        fields(keys, values, fresh, *keys.stride()[:3], *values.stride()[:3], None), ctypes.c_void_p(None)],
        buffers, [name for name in buffers if name.startswith("page ")], seeds=(0, 1))
    for b, mine in enumerate(pages):
        stored = [layout.decode(page.view(torch.uint8), dim, 16, 16, torch.float16, torch.float16) for page in mine]
        total, position = sum(counts[b]), 0
        for page, (k, v) in enumerate(stored):
            for slot in range(64):
                index = position + slot - (total - fresh)
                held = slot < counts[b][page] and index >= 0
                for got, given in ((k, keys), (v, values)):
                    assert torch.equal(got[:, slot], given[b, :, index]) if held else got[:, slot].isnan().all()
            position += counts[b][page]


def pack(raw, dim, dtype, key_bits, value_bits, seeds=(0, 1)):
    """[pages, heads, bytes] packed by the emulated kernel."""
    packed = torch.zeros(*raw.shape[:2], layout.page_bytes(dim, key_bits, value_bits), dtype=torch.uint8)
    jobs = torch.tensor([[raw[i].data_ptr(), packed[i].data_ptr()] for i in range(len(raw))])
    launch(page_library(), "tersor_cuda_kv_pack", [
        fields(*[None] * 4, raw.shape[1], dim, CODE[dtype], *[0] * 6), *ints(0, key_bits, value_bits), address(jobs),
        *ints(len(raw)), ctypes.c_void_p(None)], {"jobs": jobs, "raw": raw, "packed": packed}, ["packed"], seeds)
    return packed


@pytest.mark.parametrize("dim", layout.DIMS)
def test_pack_equals_the_reference_to_the_bit(dim):
    for i, (key_bits, value_bits) in enumerate([(2, 8), (3, 3), (4, 4), (8, 2), (16, 4), (4, 16)]):
        dtype = list(CODE)[i % 2]
        random = torch.Generator().manual_seed(i)
        k, v = (torch.randn(2, 2, 2, 64, dim, generator=random) * 10.0 ** (3 * i - 8)).to(dtype).unbind()
        k[0, 0, :, 3] = 2.5  # no range at all
        v[0, 1, 7] = torch.arange(dim).to(dtype) / 2  # halves, which go up
        packed = pack(layout.encode(k, v, 16, 16), dim, dtype, key_bits, value_bits)
        assert torch.equal(packed, layout.encode(k, v, key_bits, value_bits)), (key_bits, value_bits, dtype)


def test_jobs_that_are_none():
    raw = layout.encode(*torch.randn(2, 2, 1, 64, 64).half().unbind(), 16, 16)
    packed = torch.full((2, 1, layout.page_bytes(64, 4, 4)), 7, dtype=torch.uint8)
    jobs = torch.tensor([[0, packed[0].data_ptr()], [raw[1].data_ptr(), packed[1].data_ptr()], [raw[0].data_ptr(), 0]])
    launch(page_library(), "tersor_cuda_kv_pack", [
        fields(*[None] * 4, 1, 64, 2, *[0] * 6), *ints(0, 4, 4), address(jobs), *ints(3), ctypes.c_void_p(None)],
        {"jobs": jobs, "raw": raw, "packed": packed}, ["packed"])
    assert packed[0].eq(7).all() and not packed[1].eq(7).all()


def test_pack_of_what_is_not_finite():
    for dtype in CODE:
        k, v = torch.randn(2, 1, 1, 64, 64).to(dtype).unbind()
        k[0, 0, 3, 5], v[0, 0, 9, 1] = float("inf"), float("nan")
        keys, values = layout.decode(pack(layout.encode(k, v, 16, 16), 64, dtype, 4, 4), 64, 4, 4, dtype)
        assert keys[..., 5].isnan().all() and keys.isnan().sum() == 64
        assert values[:, :, 9].isnan().all() and values.isnan().sum() == 64


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(dim=72), "head_dim is 72; accepted on CUDA: 64, 80"),
    (dict(dim=128), "head_dim 128: not in this build"),
    (dict(heads=3), "a multiple of kv_heads = 2"),
    (dict(dtype=0), "dtype is 0"),
    (dict(stride=66), "8-byte aligned rows"),
    (dict(splits=0), "splits is 0"),
    (dict(splits=2), "partials and counters"),
    (dict(window=-1), "window is -1"),
    (dict(softcap=-1.0), "softcap is -1"),
    (dict(table_pages=0), "table_pages is 0"),
    (dict(out=None), "out: accepted is an 8-byte"),
    (dict(mask_first=-1), "mask_first, mask_tokens are -1, 0"),
    (dict(residuals=24, formats=True), "residuals and residual_query: accepted are addresses"),
    (dict(residuals=32, dim=256, formats=True), "residuals: accepted on CUDA is none where head_dim is 256"),
])  # fmt: skip
def test_the_launcher_refuses(changes, words):
    a = dict(dim=64, heads=4, dtype=2, stride=64, splits=1, window=0, softcap=0.0, table_pages=1, out=True,
             mask_first=0, residuals=0, formats=False) | changes
    x, table = torch.zeros(4, 64).half(), torch.zeros(1, 2, dtype=torch.int64)
    used = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        launch(attention_library(64, a["formats"]), "tersor_cuda_kv_attention", [
            fields(table, used, 1, a["table_pages"], 2, a["dim"], a["dtype"], *[0] * 6),
            fields(x, a["heads"], 1, 256, a["stride"], 64, x if a["out"] else None, None, None, None, a["window"], 1,
                   None, *[0] * 4, a["mask_first"], 0, None, a["splits"], None, None, a["residuals"],
                   x, 4),
            ctypes.c_float(1.0), ctypes.c_float(a["softcap"]), ctypes.c_void_p(None)], {"x": x}, [])


def test_the_plan_fills_the_device():
    plan, splits = attention_library(64).library.tersor_cuda_kv_attention_plan, ctypes.c_int64()

    def planned(batch, heads, kv_heads, dim, count, pages):
        assert plan(*ints(batch, heads, kv_heads, dim, count, pages), 132, *ints(228 * 1024), ctypes.byref(splits)) == 0
        return splits.value

    assert planned(8, 32, 8, 128, 1, 512) == 2 * 132 // 64
    assert planned(1, 32, 8, 128, 1, 512) == 2 * 132 // 8
    assert planned(1, 32, 8, 128, 1, 20) == 2, "eight pages for a split at least"
    assert planned(64, 32, 8, 128, 1, 512) == 1
    assert planned(1, 8, 8, 64, 1, 100000) == 3 * 132 // 8


SANITIZED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
import test_cuda_kv as kv
import test_cuda_kv_formats as formats
from emulation import Emulated
native = Emulated(Path({library!r}))
kv.page_library = formats.page_library = lambda: native
for dim, fresh in ((80, 7), (128, 70)):
    kv.test_append(dim, fresh)
    kv.test_pack_equals_the_reference_to_the_bit(dim)
for name in ("outliers nuq", "token e4m3"):
    formats.test_pack_equals_the_reference(name)
formats.test_pack_of_separable_values("outliers separable")
formats.test_append_of_biases()
print("clean", flush=True)
"""


def test_sanitizers_find_nothing():
    """Append and pack under AddressSanitizer and UBSan; the attention kernel takes minutes to compile with them."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    native = page_library(sanitize=True)
    script = SANITIZED.format(tests=str(Path(__file__).parent), library=str(native.path))
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "clean" and done.returncode == 0, done.stderr[-4000:]
