"""Scales in two levels, integers of groups below floats of rows: the CPU kernels against int64 bit for bit, and the
format ``W4A8[scale=int8]``."""

import itertools

import pytest
import torch
from two_level import Weight

from tersor import _C, ops
from tersor.formats.integer import Int, activation_codes
from tersor.formats.two_level import TOP, expanded, most_group_scale
from tersor.ops_fused import BoundIntLinearFused, Producer, int_linear_fused

ROWS = (1, 5, 16, 33, 128)


def arguments(weight, bias=None):
    return weight.qweight, weight.scales, weight.zeros, bias, weight.n, weight.bits, weight.group


def integers(m, k, bits, group, symmetric, seed):
    """Integers ``[m, k]`` whose groups reach their limits, so that every activation scale is 1."""
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    x = torch.randint(-top if symmetric else 0, top + 1, (m, k), generator=torch.Generator().manual_seed(seed))
    x[:, :: group or k] = top
    if not symmetric:
        x[1::2] *= -1  # zero points at both ends
    return x


@pytest.mark.parametrize("act", [4, 6, 8])
@pytest.mark.parametrize("bits", range(2, 7))
def test_exact_in_integers(isa, bits, act):
    """Unit scales of rows: the result is the integer of int64 arithmetic, with one scale a token and with groups."""
    shapes = [(33, 97, 32, 0), (17, 250, 64, 0), (48, 224, 32, 96), (50, 130, 96, 0), (16, 600, 128, 128)]
    for m, (n, k, group, act_group) in zip(ROWS, shapes, strict=True):
        for symmetric, act_symmetric in itertools.product((True, False), repeat=2):
            weight = Weight(n, k, bits, group, symmetric, unit=True, seed=m)
            x = integers(m, k, act, act_group, act_symmetric, m)
            y = ops.int_linear.cpu(x.float(), *arguments(weight), act, act_group, 1.0, act_symmetric)
            exact = x.double() @ weight.integers.double().T  # exact as well
            assert exact.abs().max() < 2**24
            assert torch.equal(y, exact.float()), (m, symmetric, act_symmetric)


@pytest.mark.parametrize("bits", range(2, 7))
def test_exact_at_the_limits(isa, bits):
    """Codes and activations at their ends, in the orders that fill 16-bit sums the most."""
    n, k, top = 20, 1088, 2**bits - 1
    full = torch.full((n, k), top)
    alternating = torch.where(torch.arange(k) % 2 == 0, 0, full)
    signs = torch.ones(6, k, dtype=torch.long)
    signs[1] = -1
    signs[2, ::2] = signs[3, 1::2] = signs[4, torch.arange(k) % 8 < 4] = -1
    for codes, symmetric in itertools.product((torch.zeros_like(full), full, alternating, top - alternating),
                                              (True, False)):
        weight = Weight(n, k, bits, 32, symmetric, unit=True, codes=codes)
        for m in (1, 3, 6):
            x = 127 * signs[-m:]
            y = ops.int_linear.cpu(0.25 * x, *arguments(weight), 8, 0)
            exact = x.double() @ weight.integers.double().T
            scaled = exact.float() * 0.25  # to float from 32 bits, then by the scale of the token
            assert torch.equal(y, scaled)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_one_rounding_for_each_scale(isa, bits):
    """Real scales of rows and one a token: the integer, times the token's scale, times the row's, plus the bias."""
    weight, bias = Weight(70, 1312, bits, 96, False), torch.randn(70)
    x = torch.randn(41, 1312)
    x[3] = 0
    values, scales = activation_codes(x, 8, 0)
    totals = values.flatten(1)[:, :1312].double() @ weight.integers.double().T
    expected = totals.to(torch.int32).float() * scales[:, 0] * weight.channels.T + bias
    for m, threads in ((1, 1), (2, 2), (5, 3), (17, 2), (41, 2)):
        torch.set_num_threads(threads)
        assert torch.equal(ops.int_linear.cpu(x[:m], *arguments(weight, bias), 8, 0), expected[:m])
    torch.set_num_threads(2)
    assert torch.equal(expected[3], bias)
    x[2, 70] = float("nan")
    y, others = ops.int_linear.cpu(x, *arguments(weight, bias), 8, 0), [0, 1, *range(3, 41)]
    assert y[2].isnan().all() and torch.equal(y[others], expected[others])


@pytest.mark.parametrize("options", [(8, 32), (8, 0, 1.0, False), (4, 64, 0.9), (6, 128, 1.0, False), (16,)], ids=str)
def test_other_paths_are_near_the_definition(isa, options):
    """Groups of activations, asymmetric ones, and activations as they are."""
    for m, symmetric in ((1, True), (3, False), (40, True)):
        weight, x, bias = Weight(33, 300, 4, 64, symmetric), torch.randn(m, 300), torch.randn(33)
        y = ops.int_linear.cpu(x, *arguments(weight, bias), *options)
        truth = ops.int_linear.reference(x, *arguments(weight, bias), *options).double()
        assert (y - truth).abs().max() < 2e-5 * truth.abs().max()


def test_every_way_of_calling_is_the_same(isa):
    weights = [Weight(n, 288, 4, 64, False, seed=n) for n in (33, 16)]
    x, biases = torch.randn(7, 288), [torch.randn(33), torch.randn(16)]
    alone = [ops.int_linear.cpu(x, *arguments(w, b), 8, 0) for w, b in zip(weights, biases)]
    lists = [w.qweight for w in weights], [w.scales for w in weights], [w.zeros for w in weights], biases, [33, 16]
    together = ops.int_linear_multi.cpu(x, *lists, 4, 64, 8, 0)
    bound = [ops.BoundIntLinear(w.qweight, w.scales, w.zeros, (w.n, w.k), 4, 64, 8, 0) for w in weights]
    for found in (together, ops.BoundIntLinearMulti(bound)(x, biases), [b(x, c) for b, c in zip(bound, biases)]):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    producer = Producer(hadamard=32)
    turned = [ops.int_linear.cpu(producer(x), *arguments(w, b), 8, 0) for w, b in zip(weights, biases)]
    fused = BoundIntLinearFused(bound, producer)(x, biases)
    plain = int_linear_fused.cpu(x, None, *lists, 4, 64, 8, 0, hadamard=32)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    assert all((a - b).norm() < 5e-3 * b.norm() for a, b in zip(fused, turned, strict=True))
    pair = [Weight(20, 96, 4, 32, False, seed=s) for s in range(3)]
    ends, rows = torch.tensor([2, 2, 6], dtype=torch.int32), torch.randn(7, 96)
    y = ops.int_linear_grouped.cpu(rows, ends, *(torch.stack([getattr(w, name) for w in pair]) for name in
                                                 ("qweight", "scales", "zeros")), None, 20, 4, 32, 8, 0)
    assert torch.equal(y[:2], ops.int_linear.cpu(rows[:2], *arguments(pair[0]), 8, 0))
    assert torch.equal(y[2:6], ops.int_linear.cpu(rows[2:6], *arguments(pair[2]), 8, 0)) and not y[6].any()


def test_dequantize_is_exact():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = Weight(37, 100, 5, 32, False)
        w = ops.int_dequantize.cpu(weight.qweight, weight.scales, weight.zeros, 37, 100, 5, 32, dtype)
        assert torch.equal(w, weight.truth.to(dtype))
        assert torch.equal(w, ops.int_dequantize.reference(weight.qweight, weight.scales, weight.zeros, 37, 100, 5, 32,
                                                           dtype))


def test_what_the_operations_refuse():
    weight, x = Weight(16, 64, 4, 32), torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"scales: found torch.uint8 \[1, 2, 16\].*\[1, 6, 16\] of two levels"):
        ops.int_linear(x, weight.qweight, weight.scales[:, :2].contiguous(), None, None, 16, 4, 32, 8)
    with pytest.raises(ValueError, match="two levels with 8 bits, accepted is 2 to 6"):
        ops.int_linear(x, torch.zeros(1, 2, 512, dtype=torch.uint8), weight.scales, None, None, 16, 8, 32, 8)
    with pytest.raises(ValueError, match="dtype codes are 0 .x. and 4 .scales.; accepted.*3 two levels"):
        _C.int_linear(x.data_ptr(), 0, 2, 64, 64, weight.qweight.data_ptr(), weight.scales.data_ptr(), 4, 0, 0,
                      x.data_ptr(), 16, 16, 4, 32, 8, 1)


# -- the format -------------------------------------------------------------------------------------------------------


def matrix(n=48, k=288, dtype=torch.float32):
    """Rows and groups of different sizes, some lopsided, some outliers."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=random, dtype=torch.float64) * 10.0 ** torch.linspace(-3, 0, n).double()[:, None]
    w *= (torch.rand(n, -(-k // 32), generator=random) * 3 + 0.3).double().repeat_interleave(32, 1)[:, :k]
    w[::3, 32:64] = w[::3, 32:64].abs()
    w.view(-1)[::97] *= 5
    w[5] = 0
    return w.to(dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 7))
def test_what_is_fitted_fits_a_byte(bits, symmetric):
    w = matrix()
    fmt = Int(bits, 64, symmetric, 8, "int8")
    for search in (False, True):
        params = fmt.fit(w, search=search, dtype=torch.bfloat16)
        groups = params["group_scales"]
        assert groups.min() >= 1 and groups.max() <= most_group_scale(bits) and torch.equal(groups, groups.round())
        assert not symmetric or groups.max() == most_group_scale(bits)
        w_hat = fmt.project(3 * w, params)  # beyond the range: codes saturate
        sizes = (w_hat / params["channel_scales"]).abs()
        assert sizes.max() <= TOP and torch.equal(sizes, sizes.round())
        tensors = fmt.pack(w_hat, params)
        assert tensors["scales"].dtype is torch.uint8 and tensors["scales"].shape == (3, 9, 16)
        assert torch.equal(fmt.unpack(tensors, w.shape), w_hat)
        padding = torch.full_like(groups, 2.0 ** (bits - 1)) - params.get("zero_points", 2.0 ** (bits - 1))
        assert (padding * groups).abs().max() <= TOP, "what padding holds fits as well"


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_near_those_of_one_level(symmetric):
    """Group scales of some fifteen steps cost little, and a search gains."""
    w = matrix()
    errors = {}
    for scale, search in itertools.product(("fp32", "int8"), (False, True)):
        fmt = Int(4, 32, symmetric, 8, scale)
        errors[scale, search] = ((fmt.project(w, fmt.fit(w, search=search)) - w).square().mean(1)
                                 / w.square().mean(1).clamp_min(1e-30)).mean().item()
    per_row = Int(4, 0, symmetric, 8)
    coarse = ((per_row.project(w, per_row.fit(w)) - w).square().mean(1) / w.square().mean(1).clamp_min(1e-30)).mean()
    assert errors["int8", False] < 1.25 * errors["fp32", False] and errors["int8", True] < 1.25 * errors["fp32", True]
    assert errors["int8", True] < errors["int8", False] < 0.6 * coarse.item()


def test_importance_counts_in_a_search():
    w = matrix()
    fmt, importance = Int(4, 32, activation=8, scale_dtype="int8"), torch.rand(288) ** 4
    loss = {name: ((fmt.project(w, fmt.fit(w, search=True, importance=given)) - w).square() * importance).sum()
            for name, given in (("with", importance), ("without", None))}
    assert loss["with"] < loss["without"]


def test_refit_keeps_the_channel_scales():
    w = matrix()
    fmt = Int(4, 64, False, 8, "int8")
    params = fmt.fit(w)
    before = {name: params[name].clone() for name in ("scales", "group_scales", "channel_scales", "zero_points")}
    fmt.refit(params, 0.3 * w[:, 64:192], 64)
    for name in ("scales", "group_scales", "zero_points"):
        assert torch.equal(params[name][:, [0, 3, 4]], before[name][:, [0, 3, 4]])
    assert torch.equal(params["channel_scales"], before["channel_scales"])
    assert torch.equal(params["scales"], params["group_scales"] * params["channel_scales"])
    assert params["group_scales"][:, 1:3].mean() < 0.5 * before["group_scales"][:, 1:3].mean(), "smaller weights"


def test_stored_scales():
    weight = Weight(20, 96, 4, 32)
    assert weight.scales.shape == (2, 7, 16)
    whole = expanded(weight.scales).transpose(1, 2).flatten(0, 1)
    assert torch.equal(whole[:20], weight.group_scales * weight.channels) and not whole[20:].any()
    assert torch.equal(expanded(weight.scales[None])[0], expanded(weight.scales))


@pytest.mark.parametrize("arguments, words", [
    (dict(num_bits=8), "2 to 6 weight bits"), (dict(num_bits=7), "W7A8"), (dict(activation=16), "4, 6 or 8 bits"),
    (dict(group_size=0), "group=0"),
])  # fmt: skip
def test_formats_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Int(**{"num_bits": 4, "activation": 8, "scale_dtype": "int8", **arguments})
    with pytest.raises(ValueError, match="model, fp32, bf16, fp16, int8"):
        Int(4, scale_dtype="int4")
