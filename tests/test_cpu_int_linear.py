"""Integer weights on the CPU with exact activations: every instruction set against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of the result to 16 bits dominates there; bfloat16 products are exact, sums are in float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def tiles(values, fill):
    """[n, groups] -> [ceil(n/16), groups, 16]"""
    n, groups = values.shape
    padded = torch.full((-n % 16, groups), fill, dtype=values.dtype)
    return torch.cat([values, padded]).reshape(-1, 16, groups).transpose(1, 2).contiguous()


def pack(codes, bits, threads=2):
    n, k = codes.shape
    packed = torch.full((-(-n // 16), -(-k // 32), 64 * bits), 0xA5, dtype=torch.uint8)
    _C.int_pack(codes.data_ptr(), n, k, bits, packed.data_ptr(), threads)
    return packed


class Weight:
    """A random weight in the packed layout, beside its float64 truth."""

    def __init__(self, n, k, bits, group, symmetric, scale_dtype, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.n, self.k, self.bits, self.group, self.scale_dtype = n, k, bits, group, scale_dtype
        size = group if 0 < group < k else k
        groups = -(-k // size)
        self.codes = torch.randint(0, 2**bits, (n, k), generator=random, dtype=torch.uint8)
        scales = (torch.rand(n, groups, generator=random) * 0.1 + 0.01).to(scale_dtype)
        # GPTQ checkpoints can hold a zero point of 2^bits, one past the largest code.
        top = min(2**bits, 255)
        zeros = torch.randint(0, top + 1, (n, groups), generator=random, dtype=torch.int64).to(torch.uint8)
        if symmetric:
            zeros.fill_(2 ** (bits - 1))
        index = torch.arange(k) // size
        self.truth = (self.codes.double() - zeros.double()[:, index]) * scales.double()[:, index]
        self.qweight = pack(self.codes, bits)
        self.scales = tiles(scales, 1.0)
        self.zeros = None if symmetric else tiles(zeros, 0)

    def projection(self, y, bias):
        return (
            self.qweight.data_ptr(), self.scales.data_ptr(), 0 if self.zeros is None else self.zeros.data_ptr(),
            0 if bias is None else bias.data_ptr(), y.data_ptr(), self.n, y.stride(0),
        )  # fmt: skip


def linear(x, weights, biases=None, threads=2, act_bits=16):
    """Runs int_linear for one weight, int_linear_multi for several; outputs are views into wider rows."""
    biases = biases or [None] * len(weights)
    m, k = x.shape
    outputs = [torch.full((m, w.n + 5), float("nan"), dtype=x.dtype)[:, : w.n] for w in weights]
    first = weights[0]
    head = (x.data_ptr(), DTYPES.index(x.dtype), m, k, x.stride(0))
    projections = [w.projection(y, b) for w, y, b in zip(weights, outputs, biases)]
    scale_dtype = DTYPES.index(first.scale_dtype)
    if len(weights) == 1:
        qweight, scales, zeros, bias, y, n, ldy = projections[0]
        _C.int_linear(
            *head, qweight, scales, scale_dtype, zeros, bias, y, n, ldy, first.bits, first.group, act_bits, threads
        )
    else:
        _C.int_linear_multi(*head, projections, scale_dtype, first.bits, first.group, act_bits, threads)
    for y, w in zip(outputs, weights):
        assert torch.isnan(y.as_strided((m, 5), (y.stride(0), 1), w.n)).all(), "wrote past the row"
    return outputs


def relative_error(y, x, weight, bias=None):
    truth = x.double() @ weight.truth.T
    if bias is not None:
        truth += bias.double()
    return float((y.double() - truth).norm() / truth.norm().clamp_min(1e-30))


SHAPES = [(33, 97), (16, 32), (1, 1), (48, 384), (130, 513), (17, 1000)]


def covering():
    """Every bits x m, with the other choices rotating so that all pairs of values meet."""
    groups = itertools.cycle((32, 0, 128, 64, 96))
    dtypes = itertools.cycle(DTYPES)
    scale_dtypes = itertools.cycle((torch.float16, torch.float32, torch.bfloat16, torch.bfloat16))
    shapes = itertools.cycle(SHAPES + [(64, 320)])
    flags = itertools.cycle(itertools.product((True, False), repeat=2))
    for bits, m in itertools.product(range(2, 9), (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 64, 130)):
        yield bits, m, next(groups), next(dtypes), next(scale_dtypes), next(shapes), *next(flags)


@pytest.mark.parametrize("bits", range(2, 9))
def test_against_float64(isa, bits):
    for seed, (b, m, group, dtype, scale_dtype, (n, k), symmetric, biased) in enumerate(covering()):
        if b != bits:
            continue
        weight = Weight(n, k, bits, group, symmetric, scale_dtype, seed)
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k + 3, generator=random).to(dtype)[:, :k]
        bias = torch.randn(n, generator=random).to(dtype) if biased else None
        (y,) = linear(x, [weight], [bias])
        error = relative_error(y, x, weight, bias)
        # One output: its own rounding is the whole error, and cancellation may make it small.
        limit = TOLERANCE[dtype] * (8 if n == 1 else 1)
        assert error < limit, (isa, bits, m, n, k, group, dtype, scale_dtype, symmetric, biased, error)


@pytest.mark.parametrize("m", (1, 2, 6, 7, 40))
@pytest.mark.parametrize("symmetric", (True, False))
def test_float32_with_a_mean(isa, m, symmetric):
    """A common shift of x makes zero points cancel large sums; the result must keep its digits."""
    for bits, group in ((4, 128), (3, 32), (8, 64), (2, 0), (5, 0), (6, 96), (7, 0)):
        weight = Weight(80, 2048, bits, group, symmetric, torch.float16, bits)
        x = torch.randn(m, 2048, generator=torch.Generator().manual_seed(m)) + 30
        (y,) = linear(x, [weight])
        error = relative_error(y, x, weight)
        assert error < 2e-6, (isa, bits, group, error)


def test_bfloat16_uses_exact_codes(isa):
    """bf16 inputs: only the output is rounded, so the error stays at that of one rounding."""
    for bits, m in itertools.product(range(2, 9), (1, 5, 33)):
        weight = Weight(64, 1024, bits, 128, False, torch.bfloat16, bits)
        x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(m)).bfloat16()
        (y,) = linear(x, [weight])
        once = (x.double() @ weight.truth.T).bfloat16().double()
        assert relative_error(y, x, weight) < 1.02 * relative_error(once, x, weight)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("m", (1, 2))
@pytest.mark.parametrize("bits", range(2, 9))
def test_an_outlier_hides_nothing(isa, bits, m, dtype):
    # One channel is far above the others and its weights are zero: the result is all of the others.
    weight = Weight(48, 512, bits, 64, True, torch.float32)
    weight.codes[:, 70] = 2 ** (bits - 1)
    weight.truth[:, 70] = 0
    weight.qweight = pack(weight.codes, bits)
    x = torch.randn(m, 512, generator=torch.Generator().manual_seed(4))
    x[:, 70] = 3e4
    (y,) = linear(x.to(dtype), [weight])
    assert relative_error(y, x.to(dtype), weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", (1, 5, 9, 65))
def test_threads_do_not_change_a_bit(isa, m):
    for bits, dtype in ((4, torch.float32), (3, torch.bfloat16), (8, torch.float16)):
        weight = Weight(100, 1600, bits, 64, False, torch.float16)
        x = torch.randn(m, 1600, generator=torch.Generator().manual_seed(1)).to(dtype)
        (expected,) = linear(x, [weight], threads=1)
        for threads in (2, 3, 16):
            (y,) = linear(x, [weight], threads=threads)
            assert torch.equal(y, expected), (isa, bits, threads)


@pytest.mark.parametrize("m", (1, 3, 20, 250))
def test_multi_equals_single(isa, m):
    weights = [Weight(n, 224, 4, 64, symmetric, torch.bfloat16, n)
               for n, symmetric in ((96, True), (33, False), (5, True))]
    x = torch.randn(m, 224, generator=torch.Generator().manual_seed(2))
    biases = [torch.randn(96), None, torch.randn(5)]
    together = linear(x, weights, biases)
    for y, weight, bias in zip(together, weights, biases):
        (alone,) = linear(x, [weight], [bias], threads=1)
        assert torch.equal(y, alone)
        assert relative_error(y, x, weight, bias) < 2e-6


def test_large_rows_are_rounded_to_nearest_even(isa):
    """With an exact sum the output must be torch's own rounding of it, ties included."""
    weight = Weight(16, 32, 4, 0, True, torch.float32)
    values = torch.zeros(16, 32, dtype=torch.uint8)
    values.fill_(8)
    values[:, 0] = 9  # w[:, 0] = scale, the rest zero
    weight.qweight, weight.scales = pack(values, 4), torch.ones(1, 1, 16)
    random = torch.Generator().manual_seed(5)
    bias = torch.randn(16, generator=random)
    for dtype in (torch.bfloat16, torch.float16):
        exact = (torch.randint(-2048, 2048, (9, 1), generator=random).float() / 8).to(dtype)
        x = torch.zeros(9, 32, dtype=dtype)
        x[:, :1] = exact
        rounded_bias = bias.to(dtype)
        (y,) = linear(x, [weight], [rounded_bias])
        assert torch.equal(y, (exact.float() + rounded_bias.float()).to(dtype))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 100), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_pack_round_trip(n, k, bits, seed):
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    back = torch.empty_like(codes)
    _C.int_unpack(packed.data_ptr(), n, k, bits, back.data_ptr(), 2)
    assert torch.equal(back, codes)
    padded = torch.full((-(-n // 16) * 16, -(-k // 32) * 32), 2 ** (bits - 1), dtype=torch.uint8)
    padded[:n, :k] = codes
    assert torch.equal(pack(padded, bits, threads=1), packed), "padding is the zero point"


def test_layout_is_the_documented_one():
    """Bytes of the 4-bit and of the 2+1-bit planes, placed here by the rule in words."""
    for bits, planes in ((4, [(4, 0)]), (3, [(2, 0), (1, 2)]), (7, [(4, 0), (2, 4), (1, 6)]), (8, [(8, 0)])):
        codes = torch.randint(0, 2**bits, (16, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        expected = [0] * (64 * bits)
        for row, t, byte in itertools.product(range(16), range(8), range(4)):
            code = int(codes[row, 8 * (t // 2) + (0, 4, 1, 5)[byte] + 2 * (t % 2)])
            for width, low in planes:
                per_chunk = 8 // width
                at = 64 * low + 64 * (t // per_chunk) + 4 * row + byte
                expected[at] |= (code >> low & (2**width - 1)) << (width * (t % per_chunk))
        assert pack(codes, bits).flatten().tolist() == expected


@pytest.mark.parametrize("symmetric", (True, False))
def test_dequantize(symmetric):
    for bits, dtype, scale_dtype in zip(range(2, 9), itertools.cycle(DTYPES), itertools.cycle(DTYPES[::-1])):
        weight = Weight(37, 150, bits, 64, symmetric, scale_dtype)
        out = torch.empty(37, 150, dtype=dtype)
        _C.int_dequantize(
            weight.qweight.data_ptr(), weight.scales.data_ptr(), DTYPES.index(scale_dtype),
            0 if symmetric else weight.zeros.data_ptr(), 37, 150, bits, 64, out.data_ptr(), DTYPES.index(dtype), 2,
        )  # fmt: skip
        assert torch.equal(out, weight.truth.float().to(dtype))
