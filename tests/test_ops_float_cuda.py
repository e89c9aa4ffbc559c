"""What `ops_float_cuda` hands to the launchers, run on CPU tensors: the launchers are the host-compiled ones."""

import ctypes
from types import SimpleNamespace

import pytest
import test_cuda_fp4_linear as fp4
import test_cuda_fp8_linear as fp8
import test_cuda_mx_linear as mx
import torch
from cuda_floats import FORMATS, Stored, kind_of, library
from test_cpu_int_linear import Weight
from test_cuda_float_linear import assert_near

from tersor import _C, ops_float, ops_float_cuda
from tersor.formats import NVFP4, ByteScales, Float, Int, Microscaling
from tersor.formats.base import reference_kernel
from tersor.formats.inputs import _ROUNDING, Inputs
from tersor.ops_round import float_round
from tersor.registry import resolve_format


class Launchers:
    """`_C`'s CUDA functions on the emulated library, with every buffer registered at the size it must have."""

    def __init__(self):
        self.calls, self.most = [], 0

    def native(self, element, kind):
        return library(2 if kind == 4 else 3 if element == 2 else element).library

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
        buffers = [(x, 2 * ((m - 1) * ldx + k), 0), (codes, n * -(-k * (8, 4, 6)[element] // 8), 0),
                   (scales, count * {0: 4, 1: 2, 2: 2, 3: 1, 4: 1}[kind], 0), (one, 4, 0), (bias, 2 * n, 0),
                   (y, 2 * m * n, 1), (partials, partial_bytes, 1), (counters, counter_bytes, 1)]
        values = (x, x_dtype, m, k, ldx, codes, element, scales, kind, scale_rows, group, one, bias, y, n, ldy, ranges,
                  partials, counters, stream)
        self.launch(native, "tersor_cuda_float_linear", buffers, values)
        self.most = max(self.most, ranges)


    def fp8_plan(self, m, n, k, weight, multiprocessors, shared):
        made = [ctypes.c_int64() for _ in range(3)]
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert fp8.library(weight).library.tersor_cuda_fp8_linear_plan(
            *sizes, weight, multiprocessors, ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return tuple(value.value for value in made)

    def fp8_rows(self, x, x_dtype, m, k, ldx, top, groups, interleaved, codes, scales, values, stream):
        buffers = [(x, (4 if x_dtype == 0 else 2) * ((m - 1) * ldx + k), 0), (top, 4, 0),
                   (codes, m * -(-k // 128) * 128, 1), (scales, 4 * m * groups, 1),
                   (values, (4 if x_dtype == 0 else 2) * m * k, 1)]
        given = (x, x_dtype, m, k, ldx, top, groups, interleaved, codes, scales, values, stream)
        self.launch(fp8.library(0).library, "tersor_cuda_fp8_rows", buffers, given)

    def fp8_linear(self, x, x_scales, x_groups, m, k, codes, weight, scales, scale_dtype, multiplier, scale_rows, group,
                   bias, y_dtype, y, n, ldy, ranges, partials, counters, stream):
        _, partial_bytes, counter_bytes = ops_float_cuda._fp8_plan(m, n, k, weight, None)
        groups = -(-k // group) if group else 1
        sizes = (-(-n // 16) * -(-k // 32) * 256, -(-n // 16) * 16 * groups) if weight == 0 else \
            (n * k, -(-n // scale_rows) * groups)
        buffers = [(x, m * -(-k // 128) * 128, 0), (x_scales, 4 * m * x_groups, 0), (codes, sizes[0], 0),
                   (scales, sizes[1] * {0: 4, 1: 2, 2: 2, 4: 1}[scale_dtype], 0), (multiplier, 4, 0), (bias, 2 * n, 0),
                   (y, 2 * m * n, 1),
                   (partials, partial_bytes, 1), (counters, counter_bytes, 1)]
        values = (x, x_scales, x_groups, m, k, codes, weight, scales, scale_dtype, multiplier, scale_rows, group, bias,
                  y_dtype, y, n, ldy, ranges, partials, counters, stream)
        self.launch(fp8.library(weight).library, "tersor_cuda_fp8_linear", buffers, values)

    def block_rows(self, x, x_dtype, m, k, ldx, kind, one, codes, scales, values, stream):
        size, stages = 4 if x_dtype == 0 else 2, -(-k // 128)
        buffers = [(x, size * ((m - 1) * ldx + k), 0), (one, 4, 0), (codes, m * stages * (64 if kind < 2 else 128), 1),
                   (scales, m * stages * (8 if kind == 1 else 4), 1), (values, size * m * k, 1)]
        given = (x, x_dtype, m, k, ldx, kind, one, codes, scales, values, stream)
        self.launch(fp4.library(0).library, "tersor_cuda_block_rows", buffers, given)

    def fp4_plan(self, m, n, k, kind, multiprocessors, shared):
        made = [ctypes.c_int64() for _ in range(3)]
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert fp4.library(kind).library.tersor_cuda_fp4_linear_plan(
            *sizes, kind, multiprocessors, ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return tuple(value.value for value in made)

    def fp4_linear(self, x, x_scales, x_one, m, k, codes, scales, one, kind, bias, y_dtype, y, n, ldy, ranges, partials,
                   counters, stream):
        _, partial_bytes, counter_bytes = ops_float_cuda._fp4_plan(m, n, k, kind, None)
        stages, group = -(-k // 128), 16 if kind else 32
        buffers = [(x, m * stages * 64, 0), (x_scales, m * stages * 128 // group, 0), (x_one, 4, 0), (one, 4, 0),
                   (codes, n * -(-k // 2), 0), (scales, n * -(-k // group), 0), (bias, 2 * n, 0), (y, 2 * m * n, 1),
                   (partials, partial_bytes, 1), (counters, counter_bytes, 1)]
        given = (x, x_scales, x_one, m, k, codes, scales, one, kind, bias, y_dtype, y, n, ldy, ranges, partials,
                 counters, stream)
        self.launch(fp4.library(kind).library, "tersor_cuda_fp4_linear", buffers, given)

    def mx_plan(self, m, n, k, weight, multiprocessors, shared):
        made = [ctypes.c_int64() for _ in range(3)]
        sizes = [ctypes.c_int64(v) for v in (m, n, k)]
        assert mx.library(weight).library.tersor_cuda_mx_linear_plan(
            *sizes, weight, multiprocessors, ctypes.c_int64(shared), *map(ctypes.byref, made)) == 0
        return tuple(value.value for value in made)

    def mx_linear(self, x, x_scales, element, m, k, codes, weight, scales, bias, y_dtype, y, n, ldy, ranges, partials,
                  counters, stream):
        _, partial_bytes, counter_bytes = ops_float_cuda._mx_plan(m, n, k, weight, None)
        stages = -(-k // 128)
        buffers = [(x, m * stages * 128, 0), (x_scales, m * stages * 4, 0),
                   (codes, n * -(-k * (8, 6, 4)[weight] // 8), 0), (scales, n * -(-k // 32), 0), (bias, 2 * n, 0),
                   (y, 2 * m * n, 1), (partials, partial_bytes, 1), (counters, counter_bytes, 1)]
        given = (x, x_scales, element, m, k, codes, weight, scales, bias, y_dtype, y, n, ldy, ranges, partials,
                 counters, stream)
        self.launch(mx.library(weight + 3 * element).library, "tersor_cuda_mx_linear", buffers, given)

    def launch(self, native, name, buffers, values):
        native.emulation_clear()
        for address, size, writable in buffers:
            if address and size:
                native.emulation_register(address, size, b"buffer", writable)
        assert getattr(native, name)(*map(ctypes.c_int64, values)) == 0, native.emulation_error().decode()
        self.calls.append(name)


@pytest.fixture
def launchers(monkeypatch):
    made = Launchers()
    monkeypatch.setattr(ops_float_cuda, "_C", SimpleNamespace(
        cuda_float_linear_plan=made.plan, cuda_float_linear=made.linear, cuda_fp8_linear_plan=made.fp8_plan,
        cuda_fp8_linear=made.fp8_linear, cuda_fp8_rows=made.fp8_rows, cuda_fp4_linear_plan=made.fp4_plan,
        cuda_fp4_linear=made.fp4_linear, cuda_block_rows=made.block_rows, cuda_mx_linear_plan=made.mx_plan,
        cuda_mx_linear=made.mx_linear))
    monkeypatch.setattr(ops_float_cuda, "_device", lambda index: (3, 100 * 1024))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    plans = (ops_float_cuda._plan, ops_float_cuda._fp8_plan, ops_float_cuda._fp4_plan, ops_float_cuda._mx_plan)
    for plan in plans:
        plan.cache_clear()
    yield made
    for plan in plans:
        plan.cache_clear()


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
    assert calls == 7 and launchers.most > 1, "of 200 x 544 several ranges"
    assert call(weight, odd[:0]).shape == (0, 200) and len(launchers.calls) == calls


def test_checks_come_before_pointers(launchers):
    weight = Stored(Microscaling("e2m1"), 32, 64)
    for x, bias, name in ((torch.randn(2, 96).half(), None, "codes"), (torch.randn(2, 64), None, "x"),
                          (torch.randn(2, 64).half(), torch.randn(32), "bias")):
        with pytest.raises(ValueError, match=f"{name}: found"):
            call(weight, x, bias)
    assert not launchers.calls


@pytest.mark.parametrize("scale", ("token", "group", "tensor"))
@pytest.mark.parametrize("weights", (0, 1), ids=("int4", "e4m3"))
def test_inputs_in_fp8(launchers, weights, scale):
    n, k = 200, 300
    weight = Weight(n, k, 4, 32, True, torch.float16) if weights == 0 else Stored(Float("e4m3", "block"), n, k)
    stored = (weight.qweight, weight.scales) if weights == 0 else (weight.tensors["weight_packed"], weight.scales)
    where = (1, 32) if weights == 0 else (weight.scale_rows, weight.group)
    for shape in ((), (3,), (2, 9)):
        wide = torch.randn(*shape, k + 3).bfloat16()[..., 3:]
        wide[..., 0] *= 100
        bias = torch.randn(n).bfloat16()
        y = ops_float_cuda.fp8_linear(wide, *stored, bias, n, *where, scale)
        seen = Inputs(Float(), "fp8", scale).quantize_input(wide.float()).double()
        fp8.assert_near(y.reshape(-1, n), seen.reshape(-1, k), weight.truth, bias)
        by_op = ops_float.fp8_linear(wide.float(), *stored, bias.float(), n, *where, scale)
        assert (by_op.double() - y.double()).norm() < 5e-3 * y.double().norm()
    assert set(launchers.calls) == {"tersor_cuda_fp8_rows", "tersor_cuda_fp8_linear"}
    assert ops_float_cuda.fp8_linear(wide[:0], *stored, None, n, *where, scale).shape == (0, 9, n)
    wide[0, 1, 5] = float("nan")
    y = ops_float_cuda.fp8_linear(wide, *stored, None, n, *where, scale)
    assert y[0, 1].isnan().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()


def test_byte_scales_of_integers(launchers):
    n, k = 200, 300
    fmt = Inputs(ByteScales(Int(4, 32, scale_dtype="fp32")))
    params = fmt.fit(w := torch.randn(n, k))
    tensors = fmt.pack(fmt.project(w, params), params)
    given = dict(x=torch.randn(5, k).bfloat16(), codes=tensors["qweight"], scales=tensors["scales"], bias=None, n=n,
                 rows=1, group=32, scale="token", multiplier=tensors["scale_multiplier"])
    y = ops_float_cuda.fp8_linear(*given.values())
    seen = fmt.quantize_input(given["x"].float()).double()
    fp8.assert_near(y, seen, fmt.unpack(tensors, (n, k), torch.float64), None)
    assert launchers.calls == ["tersor_cuda_fp8_rows", "tersor_cuda_fp8_linear"]
    by_op = ops_float.fp8_linear(*(given | dict(x=given["x"].float())).values())
    assert (by_op.double() - y.double()).norm() < 5e-3 * y.double().norm()
    for changes, name in ((dict(scales=tensors["scales"].float()), "scale_multiplier"),
                          (dict(multiplier=None), "scales"), (dict(multiplier=torch.ones(2)), "scale_multiplier"),
                          (dict(scales=tensors["scales"][:-1]), "scales")):
        with pytest.raises(ValueError, match=f"{name}: found"):
            ops_float_cuda.fp8_linear(*(given | changes).values())


@pytest.mark.parametrize("changes, name", [(dict(scale="row"), "scale"), (dict(x=torch.randn(2, 64)), "x"),
                                           (dict(group=48), "group_size"), (dict(bias=torch.ones(3)), "bias")])
def test_fp8_checks_come_before_pointers(launchers, changes, name):
    weight = Weight(32, 64, 4, 32, True, torch.float16)
    given = dict(x=torch.randn(2, 64).half(), codes=weight.qweight, scales=weight.scales, bias=None, n=32, rows=1,
                 group=32, scale="token")
    with pytest.raises(ValueError, match=f"fp8_linear: {name}.*: found"):
        ops_float_cuda.fp8_linear(*(given | changes).values())
    assert not launchers.calls


@pytest.mark.parametrize("kind", (0, 1), ids=("mxfp4", "nvfp4"))
def test_inputs_in_fp4(launchers, kind):
    n, k = 200, 300
    weight = Stored(fp4.FORMATS[kind], n, k)
    codes, scales, one, _, _ = weight.fmt._operands(weight.tensors, (n, k))
    for shape in ((), (3,), (2, 9)):
        wide = torch.randn(*shape, k + 3).bfloat16()[..., 3:]
        bias = torch.randn(n).bfloat16()
        y = ops_float_cuda.fp4_linear(wide, codes, scales, one, bias, n)
        seen = Inputs(weight.fmt, ("mxfp4", "nvfp4")[kind]).quantize_input(wide.float()).double()
        fp8.assert_near(y.reshape(-1, n), seen.reshape(-1, k), weight.truth, bias)
        by_op = ops_float.fp4_linear(wide.float(), codes, scales, one, bias.float(), n)
        assert (by_op.double() - y.double()).norm() < 5e-3 * y.double().norm()
    assert set(launchers.calls) == {"tersor_cuda_block_rows", "tersor_cuda_fp4_linear"}
    assert ops_float_cuda.fp4_linear(wide[:0], codes, scales, one, None, n).shape == (0, 9, n)
    for changes, name in ((dict(codes=codes.view(torch.float8_e4m3fn)), "codes"), (dict(bias=bias[:3]), "bias"),
                          (dict(scales=torch.ones(n, 1 + (k - 1) // (16 if kind else 32))), "scales|global_scale")):
        given = dict(x=wide, codes=codes, scales=scales, one=one, bias=None, n=n) | changes
        with pytest.raises(ValueError, match=f"{name}.*: found"):
            ops_float_cuda.fp4_linear(*given.values())


@pytest.mark.parametrize("weights, inputs", [("e4m3", "e4m3"), ("e2m3", "e4m3"), ("e2m1", "e4m3"), ("e2m3", "e2m3")])
def test_inputs_in_mx(launchers, weights, inputs):
    fmt, n, k = Microscaling(weights), 200, 300
    params = fmt.fit(torch.randn(n, k))
    tensors = fmt.pack(fmt.project(torch.randn(n, k), params), params)
    truth = fmt.unpack(tensors, (n, k), torch.float64)
    codes, scales = tensors["weight_packed"], tensors["weight_scale"]
    for shape in ((), (3,)) if inputs == "e2m3" else ((), (3,), (2, 9)):
        wide = torch.randn(*shape, k + 3).bfloat16()[..., 3:]
        bias = torch.randn(n).bfloat16()
        y = ops_float_cuda.mx_linear(wide, codes, scales, bias, n, inputs)
        seen = float_round(wide.float(), inputs, "power", 32).double()
        fp8.assert_near(y.reshape(-1, n), seen.reshape(-1, k), truth, bias)
        by_op = ops_float.mx_linear(wide.float(), codes, scales, bias.float(), n, inputs)
        assert (by_op.double() - y.double()).norm() < 5e-3 * y.double().norm()
    assert set(launchers.calls) == {"tersor_cuda_block_rows", "tersor_cuda_mx_linear"}
    assert ops_float_cuda.mx_linear(wide[:0], codes, scales, None, n, inputs).numel() == 0
    given = dict(x=wide, codes=codes, scales=scales, bias=None, n=n, element=inputs)
    for changes, name in ((dict(codes=codes[:, :-1]), "codes"), (dict(bias=bias[:3]), "bias"),
                          (dict(element="e2m1"), "element"), (dict(scales=torch.ones(n, 10)), "scales"),
                          (dict(x=wide.float()), "x")):
        with pytest.raises(ValueError, match=f"{name}: found"):
            ops_float_cuda.mx_linear(*(given | changes).values())


@pytest.mark.parametrize("kind", _ROUNDING)
def test_rounding_is_the_op(launchers, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 203).to(dtype)[..., 3:]
        x[1, 2, 7], x[0, 1, 100] = float("nan"), 40
        found, wanted = ops_float_cuda.float_round(x, *_ROUNDING[kind]), float_round.cpu(x, *_ROUNDING[kind])
        assert torch.equal(found.nan_to_num(99.0), wanted.nan_to_num(99.0))
    assert len(launchers.calls) == 3
    assert ops_float_cuda.float_round(x[:0], *_ROUNDING[kind]).shape == (0, 3, 200)
    assert torch.equal(ops_float_cuda.float_round(x[0].double(), *_ROUNDING[kind]),
                       float_round.reference(x[0].double(), *_ROUNDING[kind])) and len(launchers.calls) == 3


def test_inputs_say_how_they_are_multiplied(monkeypatch):
    cases = ((Inputs(Int(4)), (8, 9), "fp8_linear"),
             (Inputs(Float("e4m3", "block"), "fp8", "group"), (9, 0), "fp8_linear"),
             (Inputs(Int(4)), (8, 6), None), (Inputs(Int(4, symmetric=False)), (9, 0), None),
             (Inputs(ByteScales(Int(4, scale_dtype="fp32"))), (8, 9), "fp8_linear"),
             (Inputs(ByteScales(Int(8, scale_dtype="fp32"))), (8, 9), None),
             (Inputs(Int(8)), (9, 0), None), (Inputs(NVFP4(), "nvfp4"), (12, 0), "fp4_linear"),
             (Inputs(NVFP4(), "nvfp4"), (12, 1), None), (Inputs(NVFP4(), "mxfp4"), (12, 0), None),
             (Inputs(Microscaling("e2m1"), "mxfp4"), (12, 0), "fp4_linear"),
             (Inputs(Microscaling("e2m1"), "mxfp4"), (10, 0), None),
             (Inputs(Microscaling("e4m3"), "mxfp8"), (12, 0), "mx_linear"),
             (Inputs(Microscaling("e2m3"), "mxfp8"), (12, 0), "mx_linear"),
             (Inputs(Microscaling("e2m1"), "mxfp6"), (12, 0), "mx_linear"),
             (Inputs(Microscaling("e2m3"), "mxfp8"), (9, 0), None), (Inputs(Int(4), "mxfp8"), (12, 0), None))
    for fmt, capability, product in cases:
        monkeypatch.setattr(ops_float_cuda, "_capability", lambda device, found=capability: found)
        found = fmt._product(torch.device("cuda", 0), (8, 128))
        assert found == (product and f"{product} cuda"), (fmt, capability)
        if product:
            assert fmt.kernel((8, 128), "cuda").startswith(found)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda_build), reason="no CUDA device"))]


@pytest.mark.parametrize("name", ("FP8A16", "MXFP8A16", "MXFP4A16", "NVFP4A16", "W4AFP8", "FP8", "FP8_DYNAMIC",
                                  "FP8_BLOCK", "MXFP4", "MXFP4XFP8", "MXFP8", "NVFP4", "MXFP6A16", "MXFP6A8",
                                  "AMXFP8/MXFP4A16", "AMXFP6/MXFP6A16"))
@pytest.mark.parametrize("device", DEVICES)
def test_presets(device, name):
    """Each preset with inputs of 16 bits against float64 over what its own rounding and unpacking give."""
    torch.manual_seed(0)
    fmt, (n, k) = resolve_format(name), (200, 300)
    w = torch.randn(n, k)
    params = fmt.fit(w, dtype=torch.bfloat16)
    tensors = fmt.pack(fmt.project(w, params), params)
    for m in (1, 70):
        x, bias = torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16()
        seen = fmt.quantize_input(x.float()) if isinstance(fmt, Inputs) else x
        wanted = torch.nn.functional.linear(seen.double(), fmt.unpack(tensors, (n, k), torch.float64), bias.double())
        there = {key: tensor.to(device) for key, tensor in tensors.items()}
        y = fmt.linear(x.to(device), there, bias.to(device), (n, k)).cpu()
        # where rounded inputs go on in 16 bits they are rounded once more
        assert y.dtype is x.dtype and (y.double() - wanted).norm() < 5e-3 * wanted.norm(), (name, m)
    assert not reference_kernel(fmt.kernel((n, k), device))


def test_the_kernel_is_named():
    name = Float().kernel((4, 4), "cuda")
    if ops_float.float_linear.cuda is None:
        assert name.startswith("reference: ")
    else:
        assert name.startswith("float_linear cuda (float32")
    assert Microscaling("e2m3").kernel((4, 4), "cuda") == name
    assert kind_of(Float()) == 0
    for fmt in (Inputs(Int(4)), Inputs(Float())):
        name = fmt.kernel((4, 4), "cuda")
        wanted = "fp8_linear cuda" if ops_float_cuda.takes_fp8(torch.device("cuda")) else "float_round cuda + "
        assert name.startswith(wanted if _C.has_cuda_build else "reference: ")
