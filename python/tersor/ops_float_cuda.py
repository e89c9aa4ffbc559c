"""Small floats on CUDA (`float_linear`, `fp8_linear`, `fp4_linear`, `mx_linear`, `float_round`): checks, scratch
memory, the current stream, then the kernels of cuda/."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .op_checks import CODE, address, as_rows, check_bias, check_weight, fail
from .ops_cuda import _aligned_rows, _device, _workspace, capability, on_own_device

HALVES = (torch.bfloat16, torch.float16)
KERNEL = "float_linear cuda"
FP8_KERNEL, FP4_KERNEL, ROUND_KERNEL = "fp8_linear cuda", "fp4_linear cuda", "float_round cuda"
MX_KERNEL = "mx_linear cuda"
_FP4 = (12, 0)  # the one whose mma takes block scales


@functools.lru_cache(maxsize=4096)
def _plan(m, n, k, element, kind, index):
    return _C.cuda_float_linear_plan(m, n, k, element, kind, *_device(index))


def _check_halves(op: str, x: Tensor) -> None:
    if x.dtype not in HALVES or x.dim() < 1:
        fail(op, "x", f"{x.dtype} {list(x.shape)}", "on CUDA torch.bfloat16, torch.float16 [..., in_features]")


def _nothing(y: Tensor, bias: Tensor | None) -> Tensor:
    """The product over no channels."""
    return y.zero_() if bias is None else y.copy_(bias)


@on_own_device
def float_linear(x, codes, scales, global_scale, bias, out_features, scale_rows, group):
    from .ops_float import check_operands

    op, index = "float_linear", x.device.index
    _check_halves(op, x)
    k, n = x.shape[-1], out_features
    element, kind = check_operands(codes, scales, global_scale, n, k, scale_rows, group, x.device)
    if global_scale is not None and (global_scale.dtype is not torch.float32 or global_scale.device != x.device):
        fail(op, "global_scale", f"{global_scale.dtype} on {global_scale.device}", f"torch.float32 on {x.device}")
    check_bias(op, x, bias, n)
    rows = _aligned_rows(as_rows(x))
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel() or not k:
        return _nothing(y, bias)
    ranges, partial_bytes, counter_bytes = _plan(m, n, k, element, kind, index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_float_linear(
        rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, codes.data_ptr(), element,
        scales.data_ptr(), kind, scale_rows, group, address(global_scale), address(bias), y.data_ptr(), n, n, ranges,
        partials.data_ptr(), counters.data_ptr(), torch._C._cuda_getCurrentRawStream(index),
    )
    return y


# -- e4m3 activations -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _fp8_plan(m, n, k, weight, index):
    return _C.cuda_fp8_linear_plan(m, n, k, weight, *_device(index))


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU that this build has kernels for; (0, 0) where it has none."""
    if device.type != "cuda" or not _C.has_cuda_build:
        return 0, 0
    if device.index is not None:
        return capability(device.index)
    return capability(torch.cuda.current_device()) if torch.cuda.is_available() else (0, 0)


def takes_fp8(device: torch.device) -> bool:
    """Whether `fp8_linear` has a kernel on this device."""
    found = _capability(device)
    return found == (8, 9) or found[0] in (9, 10, 12)  # what TERSOR_CUDA_FP8_ARCHITECTURES has images for


def takes_fp4(device: torch.device) -> bool:
    """Whether `fp4_linear` and `mx_linear` have kernels on this device."""
    return _capability(device) == _FP4


def _largest_finite(rows: Tensor, group: int) -> Tensor:
    """The largest magnitude in the groups (0: whole rows) that are finite throughout, float32 ``[1]``; nothing waits
    for the GPU."""
    groups = F.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group)) if group else rows
    top = groups.abs().amax(-1).float()
    return top.where(top.isfinite(), 0.0).amax().view(1)


def fp8_rows(rows: Tensor, scale: str, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[m, K]`` and scales float32 ``[m, groups]`` (cuda/tile/fp8_codes.h) of ``rows [m, k]``, m >= 1,
    with a scale for each ``token``, ``group`` of 128 channels or the whole ``tensor``."""
    m, k = rows.shape
    padded = -(-k // 128) * 128
    groups = padded // 128 if scale == "group" else 1
    codes = torch.empty((m, padded), dtype=torch.uint8, device=rows.device)
    scales = torch.empty((m, groups), dtype=torch.float32, device=rows.device)
    top = _largest_finite(rows, 0) if scale == "tensor" else None
    _C.cuda_fp8_rows(rows.data_ptr(), CODE[rows.dtype], m, k, rows.stride(0) if m > 1 else k, address(top), groups,
                     interleaved, codes.data_ptr(), scales.data_ptr(), 0,
                     torch._C._cuda_getCurrentRawStream(rows.device.index))
    return codes, scales


@on_own_device
def fp8_linear(x, codes, scales, bias, out_features, scale_rows, group, scale, scale_multiplier=None):
    from .ops_float import check_byte_scales, check_fp8_scale, check_operands

    op, index = "fp8_linear", x.device.index
    _check_halves(op, x)
    check_fp8_scale(scale)
    k, n = x.shape[-1], out_features
    integers = codes.dtype is torch.uint8
    if scale_multiplier is not None:
        check_byte_scales(codes, scales, scale_multiplier)
    elif scales.dtype not in CODE:
        fail(op, "scales", scales.dtype, "floats, or bytes with a scale_multiplier")
    if integers:
        # bytes in the place of a float type: the shape is the same
        floats = scales if scale_multiplier is None else scales.new_empty(scales.shape, dtype=torch.float16)
        check_weight(op, k, codes, floats, None, n, 4, group, x.device)
    else:
        check_operands(codes, scales, None, n, k, scale_rows, group, x.device)
    check_bias(op, x, bias, n)
    rows = as_rows(x)
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel() or not k:
        return _nothing(y, bias)
    seen, of_tokens = fp8_rows(rows, scale, integers)
    weight = 0 if integers else 1
    ranges, partial_bytes, counter_bytes = _fp8_plan(m, n, k, weight, index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_fp8_linear(
        seen.data_ptr(), of_tokens.data_ptr(), of_tokens.shape[1], m, k, codes.data_ptr(), weight, scales.data_ptr(),
        CODE[scales.dtype] if scale_multiplier is None else 4, address(scale_multiplier), scale_rows, group,
        address(bias), CODE[x.dtype], y.data_ptr(), n, n, ranges, partials.data_ptr(), counters.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index),
    )
    return y


# -- activations in small groups, and rounding alone ------------------------------------------------------------------

_BLOCK_KINDS = {("e2m1", "power", 32): 0, ("e2m1", "e4m3", 16): 1, ("e4m3", "power", 32): 2, ("e2m3", "power", 32): 3}
_FP8_GROUPS = {("e4m3", "largest", 0): "token", ("e4m3", "largest", 128): "group", ("e4m3", "whole", 0): "tensor"}


@functools.lru_cache(maxsize=4096)
def _fp4_plan(m, n, k, kind, index):
    return _C.cuda_fp4_linear_plan(m, n, k, kind, *_device(index))


def _global_scale(rows: Tensor) -> Tensor:
    """What NVFP4 multiplies the scales of ``rows [m, k]`` by, float32 ``[1]``, as `ops_round` defines it."""
    top = _largest_finite(rows, 16).clamp_min(torch.finfo(torch.float32).smallest_normal)
    return ((448.0 * 6.0) * (1 / top)).nan_to_num(posinf=1.0)


def _block_rows(rows: Tensor, kind: int, codes: Tensor | None, scales: Tensor | None,
                out: Tensor | None) -> Tensor | None:
    one = _global_scale(rows) if kind == 1 else None
    m, k = rows.shape
    _C.cuda_block_rows(rows.data_ptr(), CODE[rows.dtype], m, k, rows.stride(0) if m > 1 else k, kind, address(one),
                       address(codes), address(scales), address(out),
                       torch._C._cuda_getCurrentRawStream(rows.device.index))
    return one


@on_own_device
def float_round(x, element, scale, group):
    """`ops_round.float_round` in the combinations that formats have; torch rounds others, and float64."""
    from .ops_round import _check, _float_round_reference

    _check(x, element, scale, group)
    what = element, scale, group
    if x.dtype not in CODE or what not in _BLOCK_KINDS and what not in _FP8_GROUPS:
        return _float_round_reference(x, element, scale, group)
    if not x.numel():
        return x.clone()
    index = x.device.index
    rows = as_rows(x)
    m, k = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if what in _BLOCK_KINDS:
        _block_rows(rows, _BLOCK_KINDS[what], None, None, y)
        return y
    top = _largest_finite(rows, 0) if scale == "whole" else None
    _C.cuda_fp8_rows(rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, address(top),
                     -(-k // 128) if group else 1, False, 0, 0, y.data_ptr(),
                     torch._C._cuda_getCurrentRawStream(index))
    return y


@on_own_device
def fp4_linear(x, codes, scales, global_scale, bias, out_features):
    from .ops_float import check_operands

    op, index, kind = "fp4_linear", x.device.index, 0 if global_scale is None else 1
    _check_halves(op, x)
    k, n, group = x.shape[-1], out_features, 16 if kind else 32
    element, scale_kind = check_operands(codes, scales, global_scale, n, k, 1, group, x.device)
    if (element, scale_kind) != (1, 3 + kind):
        fail(op, "codes, scales", f"{codes.dtype}, {scales.dtype}",
             "e2m1 under exponents, or under e4m3 and one number")
    if kind and (global_scale.dtype is not torch.float32 or global_scale.device != x.device):
        fail(op, "global_scale", f"{global_scale.dtype} on {global_scale.device}", f"torch.float32 on {x.device}")
    check_bias(op, x, bias, n)
    rows = as_rows(x)
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel() or not k:
        return _nothing(y, bias)
    stages = -(-k // 128)
    seen = torch.empty((m, stages * 64), dtype=torch.uint8, device=x.device)
    of_tokens = torch.empty((m, stages * (8 if kind else 4)), dtype=torch.uint8, device=x.device)
    one = _block_rows(rows, kind, seen, of_tokens, None)
    ranges, partial_bytes, counter_bytes = _fp4_plan(m, n, k, kind, index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_fp4_linear(
        seen.data_ptr(), of_tokens.data_ptr(), address(one), m, k, codes.data_ptr(), scales.data_ptr(),
        address(global_scale), kind, address(bias), CODE[x.dtype], y.data_ptr(), n, n, ranges, partials.data_ptr(),
        counters.data_ptr(), torch._C._cuda_getCurrentRawStream(index),
    )
    return y


@functools.lru_cache(maxsize=4096)
def _mx_plan(m, n, k, weight, index):
    return _C.cuda_mx_linear_plan(m, n, k, weight, *_device(index))


@on_own_device
def mx_linear(x, codes, scales, bias, out_features, element):
    from .ops_float import MX_INPUTS, check_mx_input, check_operands

    op, index = "mx_linear", x.device.index
    _check_halves(op, x)
    check_mx_input(element)
    k, n = x.shape[-1], out_features
    of_weight, scale_kind = check_operands(codes, scales, None, n, k, 1, 32, x.device)
    if scale_kind != 3:
        fail(op, "scales", scales.dtype, "exponents, torch.uint8")
    check_bias(op, x, bias, n)
    rows = as_rows(x)
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel() or not k:
        return _nothing(y, bias)
    stages = -(-k // 128)
    seen = torch.empty((m, stages * 128), dtype=torch.uint8, device=x.device)
    of_tokens = torch.empty((m, stages * 4), dtype=torch.uint8, device=x.device)
    _block_rows(rows, _BLOCK_KINDS[element, "power", 32], seen, of_tokens, None)
    weight = (0, 2, 1)[of_weight]  # the order of cuda/ptx/matrix_mx.h
    ranges, partial_bytes, counter_bytes = _mx_plan(m, n, k, weight, index)
    partials, counters = _workspace(x.device, partial_bytes, counter_bytes)
    _C.cuda_mx_linear(
        seen.data_ptr(), of_tokens.data_ptr(), MX_INPUTS[element], m, k, codes.data_ptr(), weight, scales.data_ptr(),
        address(bias), CODE[x.dtype], y.data_ptr(), n, n, ranges, partials.data_ptr(), counters.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index),
    )
    return y
