"""Low-bit activations in `ops_cuda` and `ops_lowbit_gemm_cuda`: what they hand to the CUDA launchers, run on CPU
tensors (the launchers are the host-compiled ones, rounding is torch's), against the CPU kernels."""

import dataclasses

import pytest
import torch
from cuda_lowbit import Launchers, Weight, rounded

from tersor import act_codes, ops, ops_cuda
from tersor.formats.integer import Int, quantize_activations
from tersor.ops_lowbit_gemm_cuda import lowbit_linear, stage_tables


@pytest.fixture
def launchers(monkeypatch):
    launchers = Launchers()
    launchers.install(monkeypatch)
    return launchers


def arguments(weight, bias=None):
    return weight.qweight, weight.scales, weight.zeros, bias, weight.n, weight.bits, weight.group


def truth(x, weight, *activations, **more):
    return quantize_activations(x.float(), *activations, **more).double() @ weight.truth.T


def near(y, expected, dtype):
    largest = expected.abs().max().clamp_min(1e-9)
    return bool(((y.double() - expected).abs() <= max(torch.finfo(dtype).eps, 1e-6) * largest).all())


OPTIONS = {"per token": (8, 0), "groups of 32": (8, 32), "6 bits": (6, 128), "asymmetric": (8, 0, 1.0, False),
           "asymmetric in groups": (8, 64, 1.0, False), "clipped": (8, 64, 0.8), "nibbles": (4, 0),
           "4 bits, asymmetric": (4, 0, 1.0, False), "nibbles in groups": (4, 64, 0.9)}


@pytest.mark.parametrize("options", OPTIONS)
def test_int_linear_is_the_cpu_kernel(launchers, options):
    chosen = OPTIONS[options]
    for m, symmetric, group, dtype in ((1, True, 64, torch.bfloat16), (11, False, 0, torch.float32)):
        weight = Weight(40, 200, 4, group, symmetric, torch.float32)
        x, bias = torch.randn(m, 200).to(dtype), torch.randn(40).to(dtype)
        y = ops_cuda.int_linear(x, *arguments(weight, bias), *chosen)
        assert y.shape == (m, 40) and y.dtype is dtype
        assert near(y, truth(x, weight, *chosen) + bias.double(), dtype)
        there = ops.int_linear.cpu(x, *arguments(weight, bias), *chosen)
        assert near(y, there.double(), dtype)
    assert launchers.calls == 2


def test_where_4_bits_are_stored_as_such():
    stored = act_codes.stored_width
    assert stored(4, 4, (8, 0), 0, 128) == stored(4, 4, (8, 6), 64, 0) == stored(4, 4, (8, 9), 128, 64) == 4
    assert stored(4, 4, (9, 0), 0, 0) == stored(4, 4, (12, 0), 0, 0) == stored(4, 4, (7, 5), 0, 0) == 8
    assert stored(4, 4, (8, 0), 32, 128) == 8 and stored(4, 4, (8, 0), 0, 32) == 8, "64 channels in one product"
    assert stored(4, 3, (8, 0), 0, 0) == stored(6, 4, (8, 0), 0, 0) == stored(4, 4, (8, 0), 0, 0, False) == 8


@pytest.mark.parametrize("capability, width", [((8, 6), 4), ((9, 0), 8)])
def test_the_width_is_the_machine_s(monkeypatch, capability, width):
    launchers = Launchers()
    launchers.install(monkeypatch, capability)
    seen = []
    monkeypatch.setattr(ops_cuda, "multiplied", lambda x, codes, *rest: seen.append(codes.width) or multiplied(
        x, codes, *rest))
    weight, x = Weight(40, 200, 4, 64, True, torch.float32), torch.randn(3, 200)
    y = ops_cuda.int_linear(x, *arguments(weight), 4, 0)
    assert seen == [width] and near(y, truth(x, weight, 4, 0), torch.float32)


multiplied = ops_cuda.multiplied


def test_static_scales_and_any_shape_of_rows(launchers):
    weight, scale = Weight(40, 200, 4, 64, False, torch.bfloat16), torch.rand(4) * 0.01 + 0.02
    x = torch.randn(2, 3, 200).half()
    y = ops_cuda.int_linear(x, *arguments(weight), 8, 64, 1.0, True, scale)
    assert y.shape == (2, 3, 40) and near(y, truth(x, weight, 8, 64, 1.0, True, scale), torch.float16)
    assert ops_cuda.int_linear(x[:0], *arguments(weight), 8).shape == (0, 3, 40)
    one = ops_cuda.int_linear(x[0, 0], *arguments(weight), 8, 64, 1.0, True, scale)
    assert torch.equal(one, y[0, 0])


def test_projections_are_rounded_once(launchers, monkeypatch):
    count = []
    monkeypatch.setattr("tersor.ops_lowbit_cuda.quantize_input", lambda *a, **k: count.append(1) or rounded(*a, **k))
    weights = [Weight(n, 128, 4, 32, False, torch.float16, n) for n in (32, 80)]
    x = torch.randn(4, 128).bfloat16()
    lists = [[w.qweight for w in weights], [w.scales for w in weights], [w.zeros for w in weights], [], [32, 80]]
    outputs = ops_cuda.int_linear_multi(x, *lists, 4, 32, 8)
    assert len(count) == 1 and launchers.calls == 2
    for y, weight in zip(outputs, weights):
        assert near(y, truth(x, weight, 8), torch.bfloat16)
    lists[1][1] = lists[1][1][:, :1]
    with pytest.raises(ValueError, match="int_linear_multi: scales: found"):
        ops_cuda.int_linear_multi(x, *lists, 4, 32, 8)
    assert launchers.calls == 2, "nothing was launched"


def test_mixed_blocks_and_a_residual(launchers):
    block_bits = torch.tensor([4, 8, 4], dtype=torch.uint8)
    weight = Weight(40, 300, 4, 64, True, torch.float32)
    few, many = stage_tables(block_bits)
    assert few[0].tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]] and few[1] == 3
    assert many[0].tolist() == [[0, 1, 3, 4], [0, 1, 3, 4]] and many[1] == 4
    for m in (2, 20):
        x, residual = torch.randn(m, 300), torch.randn(m, 44)[:, :40]
        codes = rounded(x, 4, 64, block_bits=block_bits, width=4)
        y = lowbit_linear(codes, *arguments(weight), torch.float32, residual)
        assert near(y, truth(x, weight, 4, 64, block_bits=block_bits) + residual.double(), torch.float32)
        wide = rounded(x, 4, 64, block_bits=block_bits, width=8)
        assert torch.equal(y, lowbit_linear(wide, *arguments(weight), torch.float32, residual)), "exact in both"
    block_bits[1] = 4
    assert stage_tables(block_bits)[1][1] == 3, "the table follows the tensor"


def test_rows_that_are_not_finite(launchers):
    weight, bias = Weight(40, 200, 4, 64, True, torch.float32), torch.randn(40)
    x = torch.randn(4, 200)
    x[1] = 0
    x[2, 7] = float("inf")
    y = ops_cuda.int_linear(x, *arguments(weight, bias), 8, 0)
    assert torch.equal(y[1], bias) and torch.isnan(y[2]).all() and torch.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("change, words", [
    (dict(codes=torch.zeros(2, 128, dtype=torch.uint8)), "quantized.codes: found torch.uint8"),
    (dict(scales=torch.zeros(2, 3)), "quantized.scales: found"),
    (dict(sums=None), "no sums of codes"),
    (dict(width=3), "quantized.width: found 3"),
    (dict(zero_points=torch.zeros(2, 4)), "quantized.zero_points: found torch.float32"),
])  # fmt: skip
def test_checks_come_before_pointers(launchers, change, words):
    weight = Weight(40, 200, 4, 64, False, torch.float32)
    codes = dataclasses.replace(rounded(torch.randn(2, 200), 8, 64), **change)
    with pytest.raises(ValueError, match=words):
        lowbit_linear(codes, *arguments(weight), torch.float32)
    assert not launchers.calls


def test_what_the_kernel_does_not_take(launchers):
    weight = Weight(40, 200, 4, 64, False, torch.float32)
    weight.zeros[0, 0, 0] = 17
    with pytest.raises(ValueError, match="values up to 17, accepted is at most 16 for 4 bits in integer products"):
        ops_cuda.int_linear(torch.randn(2, 200), *arguments(weight), 8)
    with pytest.raises(ValueError, match="bias: found"):
        lowbit_linear(rounded(torch.randn(2, 200), 8), *arguments(Weight(40, 200, 4, 64, True, torch.float32),
                                                                   torch.randn(41)), torch.float32)


def test_experts_reach_the_launcher(launchers):
    count, weight = 3, Weight(80, 200, 4, 32, False, torch.float16)
    stacked = [torch.stack([tensor] * count) for tensor in (weight.qweight, weight.scales, weight.zeros)]
    bias, ends = torch.randn(count, 80), torch.tensor([2, 2, 9], dtype=torch.int32)
    for dtype, options in ((torch.bfloat16, (8, 32)), (torch.float32, (6, 0)), (torch.float16, (8, 64, 0.9, False))):
        x = torch.randn(11, 200).to(dtype)
        given = (x, ends, *stacked, bias.to(dtype), 80, 4, 32, *options)
        y, expected = ops_cuda.int_linear_grouped(*given), ops.int_linear_grouped.cpu(*given)
        assert y.dtype is dtype and not y[9:].any() and near(y, expected.double(), dtype)
    assert launchers.calls == 3
    assert ops_cuda.int_linear_grouped(x[:0], ends * 0, *stacked, None, 80, 4, 32, 8).shape == (0, 80)


def test_formats_name_the_kernel(monkeypatch):
    monkeypatch.setattr(ops.int_linear, "cuda", ops_cuda.int_linear)
    monkeypatch.setattr(ops.int_linear_grouped, "cuda", ops_cuda.int_linear_grouped)
    assert Int(4, activation=8).kernel((64, 128), "cuda") == "quantize_rows cuda, lowbit_linear cuda"
    assert Int(4, activation=8).kernel((64, 65568), "cuda").startswith("reference: rows of 65568 channels")
    both = Int(4, symmetric=False, activation=8, act_sym=False)
    assert both.kernel((64, 40000), "cuda").startswith("reference: rows")
    assert Int(4).kernel((64, 128), "cuda").startswith("int_linear cuda")
    assert Int(4, activation=8).kernel_grouped((64, 128), "cuda") == "quantize_rows cuda, lowbit_linear_grouped cuda"
    static = Int(4, activation=8, act_scale="static")
    assert static.kernel_grouped((64, 128), "cuda").startswith("reference: no CUDA kernel for static")
