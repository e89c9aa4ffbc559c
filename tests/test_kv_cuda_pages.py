"""`CudaPages` over the host-compiled kernels, against `Pages` and float64."""

import pytest
import torch
from cuda_cache import device  # noqa: F401
from cuda_kv import relative_error

from tersor.kv import cuda_layout
from tersor.kv.cuda_pages import SLAB_PAGES, CudaPages
from tersor.kv.formats import PageFormat, normal_levels
from tersor.kv.layout import Layout, reference_attention
from tersor.kv.pages import Pages
from tersor.kv.rotary import Rotary

DIM, HEADS, DTYPE = 64, 2, torch.bfloat16


def layout(key_bits=4, value_bits=4, dim=DIM, heads=HEADS, dtype=DTYPE):
    return Layout.uniform(heads, dim, dim, dtype, key_bits, value_bits, 64, cuda_layout.value_group(dim))


def pages(key_bits=4, value_bits=4, batch=2, recent=0, sink_pages=0, **options):
    return CudaPages(layout(key_bits, value_bits, **options), batch, recent, sink_pages, "cpu")


def tokens(count, batch=2, heads=HEADS, dim=DIM, dtype=DTYPE):
    return torch.randn(2, batch, heads, count, dim).to(dtype).unbind()


def query(batch=2, queries=1, heads=2 * HEADS, dim=DIM, dtype=DTYPE):
    return torch.randn(batch, heads, queries, dim).to(dtype)


def check_table(cache):
    """The device's table says what the host knows."""
    assert cache.used.tolist() == [len(cache.pages)] * cache.batch
    for i, page in enumerate(cache.pages):
        word = page.position | page.tokens << 32 | cuda_layout.entry_kind(cache.layout, page.kind) << 40
        assert cache.table[:, i].tolist() == [[address, word] for address in page.addresses()]
    assert cache.tokens == sum(cache.counts())


def check_same(ours, theirs):
    """As `Pages` hold it, but for numbers half-way between two codes, which the CPU's kernels round in float32."""
    assert ours.counts() == theirs.counts() and ours.tokens == theirs.tokens and ours.first == theirs.first
    assert [page.packed for page in ours.pages] == [page.packed for page in theirs.pages]
    for a, b in zip(ours.decode(), theirs.decode()):
        differ = (a != b).double().mean()
        assert a.shape == b.shape and differ < 3e-3 and relative_error(a, b) < 0.015, differ


def reference(cache, q, keys, values, scale=0.125, causal=True, window=0, mask=None, mask_first=0, **options):
    at = cache.first + torch.arange(keys.shape[2])
    own = cache.first + cache.tokens - q.shape[2] + torch.arange(q.shape[2]).view(-1, 1)
    visible = torch.ones(q.shape[2], len(at), dtype=torch.bool)
    if causal:
        visible &= at <= own
    if window:
        visible &= at > own - window
    visible = visible.expand(len(q), 1, -1, -1)
    if mask is not None:
        full = torch.zeros((*mask.shape[:3], cache.first + cache.tokens), dtype=torch.bool)
        full[..., mask_first:mask_first + mask.shape[3]] = mask
        visible = visible & full[..., cache.first:]
    return reference_attention(q, keys, values, scale, visible, options.get("softcap", 0.0), options.get("sinks"))


def attend(cache, q, *fresh, **options):
    held = cache.decode()  # before the step, which packs pages only after it has read them
    if fresh:
        held = [torch.cat((old, new.double()), 2) for old, new in zip(held, fresh)]
    out, lse = cache.attend(q, *(fresh or (None, None)), 0.125, log_sum_exp=True, **options)
    expected, expected_lse = reference(cache, q, *held, **options)
    assert relative_error(out, expected) < 4e-3, relative_error(out, expected)  # weights and results have 8 bits
    assert torch.allclose(lse.double(), expected_lse, atol=1e-3)
    check_table(cache)
    return out


@pytest.mark.parametrize("bits, recent, sink_pages", [((4, 4), 32, 1), ((8, 4), 0, 0), ((2, 3), 70, 0),
                                                      ((16, 8), 64, 2), ((16, 16), 0, 0)])
def test_the_same_pages_as_on_the_cpu(device, bits, recent, sink_pages):
    """What is packed when, and the numbers."""
    torch.manual_seed(0)
    ours = pages(*bits, recent=recent, sink_pages=sink_pages, heads=1)
    theirs = Pages(layout(*bits, heads=1), 2, recent, sink_pages)
    for count in (150, 1, 40, 5, 70, 1):
        fresh = tokens(count, heads=1)
        if count > 1:
            ours.append(*fresh)
            theirs.append(*fresh)
        else:
            q = query(heads=2)
            attend(ours, q, *fresh)
            theirs.attend(q, *fresh, 0.125)
        check_same(ours, theirs)
        check_table(ours)
    assert any(page.packed for page in ours.pages) == (bits != (16, 16))


def test_steps_masks_windows_and_sinks(device):
    torch.manual_seed(1)
    cache = pages(4, 8)
    cache.append(*tokens(190))
    sinks = torch.randn(4)
    attend(cache, query(), *tokens(1), softcap=2.0, sinks=sinks)
    attend(cache, query(queries=5), *tokens(5), window=70)
    mask = torch.rand(2, 1, 3, 150) > 0.3
    attend(cache, query(queries=3), *tokens(3), causal=False, mask=mask, mask_first=cache.tokens + 3 - 150)
    attend(cache, query(queries=2))
    assert device.calls.count("attention") == 4


@pytest.mark.parametrize("dim", [80, 128])
def test_other_head_dimensions(device, dim):
    torch.manual_seed(10)
    cache = pages(4, 8, batch=1, heads=1, dim=dim, dtype=torch.float16)
    cache.append(*tokens(70, 1, 1, dim, torch.float16))
    attend(cache, query(1, 1, 3, dim, torch.float16), *tokens(1, 1, 1, dim, torch.float16))


def test_launches_of_a_step(device):
    """A step appends and attends; every 64th one packs. Nothing else is launched by us, and no page is copied."""
    cache = pages(4, 4, batch=1)
    cache.append(*tokens(65, 1))
    device.calls.clear()
    for step in range(63):
        cache.attend(query(1), *tokens(1, 1), 0.125)
        assert device.calls == ["append", "attention"] + ["pack"] * (step == 62)
        device.calls.clear()


def test_crop_and_what_comes_after(device):
    torch.manual_seed(2)
    ours, theirs = pages(4, 4, recent=32, heads=1), Pages(layout(heads=1), 2, 32)
    for step in (200, -1, 3, -70, 1, -30, 90, -66, 70):
        if step < 0:
            ours.crop(-step)
            theirs.crop(-step)
        else:
            fresh = tokens(step, heads=1)
            ours.append(*fresh)
            theirs.append(*fresh)
        check_table(ours)
        check_same(ours, theirs)
    attend(ours, query(heads=2), *tokens(1, heads=1))
    ours.crop(10**6)
    assert not ours.tokens and not ours.pages and ours.used.tolist() == [0, 0]
    attend(ours, query(heads=2), *tokens(1, heads=1))


def test_beams_share_pages_and_copy_only_what_is_written(device):
    torch.manual_seed(3)
    ours, theirs = pages(4, 4, batch=3, recent=10, heads=1), Pages(layout(heads=1), 3, 10)
    fresh = tokens(120, 3, 1)
    ours.append(*fresh)
    theirs.append(*fresh)
    packed = ours.pages[0].memory.data_ptr()
    for sequences in ([1, 1, 0], [2, 0, 0, 1], [0, 0, 0, 0], [3, 1]):
        ours.select(sequences)
        theirs.select(sequences)
        check_table(ours)
        if len(set(sequences)) > 2:
            assert ours.pages[0].memory.data_ptr() == packed, "packed pages are shared"
        for _ in range(6):
            fresh, q = tokens(1, len(sequences), 1), query(len(sequences), heads=2)
            attend(ours, q, *fresh)
            theirs.attend(q, *fresh, 0.125)
        check_same(ours, theirs)
    assert len(ours.pages[0].memory) == 1, "one row is all that is left of the first page"


def test_windows_free_slabs(device):
    torch.manual_seed(4)
    cache = pages(4, 4, batch=1, heads=1)
    cache.append(*tokens(64 * 3, 1, 1))
    sizes = []
    for _ in range(10):
        cache.append(*tokens(64, 1, 1))
        cache.drop_before(cache.first + cache.tokens - 100)
        check_table(cache)
        sizes.append(cache.nbytes)
        assert cache.counts() == [64, 64]
    attend(cache, query(1, heads=2), *tokens(1, 1, 1), window=100)
    page = cuda_layout.page_bytes(DIM, 4, 4)
    assert max(sizes) <= 16 * 16 + 4 + 2 * SLAB_PAGES * page
    cache.crop(10**6)
    assert cache.nbytes <= 16 * 16 + 4 + SLAB_PAGES * page


def test_bytes_are_those_of_the_pages(device):
    cache = pages(4, 4, batch=2, heads=1)
    cache.append(*tokens(64 * 3 + 1, heads=1))
    page, raw = (2 * cuda_layout.page_bytes(DIM, *bits) for bits in ((4, 4), (16, 16)))
    assert cache.nbytes == 3 * page + raw + cache.table.nbytes + cache.used.nbytes
    assert cache.page_bits == page * 8 / (2 * 64 * 2 * DIM) == 4.5


def test_growing_prompts_go_through_little_memory(device, monkeypatch):
    """The prompt's raw pages are packed a chunk at a time; the result is the same."""
    torch.manual_seed(5)
    fresh, whole, parts = tokens(64 * 3 + 9, heads=1), pages(3, 3, heads=1), pages(3, 3, heads=1)
    whole.append(*fresh)
    monkeypatch.setattr("tersor.kv.cuda_pages.SCRATCH", 2 * 2 * cuda_layout.page_bytes(DIM, 16, 16))
    device.calls.clear()
    parts.append(*fresh)
    assert device.calls.count("pack") == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.decode(), parts.decode()))
    attend(parts, query(heads=2), *tokens(1, heads=1))


def test_tables_grow(device):
    torch.manual_seed(6)
    cache = pages(2, 2, batch=1, heads=1)
    cache._use(cache.table[:, :2].contiguous())  # little room
    for count in (64, 30, 64 * 2, 1, 64 * 2):
        cache.append(*tokens(count, 1, 1))
        check_table(cache)
    assert cache.table.shape[1] == 8 and len(cache.pages) == 6
    attend(cache, query(1, heads=2), *tokens(1, 1, 1))


def test_offload_and_prefetch(device):
    torch.manual_seed(7)
    ours, kept = pages(4, 4, recent=16, heads=1), pages(4, 4, recent=16, heads=1)
    fresh = tokens(150, heads=1)
    ours.append(*fresh)
    kept.append(*fresh)
    on_device = ours.nbytes
    for step in range(3):
        ours.offload()
        assert all(page.slab.memory is None for page in ours.pages) and ours.nbytes >= on_device
        hosts = {id(page.slab): page.slab.host for page in ours.pages if page.packed}
        if step % 2:
            ours.prefetch()
            check_table(ours)
        fresh, q = tokens(1, heads=1), query(heads=2)
        assert torch.equal(ours.attend(q, *fresh, 0.125), kept.attend(q, *fresh, 0.125))
        ours.offload()
        assert all(page.slab.host is hosts[id(page.slab)] for page in ours.pages if page.packed), "packed pages go once"
    for count in (60, 64, 10):
        fresh = tokens(count, heads=1)
        ours.append(*fresh)
        kept.append(*fresh)
        ours.offload()
    ours.crop(70)
    kept.crop(70)
    ours.offload()
    ours.select([1, 0])
    kept.select([1, 0])
    assert all(torch.equal(a, b) for a, b in zip(ours.decode(), kept.decode()))
    check_table(ours)


@pytest.mark.parametrize("changes, words", [
    (dict(dtype=torch.float32), "dtype: found torch.float32, accepted is torch.bfloat16"),
    (dict(key_dim=48, value_dim=48), "head dimension: found 48 for keys and 48"),
    (dict(value_dim=128), "head dimension: found 64 for keys and 128"),
    (dict(page_tokens=32), "page_tokens: found 32, accepted is 64"),
    (dict(formats=(PageFormat(4, 4, value_group=16),)), "value_group: found 16"),
    (dict(key_dim=256, value_dim=256, formats=(PageFormat(4, 4, rank=4),)), "rank: found 4 of 256"),
    (dict(key_dim=256, value_dim=256, formats=(PageFormat(4, 4, value_group=64, key_tokens=32),)), "group: found 32"),
])  # fmt: skip
def test_layouts_that_no_kernel_takes(changes, words):
    made = dict(kv_heads=2, key_dim=64, value_dim=64, dtype=DTYPE, page_tokens=64) | changes
    with pytest.raises(ValueError, match=f"tersor.Cache: layer 3: .*{words}"):
        CudaPages(Layout(**made), 1, device="cpu", where="Cache: layer 3")


def test_arguments_are_checked(device):
    cache = pages()
    cache.append(*tokens(70))
    for words, call in {
        r"keys: found torch.float32 \[2, 2, 1, 64\]": lambda: cache.append(*tokens(1, dtype=torch.float32)),
        r"keys: found .*\[3, 2, 1, 64\]": lambda: cache.attend(query(3), *tokens(1, 3), 0.125),
        "bias: found a tensor": lambda: cache.append(*tokens(1), torch.zeros(2, 2, 1)),
        "positions: found": lambda: cache.attend(query(), None, None, 0.1, positions=torch.tensor([3, 4])),
        "positions: .*": lambda: cache.mass(query(), torch.zeros(2, 4, 1), 0.1, positions=torch.tensor([3, 4])),
        "query: found 71 queries, accepted is at most the 70": lambda: cache.attend(query(queries=71), None, None, 0.1),
        "kind: found 2, accepted is 1 to 1": lambda: cache.append_packed(*tokens(64), 2),
        "keys: found 63 tokens, accepted is whole pages": lambda: cache.append_packed(*tokens(63), 1),
        "sequences: found": lambda: cache.select([0, 2]),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert cache.tokens == 70
    check_table(cache)


FORMATS = {
    "levels": PageFormat(4, 2, value_group=64, key_levels=normal_levels(4, 64, 0),
                         value_levels=normal_levels(2, 64, 0)),
    "e4m3": PageFormat(8, 8, key_levels="e4m3", value_levels="e4m3", value_group=64),
    "tokens": PageFormat(4, 4, key_axis="token", value_group=64),
    "separable": PageFormat(4, 4, value_axis="separable"),
    "outliers": PageFormat(2, 2, value_group=64, key_outliers=40, value_outliers=40),
}


FREQUENCIES = tuple(1000.0**-(i / 24) for i in range(24))
ROTARY = {"halves": Rotary(FREQUENCIES), "interleaved": Rotary(FREQUENCIES, True)}


@pytest.mark.parametrize("name", [*FORMATS, *ROTARY])
def test_formats(device, name):
    """Packed as the CPU packs them, and read."""
    torch.manual_seed(8)
    rotary = ROTARY.get(name)
    made = Layout(1, DIM, DIM, DTYPE, 64, (FORMATS[rotary and "outliers" or name],), rotary)
    ours, theirs = CudaPages(made, 2, 20, 1, "cpu"), Pages(made, 2, 20, 1)
    for count in (150, 1, 60, 1):
        fresh = tokens(count, heads=1)
        if count == 1:
            attend(ours, query(heads=2), *fresh)
            theirs.append(*fresh)
        else:
            ours.append(*fresh)
            theirs.append(*fresh)
        check_same(ours, theirs)
        check_table(ours)
    assert [page.packed for page in ours.pages] == [False, True, True, False]


def test_biases_several_formats_and_mass(device):
    torch.manual_seed(9)
    made = Layout(2, DIM, DIM, DTYPE, 64, (PageFormat(4, 4, value_axis="separable"), PageFormat(2, 2, value_group=64)),
                  biased=True)
    ours, theirs = CudaPages(made, 2, device="cpu"), Pages(made, 2)
    for count, kind in ((64, 2), (70, 0), (9, 0)):
        fresh, bias = tokens(count), torch.randn(2, 2, count)
        for pages_ in (ours, theirs):
            if kind:
                pages_.append_packed(*fresh, kind, bias)
            else:
                pages_.append(*fresh, bias)
        check_same(ours, theirs)
        check_table(ours)
        assert torch.equal(ours.biases(), theirs.biases())
    fresh, q, bias = tokens(3), query(queries=3), torch.randn(2, 2, 3)
    mask = torch.rand(2, 1, 3, ours.tokens + 3) > 0.2
    out, lse = (zip(*(p.attend(q, *fresh, 0.125, causal=False, mask=mask, bias=bias, log_sum_exp=True, softcap=20.0)
                      for p in (ours, theirs))))
    assert relative_error(*out) < 1e-2 and torch.allclose(*lse, atol=1e-3)
    for options in (dict(mask=mask), dict(position=20, causal=True)):
        options = {"causal": False, "softcap": 20.0} | options
        found = [p.mass(q, lse[1], 0.125, **options) for p in (ours, theirs)]
        assert found[0].shape == (2, 2, ours.tokens) and relative_error(*found) < 1e-2
    assert "mass" in device.calls
    with pytest.raises(ValueError, match="bias: found torch.float64"):
        ours.append(*tokens(1), torch.zeros(2, 2, 1).double())


def test_graphs_are_for_static_caches(device, monkeypatch):
    """What a replay would not do again is refused while a graph is captured."""
    cache = pages(heads=1)
    cache.append(*tokens(63, heads=1))
    device.calls.clear()
    with monkeypatch.context() as other:
        other.setattr("tersor.kv.cuda_pages.capturing", lambda device: True)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a CUDA graph being captured.*accepted is tersor.StaticCache"):
                cache.attend(query(heads=2), *tokens(1, heads=1), 0.125)
    assert not device.calls and cache.tokens == 63
    attend(cache, query(heads=2), *tokens(1, heads=1))
