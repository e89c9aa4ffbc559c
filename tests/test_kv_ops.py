"""Operations of the cache against float64 over what is stored, on every instruction set."""

from dataclasses import replace

import pytest
import torch

from tersor import _C, ops_kv
from tersor.kv.layout import Layout

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
BITS = [(16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (16, 4), (4, 16)]
SHAPES = [(64, 64, 64, 64), (80, 80, 80, 32), (96, 96, 32, 128), (128, 128, 64, 64), (256, 256, 128, 32),
          (32, 16, 16, 32)]  # key_dim, value_dim, value_group, page_tokens


pytestmark = pytest.mark.usefixtures("one_thread")


def make(bits, shape, dtype, pages=3, batch=2, heads=2, seed=0):
    """A layout, raw pages, and the tokens in them."""
    key_dim, value_dim, group, tokens = shape
    layout = Layout.uniform(heads, key_dim, value_dim, dtype, *bits, tokens, group)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, pages * tokens, key_dim, generator=generator)
    keys = (keys * (1 + 4 * (torch.arange(key_dim) % 7 == 3)) + torch.arange(key_dim) % 3).to(dtype)  # uneven channels
    values = torch.randn(batch, heads, pages * tokens, value_dim, generator=generator).to(dtype)
    raw = []
    for i in range(pages):
        page = torch.zeros(batch, heads, layout.page_bytes(False), dtype=torch.uint8)
        ops_kv.kv_append(page, keys[:, :, i * tokens:(i + 1) * tokens], values[:, :, i * tokens:(i + 1) * tokens], None,
                         0, layout.numbers())
        raw.append(page)
    return layout, raw, keys, values


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def some_shapes(bits, dtype):
    """All shapes with float32 and few with the others: dtypes differ in how they are loaded, not in what is done."""
    return SHAPES if dtype is torch.float32 and bits in ((4, 4), (3, 3)) else SHAPES[sum(bits) % 3::3]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", BITS)
def test_append_and_pack(isa, bits, dtype):
    for shape in some_shapes(bits, dtype):
        layout, raw, keys, values = make(bits, shape, dtype)
        tokens = layout.page_tokens
        for i, page in enumerate(raw):
            ours = keys[:, :, i * tokens:(i + 1) * tokens], values[:, :, i * tokens:(i + 1) * tokens]
            for stored, given in zip(layout.decode(page, False, dtype), ours):
                assert torch.equal(stored, given)
            if not layout.packs:
                continue
            packed = ops_kv.kv_pack(page, 1, layout.numbers(), dtype)
            truth = ops_kv.kv_pack.reference(page, 1, layout.numbers(), dtype)
            ranges = ours[0].double().aminmax(dim=2, keepdim=True), \
                ours[1].double().unflatten(-1, (-1, shape[2])).aminmax(dim=-1, keepdim=True)
            for part, (stored, exact, given) in enumerate(zip(layout.decode(packed, True), layout.decode(truth, True),
                                                              ours)):
                # One code differs where a float32 quotient rounds to the other side.
                assert ((stored - exact).abs() > 1e-6).double().mean() < 1e-2
                if bits[part] == 16:
                    assert torch.equal(stored, given.double())
                    continue
                step = (ranges[part].max - ranges[part].min) / (2**bits[part] - 1)
                error = (stored - given.double()).abs()
                error = error if part == 0 else error.unflatten(-1, (-1, shape[2]))
                # At most half a step, and the rounding of scale and minimum.
                assert (error <= step * 0.51 + 0.004).all()
                assert error.max() > 0


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("bits", BITS)
def test_attention(isa, bits, dtype):
    for shape in some_shapes(bits, dtype):
        layout, raw, _, _ = make(bits, shape, dtype)
        page = layout.page_tokens
        kind = int(layout.packs)
        pages = [ops_kv.kv_pack(p, 1, layout.numbers(), dtype) if kind else p for p in raw[:2]] + raw[2:]
        tokens, kinds = [page, page - 5, page - 9], [kind, kind, 0]  # one that was cropped, one being filled
        total = sum(tokens)
        generator = torch.Generator().manual_seed(1)
        for queries, heads in ((1, 2), (1, 8), (3, 14)):
            q = torch.randn(2, heads, queries, layout.key_dim, generator=generator).to(dtype)
            mask = torch.rand(2, 1, queries, total, generator=generator) > 0.3
            for seen, sinks, cap, window in ((None, None, 0.0, 0), (mask, torch.randn(heads), 5.0, 0),
                                             (None, None, 0.0, page),
                                             (mask[:1, :, :, :total - 4], None, 0.0, page + 9)):
                arguments = (q, pages, tokens, kinds, [], seen, sinks, None, layout.key_dim**-0.5, cap, True, window,
                             7, 7 + total - queries, layout.numbers())
                out, total_score = ops_kv.kv_attention(*arguments)
                truth, score = ops_kv.kv_attention.reference(*arguments)
                assert relative(out, truth) < LIMIT[dtype], (shape, queries, heads)
                assert (total_score - score).abs().max() < 2e-5 * (1 + score.abs().max())


def test_long_caches_do_not_depend_on_threads(isa):
    layout, raw, _, _ = make((4, 4), (64, 64, 64, 64), torch.float32, pages=40, batch=1)
    pages = [ops_kv.kv_pack(p, 1, layout.numbers(), torch.float32) for p in raw]
    q = torch.randn(1, 8, 1, 64)
    arguments = (q, pages, [64] * 40, [1] * 40, [], None, None, None, 0.3, 0.0, True, 0, 0, 2559, layout.numbers())
    truth, _ = ops_kv.kv_attention.reference(*arguments)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops_kv.kv_attention(*arguments)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert relative(results[0], truth) < 2e-5


def test_nothing_seen_gives_zero(isa):
    layout, raw, _, _ = make((8, 8), (32, 32, 32, 32), torch.float32)
    q = torch.randn(2, 2, 1, 32)
    mask = torch.zeros(2, 1, 1, 96, dtype=torch.bool)
    for pages, tokens, seen in ((raw, [32] * 3, mask), ([], [], None)):
        out, score = ops_kv.kv_attention(q, pages, tokens, [0] * len(pages), [], seen, None, None, 1.0, 0.0, True, 0, 0,
                                         95, layout.numbers())
        assert (out == 0).all() and score.isneginf().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_head_alone(isa, bad):
    layout, _, keys, values = make((4, 4), (32, 32, 32, 32), torch.float32, pages=1)
    keys[0, 1, 3, 5] = values[1, 0, 2, 7] = bad
    page = torch.zeros(2, 2, layout.page_bytes(False), dtype=torch.uint8)
    ops_kv.kv_append(page, keys, values, None, 0, layout.numbers())
    packed = ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32)
    out, _ = ops_kv.kv_attention(torch.randn(2, 2, 1, 32), [packed], [32], [1], [], None, None, None, 1.0, 0.0, True, 0,
                                 0, 31, layout.numbers())
    assert not out[0, 0, 1].isfinite().any() and not out[1, 0, 0].isfinite().all()
    assert out[0, 0, 0].isfinite().all() and out[1, 0, 1].isfinite().all()


def test_constant_and_extreme_groups(isa):
    layout = Layout.uniform(1, 16, 16, torch.float32, 2, 2, 32, 16)
    for keys in (torch.zeros(1, 1, 32, 16), torch.full((1, 1, 32, 16), -3.25), torch.full((1, 1, 32, 16), 1e30),
                 torch.full((1, 1, 32, 16), 1e-30)):
        page = torch.zeros(1, 1, layout.page_bytes(False), dtype=torch.uint8)
        ops_kv.kv_append(page, keys, keys, None, 0, layout.numbers())
        for stored in layout.decode(ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32), True):
            assert stored.isfinite().all()
            assert ((stored - keys.double().clamp(-65504, 65504)).abs() < 1e-6).all() or keys.max() > 65504


def test_registered_operations():
    layout, raw, keys, values = make((4, 3), (32, 16, 16, 32), torch.float32, pages=2)
    numbers = layout.numbers()
    packed = ops_kv.kv_pack(raw[0], 1, numbers, torch.float32)
    q = torch.randn(2, 4, 2, 32)
    torch.library.opcheck(torch.ops.tersor.kv_pack.default, (raw[0], 1, numbers, torch.float32))
    torch.library.opcheck(torch.ops.tersor.kv_append.default, (raw[1], keys[:, :, :4], values[:, :, :4], None, 28,
                                                                  numbers))
    torch.library.opcheck(torch.ops.tersor.kv_attention.default,
                          (q, [packed, raw[1]], [32, 20], [1, 0], [], None, None, None, 0.2, 0.0, True, 0, 0, 50,
                           numbers))
    score = torch.ones(2, 4, 2)
    torch.library.opcheck(torch.ops.tersor.kv_mass.default,
                          (q, score, [packed, raw[1]], [32, 20], [1, 0], [], None, None, 0.2, 0.0, True, 0, 0, 50,
                           numbers))
    again = torch.zeros_like(raw[0])
    ops_kv.kv_append.reference(again, keys[:, :, :32], values[:, :, :32], None, 0, numbers)
    assert torch.equal(again, raw[0])


def test_what_is_refused():
    layout, raw, keys, values = make((4, 4), (32, 32, 32, 32), torch.float32, pages=1)
    numbers = layout.numbers()
    q = torch.randn(2, 4, 1, 32)

    def wrong(**changes):
        return replace(layout, **changes).numbers()

    def attend(query=q, pages=raw, tokens=(32,), kinds=(0,), segments=(), mask=None, sinks=None, positions=None,
               window=0, layout=numbers):
        return ops_kv.kv_attention(query, list(pages), list(tokens), list(kinds), list(segments), mask, sinks,
                                   positions, 1.0, 0.0, True, window, 0, 31, layout)

    attend()
    for change, message in (
            ({"query": q.half()}, "pages\\[0\\]"), ({"query": q[..., :16]}, "query: found"),
            ({"query": q[:, :3]}, "query: found"), ({"query": q.double()}, "dtype: found torch.float64"),
            ({"pages": [raw[0][..., 1:]]}, "pages\\[0\\]: found"), ({"kinds": (1,)}, "pages\\[0\\]: found"),
            ({"kinds": (2,)}, "kind of pages\\[0\\]: found 2"),
            ({"segments": (torch.zeros(2, 2, 1, 64).half(),)}, "segments\\[0\\]: found"),
            ({"positions": torch.zeros(2).long()}, "positions: found"),
            ({"tokens": (33,)}, "tokens\\[0\\]: found 33"), ({"tokens": ()}, "lists of one length"),
            ({"mask": torch.ones(2, 1, 2, 32, dtype=torch.bool)}, "mask: found"),
            ({"mask": torch.ones(2, 1, 1, 32)}, "mask: found"), ({"sinks": torch.ones(3)}, "sinks: found"),
            ({"window": -1}, "window"), ({"layout": numbers[:-1]}, "layout: found"),
            ({"layout": wrong(key_dim=24)}, "key_dim: found 24"),
            ({"layout": wrong(page_tokens=48)}, "page_tokens: found 48")):
        with pytest.raises(ValueError, match=message):
            attend(**change)
    for arguments, message in (
            ((raw[0], keys, values, None, 1), "slot: found 1 for 32"),
            ((raw[0], keys[:1], values, None, 0), "keys: found"),
            ((raw[0], keys, values[:, :, :4], None, 0), "values: found"),
            ((raw[0], keys, values, torch.zeros(2, 2, 32), 0), "bias: found"),
            ((raw[0][:, :1], keys, values, None, 0), "page: found")):
        with pytest.raises(ValueError, match=message):
            ops_kv.kv_append(*arguments, numbers)
    with pytest.raises(ValueError, match="raw: found"):
        ops_kv.kv_pack(raw[0][..., :64], 1, numbers, torch.float32)
    with pytest.raises(ValueError, match="value_group is 24"):
        _C.Kv(1, 1, 32, 32, 0, 32, False, [[4, 4, 0, 24, 0, 0, 0, 0, 0, 0]], 0, False, 0).page_bytes(1)
    kv = _C.Kv(1, 1, 32, 32, 0, 32, False, [[4, 4, 0, 32, 0, 0, 0, 0, 0, 0]], 0, False, 0)
    with pytest.raises(ValueError, match="page is 0"):
        kv.append(0, 0, q.data_ptr(), q.data_ptr(), 1, (0, 0, 0), (0, 0, 0), 0, 1)
    with pytest.raises(ValueError, match="kind is 2"):
        kv.page_bytes(2)
