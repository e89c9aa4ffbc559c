"""`float_linear` on CUDA: checks, scratch memory, the current stream, then the kernels of cuda/."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _C
from .op_checks import CODE, as_rows, check_bias, fail
from .ops_cuda import _aligned_rows, _device, _workspace

HALVES = (torch.bfloat16, torch.float16)
KERNEL = "float_linear cuda"


@functools.lru_cache(maxsize=4096)
def _plan(m, n, k, element, kind, index):
    return _C.cuda_float_linear_plan(m, n, k, element, kind, *_device(index))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def float_linear(x, codes, scales, global_scale, bias, out_features, scale_rows, group):
    from .ops_float import check_operands

    op, index = "float_linear", x.device.index
    if x.dtype not in HALVES or x.dim() < 1:
        fail(op, "x", f"{x.dtype} {list(x.shape)}", "on CUDA torch.bfloat16, torch.float16 [..., in_features]")
    k, n = x.shape[-1], out_features
    element, kind = check_operands(codes, scales, global_scale, n, k, scale_rows, group, x.device)
    if global_scale is not None and (global_scale.dtype is not torch.float32 or global_scale.device != x.device):
        fail(op, "global_scale", f"{global_scale.dtype} on {global_scale.device}", f"torch.float32 on {x.device}")
    check_bias(op, x, bias, n)
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return float_linear(x, codes, scales, global_scale, bias, n, scale_rows, group)
    rows = _aligned_rows(as_rows(x))
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    ranges, partial_bytes, counter_bytes = _plan(m, n, k, element, kind, index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_float_linear(
        rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, codes.data_ptr(), element,
        scales.data_ptr(), kind, scale_rows, group, pointer(global_scale), pointer(bias), y.data_ptr(), n, n, ranges,
        partials.data_ptr(), counters.data_ptr(), torch._C._cuda_getCurrentRawStream(index),
    )
    return y
