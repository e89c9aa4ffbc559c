"""Activations rounded on CUDA: codes and scales in the layout of `act_codes`, and the transform in front of them.

One launch loads a row, takes it through norm or gate and then a permutation, Hadamard transform or Kronecker product in
shared memory, and writes its codes, scales and sums; transformed values never go to global memory. `lowbit_linear` of
`ops_lowbit_gemm_cuda` multiplies what comes out.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _C
from .act_codes import BLOCK_CHANNELS, SUM_CHANNELS, padded_channels, row_bytes
from .op_checks import CODE, address, as_rows, check_activations, check_input, fail, state_of
from .transforms import definitions

_OP = "quantize_input"
_mixed_bytes = WeakIdKeyDictionary()  # block_bits to its state and width, and the bytes of a row
MOST_ORDER = 256  # of a small matrix that the kernels multiply with


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """Rows of activations as the integer kernels read them (`act_codes`, cuda/tile/act_codes.h).

    ``codes`` uint8 ``[m, row_bytes]`` of ``width`` 8 or 4 bits, 0 where ``block_bits`` uint8 ``[ceil(k / 128)]`` says
    the width of each 128 channels. ``scales`` float32 ``[m, groups]``, rows ``scale_stride`` apart. ``sums`` int16
    ``[m, K / 32]`` or None. ``zero_points`` int16 ``[m, groups]`` for asymmetric codes of 8 bits: stored code minus
    zero point times scale is the value. ``k`` channels, ``act_group`` of them to a scale, 0: all. ``bits`` is the
    precision.
    """

    codes: Tensor
    width: int
    scales: Tensor
    scale_stride: int
    sums: Tensor | None
    zero_points: Tensor | None
    block_bits: Tensor | None
    m: int
    k: int
    act_group: int
    bits: int


def quantize_input(x: Tensor, bits: int, act_group: int = 32, act_clip: float = 1.0, act_sym: bool = True,
                   input_scale: Tensor | None = None, block_bits: Tensor | None = None, width: int = 8,
                   sums: bool = True) -> QuantizedInput:
    """``x [..., k]`` rounded as `formats.integer.activation_codes` defines, bit for bit.

    ``width``: bits in which a code is stored, 8, or 4 for symmetric codes of 4 bits; with ``block_bits`` 4 means each
    block's own. ValueError where an option does not fit.
    """
    return Rounding(x.shape[-1], None, bits, act_group, act_clip, act_sym, input_scale, block_bits, width, sums)(x)


def produce(x: Tensor, other: Tensor | None, producer, bits: int, act_group: int = 32, act_clip: float = 1.0,
            act_sym: bool = True, input_scale: Tensor | None = None, width: int = 8,
            sums: bool = True) -> QuantizedInput:
    """`quantize_input` of what ``producer`` (an `ops_fused.Producer`) makes of ``x`` and ``other``. ValueError where no
    kernel runs the producer (`refusal` says why)."""
    producer.check(x, other)
    return Rounding(x.shape[-1], producer, bits, act_group, act_clip, act_sym, input_scale, producer.block_bits, width,
                    sums)(x, other)


class Rounding:
    """`produce` with options and tensors that were checked once; it follows tensors that move or change."""

    def __init__(self, k, producer, bits, act_group, act_clip, act_sym, input_scale, block_bits, width, sums):
        if bits == 16:
            fail(_OP, "bits", bits, "4, 6 or 8")
        if width not in (4, 8) or width == 4 and (not act_sym or bits != 4):
            fail(_OP, "width", width, "8, or 4 for symmetric codes of 4 bits")
        if block_bits is not None and (not act_sym or input_scale is not None or act_group not in (32, 64, 128)):
            fail(_OP, "block_bits", f"act_sym={act_sym}, act_group={act_group}",
                 "dynamic symmetric groups of 32, 64 or 128")
        self.k, self.producer, self.bits, self.options = k, producer, bits, (act_group, act_clip, act_sym)
        self.input_scale, self.block_bits, self.sums = input_scale, block_bits, sums
        self.width = 0 if block_bits is not None and width == 4 else width
        self.groups = -(-k // act_group) if act_group else 1
        self._steps: tuple | None = None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> QuantizedInput:
        check_input(_OP, x, self.bits)
        act_group, act_clip, act_sym = self.options
        check_activations(_OP, self.k, self.bits, act_group, act_clip, act_sym, self.input_scale, x.device)
        if x.shape[-1] != self.k:
            fail(_OP, "x", list(x.shape), f"[..., {self.k}]")
        rows = as_rows(x)
        second = None if other is None else as_rows(other)
        m, device = rows.shape[0], x.device
        wide = self._bytes_of_a_row(device)
        codes = torch.empty((m, wide), dtype=torch.uint8, device=device)
        scales = torch.empty((m, self.groups), dtype=torch.float32, device=device)
        sums = torch.empty((m, padded_channels(self.k) // SUM_CHANNELS), dtype=torch.int16, device=device) \
            if self.sums else None
        zeros = torch.empty((m, self.groups), dtype=torch.int16, device=device) if not act_sym and self.bits == 8 \
            else None
        if m and self.k:
            made, factor, epsilon = self._prepared(rows)
            fields = [rows.data_ptr(), CODE[x.dtype], m, self.k, rows.stride(0) if m > 1 else self.k, made[0],
                      address(second), second.stride(0) if second is not None and m > 1 else self.k, *made[1:]]
            _launch(device, fields, [codes.data_ptr(), wide, scales.data_ptr(), address(sums), address(zeros),
                                     self.bits, self.width, act_group, int(not act_sym), address(self.input_scale),
                                     address(self.block_bits)], act_clip, epsilon, factor)
        return QuantizedInput(codes, self.width, scales, self.groups, sums, zeros,
                              self.block_bits if self.width == 0 else None, m, self.k, act_group, self.bits)

    def _bytes_of_a_row(self, device: torch.device) -> int:
        """Mixed widths are looked at once for each state of their tensor: that waits for the GPU."""
        found, count = self.block_bits, -(-self.k // BLOCK_CHANNELS)
        if found is None:
            return row_bytes(self.k, self.width)
        if found.dtype is not torch.uint8 or found.shape != (count,) or found.device != device \
                or not found.is_contiguous():
            fail(_OP, "block_bits", f"{found.dtype} {list(found.shape)} on {found.device}",
                 f"contiguous torch.uint8 [{count}] on {device}")
        state, wide = _mixed_bytes.get(found, (None, 0))
        if state != (now := (state_of(found), self.k)):
            if not bool(((found == 4) | (found == 8)).all()):
                fail(_OP, "block_bits", found.unique().tolist(), "4 and 8")
            wide = row_bytes(self.k, 4, found)
            _mixed_bytes[found] = now, wide
        return row_bytes(self.k, self.width) if self.width else wide

    def _prepared(self, x: Tensor) -> tuple[list[int], float, float]:
        """Fields of tersor_cuda_rows from norm_weight on (without the second input), the factor and epsilon."""
        p = self.producer
        if p is None:
            return [0, 0, 0, 1, 1, 0, 1, 0, 1], 1.0, 0.0
        followed = [t for t in (p.left, p.right, p.index) if t is not None]
        now = [state_of(t) for t in followed]
        if self._steps is None or self._steps[0] != now:
            if p.index is not None and p.index.numel() and not 0 <= int(p.index.min()) <= int(p.index.max()) < self.k:
                fail(_OP, "index", f"{int(p.index.min())} to {int(p.index.max())}", f"0 to {self.k - 1}")
            self._steps = now, _steps(p, self.k, x.device)
        tensors, numbers, factor = self._steps[1]
        for name in ("norm_weight", "signs", "index"):
            tensor = getattr(p, name)
            if tensor is not None and tensor.data_ptr() % 16:
                fail(_OP, name, f"address {tensor.data_ptr():#x}", "16-byte aligned ones")
        rows, columns, parts, butterflies = numbers
        left, right = tensors
        return [address(p.norm_weight), address(p.index), address(p.signs), rows, columns, address(left), parts,
                address(right), butterflies], factor, p.epsilon


def refusal(producer, k: int, bits: int, act_group: int, width: int, device: torch.device) -> str | None:
    """Why no kernel runs this producer on ``k`` channels on a GPU; None where one does."""
    if producer is None:
        return None
    rows, columns, parts, butterflies = _shape(producer, k)
    if rows > MOST_ORDER or (producer.right is not None and columns > MOST_ORDER):
        return f"products with matrices of {rows} and {columns}; the kernels take sizes up to {MOST_ORDER}"
    if producer.left is not None and producer.right is None and columns % 8:
        return f"heads of {columns} channels; the kernels mix those of a multiple of 8"
    there = 16  # an address that stands for a tensor's
    shown = [0, 0, 1, k, k, 0, 0, k, there * (producer.index is not None), there * (producer.signs is not None), rows,
             columns, there * (parts > 0), max(parts, 1), there * (producer.right is not None), butterflies]
    mixed = producer.block_bits is not None and width == 4
    needed = _C.cuda_round_rows_shared(shown, [0, 0, 0, 0, 0, bits, 0 if mixed else width, act_group, 0, 0, 0])
    room = _most_shared(device.index)
    if needed > room:
        return f"a row of {k} channels takes {needed} bytes of shared memory; this GPU has {room}"
    return None


def _shape(producer, k: int) -> tuple[int, int, int, int]:
    """rows, columns, parts of the left matrix (0: none) and size of the butterflies."""
    if producer.left is not None:
        rows = len(producer.left)
        return rows, k // rows if producer.right is None else len(producer.right), 2, 1
    if producer.hadamard is None:
        return 1, 1, 0, 1
    size = producer.hadamard or k
    base = definitions.hadamard_base(size)
    return base, size // base, int(base > 1), size // base


def _steps(producer, k: int, device: torch.device):
    rows, columns, parts, butterflies = _shape(producer, k)
    if max(rows, columns if producer.right is not None else 1) > MOST_ORDER:
        fail(_OP, "producer", f"matrices of {rows} and {columns}", f"sizes up to {MOST_ORDER} on CUDA")
    left = right = None
    if producer.left is not None:
        left = fragments(producer.left.T, 2)
        right = None if producer.right is None else fragments(producer.right.T, 2)
    elif parts:
        left = _hadamard_fragments(rows, device)
    factor = 1.0 if producer.hadamard is None else 1 / math.sqrt(producer.hadamard or k)
    return (left, right), (rows, columns, max(parts, 1), butterflies), factor


def fragments(matrix: Tensor, parts: int) -> Tensor:
    """``matrix [n, n]`` float32 as the A operands of mma.m16n8k16 (cuda/tile/producer_products.h): int32
    ``[tiles, tiles, parts, 32, 4]``, each number as the sum of ``parts`` bfloat16."""
    padded = F.pad(matrix, (0, -matrix.shape[1] % 16, 0, -matrix.shape[0] % 16))
    # [m tile, half, g] x [l tile, half, t, element]; a register is (half of l, half of m)
    split = padded.reshape(padded.shape[0] // 16, 2, 8, padded.shape[1] // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    pieces, rest = [], split
    for _ in range(parts):
        pieces.append(rest.bfloat16())
        rest = rest - pieces[-1].float()
    return torch.stack(pieces, dim=2).contiguous().view(torch.int32).flatten(-3, -2).flatten(3, 4).squeeze(-1)


@functools.lru_cache(maxsize=64)
def _hadamard_fragments(size: int, device: torch.device) -> Tensor:
    return fragments(definitions.hadamard_matrix(size).float().to(device), 1)


@functools.cache
def _most_shared(index: int) -> int:
    """Bytes of shared memory that a block can have."""
    return _C.cuda_devices()[index]["shared_memory_per_block"]


def _launch(device: torch.device, rows: list[int], codes: list[int], clip: float, epsilon: float, factor: float):
    with torch.cuda.device(device):
        _C.cuda_round_rows(rows, codes, clip, epsilon, factor, _most_shared(device.index),
                           torch._C._cuda_getCurrentRawStream(device.index))
