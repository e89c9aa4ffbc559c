"""e4m3 activations times 4-bit integers or e4m3 on the host-compiled CUDA kernels, against float64."""

import ctypes
import functools

import pytest
import torch
from cuda_floats import CODE, COMMON, Stored, call, inputs, units
from emulation import build
from test_cpu_int_linear import Weight

from tersor.formats import Float
from tersor.formats.integer import tile_rows, untile_rows
from tersor.ops_round import float_round

HALVES = (torch.float16, torch.bfloat16)
SOURCES = ["cuda/kernels/sm89_fp8_linear.cu", "cuda/kernels/quantize_fp8_rows.cu", "cuda/dispatch/fp8_linear.cu",
           *COMMON]
ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of channels, beside 4-bit weights
# (m, n, k, ranges)
CASES = [(1, 37, 99, 1), (5, 130, 300, 4), (16, 144, 416, 3), (33, 20, 160, 1), (128, 48, 129, 2)]


@functools.cache
def library(kind, edits=()):
    """kind: 0 for int4 weights, 1 for e4m3 weights (TERSOR_FP8)."""
    return build(SOURCES, {"TERSOR_FP8": kind}, edits=edits)


def rounded_values(native, x, groups=1, top=None):
    """What the rounding kernel makes of x in x's own type."""
    m, k = x.shape
    out = torch.full((m, k), 99.0, dtype=x.dtype)
    names = ["x", *(["top"] if top is not None else []), "values"]
    native.call("tersor_cuda_fp8_rows", x, ctypes.c_int(CODE[x.dtype]), m, k, x.stride(0), top, groups,
                ctypes.c_int(0), None, None, out, None, names=names, outputs=[out])
    return out


def rounded(native, x, groups=1, interleaved=False, top=None, seeds=(0,), count=False):
    """Codes, scales and counters of the rounding kernel."""
    m, k = x.shape
    padded = -(-k // 128) * 128
    codes = torch.full((m, padded), 0x7f, dtype=torch.uint8)
    scales = torch.full((m, groups), float("nan"))
    names = ["x", *(["top"] if top is not None else []), "codes", "scales"]
    counters = native.call("tersor_cuda_fp8_rows", x, ctypes.c_int(CODE[x.dtype]), m, k, x.stride(0), top, groups,
                           ctypes.c_int(interleaved), codes, scales, None, None, names=names, outputs=[codes, scales],
                           seeds=seeds, count=count)
    return codes, scales, counters


def values(codes, scales, k, interleaved=False):
    """What codes and scales stand for, float64 [m, k]."""
    if interleaved:
        codes = codes.view(len(codes), -1, 8)[..., ORDER.argsort()].flatten(1)
    wide = codes.view(torch.float8_e4m3fn).double().view(len(codes), scales.shape[1], -1)
    return (wide * scales.double()[..., None]).flatten(1)[:, :k]


def multiply(native, weight, codes, scales, dtype, bias=None, ranges=1, seeds=(0,), count=False, pad=5):
    """y and counters of the product with a `Weight` of 4 bits or a `Stored` of e4m3."""
    integers = isinstance(weight, Weight)
    stored = weight.qweight if integers else weight.codes
    rows, group = (1, weight.group) if integers else (weight.scale_rows, weight.group)
    multiplier = getattr(weight, "multiplier", None)  # of scales that are e4m3
    before = (codes, scales, scales.shape[1], len(codes), weight.k, stored, ctypes.c_int(0 if integers else 1),
              weight.scales, ctypes.c_int(CODE.get(weight.scales.dtype, 4)), multiplier, rows, group, bias,
              ctypes.c_int(CODE[dtype]))
    named = {"x": codes, "x_scales": scales, "codes": stored, "scales": weight.scales, "scale_multiplier": multiplier,
             "bias": bias}
    return call(native, "tersor_cuda_fp8_linear", before, (), len(codes), weight.n, dtype, ranges, named, seeds, count,
                pad)


def assert_near(y, seen, truth_of_weight, bias, case=None):
    """Products are exact and sums in fp32, so nearly all of the error is the result's one rounding."""
    truth = seen @ truth_of_weight.T + (0 if bias is None else bias.double())
    magnitude = seen.abs() @ truth_of_weight.abs().T + (0 if bias is None else bias.double().abs())
    limits = torch.finfo(y.dtype)
    bound = truth.abs() * limits.eps / 1.95 + magnitude * 2**-20 + limits.tiny * limits.eps
    worst = ((y.double() - truth).abs() / bound).max()
    assert worst <= 1, (case, list(y.shape), y.dtype, float(worst))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_rounding_is_the_definition_bit_for_bit(dtype):
    torch.manual_seed(0)
    for m, k in ((3, 99), (2, 1000), (1, 2200), (4, 128)):
        wide = torch.randn(m, k + 5) * torch.logspace(-6, 4, k + 5).roll(k // 2)
        x = wide.to(dtype)[:, 3 : k + 3] if k % 2 else wide[:, :k].to(dtype).contiguous()
        for scale, groups in (("token", 1), ("group", -(-k // 128)), ("tensor", 1)):
            top = x.abs().amax().float().view(1) if scale == "tensor" else None
            for interleaved in (False, True):
                codes, scales, _ = rounded(library(1), x, groups, interleaved, top)
                found = values(codes, scales, k, interleaved)
                wanted = float_round.reference(x.float(), "e4m3", "whole" if scale == "tensor" else "largest",
                                               128 if scale == "group" else 0)
                # the definition multiplies back in fp32
                assert torch.equal(found.float(), wanted), (m, k, scale, interleaved)
                mine = rounded_values(library(1), x, groups, top)
                assert torch.equal(mine, wanted.to(dtype)), (m, k, scale, "values")
                padding = codes.view(m, -1, 8)[..., ORDER.argsort()].flatten(1) if interleaved else codes
                assert not padding[:, k:].any()


def test_every_number_between_codes_is_rounded_to_even():
    steps = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (steps[1:] + steps[:-1]) / 2
    near = torch.cat([steps, middles, middles.nextafter(steps[1:]), middles.nextafter(steps[:-1])])
    x = torch.cat([near, -near, torch.full((4,), 448.0)])[None]
    codes, scales, _ = rounded(library(1), x)
    assert scales.item() == 1 and torch.equal(codes[0, : x.shape[1]], x[0].to(torch.float8_e4m3fn).view(torch.uint8))


def test_rows_that_are_not_finite_zero_or_tiny():
    x = torch.randn(6, 300)
    x[1, 7], x[2, 299], x[3], x[4] = float("nan"), float("-inf"), 0.0, 1e-39
    for groups in (1, 3):
        codes, scales, _ = rounded(library(1), x, groups)
        assert torch.equal(values(codes, scales, 300).float().nan_to_num(99.0),
                           float_round.reference(x, "e4m3", "largest", 128 if groups == 3 else 0).nan_to_num(99.0))
        assert not codes[1, :128].any() and scales[1, 0].isnan() and scales[2, -1].isnan() and not codes[3].any()
        assert groups == 1 or scales[1, 1:].isfinite().all()


def test_rounding_reads_each_number_at_most_twice_and_writes_codes_alone():
    x = torch.randn(4, 4096).bfloat16()
    for groups in (1, 32):
        _, _, counters = rounded(library(1), x, groups, count=True)
        memory = counters["total"]["global"]
        assert memory["x"]["loaded"] == (2 if groups == 1 else 1) * 8192 * 4
        assert memory["x"]["load_widths"]["16"] == memory["x"]["loaded"]
        assert memory["codes"]["stored"] == 4096 * 4 and memory["scales"]["stored"] == 4 * 4 * groups


@pytest.mark.parametrize("group", (32, 96, 128, 0))
def test_int4_against_float64(group):
    for seed, (m, n, k, ranges) in enumerate(CASES):
        dtype = HALVES[seed % 2]
        weight = Weight(n, k, 4, group, True, (torch.bfloat16, torch.float32, torch.float16)[seed % 3], seed)
        x, bias = inputs(m, n, k, dtype, seed % 2 == 0, seed)
        codes, scales, _ = rounded(library(0), x, interleaved=True)
        y, _ = multiply(library(0), weight, codes, scales, dtype, bias, min(ranges, units(n, k)), seeds=(0, 1))
        assert_near(y, values(codes, scales, k, True), weight.truth, bias, (group, m, n, k))


def with_byte_scales(weight):
    """The weight with scales of e4m3, small ones beside subnormal ones, under one multiplier."""
    before = weight.scales.double()
    weight.multiplier = torch.tensor([2.0**-13])
    codes = (weight.scales.float() * 40).to(torch.float8_e4m3fn)
    weight.scales = codes
    ratio = untile_rows(codes.double() * 2.0**-13 / before, weight.n)
    size = weight.group if 0 < weight.group < weight.k else weight.k
    weight.truth = weight.truth * ratio[:, torch.arange(weight.k) // size]
    return weight


@pytest.mark.parametrize("group", (32, 128))
def test_int4_under_byte_scales(group):
    for seed, (m, n, k, ranges) in enumerate(CASES):
        dtype = HALVES[seed % 2]
        weight = with_byte_scales(Weight(n, k, 4, group, True, torch.float32, seed))
        x, bias = inputs(m, n, k, dtype, False, seed)
        codes, scales, _ = rounded(library(0), x, interleaved=True)
        y, _ = multiply(library(0), weight, codes, scales, dtype, bias, min(ranges, units(n, k)), seeds=(0, 1))
        assert_near(y, values(codes, scales, k, True), weight.truth, bias, (group, m, n, k))


def test_every_scale_of_a_byte():
    weight = Weight(127, 32, 4, 32, True, torch.float32)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight.scales, weight.multiplier = tile_rows(numbers.view(-1, 1).view(torch.uint8)), torch.ones(1)
    weight.scales = weight.scales.view(torch.float8_e4m3fn)
    x = torch.zeros(1, 32)
    x[0, 5] = 448
    y, _ = multiply(library(0), weight, *rounded(library(0), x, interleaved=True)[:2], torch.bfloat16)
    wanted = 448 * numbers.double() * (weight.codes[:, 5].double() - 8)
    assert torch.equal(y[0], wanted.bfloat16())


def test_every_integer_has_its_value():
    weight = Weight(32, 128, 4, 0, True, torch.float32, 1)
    weight.scales.fill_(1.0)
    x = torch.zeros(128, 128).fill_diagonal_(448.0)
    codes, scales, _ = rounded(library(0), x, interleaved=True)
    y, _ = multiply(library(0), weight, codes, scales, torch.float16)
    assert torch.equal(y.double(), 448 * (weight.codes.double() - 8).T)
    assert set(weight.codes.unique().tolist()) == {*range(16)}


@pytest.mark.parametrize("scale", ("tensor", "channel", "block"))
def test_e4m3_against_float64(scale):
    for seed, (m, n, k, ranges) in enumerate(CASES):
        dtype = HALVES[seed % 2]
        weight = Stored(Float("e4m3", scale), n, k, seed, (torch.bfloat16, torch.float32, torch.float16)[seed % 3])
        x, bias = inputs(m, n, k, dtype, seed % 2 == 0, seed)
        for groups in {1, -(-k // 128)}:
            codes, scales, _ = rounded(library(1), x, groups)
            y, _ = multiply(library(1), weight, codes, scales, dtype, bias, min(ranges, units(n, k)), seeds=(0, 1))
            assert_near(y, values(codes, scales, k), weight.truth, bias, (scale, groups, m, n, k))


@pytest.mark.parametrize("kind", (0, 1), ids=("int4", "e4m3"))
def test_what_is_not_finite_stays_in_its_row(kind):
    n, k = 40, 160
    weight = Weight(n, k, 4, 32, True, torch.float16) if kind == 0 else Stored(Float(), n, k)
    x, _ = inputs(20, n, k, torch.float16, False)
    run = lambda: multiply(library(kind), weight, *rounded(library(kind), x, interleaved=kind == 0)[:2],  # noqa: E731
                           torch.float16)[0]
    clean = run()
    x[3, 7], x[17, 0] = float("nan"), float("inf")
    y = run()
    others = [i for i in range(20) if i not in (3, 17)]
    assert y[[3, 17]].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kind", (0, 1), ids=("int4", "e4m3"))
def test_counters(kind):
    """Codes are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    n, k = 264, 512
    for m, tiles in ((1, 1), (16, 2), (64, 8)):
        weight = Weight(n, k, 4, 32, True, torch.float16) if kind == 0 else Stored(Float(), n, k)
        codes, scales, _ = rounded(library(kind), torch.randn(m, k), interleaved=kind == 0)
        _, counters = multiply(library(kind), weight, codes, scales, torch.bfloat16, None, 2, count=True)
        read = counters["total"]["global"]["codes"]
        stored = weight.qweight if kind == 0 else weight.codes
        assert read["loaded"] == stored.numel() and read["repeated"] == 0
        assert read["load_widths"]["16"] == read["loaded"] and read["sectors"] == read["minimum_sectors"]
        loop = counters["regions"]["main loop"]["shared"]
        assert loop["load"]["requests"] > 0 and loop["copy"]["requests"] > 0 and loop["extra_cycles"] == 0
        assert counters["total"]["mma"] == {"m16n8k32_e4m3": units(n, k) * 4 * 4 * 2 * tiles}


def refusal(name, **changes):
    x = torch.zeros(2, 128, dtype=torch.uint8)
    weight, scales, y = torch.zeros(2, 2, 256, dtype=torch.uint8), torch.ones(32), torch.empty(2, 32).half()
    if name == "rows":
        a = dict(x=scales.data_ptr(), x_dtype=0, m=2, k=16, ldx=16, top=0, groups=1, interleaved=0,
                 codes=x.data_ptr(), out=scales.data_ptr(), values=0, stream=0)
    else:
        a = dict(x=x.data_ptr(), x_scales=scales.data_ptr(), x_groups=1, m=2, k=64, codes=weight.data_ptr(), weight=0,
                 scales=scales.data_ptr(), scale_dtype=0, scale_multiplier=0, scale_rows=1, group=0, bias=0, y_dtype=2,
                 y=y.data_ptr(), n=32, ldy=32, ranges=1, partials=0, counters=0, stream=0)
    a.update(changes)
    native = library(0).library
    native.tersor_last_error.restype = ctypes.c_char_p
    status = getattr(native, f"tersor_cuda_fp8_{name}")(*map(ctypes.c_int64, a.values()))
    return native.tersor_last_error().decode() if status else "accepted"


@pytest.mark.parametrize("name, changes, words", [
    ("rows", dict(x_dtype=3), "x_dtype is 3"),
    ("rows", dict(groups=2), "groups is 2; accepted: 1"),
    ("rows", dict(ldx=15), "at least k = 16"),
    ("rows", dict(x=0), "x, codes or scales is absent"),
    ("rows", dict(k=0), "m, n, k are 2, 1, 0"),
    ("rows", dict(m=0, x=0), "accepted"),
    ("linear", dict(weight=2), "2 and 0; accepted: 0 int4, 1 e4m3"),
    ("linear", dict(group=40), "group is 40; accepted: multiples of 32"),
    ("linear", dict(weight=1, group=32), "group is 32; accepted: multiples of 128"),
    ("linear", dict(weight=1, group=64), "kind 1: not in this build"),
    ("linear", dict(weight=1, scale_dtype=4), "1 and 4; accepted: 0 int4"),
    ("linear", dict(scale_dtype=4), "scale_multiplier is absent"),
    ("linear", dict(y_dtype=0), "y_dtype is 0"),
    ("linear", dict(x_groups=2), "2 and 1; accepted: 1 or 1"),
    ("linear", dict(ldy=31), "n = 32"),
    ("linear", dict(ranges=2), "ranges is 2"),
    ("linear", dict(x=8), "no multiple of 16"),
    ("linear", dict(m=0, x=0), "accepted"),
])  # fmt: skip
def test_the_launchers_refuse(name, changes, words):
    assert words in refusal(name, **changes)
