"""Products of low-bit activations and integer weights on CUDA, in integers (cuda/kernels/sm80_lowbit_linear.cu, and
sm80_two_level_linear.cu for scales in two levels).

What comes in was rounded by `ops_lowbit_cuda` (a `QuantizedInput`); what goes out is ``x w^T + bias + residual``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _C, ops_cuda
from .act_codes import SUM_CHANNELS, padded_channels, row_bytes
from .op_checks import CODE, FLOATS, SCALE_CODE, check_weight, fail, state_of, two_level

_OP = "lowbit_linear"
_WIDTHS = {8: 0, 4: 1, 0: 2}  # enum LowbitWidth by QuantizedInput.width
_FEW = 16  # tokens: then memory decides, and blocks of either width cost the same
_tables = WeakIdKeyDictionary()  # block_bits to (version, the table of few tokens, of many)


def most_channels(zero_points: bool, act_zero_points: bool) -> int:
    """Channels of a row whose int32 sum cannot wrap."""
    return 32768 if zero_points and act_zero_points else 65536


def refusal(k: int, zero_points: bool, act_bits: int, act_sym: bool) -> str | None:
    """Why the kernel does not multiply rows of ``k`` channels; None where it does."""
    most = most_channels(zero_points, act_bits == 8 and not act_sym)
    return None if k <= most else f"rows of {k} channels; the integer kernel takes up to {most}"


@functools.lru_cache(maxsize=4096)
def _plan(m, n, k, bits, group_size, scale_code, zero_points, act_group, act_zero_points, width, index):
    return _C.cuda_lowbit_linear_plan(m, n, k, bits, group_size, scale_code, zero_points, act_group, act_zero_points,
                                      width, *ops_cuda._device(index))


@functools.lru_cache(maxsize=4096)
def _grouped_plan(rows, n, k, bits, group_size, scale_code, zero_points, act_group, act_zero_points, experts, index):
    return _C.cuda_lowbit_linear_grouped_plan(rows, n, k, bits, group_size, scale_code, zero_points, act_group,
                                              act_zero_points, experts, *ops_cuda._device(index))


def stage_tables(block_bits: Tensor) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """For few and for many tokens: int32 ``[2, blocks + 1]``, 64-byte units of a row before each block of 128
    channels and the cost before it (1, or with many tokens 2 for 8 bits), and the cost of all.

    Read once for each state of ``block_bits``: that waits for the GPU.
    """
    version = state_of(block_bits)
    found = _tables.get(block_bits)
    if found is None or found[0] != version:
        units = (block_bits.cpu().to(torch.int64) // 4).cumsum(0)
        starts = torch.nn.functional.pad(units, (1, 0))
        alike = torch.arange(len(starts))
        made = [(torch.stack([starts, cost]).to(torch.int32).to(block_bits.device), int(cost[-1]))
                for cost in (alike, starts)]
        found = _tables[block_bits] = (version, *made)
    return found[1], found[2]


def lowbit_linear(quantized, qweight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None,
                  out_features: int, bits: int, group_size: int, dtype: torch.dtype,
                  residual: Tensor | None = None) -> Tensor:
    """``y [m, out_features]`` in ``dtype`` of rows rounded by `ops_lowbit_cuda.quantize_input` or `produce`.

    Weights as `int_linear` takes them; ``bias [out]`` and ``residual [m, out]`` in ``dtype``. Sums are exact integers
    while no scale changes, and float32 from group to group. A row whose scale is NaN gives NaN. ValueError where an
    argument does not fit, or a row is longer than `most_channels`.
    """
    q, n = quantized, out_features
    device = q.codes.device
    check_weight(_OP, q.k, qweight, scales, zero_points, n, bits, group_size, device)
    _check(q, device)
    if dtype not in CODE:
        fail(_OP, "dtype", dtype, FLOATS)
    sums = zero_points is not None and not two_level(scales)  # with two levels they are part of the weights' bytes
    if why := refusal(q.k, sums, 8 if q.zero_points is not None else 4, q.zero_points is None):
        fail(_OP, "quantized", why, "shorter ones")
    if two_level(scales) and q.width != 8:
        fail(_OP, "quantized.width", q.width, "8 for weights in two levels of scales")
    for name, tensor, shape in (("bias", bias, (n,)), ("residual", residual, (q.m, n))):
        if tensor is not None and (tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device
                                   or tensor.stride(-1) != 1 and n > 1
                                   or tensor.dim() == 2 and q.m > 1 and tensor.stride(0) < n):
            fail(_OP, name, f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}",
                 f"{dtype} {list(shape)} on {device} with contiguous rows")
    if zero_points is not None:
        if sums and q.sums is None:
            fail(_OP, "quantized", "no sums of codes, but weights with zero points", "sums=True there")
        ops_cuda._check_zero_points(_OP, zero_points, bits, "in integer products")
    y = torch.empty((q.m, n), dtype=dtype, device=device)
    if not q.m or not n:
        return y
    if not q.k:
        for more in (y.zero_(), bias, residual)[1:]:
            y += 0 if more is None else more
        return y
    width, index = _WIDTHS[q.width], device.index
    table, cost = (None, 0) if width != 2 else stage_tables(q.block_bits)[q.m > _FEW]
    scale_code = SCALE_CODE[scales.dtype]
    if index is not None and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return lowbit_linear(q, qweight, scales, zero_points, bias, n, bits, group_size, dtype, residual)
    ranges, partial_bytes, counter_bytes = _plan(q.m, n, q.k, bits, group_size, scale_code, zero_points is not None,
                                                 q.act_group, q.zero_points is not None, width, index)
    partials, counters = ops_cuda._workspace(device, partial_bytes, counter_bytes)
    _C.cuda_lowbit_linear(
        q.codes.data_ptr(), width, q.codes.stride(0), q.scales.data_ptr(), q.scale_stride,
        q.sums.data_ptr() if sums else 0, 0 if q.zero_points is None else q.zero_points.data_ptr(),
        0 if table is None else table.data_ptr(), cost, q.act_group, q.m, q.k, qweight.data_ptr(), scales.data_ptr(),
        scale_code, 0 if zero_points is None else zero_points.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), n if residual is None or q.m == 1 else residual.stride(0),
        y.data_ptr(), CODE[dtype], n, n, bits, group_size, ranges, partials.data_ptr(), counters.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index),
    )
    return y


def lowbit_linear_grouped(quantized, ends: Tensor, qweight: Tensor, scales: Tensor, zero_points: Tensor | None,
                          bias: Tensor | None, out_features: int, bits: int, group_size: int,
                          dtype: torch.dtype) -> Tensor:
    """`lowbit_linear` for rows sorted by expert, stored in 8 bits: weights and ``bias`` have experts first, ``ends``
    int32 ``[experts]`` is the row after each expert's last. Rows of no expert give zeros. The caller has checked the
    weights (`op_checks.check_experts`)."""
    op, q, n = "lowbit_linear_grouped", quantized, out_features
    device, index = q.codes.device, q.codes.device.index
    _check(q, device)
    if q.width != 8:
        fail(op, "quantized.width", q.width, "8")
    if why := refusal(q.k, zero_points is not None, 8 if q.zero_points is not None else 4, q.zero_points is None):
        fail(op, "quantized", why, "shorter ones")
    if zero_points is not None:
        if q.sums is None:
            fail(op, "quantized", "no sums of codes, but weights with zero points", "sums=True there")
        ops_cuda._check_zero_points(op, zero_points, bits, "in integer products")
    y = torch.empty((q.m, n), dtype=dtype, device=device)
    if not q.m or not n:
        return y
    if not ends.numel() or not q.k:
        return y.zero_()
    scale_code = CODE[scales.dtype]
    ranges, partial_bytes, counter_bytes = _grouped_plan(
        q.m, n, q.k, bits, group_size, scale_code, zero_points is not None, q.act_group, q.zero_points is not None,
        ends.numel(), index)
    partials, counters = ops_cuda._workspace(device, partial_bytes, counter_bytes)
    _C.cuda_lowbit_linear_grouped(
        q.codes.data_ptr(), q.codes.stride(0), q.scales.data_ptr(), q.scale_stride,
        0 if zero_points is None else q.sums.data_ptr(), 0 if q.zero_points is None else q.zero_points.data_ptr(),
        q.act_group, q.m, q.k, ends.data_ptr(), ends.numel(), qweight.data_ptr(), scales.data_ptr(), scale_code,
        0 if zero_points is None else zero_points.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        CODE[dtype], n, n, bits, group_size, ranges, partials.data_ptr(), counters.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index),
    )
    return y


def _check(q, device: torch.device) -> None:
    """What the kernel takes on trust about rounded rows."""
    groups = -(-q.k // q.act_group) if q.act_group else 1
    if q.width not in _WIDTHS or (q.width == 0) != (q.block_bits is not None):
        fail(_OP, "quantized.width", q.width, "8, 4, or 0 with block_bits")
    wide = q.codes.shape[1] if q.width == 0 else row_bytes(q.k, q.width)
    rows = 1 if q.scale_stride == 0 else q.m
    wanted = {"codes": (q.codes, torch.uint8, (q.m, wide)), "scales": (q.scales, torch.float32, (rows, groups))}
    if q.sums is not None:
        wanted["sums"] = q.sums, torch.int16, (q.m, padded_channels(q.k) // SUM_CHANNELS)
    if q.zero_points is not None:
        wanted["zero_points"] = q.zero_points, torch.int16, (q.m, groups)
    if q.block_bits is not None:
        wanted["block_bits"] = q.block_bits, torch.uint8, (padded_channels(q.k) // 128,)
        units = stage_tables(q.block_bits)[1][1]
        if wide != 64 * units:
            fail(_OP, "quantized.codes", list(q.codes.shape), f"[{q.m}, {64 * units}] for these block_bits")
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
            fail(_OP, f"quantized.{name}", f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}",
                 f"contiguous {dtype} {list(shape)} on {device}")
