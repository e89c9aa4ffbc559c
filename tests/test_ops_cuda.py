"""What `ops_cuda` hands to the CUDA launchers, run on CPU tensors: the launchers are the host-compiled ones."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from cuda_int_weights import Weight, library, relative_error

from tersor import ops, ops_cuda


class Launchers:
    """`_C`'s CUDA functions on the emulated library, with every buffer registered at the size it must have."""

    def __init__(self, bits):
        self.native, self.calls = library(bits).library, []

    def plan(self, m, n, k, bits, group_size, scale_code, zeros, multiprocessors, shared):
        ranges, partials, counters = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert self.native.tersor_cuda_int_linear_plan(
            *sizes, bits, ctypes.c_int64(group_size), scale_code, int(zeros), multiprocessors, ctypes.c_int64(shared),
            ctypes.byref(ranges)) == 0
        assert self.native.tersor_cuda_int_linear_workspace(
            sizes[0], sizes[1], ranges, ctypes.byref(partials), ctypes.byref(counters)) == 0
        return ranges.value, partials.value, counters.value

    def run(self, name, arguments, buffers):
        self.native.emulation_clear()
        for address, size, writable in buffers:
            if address:
                self.native.emulation_register(address, size, b"buffer", writable)
        function = getattr(self.native, name)
        status = function(*(ctypes.c_int64(a) for a in arguments))
        assert status == 0, self.native.emulation_error().decode() or status
        self.calls.append(name)

    def int_linear(self, x, x_dtype, m, k, ldx, qweight, scales, scale_dtype, zeros, bias, y, n, ldy, bits, group,
                   ranges, partials, counters, stream):
        tiles, blocks, groups = -(-n // 16), -(-k // 32), -(-k // group) if group else 1
        _, partial_bytes, counter_bytes = ops_cuda._plan(m, n, k, bits, group, scale_dtype, bool(zeros), None)
        self.run("tersor_cuda_int_linear",
                 (x, x_dtype, m, k, ldx, qweight, scales, scale_dtype, zeros, bias, y, n, ldy, bits, group, ranges,
                  partials, counters, stream),
                 [(x, 2 * ((m - 1) * ldx + k), 0), (qweight, tiles * blocks * 64 * bits, 0),
                  (scales, tiles * groups * 16 * (4 if scale_dtype == 0 else 2), 0), (zeros, tiles * groups * 16, 0),
                  (bias, 2 * n, 0), (y, 2 * ((m - 1) * ldy + n), 1), (partials, partial_bytes, 1),
                  (counters, counter_bytes, 1)])

    def grouped_plan(self, rows, n, k, bits, group_size, scale_code, zeros, experts, multiprocessors, shared):
        made = [ctypes.c_int64() for _ in range(3)]
        sizes = [ctypes.c_int64(v) for v in (rows, n, k)]
        assert self.native.tersor_cuda_int_linear_grouped_plan(
            *sizes, bits, ctypes.c_int64(group_size), scale_code, int(zeros), ctypes.c_int64(experts), multiprocessors,
            ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return tuple(value.value for value in made)

    def int_linear_grouped(self, x, x_dtype, rows, k, ldx, ends, experts, qweight, scales, scale_dtype, zeros, bias, y,
                           n, ldy, bits, group, ranges, partials, counters, stream):
        tiles, blocks, groups = -(-n // 16), -(-k // 32), -(-k // group) if group else 1
        _, partial_bytes, counter_bytes = ops_cuda._grouped_plan(rows, n, k, bits, group, scale_dtype, bool(zeros),
                                                                 experts, None)
        self.run("tersor_cuda_int_linear_grouped",
                 (x, x_dtype, rows, k, ldx, ends, experts, qweight, scales, scale_dtype, zeros, bias, y, n, ldy, bits,
                  group, ranges, partials, counters, stream),
                 [(x, 2 * ((rows - 1) * ldx + k), 0), (ends, 4 * experts, 0),
                  (qweight, experts * tiles * blocks * 64 * bits, 0),
                  (scales, experts * tiles * groups * 16 * (4 if scale_dtype == 0 else 2), 0),
                  (zeros, experts * tiles * groups * 16, 0), (bias, 2 * experts * n, 0),
                  (y, 2 * ((rows - 1) * ldy + n), 1), (partials, partial_bytes, 1), (counters, counter_bytes, 1)])

    def int_dequantize(self, qweight, scales, scale_dtype, zeros, n, k, bits, group, out, out_dtype, stream):
        tiles, blocks, groups = -(-n // 16), -(-k // 32), -(-k // group) if group else 1
        self.run("tersor_cuda_int_dequantize",
                 (qweight, scales, scale_dtype, zeros, n, k, bits, group, out, out_dtype, stream),
                 [(qweight, tiles * blocks * 64 * bits, 0),
                  (scales, tiles * groups * 16 * (4 if scale_dtype == 0 else 2), 0),
                  (zeros, tiles * groups * 16, 0), (out, n * k * (4 if out_dtype == 0 else 2), 1)])


@pytest.fixture
def launchers(monkeypatch):
    launchers = Launchers(4)
    monkeypatch.setattr(ops_cuda, "_C", SimpleNamespace(
        cuda_int_linear_plan=launchers.plan, cuda_int_linear=launchers.int_linear,
        cuda_int_linear_grouped_plan=launchers.grouped_plan, cuda_int_linear_grouped=launchers.int_linear_grouped,
        cuda_int_dequantize=launchers.int_dequantize))
    monkeypatch.setattr(ops_cuda, "_device", lambda index: (3, 100 * 1024))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    ops_cuda._plan.cache_clear()
    ops_cuda._grouped_plan.cache_clear()
    yield launchers
    ops_cuda._plan.cache_clear()
    ops_cuda._grouped_plan.cache_clear()


def call(weight, x, bias=None, act_bits=16):
    return ops_cuda.int_linear(x, weight.qweight, weight.scales, weight.zeros, bias, weight.n, weight.bits,
                               weight.group, act_bits)


def test_launches_on_the_device_of_the_input(launchers, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    weight, x = Weight(20, 64, 4, 32, False, torch.float16), torch.randn(2, 64).half()
    y = call(weight, x)
    assert not entered, "it is the current one"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert torch.equal(call(weight, x), y) and entered == [x.device.index]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (70,)])
@pytest.mark.parametrize("k", (200, 97))
def test_rows_of_any_shape_and_alignment(launchers, shape, k):
    weight = Weight(200, k, 4, 32, False, torch.float16)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(*shape, k).to(dtype)
        bias = torch.randn(200).to(dtype)
        y = call(weight, x, bias)
        assert y.shape == (*shape, 200) and y.dtype is dtype
        assert relative_error(y.reshape(-1, 200), x.reshape(-1, k), weight, bias) < 5e-3
    odd = torch.randn(6, k + 5).to(torch.float16)[1:, 3 : k + 3]
    assert relative_error(call(weight, odd), odd, weight) < 1e-3
    assert set(launchers.calls) == {"tersor_cuda_int_linear"}


def test_experts_reach_the_launcher(launchers):
    count, weight = 3, Weight(80, 200, 4, 32, False, torch.float16)
    stacked = [torch.stack([tensor] * count) for tensor in (weight.qweight, weight.scales, weight.zeros)]
    bias, ends = torch.randn(count, 80), torch.tensor([2, 2, 9], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(11, 200).to(dtype)
        given = (x, ends, *stacked, bias.to(dtype), 80, 4, 32, 16)
        y, expected = ops_cuda.int_linear_grouped(*given), ops.int_linear_grouped.cpu(*given)
        assert not y[9:].any() and (y.double() - expected.double()).norm() < 6e-3 * expected.double().norm()
    assert launchers.calls.count("tersor_cuda_int_linear_grouped") == 2
    stacked[2][1, 0, 0, 3] = 17
    with pytest.raises(ValueError, match="int_linear_grouped: zero_points: found values up to 17"):
        ops_cuda.int_linear_grouped(torch.randn(11, 200).bfloat16(), ends, *stacked, None, 80, 4, 32, 16)


@pytest.mark.parametrize("m, dtype", [(ops_cuda.MAX_ROWS + 1, torch.float16), (3, torch.float32)])
def test_many_rows_and_float32_are_a_dense_product(launchers, m, dtype):
    weight = Weight(48, 96, 4, 32, False, torch.float32)
    x, bias = torch.randn(m, 96).to(dtype), torch.randn(48).to(dtype)
    assert relative_error(call(weight, x, bias), x, weight, bias) < 2e-3
    assert launchers.calls == ["tersor_cuda_int_dequantize"]


def test_projections(launchers):
    weights = [Weight(n, 128, 4, 32, False, torch.float16, n) for n in (32, 80)]
    x = torch.randn(4, 128).bfloat16()
    lists = [[w.qweight for w in weights], [w.scales for w in weights], [w.zeros for w in weights], [], [32, 80]]
    outputs = ops_cuda.int_linear_multi(x, *lists, 4, 32, 16)
    expected = ops.int_linear_multi.cpu(x, *lists, 4, 32, 16)
    for y, reference, weight in zip(outputs, expected, weights):
        assert relative_error(y, x, weight) < 4e-3
        assert (y.double() - reference.double()).norm() < 8e-3 * reference.double().norm()


def test_checks_come_before_pointers(launchers):
    weight = Weight(32, 64, 4, 32, True, torch.float16)
    with pytest.raises(ValueError, match="qweight: found"):
        call(weight, torch.randn(2, 96).half())
    with pytest.raises(ValueError, match="bias: found"):
        call(weight, torch.randn(2, 64).half(), torch.randn(32))
    with pytest.raises(ValueError, match="x: found torch.int32"):
        call(weight, torch.zeros(2, 64, dtype=torch.int32))
    assert not launchers.calls


def test_zero_points_beyond_the_codes_are_refused_in_bfloat16(launchers):
    weight = Weight(32, 64, 4, 32, False, torch.float16)
    x = torch.randn(2, 64)
    for _ in range(2):
        assert relative_error(call(weight, x.bfloat16()), x.bfloat16(), weight) < 5e-3
    weight.zeros[0, 0, 0] = 17
    with pytest.raises(ValueError, match="zero_points: found values up to 17, accepted is at most 16"):
        call(weight, x.bfloat16())
    call(weight, x.half())  # exact there


def test_the_kernel_is_named():
    name = ops.int_linear.kernel(torch.device("cuda"))
    if ops.int_linear.cuda is None:
        assert name.startswith("reference: ")
    else:
        assert name.startswith("int_linear cuda") and str(ops_cuda.MAX_ROWS) in name
