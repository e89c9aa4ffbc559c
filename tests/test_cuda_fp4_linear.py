"""MXFP4 and NVFP4 activations times weights of the same kind on the host-compiled CUDA kernels, against float64; what
rounds activations in groups against its definition."""

import ctypes
import functools

import pytest
import torch
from cuda_floats import CODE, COMMON, Stored, call, inputs, units
from emulation import build
from test_cuda_fp8_linear import assert_near

from tersor.formats import NVFP4, Microscaling
from tersor.formats.bits import unpack_bits
from tersor.formats.floating import from_codes, power_of_two
from tersor.ops_round import float_round

HALVES = (torch.float16, torch.bfloat16)
SOURCES = ["cuda/kernels/sm120_fp4_linear.cu", "cuda/kernels/quantize_fp4_rows.cu", "cuda/dispatch/fp4_linear.cu",
           *COMMON]
FORMATS = (Microscaling("e2m1"), NVFP4())
ROUNDING = (("e2m1", "power", 32), ("e2m1", "e4m3", 16), ("e4m3", "power", 32))  # by kind
KINDS = ("mxfp4", "nvfp4", "mxfp8")
# (m, n, k, ranges)
CASES = [(1, 37, 99, 1), (5, 130, 300, 4), (16, 144, 416, 3), (33, 20, 160, 1), (128, 48, 129, 2)]


@functools.cache
def library(kind, edits=()):
    """kind: 0 for MXFP4, 1 for NVFP4 (TERSOR_FP4)."""
    return build(SOURCES, {"TERSOR_FP4": kind}, edits=edits)


def global_scale(x):
    """What NVFP4's scales of x are multiplied by, from the groups that are finite."""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 16)).unflatten(-1, (-1, 16)).abs().amax(-1)
    top = groups.where(groups.isfinite(), 0.0).amax().clamp_min(torch.finfo(torch.float32).smallest_normal)
    return ((448.0 * 6.0) * (1 / top)).nan_to_num(posinf=1.0).view(1)


def rounded(native, x, kind, seeds=(0,), count=False):
    """Codes, scales, the global scale (NVFP4) and counters of the rounding kernel."""
    m, k = x.shape
    stages, one = -(-k // 128), global_scale(x) if kind == 1 else None
    codes = torch.full((m, stages * 64), 255, dtype=torch.uint8)
    scales = torch.full((m, stages * (8 if kind == 1 else 4)), 255, dtype=torch.uint8)
    names = ["x", *(["global"] if kind == 1 else []), "codes", "scales"]
    counters = native.call("tersor_cuda_block_rows", x, ctypes.c_int(CODE[x.dtype]), m, k, x.stride(0),
                           ctypes.c_int(kind), one, codes, scales, None, None, names=names, outputs=[codes, scales],
                           seeds=seeds, count=count)
    return codes, scales, one, counters


def rounded_values(native, x, kind):
    m, k = x.shape
    out, one = torch.full((m, k), 99.0, dtype=x.dtype), global_scale(x) if kind == 1 else None
    native.call("tersor_cuda_block_rows", x, ctypes.c_int(CODE[x.dtype]), m, k, x.stride(0), ctypes.c_int(kind), one,
                None, None, out, None, names=["x", *(["global"] if kind == 1 else []), "values"], outputs=[out])
    return out


def values(codes, scales, one, k):
    """What codes and scales stand for, float64 [m, k]."""
    elements = from_codes(unpack_bits(codes, 4, 2 * codes.shape[1]), "e2m1", torch.float64)
    wide = power_of_two(scales.int() - 127, torch.float64) if one is None else \
        scales.view(torch.float8_e4m3fn).double() / one.double()
    return (elements.view(*scales.shape, -1) * wide[..., None]).flatten(1)[:, :k]


def multiply(native, weight, seen, kind, dtype, bias=None, ranges=1, seeds=(0,), count=False, pad=5):
    codes, scales, one = seen
    before = (codes, scales, one, len(codes), weight.k, weight.codes, weight.scales, weight.one, ctypes.c_int(kind),
              bias, ctypes.c_int(CODE[dtype]))
    named = {"x": codes, "x_scales": scales, "x_global": one, "codes": weight.codes, "scales": weight.scales,
             "global": weight.one, "bias": bias}
    return call(native, "tersor_cuda_fp4_linear", before, (), len(codes), weight.n, dtype, ranges, named, seeds, count,
                pad)


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_rounding_is_the_definition_bit_for_bit(dtype, kind):
    torch.manual_seed(0)
    for m, k in ((3, 99), (2, 1000), (1, 1160), (4, 128)):
        wide = torch.randn(m, k + 5) * torch.logspace(-6, 4, k + 5).roll(k // 2)
        x = wide.to(dtype)[:, 3 : k + 3] if k % 2 else wide[:, :k].to(dtype).contiguous()
        wanted = float_round.reference(x.float(), *ROUNDING[kind])
        assert torch.equal(rounded_values(library(0), x, kind), wanted.to(dtype)), (m, k)
        if kind < 2:
            codes, scales, one, _ = rounded(library(0), x, kind)
            found = values(codes, scales, one, k)
            # NVFP4's definition divides the scale in fp32 first
            assert torch.equal(found.float(), wanted) if kind == 0 else \
                ((found - wanted.double()).abs() <= wanted.double().abs() * 2**-22).all()
            assert not unpack_bits(codes, 4, 2 * codes.shape[1])[:, k:].any()


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_numbers_between_codes_and_between_scales(kind):
    """Ties, the largest, and magnitudes about which the power of two changes, in groups of their own."""
    rows = []
    for base in (1.0, 1.5, 1.7499999, 1.75, 1.7500001, 1.9999999):
        for power in (-140, -127, -126, -125, -120, -3, 0, 5, 120):
            top = torch.tensor(base).double() * 2.0**power
            rows.append(top.float() * torch.linspace(-1, 1, 32))
    rows.append(torch.cat([torch.arange(-12, 13) * 0.25, torch.tensor([6.0, 5, 3.5, 2.5, -5, -0.0, 0.75])]))
    x = torch.stack(rows)
    if kind == 1:
        x = x[x.abs().amax(1) < 1e30]  # one number is for all groups
    found, wanted = rounded_values(library(0), x, kind), float_round.reference(x, *ROUNDING[kind])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_groups_that_are_not_finite_or_zero(kind):
    x = torch.randn(5, 130)
    x[1, 7], x[2, 129], x[3] = float("nan"), float("-inf"), 0.0
    wanted = float_round.reference(x, *ROUNDING[kind])
    assert torch.equal(rounded_values(library(0), x, kind).nan_to_num(99.0), wanted.nan_to_num(99.0))
    assert wanted[1].isnan().sum() == (16 if kind == 1 else 32)


@pytest.mark.parametrize("kind", (0, 1), ids=KINDS[:2])
def test_rounding_reads_once_and_writes_codes_alone(kind):
    _, _, _, counters = rounded(library(0), torch.randn(4, 2048).bfloat16(), kind, seeds=(0, 1), count=True)
    memory = counters["total"]["global"]
    assert memory["x"]["loaded"] == memory["x"]["load_widths"]["16"] == 4096 * 4
    assert memory["codes"]["stored"] == 1024 * 4 and memory["scales"]["stored"] == 4 * 2048 // (16 if kind else 32)


@pytest.mark.parametrize("kind", (0, 1), ids=KINDS[:2])
def test_against_float64(kind):
    for seed, (m, n, k, ranges) in enumerate(CASES):
        dtype = HALVES[seed % 2]
        weight = Stored(FORMATS[kind], n, k, seed)
        x, bias = inputs(m, n, k, dtype, seed % 2 == 0, seed)
        seen = rounded(library(kind), x, kind)[:3]
        y, _ = multiply(library(kind), weight, seen, kind, dtype, bias, min(ranges, units(n, k)), seeds=(0, 1))
        assert_near(y, values(*seen, k), weight.truth, bias, (m, n, k))


@pytest.mark.parametrize("kind", (0, 1), ids=KINDS[:2])
def test_what_is_not_finite_stays_in_its_row(kind):
    n, k = 40, 160
    weight = Stored(FORMATS[kind], n, k)
    x, _ = inputs(20, n, k, torch.float16, False)
    top = x[:, -16:].abs().amax()
    x = x.clamp(-top, top)  # the global scale of NVFP4 must not change
    x[[0, 1], [0, 150]] = top
    native = library(kind)
    run = lambda: multiply(native, weight, rounded(native, x, kind)[:3], kind, torch.float16)[0]  # noqa: E731
    clean = run()
    x[3, 7], x[17, 100] = float("nan"), float("inf")
    y = run()
    others = [i for i in range(20) if i not in (3, 17)]
    assert y[[3, 17]].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kind", (0, 1), ids=KINDS[:2])
def test_counters(kind):
    """Codes are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    n, k = 264, 512
    for m, tiles in ((1, 1), (16, 2), (64, 8)):
        weight = Stored(FORMATS[kind], n, k)
        seen = rounded(library(kind), torch.randn(m, k), kind)[:3]
        _, counters = multiply(library(kind), weight, seen, kind, torch.bfloat16, None, 2, count=True)
        read = counters["total"]["global"]["codes"]
        assert read["loaded"] == weight.codes.numel() and read["repeated"] == 0
        assert read["load_widths"]["16"] == read["loaded"] and read["sectors"] == read["minimum_sectors"]
        loop = counters["regions"]["main loop"]["shared"]
        assert loop["load"]["requests"] > 0 and loop["copy"]["requests"] > 0 and loop["extra_cycles"] == 0
        name = ("m16n8k64_mxf4", "m16n8k64_nvf4")[kind]
        assert counters["total"]["mma"] == {name: units(n, k) * 4 * 2 * 2 * tiles}


def refusal(name, **changes):
    x, scales, y = torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32), torch.empty(2, 32).half()
    if name == "block_rows":
        a = dict(x=scales.data_ptr(), x_dtype=0, m=2, k=16, ldx=16, kind=0, one=0, codes=x.data_ptr(),
                 scales=scales.data_ptr(), values=0, stream=0)
    else:
        a = dict(x=x.data_ptr(), x_scales=scales.data_ptr(), x_one=0, m=2, k=64, codes=x.data_ptr(),
                 scales=scales.data_ptr(), one=0, kind=0, bias=0, y_dtype=2, y=y.data_ptr(), n=32, ldy=32, ranges=1,
                 partials=0, counters=0, stream=0)
    a.update(changes)
    native = library(0).library
    native.tersor_last_error.restype = ctypes.c_char_p
    status = getattr(native, f"tersor_cuda_{name}")(*map(ctypes.c_int64, a.values()))
    return native.tersor_last_error().decode() if status else "accepted"


@pytest.mark.parametrize("name, changes, words", [
    ("block_rows", dict(kind=4), "kind is 4; accepted: 0 MXFP4"),
    ("block_rows", dict(codes=4), "no multiple of 8"),
    ("block_rows", dict(kind=1), "global is absent"),
    ("block_rows", dict(ldx=15), "at least k = 16"),
    ("block_rows", dict(m=0, x=0), "accepted"),
    ("fp4_linear", dict(kind=2), "kind is 2; accepted: 0 MXFP4, 1 NVFP4"),
    ("fp4_linear", dict(kind=1), "their global scales are absent"),
    ("fp4_linear", dict(y_dtype=0), "y_dtype is 0"),
    ("fp4_linear", dict(x=8), "multiples of 16 and 8"),
    ("fp4_linear", dict(ldy=31), "n = 32"),
    ("fp4_linear", dict(ranges=2), "ranges is 2"),
    ("fp4_linear", dict(m=0, x=0), "accepted"),
])  # fmt: skip
def test_the_launchers_refuse(name, changes, words):
    assert words in refusal(name, **changes)
