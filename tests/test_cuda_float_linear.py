"""FP8, MXFP8, MXFP4 and NVFP4 weights with 16-bit activations on the host-compiled CUDA kernel, against float64."""

import ctypes

import pytest
import torch
from cuda_floats import FORMATS, Stored, inputs, kind_of, library, multiply, units

from tersor.formats import NVFP4, Float, Microscaling
from tersor.formats.bits import pack_bits

HALVES = (torch.float16, torch.bfloat16)
# (m, n, k, ranges): 33 and 130 tokens make blocks of 64; 99 and 300 rows of codes that start anywhere
CASES = [(1, 37, 99, 1), (5, 130, 300, 4), (16, 144, 416, 3), (33, 20, 160, 1), (128, 48, 129, 2)]


def assert_near(y, x, weight, bias):
    """Codes enter exactly and sums are in fp32, so nearly all of the error is the result's one rounding."""
    truth = x.double() @ weight.truth.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.truth.abs().T + (0 if bias is None else bias.double().abs())
    limits = torch.finfo(y.dtype)
    bound = truth.abs() * limits.eps / 1.95 + magnitude * 2**-20 + limits.tiny * limits.eps
    worst = ((y.double() - truth).abs() / bound).max()
    assert worst <= 1, (weight.fmt, list(y.shape), weight.k, y.dtype, float(worst))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_against_float64(fmt):
    for seed, (m, n, k, ranges) in enumerate(CASES):
        for dtype in HALVES:
            weight = Stored(fmt, n, k, seed)
            x, bias = inputs(m, n, k, dtype, seed % 2 == 0, seed)
            y, _ = multiply(library(kind_of(fmt)), weight, x, bias, min(ranges, units(n, k)), seeds=(0, 1))
            assert_near(y, x, weight, bias)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_scales_of_every_float_type(dtype):
    for name in ("tensor", "channel", "block"):
        weight = Stored(Float("e4m3", name), 140, 272, 3, dtype)
        x, bias = inputs(6, 140, 272, torch.bfloat16, True)
        assert_near(multiply(library(0), weight, x, bias, 2)[0], x, weight, bias)


CODED = [Float("e4m3", "tensor"), Microscaling("e2m1"), Microscaling("e2m3"), NVFP4()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fmt", CODED, ids=str)
def test_every_code_has_its_value(fmt, dtype):
    """Tokens are rows of the identity, so y is the weight: nothing to round but the values themselves."""
    weight = Stored(fmt, 16, 256)
    if fmt.element == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8).where(torch.arange(256) % 128 != 127, 0)
        weight.codes = codes.roll(1)[None].expand(16, -1).contiguous()
        weight.scales.fill_(1.0)
    elif fmt.element == "e2m3":
        weight.codes = pack_bits(torch.arange(256).expand(16, -1) % 64, 6)
        weight.scales.fill_(127)
    else:
        weight.codes = torch.arange(256, dtype=torch.uint8).view(2, 128).expand(8, 2, 128).reshape(16, 128).contiguous()
        weight.scales.fill_(127)
        if fmt == NVFP4():
            # every e4m3 number that a scale can be, 16 to a row
            weight.scales = torch.arange(127, dtype=torch.uint8).repeat(3)[:256].view(16, 16).contiguous()
            weight.one = torch.ones(1)
    name = "weight_packed"
    stored = {**weight.tensors, name: weight.codes.view(weight.tensors[name].dtype),
              "weight_scale": weight.scales.view(weight.tensors["weight_scale"].dtype)}
    if weight.one is not None:
        stored["weight_global_scale"] = weight.one
    truth = fmt.unpack(stored, (16, 256), torch.float64)
    x = torch.eye(256, dtype=dtype)
    y, _ = multiply(library(kind_of(fmt)), weight, x)
    assert torch.equal(y.double(), truth.T.to(dtype).double())


COUNTED = [Float("e4m3", "channel"), Microscaling("e2m1"), Microscaling("e2m3"), NVFP4()]


@pytest.mark.parametrize("fmt", COUNTED, ids=str)
def test_counters(fmt):
    """Codes are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    n, k = 264, 512
    for m, tiles in ((1, 1), (16, 2), (64, 8)):
        weight = Stored(fmt, n, k)
        x, _ = inputs(m, n, k, torch.bfloat16, False)
        _, counters = multiply(library(kind_of(fmt)), weight, x, None, ranges=2, count=True)
        read = counters["total"]["global"]["codes"]
        assert read["loaded"] == weight.codes.numel() and read["repeated"] == 0
        assert read["load_widths"]["16"] == read["loaded"] and read["sectors"] == read["minimum_sectors"]
        loop = counters["regions"]["main loop"]["shared"]
        assert loop["load"]["requests"] > 0 and loop["copy"]["requests"] > 0 and loop["extra_cycles"] == 0
        assert counters["total"]["mma"] == {"m16n8k16_bf16": units(n, k) * 4 * 4 * 4 * tiles}


@pytest.mark.parametrize("fmt", [Float("e4m3", "block"), Microscaling("e2m1"), NVFP4()], ids=str)
def test_what_is_not_finite_stays_in_its_row(fmt):
    n, k = 40, 160
    weight = Stored(fmt, n, k)
    x, _ = inputs(20, n, k, torch.float16, False)
    clean, _ = multiply(library(kind_of(fmt)), weight, x)
    x[3, 7], x[17, 0] = float("nan"), float("inf")
    y, _ = multiply(library(kind_of(fmt)), weight, x)
    others = [i for i in range(20) if i not in (3, 17)]
    assert y[3].isnan().all() and not y[17].isfinite().any() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("ranges", (2, 5, 12))
def test_the_result_does_not_depend_on_the_order_of_blocks(ranges):
    weight = Stored(Microscaling("e2m1"), 300, 500)
    for m in (5, 70):
        x, bias = inputs(m, 300, 500, torch.bfloat16, True)
        y, _ = multiply(library(1), weight, x, bias, ranges, seeds=range(4))
        assert_near(y, x, weight, bias)


def refusal(**changes):
    """What the launcher says about one wrong argument."""
    weight = Stored(Microscaling("e2m1"), 32, 64)
    x, y = torch.randn(2, 64).half(), torch.empty(2, 32).half()
    a = dict(x=x.data_ptr(), x_dtype=2, m=2, k=64, ldx=64, codes=weight.codes.data_ptr(), element=1,
             scales=weight.scales.data_ptr(), scale_kind=3, scale_rows=1, group=32, one=0, bias=0, y=y.data_ptr(), n=32,
             ldy=32, ranges=1, partials=0, counters=0, stream=0)
    a.update(changes)
    native = library(1).library
    native.tersor_last_error.restype = ctypes.c_char_p
    integers = {name: ctypes.c_int for name in ("x_dtype", "element", "scale_kind")}
    status = native.tersor_cuda_float_linear(*(integers.get(name, ctypes.c_int64)(value) for name, value in a.items()))
    return native.tersor_last_error().decode() if status else "accepted"


@pytest.mark.parametrize("changes, words", [
    (dict(x_dtype=0), "x_dtype is 0"),
    (dict(ldx=68), "16-byte aligned rows"),
    (dict(ldx=56), "at least k = 64"),
    (dict(ldy=31), "n = 32"),
    (dict(element=3), "3 and 3"),
    (dict(scale_kind=4, element=0), "0 and 4"),
    (dict(scale_kind=4, group=16), "global is absent"),
    (dict(group=64), "group is 64"),
    (dict(scale_kind=1, group=48), "group is 48"),
    (dict(scale_rows=0), "scale_rows is 0"),
    (dict(element=0, scale_kind=1, group=64), "kind 0: not in this build"),
    (dict(ranges=2), "ranges is 2; accepted: 1 to 1"),
    (dict(ranges=2, k=256, ldx=256, group=32), "partials and counters"),
    (dict(codes=0), "codes is absent"),
    (dict(k=0), "m, n, k are 2, 32, 0"),
    (dict(m=0, x=0), "accepted"),
])  # fmt: skip
def test_the_launcher_refuses(changes, words):
    assert words in refusal(**changes)


def test_the_plan_fills_the_device():
    made = [ctypes.c_int64() for _ in range(3)]

    def planned(m, n, k, element=1, kind=3, multiprocessors=132, shared=228 * 1024):
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert library(1).library.tersor_cuda_float_linear_plan(
            *sizes, element, kind, multiprocessors, ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return made[0].value

    assert planned(1, 8192, 28672) == 3 * 132
    assert made[1].value == 3 * 132 * 2 * 128 * 8 * 4 and made[2].value == 64 * 4
    assert planned(1, 8192, 28672, 0) == 2 * 132, "two blocks of e4m3 fit into the memory"
    assert planned(1, 8192, 28672, 1, 3, 84, 100 * 1024) == 84 * 2
    assert planned(256, 8192, 28672) == 2 * 132 // 4, "four blocks of tokens share the device"
    assert planned(1, 128, 128) == 1 and planned(1, 1024, 1024) == 16
