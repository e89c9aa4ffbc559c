"""The operations of `ops` on CUDA: checks, scratch memory, the current stream, then the kernels of cuda/.

With 16-bit activations, above `MAX_ROWS` rows and for float32, `int_linear` is `int_dequantize` and a dense product;
`Op.kernel` says so. Low-bit activations are rounded by `ops_lowbit_cuda` and multiplied as integers by
`ops_lowbit_gemm_cuda`; those of experts with static scales by torch and as floats (`Int.kernel_grouped` says so).
Scales in two levels have a kernel for integer products of one weight; all else takes their products, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _C
from .op_checks import (CODE, FLOATS, as_rows, check_activations, check_bias, check_experts, check_input,
                        check_projections, check_weight, fail, state_of, two_level)

# Above so many rows a dense product of the dequantized weight is the faster way. Not measured on hardware yet.
MAX_ROWS = 256
_HALVES = (torch.bfloat16, torch.float16)


def on_own_device(op: Callable) -> Callable:
    """``op(x, ...)`` with the GPU of ``x`` as the current one, where kernels are launched."""

    @functools.wraps(op)
    def run(x, *arguments, **options):
        if torch.cuda.current_device() == x.device.index:
            return op(x, *arguments, **options)
        with torch.cuda.device(x.device.index):
            return op(x, *arguments, **options)

    return run


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory of each (1 KB of it the driver's)."""
    device = _C.cuda_devices()[index]
    return device["multiprocessors"], device["shared_memory_per_block"] + 1024


@functools.lru_cache(maxsize=4096)
def _plan(m, n, k, bits, group_size, scale_code, has_zero_points, index):
    return _C.cuda_int_linear_plan(m, n, k, bits, group_size, scale_code, has_zero_points, *_device(index))


def _workspace(device: torch.device, partial_bytes: int, counter_bytes: int) -> tuple[Tensor, Tensor]:
    """Scratch memory of one launch: partial sums, and counters at zero; empty where the launch needs none. From the
    caching allocator in every call: memory that was kept would belong to one stream, and to the pool of one graph."""
    return (torch.empty(partial_bytes, dtype=torch.uint8, device=device),
            torch.zeros(counter_bytes, dtype=torch.uint8, device=device))


_zero_points_seen = WeakIdKeyDictionary()  # zero points that were looked at, to their version


def _check_zero_points(op: str, zero_points: Tensor, bits: int, where: str = "with bfloat16") -> None:
    """The bf16 kernel is exact for zero points up to 2^bits, and integer sums are sure to fit. Each tensor is looked at
    once, since that waits for the GPU; a graph that is being captured cannot wait, so one not seen before is taken on
    trust there."""
    version = state_of(zero_points)
    if _zero_points_seen.get(zero_points) == version or torch.cuda.is_current_stream_capturing():
        return
    if zero_points.numel() and (largest := int(zero_points.max())) > 2**bits:
        fail(op, "zero_points", f"values up to {largest}", f"at most {2**bits} for {bits} bits {where}")
    _zero_points_seen[zero_points] = version


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return tuple(_C.cuda_devices()[index]["capability"])


def quantized(x: Tensor, act_bits: int, act_group: int, act_clip: float, act_sym: bool, input_scale: Tensor | None,
              bits: int, group_size: int, zero_points: bool, two_levels: bool = False):
    """``x`` rounded to codes for weights of ``bits``, as `ops_lowbit_gemm_cuda.lowbit_linear` takes it; None where rows
    are too long for it."""
    zero_points = zero_points and not two_levels  # which are part of the weights' bytes then
    from .act_codes import stored_width
    from .ops_lowbit_cuda import quantize_input
    from .ops_lowbit_gemm_cuda import refusal

    if refusal(x.shape[-1], zero_points, act_bits, act_sym):
        return None
    width = stored_width(act_bits, bits, capability(x.device.index), act_group, group_size, act_sym,
                         two_levels)
    return quantize_input(x, act_bits, act_group, act_clip, act_sym, input_scale, width=width, sums=zero_points)


def multiplied(x: Tensor, codes, qweight, scales, zero_points, bias, n: int, bits: int, group_size: int) -> Tensor:
    """The product of `quantized` rows of ``x`` with one weight."""
    from .ops_lowbit_gemm_cuda import lowbit_linear

    return lowbit_linear(codes, qweight, scales, zero_points, bias, n, bits, group_size, x.dtype).view(
        *x.shape[:-1], n)


def _rounded(x: Tensor, *activations) -> Tensor:
    """``x`` rounded to what integers hold, by torch: where no kernel takes such activations (`Int.kernel` says so)."""
    from .formats.integer import quantize_activations

    return quantize_activations(x, *activations)


def _one_level(scales: Tensor) -> Tensor:
    """Scales in two levels as their products, float32: for kernels that know one level."""
    if not two_level(scales):
        return scales
    from .formats.two_level import expanded

    return expanded(scales)


def _aligned_rows(x: Tensor) -> Tensor:
    """``x [tokens, in]`` with rows that start at multiples of 16 bytes; a copy where they do not."""
    if x.data_ptr() % 16 == 0 and (x.shape[0] <= 1 or x.stride(0) % 8 == 0):
        return x
    return x.new_empty((x.shape[0], -(-x.shape[1] // 8) * 8))[:, : x.shape[1]].copy_(x)


@on_own_device
def int_linear(x, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits, act_group=32,
               act_clip=1.0, act_sym=True, input_scale=None):
    op, index = "int_linear", x.device.index
    check_input(op, x, act_bits)
    k, n = x.shape[-1], out_features
    check_weight(op, k, qweight, scales, zero_points, n, bits, group_size, x.device)
    check_bias(op, x, bias, n)
    check_activations(op, k, act_bits, act_group, act_clip, act_sym, input_scale, x.device)
    if act_bits < 16:
        codes = quantized(x, act_bits, act_group, act_clip, act_sym, input_scale, bits, group_size,
                          zero_points is not None, two_level(scales))
        if codes is not None:
            return multiplied(x, codes, qweight, scales, zero_points, bias, n, bits, group_size)
        x = _rounded(x, act_bits, act_group, act_clip, act_sym, input_scale)
    scales = _one_level(scales)
    rows = as_rows(x)
    m = rows.shape[0]
    if x.dtype not in _HALVES or m > MAX_ROWS:
        return F.linear(x, int_dequantize(qweight, scales, zero_points, n, k, bits, group_size, x.dtype), bias)
    if zero_points is not None and bits < 8 and x.dtype is torch.bfloat16:
        _check_zero_points(op, zero_points, bits)
    rows = _aligned_rows(rows)
    y = x.new_empty((*x.shape[:-1], n))
    scale_code = CODE[scales.dtype]
    ranges, partial_bytes, counter_bytes = _plan(m, n, k, bits, group_size, scale_code, zero_points is not None,
                                                 index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_int_linear(
        rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, qweight.data_ptr(), scales.data_ptr(),
        scale_code, 0 if zero_points is None else zero_points.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), n, n, bits, group_size, ranges, partials.data_ptr(), counters.data_ptr(), stream,
    )
    return y


def int_linear_multi(x, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits, act_group=32,
                     act_clip=1.0, act_sym=True, input_scale=None):
    check_input("int_linear_multi", x, act_bits)
    check_activations("int_linear_multi", x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale, x.device)
    check_projections("int_linear_multi", qweights, scales, zero_points, biases, out_features)
    if act_bits < 16:
        for i, n in enumerate(out_features):  # all checks come before the first launch
            check_weight("int_linear_multi", x.shape[-1], qweights[i], scales[i],
                         zero_points[i] if zero_points else None, n, bits, group_size, x.device)
            check_bias("int_linear_multi", x, biases[i] if biases else None, n)
        codes = quantized(x, act_bits, act_group, act_clip, act_sym, input_scale, bits, group_size, bool(zero_points),
                          two_level(scales[0]))
        if codes is not None:
            return [
                multiplied(x, codes, qweights[i], scales[i], zero_points[i] if zero_points else None,
                           biases[i] if biases else None, n, bits, group_size)
                for i, n in enumerate(out_features)
            ]
        x, act_bits = _rounded(x, act_bits, act_group, act_clip, act_sym, input_scale), 16
    return [
        int_linear(x, qweights[i], scales[i], zero_points[i] if zero_points else None,
                   biases[i] if biases else None, n, bits, group_size, act_bits)
        for i, n in enumerate(out_features)
    ]


@functools.lru_cache(maxsize=4096)
def _grouped_plan(rows, n, k, bits, group_size, scale_code, has_zero_points, experts, index):
    return _C.cuda_int_linear_grouped_plan(rows, n, k, bits, group_size, scale_code, has_zero_points, experts,
                                           *_device(index))


@on_own_device
def int_linear_grouped(x, ends, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits,
                       act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    op, index, n = "int_linear_grouped", x.device.index, out_features
    check_input(op, x, act_bits)
    check_experts(op, x, ends, qweight, scales, zero_points, bias, n, bits, group_size)
    check_activations(op, x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale, x.device, ends.numel())
    scales = _one_level(scales)
    if input_scale is not None:  # each expert's rows by its own
        owner = torch.bucketize(torch.arange(len(x), device=x.device), ends, right=True).clamp_max(ends.numel() - 1)
        x = _rounded(x, act_bits, act_group, 1.0, True, input_scale[owner])
    elif act_bits < 16:
        from .ops_lowbit_cuda import quantize_input
        from .ops_lowbit_gemm_cuda import lowbit_linear_grouped, refusal

        if refusal(x.shape[-1], zero_points is not None, act_bits, act_sym) is None and x.shape[-1]:
            codes = quantize_input(x, act_bits, act_group, act_clip, act_sym, sums=zero_points is not None)
            return lowbit_linear_grouped(codes, ends, qweight, scales, zero_points, bias, n, bits, group_size, x.dtype)
        x = _rounded(x, act_bits, act_group, act_clip, act_sym)
    dtype = x.dtype
    if dtype not in _HALVES:
        # The kernel takes 16 bits; float32 goes expert by expert through dense products.
        return _grouped_dense(x, ends, qweight, scales, zero_points, bias, n, bits, group_size)
    if zero_points is not None and bits < 8 and dtype is torch.bfloat16:
        _check_zero_points(op, zero_points, bits)
    x = _aligned_rows(as_rows(x))
    rows, k = x.shape
    y = x.new_empty((rows, n))
    if not ends.numel():
        return y.zero_()
    scale_code = CODE[scales.dtype]
    ranges, partial_bytes, counter_bytes = _grouped_plan(rows, n, k, bits, group_size, scale_code,
                                                         zero_points is not None, ends.numel(), index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_int_linear_grouped(
        x.data_ptr(), CODE[dtype], rows, k, x.stride(0) if rows > 1 else k, ends.data_ptr(), ends.numel(),
        qweight.data_ptr(), scales.data_ptr(), scale_code, 0 if zero_points is None else zero_points.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n, bits, group_size, ranges, partials.data_ptr(),
        counters.data_ptr(), stream,
    )
    return y


def _grouped_dense(x, ends, qweight, scales, zero_points, bias, n, bits, group_size):
    y, begin = x.new_zeros((x.shape[0], n)), 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            w = int_dequantize(qweight[expert], scales[expert], None if zero_points is None else zero_points[expert],
                               n, x.shape[1], bits, group_size, x.dtype)
            y[begin:end] = F.linear(x[begin:end], w, None if bias is None else bias[expert])
        begin = end
    return y


def int_dequantize(qweight, scales, zero_points, out_features, in_features, bits, group_size, dtype):
    device = qweight.device
    check_weight("int_dequantize", in_features, qweight, scales, zero_points, out_features, bits, group_size, device)
    if dtype not in CODE:
        fail("int_dequantize", "dtype", dtype, FLOATS)
    scales = _one_level(scales)
    w = qweight.new_empty((out_features, in_features), dtype=dtype)
    with torch.cuda.device(device):
        _C.cuda_int_dequantize(
            qweight.data_ptr(), scales.data_ptr(), CODE[scales.dtype],
            0 if zero_points is None else zero_points.data_ptr(), out_features, in_features, bits, group_size,
            w.data_ptr(), CODE[dtype], torch._C._cuda_getCurrentRawStream(device.index),
        )
    return w
