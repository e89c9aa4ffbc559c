"""What every native operation checks before a pointer leaves Python. Each raises ValueError that names the operation,
the argument, what was found and what is accepted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum tersor_dtype
SCALE_CODE = {**CODE, torch.uint8: 3}  # of integer weights; uint8: two levels (formats/two_level.py)
FLOATS = "float32, bfloat16, float16"


def two_level(scales: Tensor) -> bool:
    """Whether stored scales are integers of groups below floats of rows (formats/two_level.py)."""
    return scales.dtype is torch.uint8


def fail(op: str, argument: str, found: object, accepted: str) -> None:
    raise ValueError(f"tersor.{op}: {argument}: found {found}, accepted is {accepted}")


def check_weight(op, k, qweight, scales, zero_points, n, bits, group_size, device):
    """Everything a kernel takes on trust about one stored weight."""
    if not 2 <= bits <= 8:
        fail(op, "bits", bits, "2 to 8")
    if group_size < 0 or group_size % 32:
        fail(op, "group_size", group_size, "a multiple of 32, or 0 for one scale per row")
    rows, blocks = -(-n // 16), -(-k // 32)
    groups = -(-k // group_size) if group_size else 1
    if qweight.dtype is not torch.uint8 or qweight.shape != (rows, blocks, 64 * bits):
        fail(op, "qweight", f"{qweight.dtype} {list(qweight.shape)}",
             f"torch.uint8 {[rows, blocks, 64 * bits]} for {n} x {k} weights of {bits} bits")
    if scales.dtype not in SCALE_CODE or scales.shape != (rows, groups + 4 * two_level(scales), 16):
        fail(op, "scales", f"{scales.dtype} {list(scales.shape)}",
             f"{FLOATS} {[rows, groups, 16]}, or torch.uint8 {[rows, groups + 4, 16]} of two levels")
    if two_level(scales) and bits > 6:
        fail(op, "scales", f"two levels with {bits} bits", "2 to 6 bits with them")
    if zero_points is not None and (zero_points.dtype is not torch.uint8 or zero_points.shape != (rows, groups, 16)):
        fail(op, "zero_points", f"{zero_points.dtype} {list(zero_points.shape)}",
             f"torch.uint8 {[rows, groups, 16]}")
    for name, tensor in (("qweight", qweight), ("scales", scales), ("zero_points", zero_points)):
        if tensor is not None and (tensor.device != device or not tensor.is_contiguous()):
            fail(op, name, f"{tensor.device}, contiguous={tensor.is_contiguous()}", f"contiguous on {device}")


def check_experts(op, x, ends, qweight, scales, zero_points, bias, n, bits, group_size):
    """`check_weight` for weights with a leading expert dimension, and the rest of a grouped operation."""
    count = ends.numel()
    if ends.dtype is not torch.int32 or ends.dim() != 1 or ends.device != x.device or not ends.is_contiguous():
        fail(op, "ends", f"{ends.dtype} {list(ends.shape)} on {ends.device}",
             f"contiguous torch.int32 [experts] on {x.device}")
    if x.dim() != 2:
        fail(op, "x", list(x.shape), "[rows, in_features], sorted by expert")
    for name, tensor in (("qweight", qweight), ("scales", scales), ("zero_points", zero_points)):
        if tensor is not None and (tensor.dim() != 4 or len(tensor) != count or not tensor.is_contiguous()):
            fail(op, name, f"{list(tensor.shape)}, contiguous={tensor.is_contiguous()}",
                 f"contiguous, {count} experts first")
    if count:
        check_weight(op, x.shape[-1], qweight[0], scales[0], None if zero_points is None else zero_points[0], n, bits,
                     group_size, x.device)
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (count, n) or bias.device != x.device
                             or not bias.is_contiguous()):
        fail(op, "bias", f"{bias.dtype} {list(bias.shape)} on {bias.device}",
             f"contiguous {x.dtype} {[count, n]} on {x.device}")


def check_input(op, x, act_bits):
    if x.dtype not in CODE:
        fail(op, "x", x.dtype, FLOATS)
    if x.dim() < 1:
        fail(op, "x", "a scalar", "a tensor [..., in_features]")
    if act_bits not in (4, 6, 8, 16):
        fail(op, "act_bits", act_bits, "4, 6, 8 or 16")


def check_activations(op, k, act_bits, act_group, act_clip, act_sym, input_scale, device, experts=None):
    """The options of rounded activations; `check_input` comes first. Static scales have experts first."""
    if act_bits == 16 and (act_group, act_clip, act_sym, input_scale) != (32, 1.0, True, None):
        fail(op, "act_group, act_clip, act_sym, input_scale", "other than the default with act_bits 16",
             "them with 4, 6 or 8")
    if act_group < 0 or act_group % 32:
        fail(op, "act_group", act_group, "a multiple of 32, or 0 for one scale per token")
    if not 0 < act_clip <= 1:
        fail(op, "act_clip", act_clip, "a factor above 0 up to 1")
    if input_scale is None:
        return
    if not act_sym:
        fail(op, "input_scale", "static scales with act_sym=False", "symmetric activations")
    shape = (-(-k // act_group) if act_group else 1,)
    if experts is not None:
        shape = (experts, *shape)
    if input_scale.dtype is not torch.float32 or input_scale.shape != shape or input_scale.device != device \
            or not input_scale.is_contiguous():
        fail(op, "input_scale", f"{input_scale.dtype} {list(input_scale.shape)} on {input_scale.device}",
             f"contiguous torch.float32 {list(shape)} on {device}")


def check_bias(op, x, bias, n):
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.device != x.device
                             or not bias.is_contiguous()):
        fail(op, "bias", f"{bias.dtype} {list(bias.shape)} on {bias.device}",
             f"contiguous {x.dtype} {[n]} on {x.device}")


def as_rows(x: Tensor) -> Tensor:
    """``x`` as ``[tokens, in]`` with unit stride along ``in``."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] > 1 or x.stride(0) < x.shape[1] and x.shape[0] > 1:
        x = x.contiguous()
    return x


def check_projections(op, qweights, scales, zero_points, biases, out_features):
    count = len(qweights)
    if not count or len(scales) != count or len(out_features) != count or len(zero_points) not in (0, count) \
            or len(biases) not in (0, count):
        fail(op, "lists", [count, len(scales), len(zero_points), len(biases), len(out_features)],
             "one entry per projection (zero_points and biases may be empty)")


def address(tensor: Tensor | None) -> int:
    """Of what a kernel is given; 0 where it is absent."""
    return 0 if tensor is None else tensor.data_ptr()


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Address and version: what is another pair, holds other values. (Writes to inference tensors are not counted.)"""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
