"""Activations of 4, 6, 8 bits in the integer kernels: exact against int64, and every option against its definition."""

import itertools

import pytest
import torch
from test_cpu_int_linear_a8 import BFLOAT16, FLOAT16, FLOAT32, Weight, extreme_codes

from tersor import _C
from tersor.formats.integer import activation_codes, quantize_activations

pytestmark = pytest.mark.usefixtures("isa")

ROWS = (1, 5, 16, 33, 128)
ONE = torch.ones(1, 1)


def integers(m, k, bits, group, symmetric, seed=0):
    """Integers ``[m, k]`` whose groups reach their limits, so that every scale is 1 and rounding changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    x = torch.randint(-top if symmetric else 0, top + 1, (m, k), generator=generator)
    x[:, :: group or k] = top
    if not symmetric:
        x[1::2] *= -1  # zero points at both ends
    return x


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act", [4, 6, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_in_integers(bits, act, symmetric):
    """Unit scales: the result is an integer that fp32 holds, equal to the one of int64 arithmetic."""
    torch.manual_seed(bits)
    shapes = [(33, 97, 32, 32), (17, 250, 64, 0), (48, 224, 0, 64), (50, 130, 96, 32), (16, 255, 128, 128)]
    for m, (n, k, group, act_group) in zip(ROWS, shapes, strict=True):
        for zeros in (None, torch.randint(0, 2**bits, (n, -(-k // group) if group else 1))):
            weight = Weight.random(n, k, bits, group, zeros=zeros, scales=ONE)
            x = integers(m, k, act, act_group, symmetric, m)
            y = weight.call(x.float(), act=_C.Input(act, act_group, 1.0, symmetric))
            zero = torch.full((n, 1), 2 ** (bits - 1)) if zeros is None else zeros
            index = torch.arange(k) // (group or k) if zeros is not None else torch.zeros(k, dtype=torch.long)
            exact = x @ (weight.codes.long() - zero[:, index]).T
            assert exact.abs().max() < 2**24
            assert torch.equal(y.long(), exact) and torch.equal(y, exact.float())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act", [4, 6, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_at_the_limits(bits, act, symmetric):
    """Codes and activations at their ends, all of one sign or in the orders that fill 16-bit sums the most."""
    k, top = 96, 2 ** (act - 1) - 1 if symmetric else 2**act - 1
    signs = torch.ones(6, k, dtype=torch.long)
    signs[1] = -1
    signs[2, ::2] = -1 if symmetric else 0
    signs[3, 1::2] = -1 if symmetric else 0
    signs[4, (torch.arange(k) % 8) < 4] = -1 if symmetric else 0
    signs[5] = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(0))
    if not symmetric:
        signs[5, 0] = 1
        signs[3:5] *= -1
    for codes, m, group in itertools.product(extreme_codes(bits, 20, k), (1, 3, 6), (0, 32)):
        x = top * signs[-m:]
        if group:
            x[:, ::32] = torch.where(x.amin(1, keepdim=True) < 0, -top, top)
        y = Weight(codes, bits, 32, scales=ONE).call(0.5 * x, act=_C.Input(act, group, 1.0, symmetric))
        assert torch.equal(y, 0.5 * (x @ (codes.long() - 2 ** (bits - 1)).T))


OPTIONS = [(8, 32, 0.8, True), (8, 64, 1.0, True), (8, 0, 0.95, True), (6, 32, 1.0, True), (6, 96, 0.7, True),
           (4, 32, 1.0, True), (4, 0, 0.9, True), (4, 128, 0.5, True), (8, 0, 1.0, False), (8, 32, 0.9, False),
           (6, 64, 1.0, False), (4, 32, 0.8, False), (4, 0, 1.0, False)]


def awkward(k, dtype):
    """Rows that are zero, subnormal, huge, tied, one-sided, or have an outlier."""
    torch.manual_seed(0)
    x = torch.randn(26, k)
    x[1] = 0
    x[2] = 5e-39 * torch.randn(k)
    x[3] = 1e-44 * torch.randn(k)
    x[4, 7] = 3e38 if dtype is not FLOAT16 else 6e4
    x[5] = x[5].sign() * 0.3
    x[6, 32:64] = 0
    x[7] = torch.arange(k) - 45.0
    x[8] = (torch.arange(k) - 45) * 0.5 * 2.0**-100
    x[9] = x[9].abs()
    x[10] = -x[10].abs()
    x[11] = x[11].abs() + 3
    x[12:22] *= 10.0 ** torch.linspace(-37, 37, 10)[:, None]
    x[22] = torch.where(torch.arange(k) % 3 == 0, -3e38, 3e38) if dtype is not FLOAT16 else x[22]
    return x.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=["fp32", "bf16", "fp16"])
def test_rounding_is_the_definition_bit_for_bit(dtype, options):
    """Through an identity: what comes out are the rounded activations themselves."""
    k = 150
    codes = torch.full((k, k), 8, dtype=torch.uint8) + torch.eye(k, dtype=torch.uint8)
    identity = Weight(codes, 4, 0, scales=ONE)
    x = awkward(k, dtype)
    expected = quantize_activations(x, *options)
    assert (expected[2] != 0).any() or dtype is FLOAT16 or options[0] == 4
    for rows in (slice(0, 26), slice(0, 1), slice(2, 4), slice(3, 10), slice(22, 23)):
        y = identity.call(x[rows].contiguous(), act=_C.Input(*options))
        if options[0] == 8 and not options[3]:  # nine bits are two products, and one rounding more in fp32
            near = torch.finfo(dtype).eps if dtype is not FLOAT32 else 2**-22
            assert torch.allclose(y, expected[rows], rtol=near, atol=0), rows
        else:
            assert torch.equal(y, expected[rows]), rows


def test_static_scales_and_bits_of_blocks_are_the_definition():
    torch.manual_seed(0)
    k = 300
    codes = torch.full((k, k), 8, dtype=torch.uint8) + torch.eye(k, dtype=torch.uint8)
    identity = Weight(codes, 4, 0, scales=ONE)
    x = torch.randn(9, k)
    x[3] = 0
    for bits, group in ((8, 0), (8, 64), (6, 32), (4, 128)):
        scale = torch.rand(-(-k // group) if group else 1) * 0.02 + 0.01
        y = identity.call(x, act=_C.Input(bits, group, 1.0, True, scale.data_ptr()))
        assert torch.equal(y, quantize_activations(x, bits, group, scale=scale))
        assert (y.abs() <= (2 ** (bits - 1) - 1) * scale.max()).all()
    blocks = torch.tensor([4, 8, 4], dtype=torch.uint8)
    for group in (32, 64, 128):
        y = identity.call(x, act=_C.Input(8, group, 1.0, True, 0, blocks.data_ptr()))
        assert torch.equal(y, quantize_activations(x, 8, group, block_bits=blocks))
        assert torch.equal(y[:, :128], quantize_activations(x[:, :128], 4, group))
        assert torch.equal(y[:, 128:256], quantize_activations(x[:, 128:256], 8, group))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products_of_what_was_rounded(options):
    """Random weights with their own scales and zero points, against float64 of the very integers."""
    torch.manual_seed(0)
    for m, n, k, bits, group in ((1, 33, 97, 4, 32), (3, 20, 320, 6, 96), (9, 35, 576, 8, 128), (40, 49, 160, 3, 0)):
        weight = Weight.random(n, k, bits, group, m != 9)
        x, bias = torch.randn(m, k) + 0.5, torch.randn(n)
        q, scales = activation_codes(x, *options)
        seen = (q.double() * scales).flatten(-2)[:, :k]
        index = torch.arange(k) // (group if 0 < group < k else k)
        zero = 2 ** (bits - 1) if weight.zeros is None else weight.zeros.double()[:, index]
        w = (weight.codes.double() - zero) * weight.scales.double()[:, index]
        y = weight.call(x, bias, act=_C.Input(*options))
        size = seen.abs() @ (weight.codes.double() * weight.scales.double()[:, index]).abs().T + bias.abs()
        bound = size.clamp_min(seen.abs() @ torch.full((k, n), 2.0**bits, dtype=torch.float64)) * 2**-22
        assert ((y - (seen @ w.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_stand_alone_whatever_the_batch_and_threads(options):
    torch.manual_seed(0)
    weight = Weight.random(70, 1312, 5, 96, True)
    x, act = torch.randn(41, 1312), _C.Input(*options)
    alone = torch.cat([weight.call(row[None], act=act, threads=1) for row in x])
    for m, threads in ((2, 1), (3, 2), (5, 3), (9, 2), (17, 7), (41, 2)):
        assert torch.equal(weight.call(x[:m], act=act, threads=threads), alone[:m]), m


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zeros_give_the_bias_and_what_is_not_finite_stays_in_its_row(options):
    torch.manual_seed(0)
    weight, bias, act = Weight.random(20, 130, 4, 64, True), torch.randn(20), _C.Input(*options)
    clean = torch.randn(7, 130)
    clean[5] = 0
    expected = weight.call(clean, bias, act=act)
    assert torch.equal(expected[5], bias)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        x = clean.clone()
        x[2, 70] = value
        y, others = weight.call(x, bias, act=act), [0, 1, 3, 4, 5, 6]
        assert y[2].isnan().all() and torch.equal(y[others], expected[others])
    static = torch.full((5,), 0.1)
    x[2, 70] = float("inf")
    y = weight.call(x, bias, act=_C.Input(8, 32, 1.0, True, static.data_ptr()))
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("arguments,message", [
    ((5,), "act_bits is 5; accepted: 16"), ((8, 48), "act_group is 48; accepted: a multiple of 32"),
    ((8, -32), "act_group is -32"), ((4, 32, 0.0), "act_clip is 0; accepted: above 0"),
    ((4, 32, 1.5), "act_clip is 1.5"), ((4, 32, float("nan")), "act_clip is nan"),
])  # fmt: skip
def test_bad_options_are_refused_natively(arguments, message):
    with pytest.raises(ValueError, match=message):
        Weight.random(16, 64, 4, 32).call(torch.randn(2, 64), act=_C.Input(*arguments))
