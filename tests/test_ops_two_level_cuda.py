"""Scales in two levels in `ops_cuda`, `ops_fused` and layers: what they hand to the CUDA launchers, run on CPU tensors
(the launchers are the host-compiled ones), against the CPU kernels."""

import cuda_rows
import pytest
import torch
from cuda_lowbit import Launchers
from cuda_rows import emulated
from emulation import build
from test_cuda_lowbit_fused import quantize_input
from test_cuda_two_level import SOURCES, library
from two_level import Weight

from tersor import ops, ops_cuda, ops_fused, ops_lowbit_cuda
from tersor.formats.integer import Int
from tersor.formats.mixed import MixedInputs
from tersor.formats.two_level import expanded
from tersor.ops_fused import BoundFusedCuda, BoundLowbitCuda, Producer
from tersor.ops_lowbit_gemm_cuda import lowbit_linear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launchers(monkeypatch):
    launchers = Launchers(native=library(4))
    launchers.experts = build([*SOURCES, "cuda/kernels/sm80_lowbit_linear_experts.cu"], {"TERSOR_BITS": 4}).library
    launchers.install(monkeypatch)
    return launchers


def arguments(weight, bias=None):
    return weight.qweight, weight.scales, weight.zeros, bias, weight.n, weight.bits, weight.group


def near(y, expected):
    return bool(((y - expected).abs() <= 2e-6 * expected.abs().max()).all())


@pytest.mark.parametrize("options", [(8, 0), (8, 32), (4, 64, 0.9), (4, 0, 1.0, False), (8, 0, 1.0, False)], ids=str)
def test_int_linear_is_the_cpu_kernel(launchers, options):
    for m, symmetric in ((1, True), (11, False)):
        weight, x, bias = Weight(40, 200, 4, 64, symmetric), torch.randn(m, 200), torch.randn(40)
        y = ops_cuda.int_linear(x, *arguments(weight, bias), *options)
        there = ops.int_linear.cpu(x, *arguments(weight, bias), *options)
        assert near(y, there)
        if options == (8, 0):
            assert torch.equal(y, there), "one rounding for each scale, in the same order"
        several = ops_cuda.int_linear_multi(x, [weight.qweight] * 2, [weight.scales] * 2,
                                            [] if symmetric else [weight.zeros] * 2, [bias] * 2, [40, 40], 4, 64,
                                            *options)
        assert all(torch.equal(one, y) for one in several)
    assert launchers.calls == 6


def test_experts_take_one_level(launchers):
    weights = [Weight(20, 96, 4, 32, False, seed=s) for s in range(3)]
    ends, rows = torch.tensor([2, 2, 6], dtype=torch.int32), torch.randn(7, 96)
    given = [torch.stack([getattr(w, name) for w in weights]) for name in ("qweight", "scales", "zeros")]
    y = ops_cuda.int_linear_grouped(rows, ends, *given, None, 20, 4, 32, 8, 0)
    assert near(y, ops.int_linear_grouped.cpu(rows, ends, *given, None, 20, 4, 32, 8, 0)) and launchers.calls == 1


def test_codes_that_do_not_fit_are_refused(launchers):
    weight, x = Weight(40, 128, 4, 64), torch.randn(2, 128)
    codes = ops_lowbit_cuda.quantize_input(x, 4, 0, width=4)
    with pytest.raises(ValueError, match="quantized.width: found 4, accepted is 8 for weights in two levels"):
        lowbit_linear(codes, weight.qweight, weight.scales, None, None, 40, 4, 64, torch.float32)


def test_rows_too_long_for_integers_take_one_level(launchers, monkeypatch):
    """Then torch rounds, and `int_dequantize` or the 16-bit kernel is given scales of one level."""
    weight, x = Weight(20, 96, 4, 32, False), torch.randn(3, 96)
    seen = {}

    def dequantize(qweight, scales, *rest):
        seen["scales"] = scales
        return ops.int_dequantize.cpu(qweight, scales, *rest)

    monkeypatch.setattr(ops_cuda, "quantized", lambda *a, **k: None)
    monkeypatch.setattr(ops_cuda, "int_dequantize", dequantize)
    y = ops_cuda.int_linear(x, *arguments(weight), 8, 0)
    assert torch.equal(seen["scales"], expanded(weight.scales))
    assert near(y, ops.int_linear.cpu(x, *arguments(weight), 8, 0))


@pytest.mark.parametrize("zeros", [False, True])
def test_producers_and_layers(launchers, monkeypatch, zeros):
    """One launch rounds, without sums of codes and never to nibbles; one multiplies for each weight."""
    monkeypatch.setattr(ops_lowbit_cuda, "quantize_input", quantize_input)  # the kernel, not its definition
    weights = [Weight(n, 128, 4, 64, not zeros, seed=n) for n in (33, 16)]
    bound = [BoundLowbitCuda(w.qweight, w.scales, w.zeros, (w.n, w.k), 4, 64, 4, 0) for w in weights]
    call, x = BoundFusedCuda(bound, Producer(hadamard=0)), torch.randn(5, 128)
    with emulated(cuda_rows.Launchers()):
        codes = call.rounding(x)
        assert codes.sums is None and codes.width == 8
        found = call(x, [None, None])
    made = ops_fused.BoundIntLinearFused([ops.BoundIntLinear(*b.tensors, b.shape, 4, 64, 4, 0) for b in bound],
                                         Producer(hadamard=0))(x, [None, None])
    for y, expected in zip(found, made, strict=True):
        assert (y - expected).norm() < 0.02 * expected.norm()  # sums in another order round a code here and there
    one_level = BoundLowbitCuda(weights[0].qweight, expanded(weights[0].scales), weights[0].zeros, (33, 128), 4, 64, 4,
                                0)
    with pytest.raises(ValueError, match="projection 1"):
        BoundFusedCuda([bound[0], one_level], Producer())


def test_kernels_are_named():
    fmt = Int(4, 64, False, 8, "int8")
    if ops.int_linear.cuda is None:
        assert fmt.kernel((64, 64), "cuda").startswith("reference")
        return
    assert fmt.kernel((64, 40000), "cuda") == "quantize_rows cuda, two_level_linear cuda"
    assert fmt.kernel((64, 65568), "cuda").startswith("reference: rows of 65568")
    assert "scales of one level" in fmt.kernel_grouped((64, 64), "cuda")
    assert MixedInputs(Int(4, 64, activation=4, scale_dtype="int8")).kernel((64, 64), "cuda").endswith(
        "two_level_linear cuda")
