"""MXFP8 and MXFP6 activations times MXFP8, MXFP6 and MXFP4 weights on host-compiled CUDA kernels, against float64."""

import ctypes
import functools

import pytest
import torch
from cuda_floats import CODE, COMMON, call, inputs, units
from cuda_instances import instances
from emulation import build
from test_cuda_fp8_linear import assert_near

from tersor.formats import Microscaling
from tersor.formats.floating import from_codes, power_of_two
from tersor.ops_round import float_round

HALVES = (torch.float16, torch.bfloat16)
ELEMENTS = ("e4m3", "e2m3", "e2m1")
SOURCES = ["cuda/kernels/sm120_mx_linear.cu", "cuda/kernels/quantize_fp4_rows.cu", "cuda/dispatch/fp4_linear.cu",
           "cuda/dispatch/mx_linear.cu", *COMMON]
# Element of the weight + 3 that of the input (TERSOR_MX). test_cuda_float_products.py has the products of the others.
KINDS = (0, 1, 2, 4)
NAMES = [f"{ELEMENTS[kind % 3]}-{ELEMENTS[kind // 3]}" for kind in KINDS]
# (m, n, k, ranges)
CASES = [(1, 37, 99, 1), (5, 130, 300, 4), (16, 144, 416, 3), (20, 20, 160, 1), (128, 48, 129, 2)]


@functools.cache
def library(kind, edits=()):
    if kind > 2:  # the same but for the product's instruction: one number of tokens is enough
        edits = instances(1)
    return build(SOURCES, {"TERSOR_MX": kind}, edits=edits)


class Stored:
    """A weight [n, k] of an element, packed, beside its values in float64."""

    def __init__(self, element, n, k, seed=0):
        torch.manual_seed(seed)
        w = torch.randn(n, k) * torch.rand(n, 1) ** 4
        w.view(-1)[::13] *= 20  # subnormal elements beside them
        w.view(-1)[::29] = 0
        self.element, self.n, self.k = ELEMENTS.index(element), n, k
        fmt = Microscaling(element)
        params = fmt.fit(w)
        tensors = fmt.pack(fmt.project(w, params), params)
        self.truth = fmt.unpack(tensors, (n, k), torch.float64)
        self.codes, self.scales = tensors["weight_packed"].view(torch.uint8), tensors["weight_scale"]


def rounded(native, x, element, seeds=(0,), count=False):
    """Codes, scales and counters of the rounding kernel; element: of the input."""
    m, k = x.shape
    stages = -(-k // 128)
    codes = torch.full((m, stages * 128), 255, dtype=torch.uint8)
    scales = torch.full((m, stages * 4), 255, dtype=torch.uint8)
    counters = native.call("tersor_cuda_block_rows", x, ctypes.c_int(CODE[x.dtype]), m, k, x.stride(0),
                           ctypes.c_int(2 + element), None, codes, scales, None, None,
                           names=["x", "codes", "scales"], outputs=[codes, scales], seeds=seeds, count=count)
    return codes, scales, counters


def values(codes, scales, element, k):
    """What codes and scales stand for, float64 [m, k]."""
    elements = from_codes(codes.int(), ELEMENTS[element], torch.float64)
    wide = power_of_two(scales.int() - 127, torch.float64)
    return (elements.view(*scales.shape, -1) * wide[..., None]).flatten(1)[:, :k]


def multiply(native, weight, seen, element, dtype, bias=None, ranges=1, seeds=(0,), count=False, pad=5):
    codes, scales = seen
    before = (codes, scales, ctypes.c_int(element), len(codes), weight.k, weight.codes, ctypes.c_int(weight.element),
              weight.scales, bias, ctypes.c_int(CODE[dtype]))
    named = {"x": codes, "x_scales": scales, "codes": weight.codes, "scales": weight.scales, "bias": bias}
    return call(native, "tersor_cuda_mx_linear", before, (), len(codes), weight.n, dtype, ranges, named, seeds, count,
                pad)


@pytest.mark.parametrize("element", (0, 1), ids=ELEMENTS[:2])
def test_codes_and_scales_are_the_definition(element):
    torch.manual_seed(0)
    for m, k in ((3, 99), (2, 1000), (4, 128)):
        x = (torch.randn(m, k) * torch.logspace(-6, 4, k).roll(k // 2)).bfloat16()
        codes, scales, _ = rounded(library(0), x, element, seeds=(0, 1))
        wanted = float_round.reference(x.float(), ELEMENTS[element], "power", 32)
        assert torch.equal(values(codes, scales, element, k).float(), wanted), (m, k)
        assert not codes[:, k:].any()
        assert element == 0 or int(codes.max()) < 64


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_rounding_to_six_bits_is_the_definition(dtype):
    """Ties, the largest, and magnitudes about which the power of two changes, in groups of their own."""
    rows = [torch.cat([torch.arange(-15, 16) * 0.5, torch.tensor([7.5])]), torch.arange(-16, 16) / 16,
            torch.tensor([float("inf")] + 31 * [1.0])]
    for base in (1.0, 1.5, 1.875, 1.9374, 1.9375, 1.9376, 1.9999):
        for power in (-140, -127, -126, -125, -3, 0, 5, 120):
            rows.append((torch.tensor(base).double() * 2.0**power).float() * torch.linspace(-1, 1, 32))
    x, out = torch.stack(rows).to(dtype), None
    out = torch.full_like(x, 99.0)
    library(0).call("tersor_cuda_block_rows", x, ctypes.c_int(CODE[dtype]), *x.shape, 32, ctypes.c_int(3), None, None,
                    None, out, None, names=["x", "values"], outputs=[out])
    wanted = float_round.reference(x.float(), "e2m3", "power", 32).to(dtype)
    assert torch.equal(out.nan_to_num(99.0), wanted.nan_to_num(99.0)) and out[2].isnan().all()


def test_rounding_reads_once_and_writes_codes_alone():
    _, _, counters = rounded(library(0), torch.randn(4, 2048).bfloat16(), 0, count=True)
    memory = counters["total"]["global"]
    assert memory["x"]["loaded"] == memory["x"]["load_widths"]["16"] == 4096 * 4
    assert memory["codes"]["stored"] == 2048 * 4 and memory["scales"]["stored"] == 64 * 4


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_against_float64(kind):
    element = kind // 3
    for seed, (m, n, k, ranges) in enumerate(CASES if kind < 3 else CASES[:2]):
        dtype = HALVES[seed % 2]
        weight = Stored(ELEMENTS[kind % 3], n, k, seed)
        x, bias = inputs(m, n, k, dtype, seed % 2 == 0, seed)
        seen = rounded(library(kind), x, element)[:2]
        y, _ = multiply(library(kind), weight, seen, element, dtype, bias, min(ranges, units(n, k)), seeds=(0, 1))
        assert_near(y, values(*seen, element, k), weight.truth, bias, (m, n, k))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_code_has_its_value(kind):
    """Rows of one code each under the scale 1, times ones."""
    bits = (8, 6, 4)[kind % 3]
    codes = torch.tensor([c for c in range(2**bits) if bits < 8 or c & 127 != 127], dtype=torch.uint8)
    weight = Stored(ELEMENTS[kind % 3], len(codes), 32)
    dense = codes[:, None].expand(-1, 32)[..., None] >> torch.arange(bits, dtype=torch.uint8) & 1
    weight.codes = (dense.flatten(1).view(len(codes), -1, 8).int() << torch.arange(8)).sum(-1).to(torch.uint8)
    weight.scales = torch.full((len(codes), 1), 127, dtype=torch.uint8)
    x = torch.zeros(1, 32)
    x[0, 7] = 1
    y, _ = multiply(library(kind), weight, rounded(library(kind), x, kind // 3)[:2], kind // 3, torch.float16)
    assert torch.equal(y[0].double(), from_codes(codes.int(), ELEMENTS[kind % 3], torch.float64))


@pytest.mark.parametrize("kind", KINDS[:3], ids=NAMES[:3])
def test_what_is_not_finite_stays_in_its_row(kind):
    n, k = 40, 160
    weight = Stored(ELEMENTS[kind % 3], n, k)
    x, _ = inputs(20, n, k, torch.float16, False)
    native = library(kind)
    run = lambda: multiply(native, weight, rounded(native, x, 0)[:2], 0, torch.float16)[0]  # noqa: E731
    clean = run()
    x[3, 7], x[17, 100] = float("nan"), float("inf")
    y = run()
    others = [i for i in range(20) if i not in (3, 17)]
    assert y[[3, 17]].isnan().all() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kind", KINDS[:3], ids=NAMES[:3])
def test_counters(kind):
    """Codes are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    n, k = 264, 512
    for m, tiles in ((1, 1), (16, 2), (64, 8)):
        weight = Stored(ELEMENTS[kind % 3], n, k)
        seen = rounded(library(kind), torch.randn(m, k), 0)[:2]
        _, counters = multiply(library(kind), weight, seen, 0, torch.bfloat16, None, 2, count=True)
        read = counters["total"]["global"]["codes"]
        assert read["loaded"] == weight.codes.numel() and read["repeated"] == 0
        assert read["load_widths"]["16"] == read["loaded"] and read["sectors"] == read["minimum_sectors"]
        loop = counters["regions"]["main loop"]["shared"]
        assert loop["load"]["requests"] > 0 and loop["copy"]["requests"] > 0 and loop["extra_cycles"] == 0
        name = f"m16n8k32_mx_{ELEMENTS[kind % 3]}_e4m3"
        assert counters["total"]["mma"] == {name: units(n, k) * 4 * 4 * 2 * tiles}


def refusal(**changes):
    x, y = torch.zeros(32, 64, dtype=torch.uint8), torch.empty(2, 32).half()
    a = dict(x=x.data_ptr(), x_scales=x.data_ptr(), input=0, m=2, k=64, codes=x.data_ptr(), weight=0,
             scales=x.data_ptr(), bias=0, y_dtype=2, y=y.data_ptr(), n=32, ldy=32, ranges=1, partials=0, counters=0,
             stream=0)
    a.update(changes)
    native = library(0).library
    native.tersor_last_error.restype = ctypes.c_char_p
    status = native.tersor_cuda_mx_linear(*map(ctypes.c_int64, a.values()))
    return native.tersor_last_error().decode() if status else "accepted"


@pytest.mark.parametrize("changes, words", [
    (dict(weight=3), "weight and input are 3 and 0; accepted: 0 e4m3"),
    (dict(input=2), "weight and input are 0 and 2; accepted: 0 e4m3"),
    (dict(weight=1), "weight 1, input 0: not in this build"),
    (dict(scales=0), "scales are absent"),
    (dict(y_dtype=0), "y_dtype is 0"),
    (dict(x=8), "multiples of 16 and 4"),
    (dict(ldy=31), "n = 32"),
    (dict(ranges=2), "ranges is 2"),
    (dict(m=0, x=0), "accepted"),
])  # fmt: skip
def test_the_launcher_refuses(changes, words):
    assert words in refusal(**changes)
