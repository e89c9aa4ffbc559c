"""`float_round`: activations rounded to small floats and multiplied back, in one pass on the CPU and on CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, ops, ops_float_cuda
from .op_checks import CODE, FLOATS, as_rows, fail

_OP = "float_round"
ELEMENTS = {"e4m3": 0, "e2m1": 1, "e2m3": 2}
# What a group is divided by: its largest magnitude over the element's; that of the whole input; a power of two (OCP
# MX); e4m3 under one number for the whole input (NVFP4).
SCALES = {"largest": 0, "whole": 1, "power": 2, "e4m3": 3}


def _check(x: Tensor, element: str, scale: str, group: int) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        fail(_OP, "x", f"{x.dtype} {list(x.shape)}", "floating point [..., k]")
    if element not in ELEMENTS or scale not in SCALES or group < 0 or group % 16:
        fail(_OP, "element, scale, group", [element, scale, group],
             f"{', '.join(ELEMENTS)}; {', '.join(SCALES)}; a multiple of 16, or 0 for the whole width")


def _float_round_cpu(x: Tensor, element: str, scale: str, group: int) -> Tensor:
    _check(x, element, scale, group)
    if x.dtype is torch.float64:
        return _float_round_reference(x, element, scale, group)
    if x.dtype not in CODE:
        fail(_OP, "x", x.dtype, f"{FLOATS}, torch.float64")
    rows, k = as_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype)
    m = rows.shape[0]
    _C.float_round(rows.data_ptr(), y.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k,
                   ELEMENTS[element], SCALES[scale], group or max(k, 16), torch.get_num_threads())
    return y


def _float_round_reference(x: Tensor, element: str, scale: str, group: int) -> Tensor:
    """The definition, on any device. A group with NaN or Inf becomes NaN and does not count in the whole's scale; what
    rounding brings beyond the largest number of x's dtype becomes that."""
    from .formats.floating import ELEMENTS as TYPES
    from .formats.floating import power_of_two, power_of_two_scale, round_to

    _check(x, element, scale, group)
    if not x.numel():
        return x.clone()
    wide = x if x.dtype is torch.float64 else x.float()
    k, largest = x.shape[-1], TYPES[element][3]
    groups = F.pad(wide, (0, -k % (group or k))).unflatten(-1, (-1, group or k))
    top = groups.abs().amax(-1, keepdim=True)
    finite = top.isfinite()
    top = top.where(finite, 0.0)
    tiny = torch.finfo(torch.float32).smallest_normal
    if scale == "power":
        step = power_of_two(power_of_two_scale(top, element), wide.dtype)
    elif scale == "e4m3":
        # The global scale's inverse, in the order of operations that kernels follow.
        one = (TYPES["e4m3"][3] * largest) * (1 / top.amax().clamp_min(tiny))
        one = one.nan_to_num(posinf=1.0)
        step = round_to(top / largest * one, "e4m3").clamp_min(2.0**-9) / one
    else:
        step = ((top.amax() if scale == "whole" else top) / largest).clamp_min(tiny)
    most = torch.finfo(x.dtype).max
    rounded = (round_to(groups / step, element) * step).clamp(-most, most).where(finite, torch.nan)
    return rounded.flatten(-2)[..., :k].to(x.dtype)


def _float_round_fake(x: Tensor, element: str, scale: str, group: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


float_round = ops.Op(_OP, "(Tensor x, str element, str scale, int group) -> Tensor", _float_round_cpu,
                     _float_round_fake, _float_round_reference,
                     cuda=ops_float_cuda.float_round if _C.has_cuda_build else _float_round_reference,
                     cuda_kernel=ops_float_cuda.ROUND_KERNEL if _C.has_cuda_build else
                     "reference: float_round by torch")
