"""Integer weights for the CUDA kernels' tests: the host-compiled kernels as functions of tensors."""

import ctypes
import functools

import torch
from emulation import build
from test_cpu_int_linear import Weight, relative_error

__all__ = ["CODE", "SOURCES", "Weight", "dequantize", "inputs", "library", "multiply", "relative_error", "units"]

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
SOURCES = [
    "cuda/kernels/sm80_int_linear.cu", "cuda/kernels/int_dequantize.cu", "cuda/dispatch/int_linear.cu",
    "cuda/dispatch/int_dequantize.cu", "cpp/common/status.cpp", "cpp/common/parallel.cpp", "cpp/cpu/int_layout.cpp",
]


@functools.cache
def library(bits, sanitize=False):
    return build(SOURCES, {"TERSOR_BITS": bits}, sanitize=sanitize)


def inputs(m, weight, dtype, biased, seed=0):
    """x [m, k] whose rows are 16-byte aligned and padded with NaN, and a bias."""
    random = torch.Generator().manual_seed(seed)
    width = -(-weight.k // 8) * 8
    x = torch.full((m, width), float("nan"), dtype=dtype)[:, : weight.k]
    x.copy_(torch.randn(m, weight.k, generator=random))
    return x, torch.randn(weight.n, generator=random).to(dtype) if biased else None


def units(weight):
    """(row block, stage) pairs that a launch can cut into ranges."""
    return -(-weight.n // 128) * -(-weight.k // 128)


def multiply(library, weight, x, bias=None, ranges=1, seeds=(0,), count=False, pad=5):
    """y [m, n] of the emulated kernel, and its counters. The columns behind y's rows must stay as they were."""
    m, n = x.shape[0], weight.n
    out = torch.full((m, n + pad), float("nan"), dtype=x.dtype)
    sizes = [ctypes.c_int64(), ctypes.c_int64()]
    status = library.library.tersor_cuda_int_linear_workspace(
        ctypes.c_int64(m), ctypes.c_int64(n), ctypes.c_int64(ranges), *map(ctypes.byref, sizes))
    assert status == 0
    partials = torch.full((sizes[0].value // 4,), float("nan"))
    counters = torch.zeros(sizes[1].value // 4, dtype=torch.int32)
    names = {"x": x, "qweight": weight.qweight, "scales": weight.scales, "zero_points": weight.zeros, "bias": bias,
             "y": out, "partials": partials, "counters": counters}
    # The whole of y's rows is registered: what is written behind them is found below.
    result = library.call(
        "tersor_cuda_int_linear", x, CODE[x.dtype], m, weight.k, x.stride(0), weight.qweight, weight.scales,
        CODE[weight.scale_dtype], weight.zeros, bias, out, n, out.stride(0), weight.bits, weight.group, ranges,
        partials, counters, None, names=[name for name, tensor in names.items() if tensor is not None],
        outputs=[out, partials, counters], seeds=seeds, count=count)
    assert not counters.any(), "the counters are not zero again"
    assert torch.isnan(out[:, n:]).all(), "wrote past the row"
    return out[:, :n], result


def dequantize(library, weight, dtype, seeds=(0,), count=False):
    out = torch.full((weight.n, weight.k), float("nan"), dtype=dtype)
    names = ["qweight", "scales"] + ([] if weight.zeros is None else ["zero_points"]) + ["out"]
    result = library.call(
        "tersor_cuda_int_dequantize", weight.qweight, weight.scales, CODE[weight.scale_dtype], weight.zeros, weight.n,
        weight.k, weight.bits, weight.group, out, CODE[dtype], None, names=names, outputs=[out], seeds=seeds,
        count=count)
    return out, result
