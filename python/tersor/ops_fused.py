"""`int_linear_fused`: integer weights times activations that a transform makes while they are rounded.

A row goes through norm or gate, permutation, signs, Hadamard or Kronecker in the memory of the thread that rounds it,
on CUDA in the shared memory of its block; the transformed values are never written anywhere else. The definitions are
in `transforms.definitions`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, ops, ops_cuda
from .op_checks import (CODE, SCALE_CODE, as_rows, check_activations, check_bias, check_input, check_projections,
                        check_weight, fail, state_of, two_level)
from .transforms import definitions

_OP = "int_linear_fused"
_MOST_DENSE = 1024  # order of a Hadamard matrix that is multiplied as a whole


@dataclass(frozen=True, eq=False)
class Producer:
    """What happens to ``x [..., in]`` before it is rounded: the steps that are set, in this order.

    ``norm_weight [in]`` (of x's dtype) with ``epsilon``: RMSNorm. ``silu_mul``: SiLU(x) times a second input. ``index
    [in]`` int32: permutation. ``signs [in]`` float32 and ``hadamard``: blocks of the Hadamard transform, 0 the whole
    width, None for none. ``left [n1, n1]``, ``right [n2, n2]`` float32: Kronecker; ``left`` alone mixes ``n1`` heads.
    ``block_bits`` uint8 ``[ceil(in / 128)]``: 4 or 8 bits for each 128 channels, after everything else. A norm excludes
    a gate, and of permutation, Hadamard and Kronecker there is one.
    """

    norm_weight: Tensor | None = None
    epsilon: float = 0.0
    silu_mul: bool = False
    hadamard: int | None = None
    signs: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    index: Tensor | None = None
    block_bits: Tensor | None = None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The transformed input, by the definitions, in x's dtype."""
        if self.norm_weight is not None:
            x = definitions.rms_norm(x, self.norm_weight, self.epsilon)
        if self.silu_mul:
            x = definitions.silu_mul(x, other.to(x.dtype))
        if self.index is not None:
            x = definitions.permute(x, self.index)
        if self.hadamard is not None:
            x = definitions.hadamard(x, self.hadamard, self.signs)
        if self.left is not None:
            x = definitions.kronecker(x, self.left, self.right)
        return x

    def check(self, x: Tensor, other: Tensor | None) -> None:
        """ValueError where a step does not fit ``x`` or another step."""
        k = x.shape[-1]
        if (self.index is not None) + (self.hadamard is not None) + (self.left is not None) > 1:
            fail(_OP, "index, hadamard, left", "several of them", "one at most")
        if self.silu_mul is not (other is not None) or self.silu_mul and self.norm_weight is not None:
            fail(_OP, "silu_mul, other, norm_weight", f"silu_mul={self.silu_mul}, other {_given(other)}, norm_weight "
                 f"{_given(self.norm_weight)}", "both or none of silu_mul and other, and no norm with them")
        if self.left is None and self.right is not None or self.signs is not None and self.hadamard is None:
            fail(_OP, "left, right, signs", "a part alone", "right with left, signs with hadamard")
        _check(x, "norm_weight", self.norm_weight, x.dtype, (k,))
        _check(x, "signs", self.signs, torch.float32, (k,))
        _check(x, "index", self.index, torch.int32, (k,))
        _check(x, "block_bits", self.block_bits, torch.uint8, (-(-k // 128),))
        if other is not None and (other.dtype is not x.dtype or other.shape != x.shape or other.device != x.device):
            fail(_OP, "other", f"{other.dtype} {list(other.shape)}", f"{x.dtype} {list(x.shape)}, as x")
        if self.left is not None:
            n1 = len(self.left)
            n2 = len(self.right) if self.right is not None else k // max(n1, 1)
            if n1 * n2 != k:
                fail(_OP, "left, right", f"sizes {n1} and {n2}", f"sizes whose product is the width {k}")
            _check(x, "left", self.left, torch.float32, (n1, n1))
            _check(x, "right", self.right, torch.float32, (n2, n2))
        if self.hadamard is not None:
            if self.hadamard < 0 or self.hadamard and k % self.hadamard:
                fail(_OP, "hadamard", self.hadamard, f"0, or a divisor of the width {k}")
            definitions.hadamard_base(self.hadamard or k)

    def matrices(self, k: int) -> dict:
        """The steps that are products, as `_C.Input` takes them, with tensors for pointers."""
        if self.left is not None and self.right is None:
            return {"rows": len(self.left), "columns": k // len(self.left), "left": self.left.T.contiguous()}
        if self.left is not None:
            n2 = len(self.right)
            return {"rows": len(self.left), "columns": n2, "left": self.left.T.contiguous(),
                    "right": F.pad(self.right, (0, -n2 % 16)).contiguous()}
        if self.hadamard is None:
            return {}
        return {**_hadamard_matrices(self.hadamard or k), **({} if self.signs is None else {"signs": self.signs})}


@functools.lru_cache(maxsize=64)
def _hadamard_matrices(size: int) -> dict:
    m = definitions.hadamard_base(size)
    power = size // m
    base = {"left": definitions.hadamard_matrix(m).float().contiguous()} if m > 1 else {}
    if power >= 16:
        return {"rows": m, "columns": power, "butterflies": True, "hadamard_scale": 1 / math.sqrt(size), **base}
    # Too narrow for vectors: one dense matrix, or two where that would be a large one.
    rows = 1 if size <= _MOST_DENSE else m
    dense = (definitions.hadamard_matrix(size // rows) / math.sqrt(size)).T.float()
    return {"rows": rows, "columns": size // rows, "right": F.pad(dense, (0, -(size // rows) % 16)).contiguous(),
            **(base if rows > 1 else {})}


def _given(value: object) -> str:
    return "absent" if value is None else "given"


def _check(x: Tensor, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype is not dtype or tensor.shape != shape or tensor.device != x.device
                               or not tensor.is_contiguous()):
        fail(_OP, name, f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}",
             f"contiguous {dtype} {list(shape)} on {x.device}")


class _Prepared:
    """A producer's tensors in the form of the kernel, and the `_C.Input` that points to them."""

    def __init__(self, producer: Producer, k: int, act_bits, act_group, act_clip, act_sym, input_scale):
        found = producer.matrices(k)
        for name in ("norm_weight", "index", "block_bits"):
            if getattr(producer, name) is not None:
                found[name] = getattr(producer, name)
        if input_scale is not None:
            found["scales"] = input_scale
        self.kept = [value for value in found.values() if isinstance(value, Tensor)]
        self.addresses = [tensor.data_ptr() for tensor in self.kept]
        self.copied = [(tensor, state_of(tensor)) for tensor in (producer.left, producer.right) if tensor is not None]
        self.input = _C.Input(act_bits, act_group, act_clip, act_sym, epsilon=producer.epsilon, **{
            name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in found.items()})

    def current(self) -> bool:
        """Whether no tensor moved or was freed, and none that was copied is another."""
        return all(tensor.data_ptr() == address for tensor, address in zip(self.kept, self.addresses)) \
            and all(state_of(tensor) == version for tensor, version in self.copied)


def _check_options(producer, x, act_bits, act_group, act_clip, act_sym, input_scale):
    check_activations(_OP, x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale, x.device)
    if act_bits == 16:
        fail(_OP, "act_bits", 16, "4, 6 or 8")
    if producer.block_bits is not None and (not act_sym or input_scale is not None or act_group not in (32, 64, 128)):
        fail(_OP, "block_bits", f"act_sym={act_sym}, act_group={act_group}, input_scale {_given(input_scale)}",
             "dynamic symmetric groups of 32, 64 or 128")


def _multiply(x, other, prepared, projections, scale_code, bits, group_size):
    rows = as_rows(x)
    m, k = rows.shape
    second = None if other is None else as_rows(other)
    _C.int_linear_fused(
        rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k,
        0 if second is None else second.data_ptr(), second.stride(0) if second is not None and m > 1 else k,
        projections, scale_code, bits, group_size, prepared.input, torch.get_num_threads())


class BoundIntLinearFused:
    """`int_linear_fused` on weights that were checked once (`ops.BoundIntLinear`) and one producer.

    Called with ``x [..., in]``, a bias or None for each weight, and the gate's second input where there is one; gives
    a list of outputs. It follows tensors that move, as its members do.
    """

    def __init__(self, members: list[ops.BoundIntLinear], producer: Producer):
        self.together = ops.BoundIntLinearMulti(members)  # checks that they fit
        self.producer, self.members = producer, members
        self._checked: tuple | None = None
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, biases: list[Tensor | None], other: Tensor | None = None) -> list[Tensor]:
        first, k = self.members[0], self.together.in_features
        check_input(_OP, x, first.act_bits)
        if x.shape[-1] != k:
            fail(_OP, "x", list(x.shape), f"[..., {k}]")
        outputs, projections = [], []
        for member, n, bias in zip(self.members, self.together.out_features, biases, strict=True):
            check_bias(_OP, x, bias, n)
            y = x.new_empty((*x.shape[:-1], n))
            outputs.append(y)
            projections.append((*member.addresses(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n))
        if self._prepared is None or self._checked is not x.dtype or not self._prepared.current():
            _check_options(self.producer, x, first.act_bits, *first.options, first.input_scale)
            self.producer.check(x, other)
            self._prepared = _Prepared(self.producer, k, first.act_bits, *first.options, first.input_scale)
            self._checked = x.dtype
        elif (other is not None) is not self.producer.silu_mul or other is not None and (
                other.dtype is not x.dtype or other.shape != x.shape or not other.is_cpu):
            self.producer.check(x, other)
        _multiply(x, other, self._prepared, projections, first.scale_code, first.bits, first.group_size)
        return outputs


def _producer(norm_weight, epsilon, other, hadamard, signs, left, right, index, block_bits):
    return Producer(norm_weight, epsilon, other is not None, None if hadamard < 0 else hadamard, signs, left, right,
                    index, block_bits)


def _fused_cpu(x, other, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits, act_group=32,
               act_clip=1.0, act_sym=True, input_scale=None, norm_weight=None, epsilon=0.0, hadamard=-1, signs=None,
               left=None, right=None, index=None, block_bits=None):
    check_input(_OP, x, act_bits)
    producer = _producer(norm_weight, epsilon, other, hadamard, signs, left, right, index, block_bits)
    producer.check(x, other)
    _check_options(producer, x, act_bits, act_group, act_clip, act_sym, input_scale)
    outputs, projections = ops.checked_projections(_OP, x, qweights, scales, zero_points, biases, out_features, bits,
                                                   group_size)
    prepared = _Prepared(producer, x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale)
    _multiply(x, other, prepared, projections, SCALE_CODE[scales[0].dtype], bits, group_size)
    return outputs


def _fused_fake(x, other, qweights, scales, zero_points, biases, out_features, *rest):
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]


def _fused_reference(x, other, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits,
                     act_group=32, act_clip=1.0, act_sym=True, input_scale=None, norm_weight=None, epsilon=0.0,
                     hadamard=-1, signs=None, left=None, right=None, index=None, block_bits=None):
    from .formats.integer import quantize_activations

    producer = _producer(norm_weight, epsilon, other, hadamard, signs, left, right, index, block_bits)
    made = producer(x.double(), None if other is None else other.double())
    seen = quantize_activations(made.float(), act_bits, act_group, act_clip, act_sym, input_scale, block_bits).double()
    outputs = []
    for i, n in enumerate(out_features):
        w = ops.int_dequantize_reference(qweights[i], scales[i], zero_points[i] if zero_points else None, n,
                                         x.shape[-1], bits, group_size, torch.float64)
        outputs.append(F.linear(seen, w, biases[i].double() if biases else None).to(x.dtype))
    return outputs


# -- CUDA -------------------------------------------------------------------------------------------------------------


def eager_cuda(x: Tensor) -> bool:
    """`ops.plain` for a tensor on a GPU: nothing watches what is called with it."""
    return type(x) is Tensor and x.is_cuda and not ops._is_compiling() and not ops._listening() \
        and ops._transform() is None and ops._forward_ad._current_level < 0


class CudaRounding:
    """An input of integer kernels on a GPU, rounded by one launch together with the producer's steps; where no kernel
    runs those (``refusal`` says why), torch does, and the launch rounds the result.

    ``device``: of the weights, with ``bits`` and ``group_size``. Called with ``x [..., k]`` and the gate's second
    input; gives an `ops_lowbit_cuda.QuantizedInput`.
    """

    def __init__(self, producer: Producer, k: int, bits: int, group_size: int, zero_points: bool, act_bits: int,
                 act_group: int, act_clip: float, act_sym: bool, input_scale: Tensor | None, device: torch.device,
                 two_levels: bool = False):
        from . import ops_lowbit_cuda
        from .act_codes import stored_width

        mixed = producer.block_bits is not None
        width = stored_width(4 if mixed else act_bits, bits, ops_cuda.capability(device.index), act_group, group_size,
                             act_sym, two_levels)
        self.producer = producer
        self.refusal = ops_lowbit_cuda.refusal(producer, k, act_bits, act_group, width, device)
        self._round = ops_lowbit_cuda.Rounding(
            k, producer if self.refusal is None else None, act_bits, act_group, act_clip, act_sym, input_scale,
            producer.block_bits, width, zero_points and not two_levels)
        self._checked: tuple | None = None

    def __call__(self, x: Tensor, other: Tensor | None = None):
        seen = x.dtype, None if other is None else other.dtype, None if other is None else other.shape == x.shape
        if seen != self._checked or other is not None and other.device != x.device:
            self.producer.check(x, other)
            self._checked = seen
        if self.refusal is None:
            return self._round(x, other)
        return self._round(self.producer(x.float(), None if other is None else other.float()))


class BoundLowbitCuda:
    """`int_linear` with rounded inputs on one weight on a GPU, as `ops.BoundIntLinear` is on the CPU: called with
    ``x [..., in]`` and a bias. The weight is checked in every call; what follows from the options is kept."""

    def __init__(self, qweight, scales, zero_points, shape, bits, group_size, act_bits, act_group=32, act_clip=1.0,
                 act_sym=True, input_scale=None):
        self.tensors, self.shape, self.bits, self.group_size = (qweight, scales, zero_points), shape, bits, group_size
        self.act_bits, self.options, self.input_scale = act_bits, (act_group, act_clip, act_sym), input_scale
        self.device = qweight.device
        self._alone: BoundFusedCuda | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._alone is None:
            self._alone = BoundFusedCuda([self], Producer())
        return self._alone(x, [bias])[0]


class BoundFusedCuda:
    """`BoundIntLinearFused` on a GPU: one launch rounds the input, one multiplies for each weight."""

    def __init__(self, members: list[BoundLowbitCuda], producer: Producer):
        first = members[0]
        alike = [(m.shape[1], m.bits, m.group_size, m.act_bits, m.options, m.device, m.tensors[2] is None,
                  two_level(m.tensors[1])) for m in members]
        for i, member in enumerate(members):
            if alike[i] != alike[0] or member.input_scale is not first.input_scale:
                fail(_OP, f"projection {i}", f"width, bits, group_size and activations {alike[i]}",
                     "those of the first")
        self.members, self.producer = members, producer
        self._round: CudaRounding | None = None

    @property
    def rounding(self) -> CudaRounding:
        if self._round is None:
            first = self.members[0]
            self._round = CudaRounding(self.producer, first.shape[1], first.bits, first.group_size,
                                       first.tensors[2] is not None, first.act_bits, *first.options, first.input_scale,
                                       first.device, two_level(first.tensors[1]))
        return self._round

    def __call__(self, x: Tensor, biases: list[Tensor | None], other: Tensor | None = None) -> list[Tensor]:
        first = self.members[0]
        check_input(_OP, x, first.act_bits)
        if x.shape[-1] != first.shape[1] or x.device != first.device:
            fail(_OP, "x", f"{list(x.shape)} on {x.device}", f"[..., {first.shape[1]}] on {first.device}")
        for member, bias in zip(self.members, biases, strict=True):
            check_bias(_OP, x, bias, member.shape[0])
        codes = self.rounding(x, other)
        return [ops_cuda.multiplied(x, codes, *member.tensors, bias, member.shape[0], member.bits, member.group_size)
                for member, bias in zip(self.members, biases)]


def bound_fused(members: list, producer: Producer) -> BoundIntLinearFused | BoundFusedCuda:
    """The fused call on weights that were bound on one device."""
    return (BoundIntLinearFused if isinstance(members[0], ops.BoundIntLinear) else BoundFusedCuda)(members, producer)


def _fused_cuda(x, other, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits, act_group=32,
                act_clip=1.0, act_sym=True, input_scale=None, norm_weight=None, epsilon=0.0, hadamard=-1, signs=None,
                left=None, right=None, index=None, block_bits=None):
    from .formats.integer import quantize_activations
    from .ops_lowbit_gemm_cuda import refusal

    producer = _producer(norm_weight, epsilon, other, hadamard, signs, left, right, index, block_bits)
    check_input(_OP, x, act_bits)
    producer.check(x, other)
    options = act_bits, act_group, act_clip, act_sym, input_scale
    _check_options(producer, x, *options)
    check_projections(_OP, qweights, scales, zero_points, biases, out_features)
    for i, n in enumerate(out_features):  # all checks come before the first launch
        check_weight(_OP, x.shape[-1], qweights[i], scales[i], zero_points[i] if zero_points else None, n, bits,
                     group_size, x.device)
        check_bias(_OP, x, biases[i] if biases else None, n)
    two_levels = two_level(scales[0])
    if refusal(x.shape[-1], bool(zero_points) and not two_levels, act_bits, act_sym):  # rows too long for integer sums
        made = producer(x.float(), None if other is None else other.float())
        seen = quantize_activations(made, *options, block_bits).to(x.dtype)
        return ops.int_linear_multi.dispatch(seen, qweights, scales, zero_points, biases, out_features, bits,
                                             group_size, 16)
    codes = CudaRounding(producer, x.shape[-1], bits, group_size, bool(zero_points), *options, x.device,
                         two_levels)(x, other)
    return [ops_cuda.multiplied(x, codes, qweights[i], scales[i], zero_points[i] if zero_points else None,
                            biases[i] if biases else None, n, bits, group_size)
            for i, n in enumerate(out_features)]


int_linear_fused = ops.Op(
    _OP,
    "(Tensor x, Tensor? other, Tensor[] qweights, Tensor[] scales, Tensor[] zero_points, Tensor[] biases, "
    f"int[] out_features, int bits, int group_size, {ops.ACTIVATIONS}, Tensor? norm_weight=None, float epsilon=0.0, "
    "int hadamard=-1, Tensor? signs=None, Tensor? left=None, Tensor? right=None, Tensor? index=None, "
    "Tensor? block_bits=None) -> Tensor[]",
    _fused_cpu, _fused_fake, _fused_reference, _fused_cuda if _C.has_cuda_build else None,
    "producer_rows or producer_products cuda (quantize_rows cuda behind torch where neither takes the steps), then "
    "lowbit_linear cuda, once for each projection",
)
