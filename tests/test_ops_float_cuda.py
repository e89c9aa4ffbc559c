"""What `ops_float_cuda` hands to the launchers, run on CPU tensors: the launchers are the host-compiled ones."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cuda_floats import FORMATS, Stored, kind_of, library
from test_cuda_float_linear import assert_near

from tersor import ops_float, ops_float_cuda
from tersor.formats import Float, Microscaling


class Launchers:
    """`_C`'s CUDA functions on the emulated library, with every buffer registered at the size it must have."""

    def __init__(self):
        self.calls, self.sizes = [], {}

    def native(self, element, kind):
        return library(2 if kind == 4 else element).library

    def plan(self, m, n, k, element, kind, multiprocessors, shared):
        made = [ctypes.c_int64() for _ in range(3)]
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert self.native(element, kind).tersor_cuda_float_linear_plan(
            *sizes, element, kind, multiprocessors, ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return tuple(value.value for value in made)

    def linear(self, x, x_dtype, m, k, ldx, codes, element, scales, kind, scale_rows, group, one, bias, y, n, ldy,
               ranges, partials, counters, stream):
        native = self.native(element, kind)
        _, partial_bytes, counter_bytes = ops_float_cuda._plan(m, n, k, element, kind, None)
        count = -(-n // scale_rows) * -(-k // group)
        native.emulation_clear()
        for address, size, writable in (
                (x, 2 * ((m - 1) * ldx + k), 0), (codes, n * -(-k // 2) if element else n * k, 0),
                (scales, count * {0: 4, 1: 2, 2: 2, 3: 1, 4: 1}[kind], 0), (one, 4, 0), (bias, 2 * n, 0),
                (y, 2 * m * n, 1), (partials, partial_bytes, 1), (counters, counter_bytes, 1)):
            if address and size:
                native.emulation_register(address, size, b"buffer", writable)
        values = (x, x_dtype, m, k, ldx, codes, element, scales, kind, scale_rows, group, one, bias, y, n, ldy, ranges,
                  partials, counters, stream)
        assert native.tersor_cuda_float_linear(*map(ctypes.c_int64, values)) == 0, native.emulation_error().decode()
        self.calls.append(ranges)


@pytest.fixture
def launchers(monkeypatch):
    made = Launchers()
    monkeypatch.setattr(ops_float_cuda, "_C", SimpleNamespace(
        cuda_float_linear_plan=made.plan, cuda_float_linear=made.linear))
    monkeypatch.setattr(ops_float_cuda, "_device", lambda index: (3, 100 * 1024))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    ops_float_cuda._plan.cache_clear()
    yield made
    ops_float_cuda._plan.cache_clear()


def call(weight, x, bias=None, **changes):
    codes, scales, one, rows, group = weight.fmt._operands(weight.tensors, (weight.n, weight.k))
    given = dict(x=x, codes=codes, scales=scales, one=one, bias=bias, n=weight.n, rows=rows, group=group, **changes)
    return ops_float_cuda.float_linear(*given.values())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats_and_inputs_of_any_shape(launchers, fmt):
    for k in (544, 97):
        weight = Stored(fmt, 200, k)
        for shape in ((), (1,), (2, 3)):
            x, bias = torch.randn(*shape, k).bfloat16(), torch.randn(200).bfloat16()
            y = call(weight, x, bias)
            assert y.shape == (*shape, 200) and y.dtype is x.dtype
            assert_near(y.reshape(-1, 200), x.reshape(-1, k), weight, bias)
    odd = torch.randn(6, k + 5).half()[1:, 3 : k + 3]
    assert_near(call(weight, odd), odd, weight, None)
    calls = len(launchers.calls)
    assert calls == 7 and max(launchers.calls) > 1, "of 200 x 544 several ranges"
    assert call(weight, odd[:0]).shape == (0, 200) and len(launchers.calls) == calls


def test_checks_come_before_pointers(launchers):
    weight = Stored(Microscaling("e2m1"), 32, 64)
    for x, bias, name in ((torch.randn(2, 96).half(), None, "codes"), (torch.randn(2, 64), None, "x"),
                          (torch.randn(2, 64).half(), torch.randn(32), "bias")):
        with pytest.raises(ValueError, match=f"{name}: found"):
            call(weight, x, bias)
    assert not launchers.calls


def test_the_kernel_is_named():
    name = Float().kernel((4, 4), "cuda")
    if ops_float.float_linear.cuda is None:
        assert name.startswith("reference: ")
    else:
        assert name.startswith("float_linear cuda (float32")
    assert Microscaling("e2m3").kernel((4, 4), "cuda").startswith("reference: ")
    assert kind_of(Float()) == 0
