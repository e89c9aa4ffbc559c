"""Every format of packed pages: packing against the reference, attention against float64 over what is stored."""

import pytest
import torch

from tersor import ops_kv
from tersor.kv.formats import positions
from tersor.kv.layout import Layout, PageFormat, normal_levels
from tersor.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {
    "levels 4": PageFormat(4, 4, key_levels=normal_levels(4), value_levels=normal_levels(4)),
    "levels 3": PageFormat(3, 3, key_levels=normal_levels(3), value_levels=normal_levels(3)),
    "levels 2": PageFormat(2, 2, key_levels=(-100, -20, 10, 127), value_levels=(-127, 0, 10, 90)),
    "e4m3": PageFormat(8, 8, key_levels="e4m3", value_levels="e4m3"),
    "outliers": PageFormat(2, 3, key_outliers=40, value_outliers=30, value_group=16),
    "outliers, levels": PageFormat(3, 2, value_levels=normal_levels(2), key_outliers=25, value_outliers=40),
    "outliers, e4m3": PageFormat(8, 8, key_levels="e4m3", value_levels="e4m3", key_outliers=20, value_outliers=20),
    "token": PageFormat(4, 4, key_axis="token"),
    "token, groups": PageFormat(3, 4, key_axis="token", key_group=16, key_outliers=10),
    "token, e4m3": PageFormat(8, 2, key_axis="token", key_levels="e4m3"),
    "separable": PageFormat(4, 3, value_axis="separable", value_outliers=25),
    "keys in 16 bits": PageFormat(16, 2, value_outliers=10, value_levels=normal_levels(2)),
    "values in 16 bits": PageFormat(2, 16, key_outliers=10),
}
SHAPES = [(64, 64, 64), (80, 80, 32), (96, 96, 32), (128, 128, 64), (256, 256, 32), (32, 16, 96)]


def turning(channels, interleaved=False):
    return Rotary(tuple(1000.0**(-2 * i / channels) for i in range(channels // 2)), interleaved)


def heavy(*shape, seed=0):
    """Numbers with a heavy tail, and channels of their own size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * x.abs() * (1 + 4 * (torch.arange(shape[-1]) % 7 == 3)) + torch.arange(shape[-1]) % 3


def raw_page(layout, seed=0, batch=2):
    keys, values = (heavy(batch, layout.kv_heads, layout.page_tokens, dim, seed=seed + i).to(layout.dtype)
                    for i, dim in enumerate((layout.key_dim, layout.value_dim)))
    bias = torch.randn(keys.shape[:3]) if layout.biased else None
    page = torch.zeros(batch, layout.kv_heads, layout.page_bytes(0), dtype=torch.uint8)
    ops_kv.kv_append(page, keys, values, bias, 0, layout.numbers())
    return page, keys, values, bias


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def attend(layout, pages, tokens, kinds, query, segments=(), **options):
    default = {"mask": None, "sinks": None, "positions": None, "scale": 0.3 * query.shape[-1]**-0.5, "softcap": 0.0,
               "causal": True, "window": 0, "first": 0, "position": sum(tokens) - query.shape[2]}
    return (query, list(pages), tokens, kinds, list(segments), *(default | options).values(), layout.numbers())


def cases():
    for number, name in enumerate(FORMATS):
        for turn in range(3):
            yield pytest.param(name, turn, SHAPES[(number + 2 * turn) % len(SHAPES)], id=f"{name}-{turn}")


@pytest.mark.parametrize("name, turn, shape", list(cases()))
def test_packing_and_attention(isa, name, turn, shape):
    key_dim, value_dim, tokens = shape
    rotary = (None, turning(key_dim), turning(16, True))[turn]
    for dtype in (torch.float32, torch.bfloat16) if turn else (torch.float32, torch.float16):
        layout = Layout(2, key_dim, value_dim, dtype, tokens, (PageFormat(4, 4), FORMATS[name]), rotary, turn == 1)
        page, keys, values, bias = raw_page(layout)
        assert torch.equal(page, layout.encode(keys, values, 0, bias))
        packed = ops_kv.kv_pack(page, 2, layout.numbers(), dtype)
        truth = ops_kv.kv_pack.reference(page, 2, layout.numbers(), dtype)
        for stored, exact in zip(layout.decode(packed, 2), layout.decode(truth, 2)):
            # One code differs where a float32 quotient rounds to the other side.
            assert ((stored - exact).abs() > 2e-6 * (1 + exact.abs())).double().mean() < 1e-2
        assert torch.equal(layout.decode_bias(packed, 2), layout.decode_bias(page, 0))
        other = ops_kv.kv_pack(page, 1, layout.numbers(), dtype)
        held, kinds = [tokens, tokens - 5, tokens, tokens - 9], [2, 2, 1, 0]  # one of them was cropped
        generator = torch.Generator().manual_seed(1)
        for queries, heads, options in ((1, 8, {}), (3, 6, {"softcap": 5.0, "sinks": torch.randn(6)}),
                                        (1, 2, {"window": tokens})):
            query = torch.randn(2, heads, queries, key_dim, generator=generator).to(dtype)
            if queries > 1:
                options["mask"] = torch.rand(2, 1, queries, sum(held), generator=generator) > 0.2
            arguments = attend(layout, (packed, packed, other, page), held, kinds, query, **options)
            out, score = ops_kv.kv_attention(*arguments)
            exact, total = ops_kv.kv_attention.reference(*arguments)
            limit = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
            assert relative(out, exact) < limit, (dtype, queries)
            assert (score - total).abs().max() < 2e-5 * (1 + total.abs().max())


@pytest.mark.parametrize("name", ["outliers", "separable", "token, groups", "outliers, e4m3"])
def test_every_part_of_a_page_is_read(name):
    layout = Layout(1, 64, 64, torch.float32, 64, (FORMATS[name],), turning(64), True)
    page, _, _, _ = raw_page(layout, batch=1)
    packed = ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32)
    query = torch.randn(1, 2, 1, 64)
    before = ops_kv.kv_attention(*attend(layout, [packed], [64], [1], query))[0]
    for part, (first, length) in layout.parts(1).items():
        if not length or part == "page":
            continue
        changed = packed.clone()
        if part.endswith("index"):
            changed[..., first:first + length:2] ^= 1  # the neighbouring channel
        else:
            changed[..., first:first + length] = changed[..., first:first + length].roll(length // 4 * 2, -1)
        after, _ = ops_kv.kv_attention(*attend(layout, [changed], [64], [1], query))
        truth, _ = ops_kv.kv_attention.reference(*attend(layout, [changed], [64], [1], query))
        assert relative(after, before) > 1e-4 and relative(after, truth) < 2e-5, part


def error(layout, page, query):
    """Of attention over the packed page, against the raw one."""
    out = ops_kv.kv_attention(*attend(layout, [ops_kv.kv_pack(page, 1, layout.numbers(), layout.dtype)],
                                      [layout.page_tokens], [1], query, scale=0.05))[0]
    return relative(out, ops_kv.kv_attention.reference(*attend(layout, [page], [layout.page_tokens], [0], query,
                                                               scale=0.05))[0])


def test_levels_and_outliers_beat_integers_of_at_least_as_many_bytes():
    query = torch.randn(2, 8, 4, 64)
    plain = Layout(2, 64, 64, torch.float32, 64, (PageFormat(3, 3, value_group=64),))
    few = Layout(2, 64, 64, torch.float32, 64, (PageFormat(2, 2, value_group=64, key_levels=normal_levels(2),
                                                          value_levels=normal_levels(2), key_outliers=60,
                                                          value_outliers=60),))
    assert few.page_bytes(1) <= plain.page_bytes(1)
    x = torch.randn(2, 2, 2, 64, 64).double()
    x = x * (1 + 40 * (torch.rand(x.shape) < 0.01))  # one in a hundred is far out
    page = plain.encode(x[0].float(), x[1].float(), 0)
    assert error(few, page, query) < 0.8 * error(plain, page, query)
    without = Layout(2, 64, 64, torch.float32, 64, (PageFormat(2, 2, value_group=64),))
    levels = Layout(2, 64, 64, torch.float32, 64, (PageFormat(2, 2, value_group=64, key_levels=normal_levels(2),
                                                             value_levels=normal_levels(2)),))
    normal = plain.encode(*torch.randn(2, 2, 2, 64, 64), 0)
    assert error(levels, normal, query) < 0.97 * error(without, normal, query)


def test_errors_fall_with_bits():
    query = torch.randn(2, 8, 4, 64)
    for make in (lambda b: PageFormat(b, b, key_levels=normal_levels(b), value_levels=normal_levels(b)),
                 lambda b: PageFormat(b, b, key_outliers=20, value_outliers=20),
                 lambda b: PageFormat(b, b, key_axis="token", key_group=32, value_axis="separable")):
        errors = []
        for bits in (2, 3, 4):
            layout = Layout(2, 64, 64, torch.float32, 64, (make(bits),), turning(64))
            page = layout.encode(*torch.randn(2, 2, 2, 64, 64, generator=torch.Generator().manual_seed(0)), 0)
            errors.append(error(layout, page, query))
        assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_turned_keys_keep_still_at_any_offset(isa, interleaved):
    """Keys that are alike before rotary embedding cost almost nothing once they are turned back."""
    rotary = turning(48, interleaved)
    layouts = [Layout(2, 64, 64, torch.float32, 64, (PageFormat(2, 8),), r) for r in (rotary, None)]
    still = torch.randn(2, 2, 1, 64) * 3 + 0.05 * torch.randn(2, 2, 200, 64)
    keys = rotary.turn(still, torch.arange(200))[:, :, 77:141]  # as a model gives them, at positions from 77 on
    values, query = torch.randn(2, 2, 64, 64), torch.randn(2, 4, 1, 64)
    with_turn, without = (error(layout, layout.encode(keys, values, 0), query) for layout in layouts)
    assert with_turn < 0.02 and without > 10 * with_turn


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_spoils_its_own_head_alone(isa, name, bad):
    layout = Layout(2, 32, 32, torch.float32, 32, (FORMATS[name],), turning(32))
    keys, values = torch.randn(2, 2, 2, 32, 32)
    keys[0, 1, 3, 5] = values[1, 0, 2, 7] = bad
    page = torch.zeros(2, 2, layout.page_bytes(0), dtype=torch.uint8)
    ops_kv.kv_append(page, keys, values, None, 0, layout.numbers())
    packed = ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32)
    out, _ = ops_kv.kv_attention(*attend(layout, [packed], [32], [1], torch.randn(2, 2, 1, 32)))
    spoilt = out[0, 0, 1]
    # An infinite raw key of 16 bits may only hide a token or be all there is.
    assert not spoilt.isfinite().any() or (name == "keys in 16 bits" and bad == float("inf"))
    assert not out[1, 0, 0].isfinite().all()
    assert out[0, 0, 0].isfinite().all() and out[1, 0, 1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -3.25, 1e30, 1e-30])
@pytest.mark.parametrize("name", FORMATS)
def test_constant_and_extreme_vectors(isa, name, value):
    if value == 1e30 and "16 bits" in name:
        value = 6e4
    layout = Layout(1, 32, 32, torch.float32, 32, (FORMATS[name],))
    keys = torch.full((1, 1, 32, 32), value)
    page = torch.zeros(1, 1, layout.page_bytes(0), dtype=torch.uint8)
    ops_kv.kv_append(page, keys, keys, None, 0, layout.numbers())
    for stored in layout.decode(ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32), 1):
        assert stored.isfinite().all()
        if value < 6e4:
            assert ((stored - value).abs() <= 0.07 * abs(value) + 1e-6).all()


def test_levels():
    for bits in (2, 3, 4):
        levels = normal_levels(bits)
        assert len(levels) == 2**bits and -127 <= levels[0] < levels[-1] <= 127
        assert levels == tuple(-level for level in reversed(levels))
        steps = torch.tensor(levels).diff()
        assert steps[len(steps) // 2] == steps.min() < steps[0]  # closest where most numbers are
    even = (-127, -42, 42, 127)
    assert (positions(even) - torch.arange(4)).abs().max() < 0.01
    layouts = [Layout(1, 32, 32, torch.float32, 32, (PageFormat(2, 2, key_levels=x, value_levels=x),))
               for x in (None, even)]
    page = layouts[0].encode(*torch.randn(2, 1, 1, 32, 32), 0)
    plain, spread = (ops_kv.kv_pack(page, 1, layout.numbers(), torch.float32) for layout in layouts)
    assert (plain != spread).double().mean() < 0.03  # levels at equal steps are integers


def test_what_is_refused():
    good = {"kv_heads": 2, "key_dim": 64, "value_dim": 32, "dtype": torch.float32, "page_tokens": 64}
    for page, message in (
            (PageFormat(5, 4), "key_bits: found 5"), (PageFormat(4, 4, value_group=24), "value_group: found 24"),
            (PageFormat(4, 4, key_group=32), "key_group: found 32"),
            (PageFormat(4, 4, key_axis="row"), "key_axis: found 'row'"),
            (PageFormat(4, 4, value_axis="separable", value_group=16), "value_group: found 16"),
            (PageFormat(4, 4, key_levels="e4m3"), "key_levels: found 'e4m3' of 4 bits"),
            (PageFormat(2, 4, key_levels=(0, 1, 1, 2)), "key_levels: found"),
            (PageFormat(2, 4, key_levels=(0, 1, 2)), "key_levels: found"),
            (PageFormat(4, 16, value_outliers=3), "value_outliers: found 3"),
            (PageFormat(4, 4, key_outliers=-1), "key_outliers: found -1"),
            (PageFormat(4, 4, rank=17), "rank: found 17")):
        with pytest.raises(ValueError, match=message):
            Layout(**good, formats=(page,)).check("cache")
        with pytest.raises(ValueError, match="tersor.kv_pack"):
            ops_kv.kv_pack(torch.zeros(1, 2, 1, dtype=torch.uint8), 1, Layout(**good, formats=(page,)).numbers(),
                           torch.float32)
    for pairs in (33, 0):
        with pytest.raises(ValueError, match=f"inv_freq: found {pairs} pairs"):
            Layout(**good, rotary=Rotary((1.0,) * pairs)).check("cache")
    wide = Layout(1, 1024, 16, torch.float32, 128, (PageFormat(4, 4, key_outliers=1),))
    with pytest.raises(ValueError, match="at most 65536"):
        wide.check("cache")
