"""Low-bit activations times integer weights on the host-compiled CUDA kernels: against int64 bit for bit where scales
are 1, against float64 with real ones."""

import ctypes
import itertools

import pytest
import torch
from cuda_lowbit import BYTES, MIXED, NIBBLES, Activations, Weight, library, multiply, plan, units

ROWS = (1, 5, 16, 33, 128)


def integer_weight(n, k, bits, group, symmetric, seed=0):
    """Scales of 1, and codes that reach both ends."""
    weight = Weight(n, k, bits, group, symmetric, torch.float32, seed)
    weight.scales.fill_(1.0)
    index = torch.arange(k) // (group if 0 < group < k else k)
    zeros = torch.full((n, 1), 2 ** (bits - 1)) if weight.zeros is None else weight.zeros.transpose(1, 2).flatten(0, 1)
    weight.integers = weight.codes.long() - zeros[:n].long()[:, index if weight.zeros is not None else [0] * k]
    return weight


def exact(x, weight, ranges, seeds=(0,)):
    """y, and the integers that it must be."""
    y, _ = multiply(library(weight.bits, x.width != BYTES), weight=weight, x=x, ranges=ranges, seeds=seeds)
    expected = x.integers @ weight.integers.T
    assert int(expected.abs().max()) < 2**24, "float32 holds every result"
    return y, expected


def pairs():
    """Every (weight bits, activation bits, rows); the other choices rotate so that their pairs meet."""
    shapes = itertools.cycle([(20, 200), (144, 96), (16, 160), (130, 97)])
    groups = itertools.cycle([(0, 0), (32, 0), (0, 0), (128, 64), (0, 96), (96, 32), (64, 128)])
    flags = itertools.cycle(itertools.product((True, False), (False, True)))
    for bits, act_bits, m in itertools.product(range(2, 9), (4, 6, 8), ROWS):
        yield bits, act_bits, m, next(shapes), next(groups), *next(flags)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_pair_of_widths_is_exact(bits):
    for seed, (b, act_bits, m, (n, k), (group, act_group), symmetric, zeros) in enumerate(pairs()):
        if b != bits:
            continue
        weight = integer_weight(n, k, bits, group, symmetric, seed)
        x = Activations(m, k, act_bits, act_group, zeros=zeros and act_bits == 8, unit=True, seed=seed)
        y, expected = exact(x, weight, min(2, units(weight)))
        assert torch.equal(y.long(), expected), (bits, act_bits, m, n, k, group, act_group, symmetric, zeros)


@pytest.mark.parametrize("bits", (2, 4, 7, 8))
@pytest.mark.parametrize("symmetric", (True, False))
def test_extreme_codes_are_exact(bits, symmetric):
    """All codes at an end of their range, on both sides, zero points of 0 and 2^bits included."""
    for code, value, zero in itertools.product((0, 2**bits - 1), (-128, 127), (0, min(2**bits, 255))):
        weight = integer_weight(16, 224, bits, 0, symmetric)
        weight.codes.fill_(code)
        weight.qweight.fill_(255 if code else 0)  # every plane's bits
        if not symmetric:
            weight.zeros.fill_(zero)
        weight.integers.fill_(code - (2 ** (bits - 1) if symmetric else zero))
        x = Activations(5, 224, 8, values=torch.full((5, 224), value), unit=True)
        y, expected = exact(x, weight, 1)
        assert torch.equal(y.long(), expected), (code, value, zero)


def test_int32_sums_of_the_longest_rows():
    """k = 65536, every product the largest: the sum is just below 2^31."""
    weight = integer_weight(16, 65536, 8, 0, True)
    weight.qweight.zero_()
    x = Activations(1, 65536, 8, values=torch.full((1, 65536), -128), unit=True)
    x.scales.fill_(2.0**-20)
    y, _ = multiply(library(8), x, weight, ranges=2)
    assert y.unique().tolist() == [65536 * 128.0 * 128 / 2**20]


def test_results_of_whole_rows_do_not_depend_on_the_cut():
    """int32 partial sums: any number of ranges gives the same bits, with scales that round."""
    weight = Weight(144, 600, 4, 0, False, torch.float16)
    for x in (Activations(5, 600, 8), Activations(70, 600, 8, zeros=True)):
        results = [multiply(library(4), x, weight, ranges=ranges, dtype=torch.bfloat16)[0] for ranges in (1, 3, 10)]
        assert all(torch.equal(results[0], other) for other in results[1:])


def reference(x, weight, bias=None, residual=None):
    y = x.truth @ weight.truth.T
    for more in (bias, residual):
        y = y if more is None else y + more.double()
    return y


def close(y, truth):
    """Up to the rounding of the result, and of fp32 sums."""
    largest = truth.abs().max()
    return bool(((y.double() - truth).abs() <= 1e-6 * largest + torch.finfo(y.dtype).eps * truth.abs() * 0.51).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bits", (4, 6, 8))
def test_real_scales_bias_and_residual_against_float64(bits, dtype):
    scale_dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for m, (group, act_group), static, wide in ((3, (64, 32), False, True), (17, (0, 0), True, False),
                                                 (40, (128, 0), False, True), (9, (0, 160), True, True)):
        weight = Weight(137, 300, bits, group, m != 40, next(scale_dtypes), m)
        x = Activations(m, 300, 8, act_group, static=static, zeros=m == 40, seed=m)
        random = torch.Generator().manual_seed(m)
        bias = torch.randn(137, generator=random).to(dtype)
        residual = torch.randn(m, 140, generator=random).to(dtype)[:, :137] if wide else None
        y, _ = multiply(library(bits), x, weight, bias, residual, dtype, ranges=3, seeds=(0, 1))
        assert close(y, reference(x, weight, bias, residual)), (m, group, act_group)


@pytest.mark.parametrize("symmetric", (True, False))
def test_nibbles_are_exact_and_scaled(symmetric):
    """4-bit weights and activations, multiplied as they are stored."""
    for m, (n, k), (group, act_group) in zip(ROWS, ((20, 200), (144, 300), (16, 97), (130, 160), (20, 300)),
                                             itertools.cycle([(0, 0), (64, 0), (128, 64), (0, 128)])):
        weight = integer_weight(n, k, 4, group, symmetric, m)
        x = Activations(m, k, 4, act_group, NIBBLES, unit=True, seed=m)
        y, expected = exact(x, weight, min(3, units(weight)))
        assert torch.equal(y.long(), expected), (m, n, k, group, act_group)
    weight, x = Weight(16, 700, 4, 64, symmetric, torch.bfloat16), Activations(20, 700, 4, 128, NIBBLES)
    y, counters = multiply(library(4, True), x, weight, count=True)
    assert close(y, reference(x, weight))
    assert set(counters["total"]["mma"]) == {"m16n8k64_s4"}
    assert counters["regions"]["main loop"]["shared"]["matrix"]["requests"] > 0
    assert counters["regions"]["main loop"]["shared"]["extra_cycles"] == 0


def test_blocks_of_two_widths():
    """Each block's products at its own width; ranges of equal cost; the last block is not whole."""
    choices = [(1, (4, 4, 8, 4)), (20, (8, 4, 4, 4)), (40, (4, 8, 8, 8)), (5, (8, 8, 8, 8)), (5, (4, 4, 4, 4))]
    for (m, block_bits), (group, act_group) in zip(choices, itertools.cycle([(0, 64), (128, 128), (64, 64)])):
        block_bits = torch.tensor(block_bits, dtype=torch.uint8)
        for symmetric in (True, False):
            weight = integer_weight(150, 430, 4, group, symmetric, m)
            x = Activations(m, 430, 8, act_group, MIXED, block_bits=block_bits, unit=True, seed=m)
            for ranges in (1, 2, int(x.starts[1, -1])):
                y, expected = exact(x, weight, ranges)
                assert torch.equal(y.long(), expected), (m, block_bits, group, act_group, ranges)
        weight = Weight(150, 430, 4, group, True, torch.float16)
        x = Activations(m, 430, 8, act_group, MIXED, block_bits=block_bits)
        y, counters = multiply(library(4, True), x, weight, ranges=2, count=True)
        assert close(y, reference(x, weight))
        tiles = {1: 1, 5: 1, 20: 4, 40: 8}[m]
        wide = [min(4, 14 - 4 * i) for i in range(4) if block_bits[i] == 8]
        narrow = [min(2, 7 - 2 * i) for i in range(4) if block_bits[i] == 4]
        expected = {"m16n8k32_s8": sum(wide) * 16 * tiles, "m16n8k64_s4": sum(narrow) * 16 * tiles}
        assert counters["total"]["mma"] == {name: count for name, count in expected.items() if count}


@pytest.mark.parametrize("bits", (3, 4, 6, 8))
def test_counters(bits):
    """Weights and codes are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    for m, group, act_group, scale_dtype, symmetric in ((1, 128, 0, torch.float16, True),
                                                        (16, 32, 64, torch.float32, False),
                                                        (64, 96, 32, torch.bfloat16, True),
                                                        (128, 0, 0, torch.bfloat16, True)):
        weight = Weight(136, 544, bits, group, symmetric, scale_dtype)
        x = Activations(m, 544, 8, act_group)
        _, counters = multiply(library(bits), x, weight, ranges=2, count=True)
        total = counters["total"]["global"]["qweight"]
        assert total["loaded"] == weight.qweight.numel() and total["repeated"] == 0
        assert total["load_widths"]["16"] == total["loaded"] and total["sectors"] == total["minimum_sectors"]
        loop = counters["regions"]["main loop"]
        assert loop["shared"]["load"]["requests"] > 0 and loop["shared"]["copy"]["requests"] > 0
        assert loop["shared"]["extra_cycles"] == 0
        tiles = {1: 1, 16: 2, 64: 8, 128: 16}[m]
        blocks = 2 * 17  # two row blocks of 17 blocks of 32 k
        assert counters["total"]["mma"] == {"m16n8k32_s8": blocks * 4 * 2 * tiles}, "4 warps, 2 products"
        codes = counters["total"]["global"]["codes"]
        assert codes["loaded"] == 2 * x.codes.numel(), "once for each row block"


def test_tokens_without_values_and_tokens_that_are_not_finite():
    weight = Weight(40, 200, 4, 64, False, torch.bfloat16)
    for act_group in (0, 64):
        x = Activations(6, 200, 8, act_group)
        bias = torch.randn(40).to(torch.bfloat16)
        for tensor in (x.values, x.codes, x.sums):
            tensor[2:4] = 0
        x.scales[2], x.scales[3] = 0.0, float("nan")
        x.truth[2:4] = 0
        y, _ = multiply(library(4), x, weight, bias, dtype=torch.bfloat16)
        assert torch.equal(y[2], bias), "zeros give the bias itself"
        assert torch.isnan(y[3]).all(), "what is not finite gives NaN, to its own row"
        others = [0, 1, 4, 5]
        assert close(y[others], reference(x, weight, bias)[others])


def test_no_tokens():
    weight, x = Weight(40, 200, 4, 64, True, torch.bfloat16), Activations(0, 200, 8)
    y, counters = multiply(library(4), x, weight, count=True)
    assert y.shape == (0, 40) and counters["launches"] == 0


@pytest.mark.parametrize("ranges", (2, 5))
def test_the_result_does_not_depend_on_the_order_of_blocks(ranges):
    """Six orders of threads and blocks, one result to the last bit (asserted by the harness)."""
    weight = Weight(140, 600, 4, 64, False, torch.float16)
    multiply(library(4), Activations(5, 600, 8, 128), weight, ranges=ranges, seeds=range(6))


def test_the_plan_fills_the_device():
    def planned(m, n, k, group=0, act_group=0, width=BYTES, multiprocessors=132, shared=228 * 1024):
        weight = Weight(16, 32, 4, group, True, torch.float16)
        weight.n, weight.k = n, k
        x = Activations(1, 32, 4, act_group)
        x.m, x.width = m, width
        return plan(library(4), x, weight, multiprocessors, shared)

    assert planned(1, 8192, 28672)[0] == 3 * 132 and planned(1, 8192, 28672, group=128)[0] == 4 * 132
    assert planned(128, 8192, 28672)[0] == 2 * 132
    assert planned(4096, 8192, 28672)[0] == 2 * 132 // 32, "32 blocks of 128 tokens share the device"
    assert planned(4096, 8192, 28672, group=128)[0] == 2 * 132 // 64, "64 where scales change along k"
    assert planned(1, 128, 128)[0] == 1 and planned(1, 128, 128)[1:] == (0, 0)
    assert planned(1, 8192, 8192, 128, 128, MIXED)[0] == 3 * 132
    ranges, partials, counters = planned(20, 8192, 8192)
    assert partials == ranges * 2 * 128 * 32 * 4 and counters == 64 * 4


@pytest.mark.parametrize("bits, arguments, words", [
    (4, dict(k=65537), "65536"), (4, dict(act_group=40), "act_group is 40"), (5, dict(width=NIBBLES), "4-bit weights"),
    (4, dict(width=NIBBLES, act_group=32), "multiples of 64"), (4, dict(width=MIXED, act_group=256), "64 and 128"),
    (4, dict(width=3), "width is 3"),
])  # fmt: skip
def test_the_launcher_refuses(bits, arguments, words):
    weight = Weight(32, 512, bits, 0, True, torch.float16)
    x = Activations(2, 512, 4, block_bits=torch.full((4,), 8, dtype=torch.uint8))
    x.codes = torch.zeros(2, 512, dtype=torch.uint8)
    weight.k = arguments.pop("k", 512)
    x.k = weight.k
    for name, value in arguments.items():
        setattr(x, {"act_group": "group"}.get(name, name), value)
    native = library(bits)
    with pytest.raises(RuntimeError, match="returned"):
        multiply(native, x, weight)
    native.library.tersor_last_error.restype = ctypes.c_char_p
    assert words in native.library.tersor_last_error().decode()
