"""W4A16 and its relatives on `cpu`, on the host-compiled CUDA kernels (`emulated`) and on `cuda`, against float64."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_int_weights import CODE, Weight, dequantize, inputs, library, multiply, relative_error, units

from tersor import ops

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]
HALVES = (torch.float16, torch.bfloat16)


def run(device, weight, x, bias, ranges=1, seeds=(0, 1)):
    """y on one of DEVICES."""
    if device == "emulated":
        return multiply(library(weight.bits), weight, x, bias, ranges, seeds)[0]
    there = [None if t is None else t.to(device) for t in (x, weight.qweight, weight.scales, weight.zeros, bias)]
    return ops.int_linear(*there, weight.n, weight.bits, weight.group, 16).cpu()


def covering():
    """Every bits x m; the other choices rotate so that their pairs meet."""
    shapes = itertools.cycle([(80, 200), (272, 1056), (16, 128), (130, 97), (300, 520)])
    groups = itertools.cycle((32, 128, 0, 64, 96, 160))
    dtypes = itertools.cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16))
    scale_dtypes = itertools.cycle((torch.bfloat16, torch.float16, torch.float32, torch.float16))
    flags = itertools.cycle(itertools.product((True, False), repeat=2))
    for bits, m in itertools.product(range(2, 9), (1, 3, 16, 17, 64, 200)):
        yield bits, m, next(shapes), next(groups), next(dtypes), next(scale_dtypes), *next(flags)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("device", DEVICES)
def test_against_float64(device, bits):
    for seed, (b, m, (n, k), group, dtype, scale_dtype, symmetric, biased) in enumerate(covering()):
        if b != bits:
            continue
        weight = Weight(n, k, bits, group, symmetric, scale_dtype, seed)
        x, bias = inputs(m, weight, dtype, biased, seed)
        truth = x.double() @ weight.truth.T + (0 if bias is None else bias.double())
        once = relative_error(truth.to(dtype), x, weight, bias)  # the error of rounding the exact result
        for ranges in {1, min(3, units(weight)), units(weight)} if device == "emulated" else {1}:
            error = relative_error(run(device, weight, x, bias, ranges), x, weight, bias)
            case = (bits, m, n, k, group, dtype, scale_dtype, symmetric, biased, ranges, error)
            assert error < 5e-3, case
            # Codes enter exactly and sums are in fp32, so nearly all of the error is the result's one rounding.
            assert error < 1.05 * once + 1e-5, case


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", (32, 96, 128, 0))
def test_a_mean_that_zero_points_cancel(device, group):
    """x with a mean far from zero: exact differences code - zero_point keep the digits that cancellation takes."""
    weight = Weight(144, 1024, 4, group, False, torch.float32, 3)
    x, _ = inputs(5, weight, torch.float16, False)
    x += 8
    assert relative_error(run(device, weight, x, None), x, weight) < 1e-3


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_zero_points_are_exact(bits):
    """Zero points of 0 and 2^bits (at most 255), where the magic numbers reach the ends of their exact range."""
    for dtype, zero in itertools.product(HALVES, (0, min(2**bits, 255))):
        weight = Weight(32, 96, bits, 0, False, torch.float32, 1)
        weight.zeros.fill_(zero)
        weight.scales.fill_(1.0)
        x = torch.zeros(8, 96, dtype=dtype)
        x[torch.arange(8), torch.arange(8) * 13] = 1.0  # y is eight columns of the weight: nothing to round
        y, _ = multiply(library(bits), weight, x)
        assert torch.equal(y.double(), weight.codes.double().T[torch.arange(8) * 13] - zero)


@pytest.mark.parametrize("ranges", (2, 5, 7, 12))
def test_the_result_does_not_depend_on_the_order_of_blocks(ranges):
    """Eight orders of threads and blocks, one result to the last bit (asserted by the harness)."""
    weight = Weight(300, 500, 4, 64, False, torch.float16)
    for m in (5, 70):
        x, bias = inputs(m, weight, torch.bfloat16, True)
        multiply(library(4), weight, x, bias, ranges, seeds=range(8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_counters(bits):
    """The weights are read once, in 16-byte pieces, and the main loop meets no bank conflict."""
    for m, group, scale_dtype in ((1, 128, torch.float16), (16, 32, torch.float32), (64, 96, torch.bfloat16)):
        weight = Weight(264, 544, bits, group, False, scale_dtype)
        x, _ = inputs(m, weight, torch.bfloat16, False)
        _, counters = multiply(library(bits), weight, x, None, ranges=4, count=True)
        total = counters["total"]["global"]["qweight"]
        assert total["loaded"] == weight.qweight.numel() and total["repeated"] == 0
        assert total["load_widths"]["16"] >= 0.95 * total["loaded"]
        assert total["sectors"] == total["minimum_sectors"]
        loop = counters["regions"]["main loop"]
        assert loop["shared"]["load"]["requests"] > 0 and loop["shared"]["copy"]["requests"] > 0
        assert loop["shared"]["extra_cycles"] == 0
        kind = "m16n8k16_bf16"
        stages, token_tiles = units(weight), {1: 1, 16: 2, 64: 8}[m]
        assert counters["total"]["mma"] == {kind: stages * 4 * 4 * 4 * token_tiles}, "4 warps, 4 blocks, 4 products"
        x_bytes = counters["total"]["global"]["x"]
        assert x_bytes["loaded"] == 3 * 2 * m * weight.k, "once for each of three row blocks"


def test_more_than_64_tokens_read_weights_once_for_each_64():
    weight = Weight(128, 256, 4, 128, True, torch.float16)
    x, _ = inputs(130, weight, torch.float16, False)
    _, counters = multiply(library(4), weight, x, None, count=True)
    assert counters["total"]["global"]["qweight"]["loaded"] == 3 * weight.qweight.numel()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("device", DEVICES)
def test_dequantize(device, bits):
    cases = itertools.cycle(itertools.product((torch.float16, torch.bfloat16, torch.float32), (True, False)))
    for (n, k), group in itertools.product([(80, 200), (33, 97), (16, 544)], (32, 96, 0)):
        dtype, symmetric = next(cases)
        weight = Weight(n, k, bits, group, symmetric, torch.float16, bits)
        if device == "emulated":
            w, counters = dequantize(library(bits), weight, dtype, seeds=(0, 1), count=True)
            read = counters["total"]["global"]["qweight"]
            # Lanes share pieces of the 2- and 1-bit planes, within one load of the warp.
            assert 32 * read["sectors"] == weight.qweight.numel() and read["load_widths"]["16"] == read["loaded"]
        else:
            there = [None if t is None else t.to(device) for t in (weight.qweight, weight.scales, weight.zeros)]
            w = ops.int_dequantize(*there, n, k, bits, group, dtype).cpu()
        # 16-bit scales times codes are exact in fp32: one rounding to dtype.
        assert torch.equal(w, weight.truth.float().to(dtype)), (bits, n, k, group, dtype, symmetric)


def refusal(**changes):
    """What the launcher says about one wrong argument."""
    weight = Weight(32, 64, 4, 32, True, torch.float16)
    x, _ = inputs(2, weight, torch.float16, False)
    y = torch.empty(2, 32, dtype=torch.float16)
    a = dict(x=x.data_ptr(), x_dtype=CODE[x.dtype], m=2, k=64, ldx=64, qweight=weight.qweight.data_ptr(),
             scales=weight.scales.data_ptr(), scale_dtype=CODE[torch.float16], zero_points=0, bias=0, y=y.data_ptr(),
             n=32, ldy=32, bits=4, group_size=32, ranges=1, partials=0, counters=0, stream=0)
    a.update(changes)
    native = library(4).library
    native.tersor_last_error.restype = ctypes.c_char_p
    integers = {"x_dtype": ctypes.c_int, "scale_dtype": ctypes.c_int, "bits": ctypes.c_int}
    status = native.tersor_cuda_int_linear(*(integers.get(name, ctypes.c_int64)(value) for name, value in a.items()))
    assert status != 0
    return native.tersor_last_error().decode()


@pytest.mark.parametrize("changes, words", [
    (dict(x_dtype=0), "x_dtype is 0"),
    (dict(ldx=68), "16-byte aligned rows"),
    (dict(ldx=56), "at least k = 64"),
    (dict(ldy=31), "n = 32"),
    (dict(bits=9), "bits is 9"),
    (dict(bits=5), "not in this build"),
    (dict(group_size=40), "multiple of 32"),
    (dict(ranges=2), "ranges is 2; accepted: 1 to 1"),
    (dict(ranges=2, k=256, ldx=256), "partials and counters"),
    (dict(qweight=0), "qweight is absent"),
    (dict(scales=8), "16-byte aligned addresses"),
    (dict(scale_dtype=3), "scale_dtype is 3"),
    (dict(n=2**40), "0 to 2^30"),
])  # fmt: skip
def test_the_launcher_refuses(changes, words):
    assert words in refusal(**changes)


def test_the_plan_fills_the_device():
    plan, ranges = library(4).library.tersor_cuda_int_linear_plan, ctypes.c_int64()

    def planned(m, n, k, multiprocessors=132, shared=228 * 1024):
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert plan(*sizes, 4, ctypes.c_int64(128), 2, 0, multiprocessors, ctypes.c_int64(shared),
                    ctypes.byref(ranges)) == 0
        return ranges.value

    assert planned(1, 8192, 28672) == 4 * 132
    assert planned(64, 8192, 28672) == 2 * 132
    assert planned(1, 8192, 28672, 84, 100 * 1024) == 2 * 84, "two blocks fit into the memory of sm_86"
    assert planned(256, 8192, 28672) == 2 * 132 // 4, "four blocks of tokens share the device"
    assert planned(1, 128, 128) == 1
    assert planned(1, 1024, 1024) == 16, "ranges of at least four stages"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_replays_a_decode_step():
    weight = Weight(4096, 4096, 4, 128, False, torch.bfloat16)
    x, _ = inputs(1, weight, torch.bfloat16, False)
    there = [t.cuda() for t in (x, weight.qweight, weight.scales, weight.zeros)]
    call = lambda: ops.int_linear(*there, None, weight.n, 4, 128, 16)  # noqa: E731
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


SANITIZED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from cuda_int_weights import Weight, dequantize, inputs, multiply, relative_error
from emulation import Emulated
native = Emulated(Path({library!r}))
for m, n, k, group, symmetric, dtype, ranges in (
        (11, 204, 300, 96, False, torch.bfloat16, 4), (1, 130, 97, 32, True, torch.float16, 1),
        (70, 136, 300, 0, False, torch.float16, 3)):
    weight = Weight(n, k, {bits}, group, symmetric, torch.float16)
    x, bias = inputs(m, weight, dtype, m > 1)
    y, _ = multiply(native, weight, x, bias, ranges)
    assert relative_error(y, x, weight, bias) < 5e-3
    assert torch.equal(dequantize(native, weight, dtype)[0], weight.truth.float().to(dtype))
print("clean", flush=True)
"""


@pytest.mark.parametrize("bits", (4, 7, 8))
def test_sanitizers_find_nothing(bits):
    """The same source under AddressSanitizer and UBSan."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    native = library(bits, sanitize=True)
    script = SANITIZED.format(tests=str(Path(__file__).parent), library=str(native.path), bits=bits)
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "clean" and done.returncode == 0, done.stderr[-4000:]
