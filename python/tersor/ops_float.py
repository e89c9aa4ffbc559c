"""`float_linear`: weights of small floats (FP8, MXFP4, MXFP6, MXFP8, NVFP4) times activations as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, ops, ops_float_cuda, ops_round
from .op_checks import CODE, FLOATS, as_rows, check_bias, fail

_OP = "float_linear"
_CPU = torch.device("cpu")
_E8M0, _E4M3 = 3, 4  # kinds of scales beside those of CODE


def check_operands(codes, scales, global_scale, n, k, scale_rows, group, device):
    """Everything the kernels take on trust about one stored weight; ``(element, kind of scales)``."""
    six = (n, -(-6 * k // 8))
    if codes.dtype is torch.float8_e4m3fn:
        element, shape = 0, (n, k)
    elif codes.shape == six and k > 1:  # a single code of either kind takes a byte, and is taken for e2m1
        element, shape = 2, six
    else:
        element, shape = 1, (n, -(-k // 2))
    if codes.dtype not in (torch.float8_e4m3fn, torch.uint8) or codes.shape != shape or not codes.is_contiguous() \
            or codes.device != device:
        fail(_OP, "codes", f"{codes.dtype} {list(codes.shape)}",
             f"contiguous float8_e4m3fn {[n, k]}, or uint8 {[n, -(-k // 2)]} of e2m1, {list(six)} of e2m3, on {device}")
    if scale_rows < 1 or group < 16 or group % 16 and group < k:
        fail(_OP, "scale_rows, group", [scale_rows, group], "at least 1, and a multiple of 16 or the whole width")
    groups = -(-n // scale_rows) * -(-k // group)
    kind = {torch.uint8: _E8M0, torch.float8_e4m3fn: _E4M3}.get(scales.dtype, CODE.get(scales.dtype))
    if kind is None or scales.numel() != groups or not scales.is_contiguous() or scales.device != device:
        fail(_OP, "scales", f"{scales.dtype} {list(scales.shape)}",
             f"contiguous {FLOATS}, float8_e4m3fn or uint8 exponents, {groups} of them, on {device}")
    if (kind == _E4M3) is not (global_scale is not None) or global_scale is not None and global_scale.numel() != 1:
        fail(_OP, "global_scale", "absent" if global_scale is None else list(global_scale.shape),
             "one number with float8 scales, none with others")
    return element, kind


def _check(codes, scales, global_scale, n, k, scale_rows, group):
    """The same on the CPU, and the global scale as a number."""
    element, kind = check_operands(codes, scales, global_scale, n, k, scale_rows, group, _CPU)
    return element, kind, 1.0 if global_scale is None else float(global_scale)


def dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor | None, n: int, k: int, scale_rows: int,
               group: int) -> Tensor:
    """The weight as float32 ``[n, k]``, exactly what the formats' `unpack` gives."""
    element, kind, one = _check(codes, scales, global_scale, n, k, scale_rows, group)
    out = torch.empty(n, k)
    _C.float_dequantize(n, k, codes.data_ptr(), element, scales.data_ptr(), kind, scale_rows, group, one,
                        out.data_ptr(), torch.get_num_threads())
    return out


def _float_linear_cpu(x, codes, scales, global_scale, bias, out_features, scale_rows, group):
    if x.dtype not in CODE or x.dim() < 1:
        fail(_OP, "x", f"{x.dtype} {list(x.shape)}", f"{FLOATS} [..., in_features]")
    k, n = x.shape[-1], out_features
    element, kind, one = _check(codes, scales, global_scale, n, k, scale_rows, group)
    check_bias(_OP, x, bias, n)
    rows = as_rows(x)
    m = rows.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    _C.float_linear(rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, codes.data_ptr(), element,
                    scales.data_ptr(), kind, scale_rows, group, one, 0 if bias is None else bias.data_ptr(),
                    y.data_ptr(), n, n, torch.get_num_threads())
    return y


def _float_linear_fake(x, codes, scales, global_scale, bias, out_features, scale_rows, group):
    return x.new_empty((*x.shape[:-1], out_features))


def _float_linear_reference(x, codes, scales, global_scale, bias, out_features, scale_rows, group):
    from .formats.bits import unpack_bits
    from .formats.floating import element_bits, exponent_scales, from_codes

    k = x.shape[-1]
    if codes.dtype is torch.uint8:
        element = "e2m3" if codes.shape[1] == -(-6 * k // 8) and k > 1 else "e2m1"
        values = from_codes(unpack_bits(codes, element_bits(element), k), element, torch.float64)
    else:
        values = codes.double()
    wide = exponent_scales(scales, torch.float64) if scales.dtype is torch.uint8 else scales.double()
    if global_scale is not None:
        wide = wide / global_scale.double()
    wide = wide.view(-(-out_features // scale_rows), -(-k // group))
    wide = wide.repeat_interleave(scale_rows, 0)[:out_features].repeat_interleave(group, 1)[:, :k]
    return F.linear(x.double(), values * wide, None if bias is None else bias.double()).to(x.dtype)


float_linear = ops.Op(
    _OP,
    "(Tensor x, Tensor codes, Tensor scales, Tensor? global_scale, Tensor? bias, int out_features, int scale_rows, "
    "int group) -> Tensor",
    _float_linear_cpu, _float_linear_fake, _float_linear_reference,
    cuda=ops_float_cuda.float_linear if _C.has_cuda_build else None, cuda_kernel=ops_float_cuda.KERNEL,
)


# -- fp8_linear: inputs rounded to e4m3, weights of 4-bit integers or e4m3 -------------------------------------------

_FP8_SCALES = {"token": ("largest", 0), "group": ("largest", 128), "tensor": ("whole", 0)}


def check_fp8_scale(scale: str) -> None:
    if scale not in _FP8_SCALES:
        fail("fp8_linear", "scale", scale, ", ".join(_FP8_SCALES))


def _fp8_linear_by(linear, int_linear, rounding):
    """Rounding, then the product with what is left; one for each device."""

    def fp8_linear(x, codes, scales, bias, out_features, scale_rows, group, scale, scale_multiplier=None):
        check_fp8_scale(scale)
        seen = rounding(x, "e4m3", *_FP8_SCALES[scale])
        if scale_multiplier is not None:
            check_byte_scales(codes, scales, scale_multiplier)
            scales = scales.float() * scale_multiplier
        if codes.dtype is torch.uint8:
            return int_linear(seen, codes, scales, None, bias, out_features, 4, group, 16)
        return linear(seen, codes, scales, None, bias, out_features, scale_rows, group)

    return fp8_linear


def check_byte_scales(codes: Tensor, scales: Tensor, scale_multiplier: Tensor) -> None:
    """What comes with a multiplier: integers under scales that are e4m3."""
    if codes.dtype is not torch.uint8 or scales.dtype is not torch.float8_e4m3fn:
        fail("fp8_linear", "scale_multiplier", f"one for codes of {codes.dtype} under scales of {scales.dtype}",
             "one for 4-bit integers under float8_e4m3fn")
    if not scales.is_contiguous() or scales.device != codes.device:
        fail("fp8_linear", "scales", f"{scales.device}, contiguous={scales.is_contiguous()}",
             f"contiguous on {codes.device}")
    if scale_multiplier.dtype is not torch.float32 or scale_multiplier.shape != (1,) \
            or scale_multiplier.device != codes.device:
        fail("fp8_linear", "scale_multiplier", f"{scale_multiplier.dtype} {list(scale_multiplier.shape)} on "
             f"{scale_multiplier.device}", f"torch.float32 [1] on {codes.device}")


def _fp8_linear_fake(x, codes, scales, bias, out_features, scale_rows, group, scale, scale_multiplier=None):
    return x.new_empty((*x.shape[:-1], out_features))


fp8_linear = ops.Op(
    "fp8_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int out_features, int scale_rows, int group, str scale, "
    "Tensor? scale_multiplier=None) -> Tensor",
    _fp8_linear_by(_float_linear_cpu, ops.int_linear.cpu, ops_round.float_round.cpu), _fp8_linear_fake,
    _fp8_linear_by(_float_linear_reference, ops.int_linear.reference, ops_round.float_round.reference),
    cuda=ops_float_cuda.fp8_linear if _C.has_cuda_build else None, cuda_kernel=ops_float_cuda.FP8_KERNEL,
)


# -- fp4_linear: inputs and weights both MXFP4, or both NVFP4 ----------------------------------------------------------


def _fp4_linear_by(linear, rounding):

    def fp4_linear(x, codes, scales, global_scale, bias, out_features):
        how = ("e2m1", "power", 32) if global_scale is None else ("e2m1", "e4m3", 16)
        return linear(rounding(x, *how), codes, scales, global_scale, bias, out_features, 1, how[2])

    return fp4_linear


def _fp4_linear_fake(x, codes, scales, global_scale, bias, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


fp4_linear = ops.Op(
    "fp4_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? global_scale, Tensor? bias, int out_features) -> Tensor",
    _fp4_linear_by(_float_linear_cpu, ops_round.float_round.cpu), _fp4_linear_fake,
    _fp4_linear_by(_float_linear_reference, ops_round.float_round.reference),
    cuda=ops_float_cuda.fp4_linear if _C.has_cuda_build else None, cuda_kernel=ops_float_cuda.FP4_KERNEL,
)


# -- mx_linear: inputs rounded to MXFP8 or MXFP6, weights in MXFP8, MXFP6 or MXFP4 ------------------------------------

MX_INPUTS = {"e4m3": 0, "e2m3": 1}


def check_mx_input(element: str) -> None:
    if element not in MX_INPUTS:
        fail("mx_linear", "element", element, f"of inputs {', '.join(MX_INPUTS)}")


def _mx_linear_by(linear, rounding):

    def mx_linear(x, codes, scales, bias, out_features, element):
        check_mx_input(element)
        return linear(rounding(x, element, "power", 32), codes, scales, None, bias, out_features, 1, 32)

    return mx_linear


def _mx_linear_fake(x, codes, scales, bias, out_features, element):
    return x.new_empty((*x.shape[:-1], out_features))


mx_linear = ops.Op(
    "mx_linear", "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int out_features, str element) -> Tensor",
    _mx_linear_by(_float_linear_cpu, ops_round.float_round.cpu), _mx_linear_fake,
    _mx_linear_by(_float_linear_reference, ops_round.float_round.reference),
    cuda=ops_float_cuda.mx_linear if _C.has_cuda_build else None, cuda_kernel=ops_float_cuda.MX_KERNEL,
)


def takes(x: Tensor) -> bool:
    """Whether a kernel multiplies inputs like ``x``: on CUDA those of 16 bits."""
    return x.is_cpu and x.dtype in CODE or x.is_cuda and float_linear.cuda is not None \
        and x.dtype in ops_float_cuda.HALVES
