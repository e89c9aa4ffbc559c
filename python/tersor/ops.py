"""One table of native operations: schema, fake, checks, CPU kernel, CUDA slot, pure-torch reference.

Every check (`op_checks`) happens before a pointer leaves Python. Kernels never see a tensor whose dtype, device, shape
or contiguity was not verified against the others. What runs on CUDA is in `ops_cuda`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from . import _C, ops_cuda
from .op_checks import (CODE, FLOATS, SCALE_CODE, as_rows, check_activations, check_bias, check_experts, check_input,
                        check_projections, check_weight, fail)

_LIBRARY = torch.library.Library("tersor", "DEF")

OPS: dict[str, "Op"] = {}


@dataclass
class Op:
    """One operation. Calling it goes through the dispatcher, or straight to the CPU kernel where nothing listens."""

    name: str
    schema: str
    cpu: Callable
    fake: Callable
    reference: Callable
    cuda: Callable | None = None
    cuda_kernel: str = ""

    def __post_init__(self):
        _LIBRARY.define(self.name + self.schema)
        _LIBRARY.impl(self.name, self.cpu, "CPU")
        if self.cuda is not None:
            _LIBRARY.impl(self.name, self.cuda, "CUDA")
        torch.library.register_fake(f"tersor::{self.name}", self.fake, lib=_LIBRARY)
        self.dispatch = getattr(torch.ops.tersor, self.name).default
        OPS[self.name] = self

    def __call__(self, first, *rest):
        return (self.cpu if plain(first) else self.dispatch)(first, *rest)

    def kernel(self, device: torch.device) -> str:
        """Name of the kernel that serves this device, or ``reference: why``."""
        if device.type == "cpu":
            return f"{self.name} {_C.isa()}"
        if device.type == "cuda" and self.cuda is not None:
            return self.cuda_kernel or f"{self.name} cuda"
        return f"reference: {self.name} has no kernel for device {device.type!r}"


_listening = torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack


def plain(x: Tensor) -> bool:
    """Whether ``x`` is an eager CPU tensor that no mode or transform watches: such calls need nothing of the
    dispatcher, which costs about 2.5 us each."""
    return type(x) is Tensor and x.is_cpu and not _is_compiling() and not _listening() and _transform() is None \
        and _forward_ad._current_level < 0


_threads = torch.get_num_threads
_CPU = torch.device("cpu")


# -- int_linear -------------------------------------------------------------------------------------------------

# act_bits and what follows it: how activations are rounded, as formats/integer.py:activation_codes says.
ACTIVATIONS = "int act_bits, int act_group=32, float act_clip=1.0, bool act_sym=True, Tensor? input_scale=None"
_dynamic_input = functools.lru_cache(maxsize=256)(_C.Input)


def native_input(act_bits, act_group, act_clip, act_sym, input_scale):
    """What the kernels take as activations: the bits alone where all else is usual."""
    if input_scale is not None:
        return _C.Input(act_bits, act_group, act_clip, act_sym, input_scale.data_ptr())
    if act_group == 32 and act_clip == 1 and act_sym:
        return act_bits
    return _dynamic_input(act_bits, act_group, act_clip, act_sym)


def _int_linear_cpu(x, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits, act_group=32,
                    act_clip=1.0, act_sym=True, input_scale=None):
    check_input("int_linear", x, act_bits)
    k = x.shape[-1]
    check_activations("int_linear", k, act_bits, act_group, act_clip, act_sym, input_scale, x.device)
    check_weight("int_linear", k, qweight, scales, zero_points, out_features, bits, group_size, x.device)
    check_bias("int_linear", x, bias, out_features)
    rows = as_rows(x)
    m = rows.shape[0]
    y = x.new_empty((m, out_features) if x.dim() == 2 else (*x.shape[:-1], out_features))
    _C.int_linear(
        rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, qweight.data_ptr(), scales.data_ptr(),
        SCALE_CODE[scales.dtype], 0 if zero_points is None else zero_points.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), out_features, out_features, bits, group_size,
        native_input(act_bits, act_group, act_clip, act_sym, input_scale), _threads(),
    )
    return y


_WORTH_HUGE_PAGES = 4 << 20  # bytes of a weight


class BoundIntLinear:
    """`int_linear` on one weight that was checked once: what a layer calls again and again on plain tensors.

    It keeps the tensors alive and looks at their addresses in every call, so storage that was freed or moved under
    it is noticed and checked anew before a pointer is used.
    """

    __slots__ = ("tensors", "shape", "bits", "group_size", "act_bits", "pointers", "scale_code", "options",
                 "input_scale", "input", "input_pointer")

    def __init__(self, qweight, scales, zero_points, shape, bits, group_size, act_bits, act_group=32, act_clip=1.0,
                 act_sym=True, input_scale=None):
        self.tensors = (qweight, scales, zero_points)
        self.shape, self.bits, self.group_size, self.act_bits = shape, bits, group_size, act_bits
        self.options, self.input_scale = (act_group, act_clip, act_sym), input_scale
        self._check()

    def _check(self) -> None:
        qweight, scales, zero_points = self.tensors
        n, k = self.shape
        check_weight("int_linear", k, qweight, scales, zero_points, n, self.bits, self.group_size, _CPU)
        check_activations("int_linear", k, self.act_bits, *self.options, self.input_scale, _CPU)
        self.pointers = (qweight.data_ptr(), scales.data_ptr(), 0 if zero_points is None else zero_points.data_ptr())
        self.input = native_input(self.act_bits, *self.options, self.input_scale)
        self.input_pointer = 0 if self.input_scale is None else self.input_scale.data_ptr()
        self.scale_code = SCALE_CODE[scales.dtype]
        if n and k and not (self.pointers[0] and self.pointers[1] and (zero_points is None or self.pointers[2])
                            and (self.input_scale is None or self.input_pointer)):
            fail("int_linear", "qweight, scales, zero_points and input_scale", "freed storage", "tensors with storage")
        if qweight.nbytes >= _WORTH_HUGE_PAGES:
            _C.huge_pages(self.pointers[0], qweight.nbytes)

    def addresses(self) -> tuple[int, int, int]:
        """Of the tensors as they are now; checked anew where they moved."""
        qweight, scales, zero_points = self.tensors
        q, s, z = self.pointers
        if qweight.data_ptr() != q or scales.data_ptr() != s or z and zero_points.data_ptr() != z \
                or self.input_pointer and self.input_scale.data_ptr() != self.input_pointer:
            self._check()
        return self.pointers

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, s, z = self.addresses()
        code = CODE.get(x.dtype)
        n, k = self.shape
        size = x.shape
        if code is None or size[-1] != k:
            check_input("int_linear", x, self.act_bits)
            fail("int_linear", "x", list(size), f"[..., {k}]")
        if bias is not None:
            check_bias("int_linear", x, bias, n)
        if len(size) == 2:
            rows, m = x, size[0]
            y = x.new_empty((m, n))
        else:
            m = math.prod(size[:-1])
            rows = x.reshape(m, k)
            y = x.new_empty((*size[:-1], n))
        stride, unit = rows.stride()
        if unit != 1 or stride < k:
            rows = rows.contiguous()
            stride = k
        _C.int_linear(rows.data_ptr(), code, m, k, stride, q, s, self.scale_code, z,
                      0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n, self.bits, self.group_size,
                      self.input, _threads())
        return y


def _int_linear_fake(x, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits, act_group=32,
                     act_clip=1.0, act_sym=True, input_scale=None):
    return x.new_empty((*x.shape[:-1], out_features))


def _int_linear_reference(x, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits,
                          act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    from .formats.integer import quantize_activations

    w = int_dequantize_reference(qweight, scales, zero_points, out_features, x.shape[-1], bits, group_size,
                                 torch.float64)
    seen = x if act_bits == 16 else quantize_activations(x.float(), act_bits, act_group, act_clip, act_sym, input_scale)
    y = F.linear(seen.double(), w, None if bias is None else bias.double())
    return y.to(x.dtype)


int_linear = Op(
    "int_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? zero_points, Tensor? bias, int out_features, int bits, "
    f"int group_size, {ACTIVATIONS}) -> Tensor",
    _int_linear_cpu, _int_linear_fake, _int_linear_reference, ops_cuda.int_linear if _C.has_cuda_build else None,
    f"int_linear cuda; over {ops_cuda.MAX_ROWS} rows or in float32 int_dequantize cuda and a dense product",
)


# -- int_linear_multi: projections of one input in one call -------------------------------------------------------


def _int_linear_multi_cpu(x, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits,
                          act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    op = "int_linear_multi"
    check_input(op, x, act_bits)
    check_activations(op, x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale, x.device)
    rows = as_rows(x)
    m, k = rows.shape
    outputs, projections = checked_projections(op, x, qweights, scales, zero_points, biases, out_features, bits,
                                               group_size)
    _C.int_linear_multi(rows.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k, projections,
                        SCALE_CODE[scales[0].dtype], bits, group_size,
                        native_input(act_bits, act_group, act_clip, act_sym, input_scale), _threads())
    return outputs


def checked_projections(op, x, qweights, scales, zero_points, biases, out_features, bits, group_size):
    """Outputs, and the tuples by which the kernels know several weights of one input."""
    check_projections(op, qweights, scales, zero_points, biases, out_features)
    k = x.shape[-1]
    outputs, projections = [], []
    for i, n in enumerate(out_features):
        zero = zero_points[i] if zero_points else None
        bias = biases[i] if biases else None
        check_weight(op, k, qweights[i], scales[i], zero, n, bits, group_size, x.device)
        if scales[i].dtype is not scales[0].dtype:
            fail(op, f"scales[{i}]", scales[i].dtype, f"the dtype of the first, {scales[0].dtype}")
        check_bias(op, x, bias, n)
        y = x.new_empty((*x.shape[:-1], n))
        outputs.append(y)
        projections.append((qweights[i].data_ptr(), scales[i].data_ptr(), 0 if zero is None else zero.data_ptr(),
                            0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n))
    return outputs, projections


class BoundIntLinearMulti:
    """`int_linear_multi` on weights that were checked once, as `BoundIntLinear` is for one."""

    __slots__ = ("members", "in_features", "out_features", "bits", "group_size", "act_bits", "scale_code")

    def __init__(self, members: list[BoundIntLinear]):
        first = members[0]
        for i, member in enumerate(members):
            found = member.shape[1], member.bits, member.group_size, member.scale_code, member.act_bits, member.options
            if found != (first.shape[1], first.bits, first.group_size, first.scale_code, first.act_bits, first.options):
                fail("int_linear_multi", f"projection {i}", f"width, bits, group_size, dtype and activations {found}",
                     "those of the first")
            if member.input_scale is not first.input_scale and (member.input_scale is None or first.input_scale is None
                                                                or not member.input_scale.equal(first.input_scale)):
                fail("int_linear_multi", f"projection {i}", "another input_scale", "that of the first")
        self.members = members
        self.in_features, self.out_features = first.shape[1], [member.shape[0] for member in members]
        self.bits, self.group_size, self.act_bits = first.bits, first.group_size, first.act_bits
        self.scale_code = first.scale_code

    def __call__(self, x: Tensor, biases: list[Tensor | None]) -> list[Tensor]:
        code, size, k = CODE.get(x.dtype), x.shape, self.in_features
        if code is None or size[-1] != k:
            check_input("int_linear_multi", x, self.act_bits)
            fail("int_linear_multi", "x", list(size), f"[..., {k}]")
        m = math.prod(size[:-1])
        rows = x if len(size) == 2 else x.reshape(m, k)
        stride, unit = rows.stride()
        if unit != 1 or stride < k:
            rows, stride = rows.contiguous(), k
        outputs, projections = [], []
        for member, n, bias in zip(self.members, self.out_features, biases):
            if bias is not None:
                check_bias("int_linear_multi", x, bias, n)
            y = x.new_empty((*size[:-1], n))
            outputs.append(y)
            projections.append((*member.addresses(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n))
        _C.int_linear_multi(rows.data_ptr(), code, m, k, stride, projections, self.scale_code, self.bits,
                            self.group_size, self.members[0].input, _threads())
        return outputs


def _int_linear_multi_fake(x, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits,
                           act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]


def _int_linear_multi_reference(x, qweights, scales, zero_points, biases, out_features, bits, group_size, act_bits,
                                act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    return [
        _int_linear_reference(x, qweights[i], scales[i], zero_points[i] if zero_points else None,
                              biases[i] if biases else None, n, bits, group_size, act_bits, act_group, act_clip,
                              act_sym, input_scale)
        for i, n in enumerate(out_features)
    ]


int_linear_multi = Op(
    "int_linear_multi",
    "(Tensor x, Tensor[] qweights, Tensor[] scales, Tensor[] zero_points, Tensor[] biases, int[] out_features, "
    f"int bits, int group_size, {ACTIVATIONS}) -> Tensor[]",
    _int_linear_multi_cpu, _int_linear_multi_fake, _int_linear_multi_reference,
    ops_cuda.int_linear_multi if _C.has_cuda_build else None, "int_linear cuda, once for each projection",
)


# -- int_linear_grouped: the experts of a mixture ------------------------------------------------------------------


def _int_linear_grouped_cpu(x, ends, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits,
                            act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    op = "int_linear_grouped"
    check_input(op, x, act_bits)
    check_experts(op, x, ends, qweight, scales, zero_points, bias, out_features, bits, group_size)
    check_activations(op, x.shape[-1], act_bits, act_group, act_clip, act_sym, input_scale, x.device, ends.numel())
    x = as_rows(x)
    rows, k = x.shape
    y = x.new_empty((rows, out_features))
    _C.int_linear_grouped(
        x.data_ptr(), CODE[x.dtype], rows, k, x.stride(0) if rows > 1 else k, ends.data_ptr(), ends.numel(),
        qweight.data_ptr(), scales.data_ptr(), SCALE_CODE[scales.dtype],
        0 if zero_points is None else zero_points.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        out_features, out_features, bits, group_size,
        native_input(act_bits, act_group, act_clip, act_sym, input_scale), _threads(),
    )
    return y


def _int_linear_grouped_fake(x, ends, qweight, scales, zero_points, bias, out_features, bits, group_size, act_bits,
                             act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    return x.new_empty((x.shape[0], out_features))


def _int_linear_grouped_reference(x, ends, qweight, scales, zero_points, bias, out_features, bits, group_size,
                                  act_bits, act_group=32, act_clip=1.0, act_sym=True, input_scale=None):
    y, begin = x.new_zeros((x.shape[0], out_features)), 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            y[begin:end] = _int_linear_reference(
                x[begin:end], qweight[expert], scales[expert], None if zero_points is None else zero_points[expert],
                None if bias is None else bias[expert], out_features, bits, group_size, act_bits, act_group, act_clip,
                act_sym, None if input_scale is None else input_scale[expert])
        begin = end
    return y


int_linear_grouped = Op(
    "int_linear_grouped",
    "(Tensor x, Tensor ends, Tensor qweight, Tensor scales, Tensor? zero_points, Tensor? bias, int out_features, "
    f"int bits, int group_size, {ACTIVATIONS}) -> Tensor",
    _int_linear_grouped_cpu, _int_linear_grouped_fake, _int_linear_grouped_reference,
    ops_cuda.int_linear_grouped if _C.has_cuda_build else None,
    "int_linear_grouped cuda; in float32 int_dequantize cuda and dense products",
)


# -- packing ----------------------------------------------------------------------------------------------------


def _int_pack_cpu(codes, bits):
    if not 2 <= bits <= 8:
        fail("int_pack", "bits", bits, "2 to 8")
    if codes.dtype is not torch.uint8 or codes.dim() != 2 or not codes.is_contiguous():
        fail("int_pack", "codes", f"{codes.dtype} {list(codes.shape)}", "contiguous torch.uint8 [out, in]")
    if codes.numel() and int(codes.max()) >= 2**bits:
        fail("int_pack", "codes", int(codes.max()), f"0 to {2**bits - 1}")
    n, k = codes.shape
    qweight = codes.new_empty((-(-n // 16), -(-k // 32), 64 * bits))
    _C.int_pack(codes.data_ptr(), n, k, bits, qweight.data_ptr(), _threads())
    return qweight


def _int_pack_fake(codes, bits):
    n, k = codes.shape
    return codes.new_empty((-(-n // 16), -(-k // 32), 64 * bits))


_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def _vector_columns() -> Tensor:
    """Column of a block that byte ``b`` of vector ``t`` holds, ``[8, 4]``."""
    t, b = torch.meshgrid(torch.arange(8), torch.arange(4), indexing="ij")
    return 8 * (t // 2) + torch.tensor([0, 4, 1, 5])[b] + 2 * (t % 2)


def _int_pack_reference(codes, bits):
    n, k = codes.shape
    padded = F.pad(codes, (0, -k % 32, 0, -n % 16), value=2 ** (bits - 1))
    blocks = padded.unflatten(0, (-1, 16)).unflatten(2, (-1, 32)).transpose(1, 2)
    vectors = blocks[..., _vector_columns()].permute(0, 1, 3, 2, 4).flatten(-2)  # [tiles, blocks, 8, 64]
    planes, low = [], 0
    for width in _PLANES[bits]:
        fields = (vectors >> low & 2**width - 1).unflatten(2, (-1, 8 // width))
        shifts = (torch.arange(8 // width, dtype=torch.uint8) * width).view(-1, 1)
        planes.append((fields << shifts).sum(3, dtype=torch.int32).to(torch.uint8).flatten(2))
        low += width
    return torch.cat(planes, 2).contiguous()


int_pack = Op("int_pack", "(Tensor codes, int bits) -> Tensor", _int_pack_cpu, _int_pack_fake, _int_pack_reference)


def _check_packed(op, qweight, n, k, bits):
    if not 2 <= bits <= 8:
        fail(op, "bits", bits, "2 to 8")
    shape = (-(-n // 16), -(-k // 32), 64 * bits)
    if n < 0 or k < 0 or qweight.dtype is not torch.uint8 or qweight.shape != shape or not qweight.is_contiguous():
        fail(op, "qweight", f"{qweight.dtype} {list(qweight.shape)}", f"contiguous torch.uint8 {list(shape)}")


def _int_unpack_cpu(qweight, out_features, in_features, bits):
    _check_packed("int_unpack", qweight, out_features, in_features, bits)
    codes = qweight.new_empty((out_features, in_features))
    _C.int_unpack(qweight.data_ptr(), out_features, in_features, bits, codes.data_ptr(), _threads())
    return codes


def _int_unpack_fake(qweight, out_features, in_features, bits):
    return qweight.new_empty((out_features, in_features))


def _int_unpack_reference(qweight, out_features, in_features, bits):
    tiles, blocks, _ = qweight.shape
    vectors = qweight.new_zeros(tiles, blocks, 8, 64)
    low = at = 0
    for width in _PLANES[bits]:
        chunk = qweight[..., at : at + 64 * width].unflatten(2, (width, 1, 64))
        shifts = (torch.arange(8 // width, dtype=torch.uint8) * width).view(-1, 1)
        vectors |= (chunk >> shifts & 2**width - 1).flatten(2, 3) << low
        low, at = low + width, at + 64 * width
    codes = qweight.new_empty(tiles, blocks, 16, 32)
    codes[..., _vector_columns()] = vectors.unflatten(3, (16, 4)).permute(0, 1, 3, 2, 4)
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features].contiguous()


int_unpack = Op("int_unpack", "(Tensor qweight, int out_features, int in_features, int bits) -> Tensor",
                _int_unpack_cpu, _int_unpack_fake, _int_unpack_reference)


def _int_dequantize_cpu(qweight, scales, zero_points, out_features, in_features, bits, group_size, dtype):
    check_weight("int_dequantize", in_features, qweight, scales, zero_points, out_features, bits, group_size,
                  qweight.device)
    if dtype not in CODE:
        fail("int_dequantize", "dtype", dtype, FLOATS)
    w = qweight.new_empty((out_features, in_features), dtype=dtype)
    _C.int_dequantize(qweight.data_ptr(), scales.data_ptr(), SCALE_CODE[scales.dtype],
                      0 if zero_points is None else zero_points.data_ptr(), out_features, in_features, bits,
                      group_size, w.data_ptr(), CODE[dtype], _threads())
    return w


def _int_dequantize_fake(qweight, scales, zero_points, out_features, in_features, bits, group_size, dtype):
    return qweight.new_empty((out_features, in_features), dtype=dtype)


def int_dequantize_reference(qweight, scales, zero_points, out_features, in_features, bits, group_size, dtype):
    from .formats.integer import untile_rows
    from .formats.two_level import expanded

    codes = _int_unpack_reference(qweight, out_features, in_features, bits).double()
    index = torch.arange(in_features) // (group_size or max(in_features, 1))
    zero = 2 ** (bits - 1) if zero_points is None else untile_rows(zero_points, out_features).double()[:, index]
    scales = expanded(scales) if scales.dtype is torch.uint8 else scales
    return ((codes - zero) * untile_rows(scales, out_features).double()[:, index]).to(dtype)


int_dequantize = Op(
    "int_dequantize",
    "(Tensor qweight, Tensor scales, Tensor? zero_points, int out_features, int in_features, int bits, "
    "int group_size, ScalarType dtype) -> Tensor",
    _int_dequantize_cpu, _int_dequantize_fake, int_dequantize_reference,
    ops_cuda.int_dequantize if _C.has_cuda_build else None,
)


# -- fitting ----------------------------------------------------------------------------------------------------


def _int_fit_cpu(w, importance, bits, group_size, symmetric, steps, dtype):
    op = "int_fit"
    if not 2 <= bits <= 8:
        fail(op, "bits", bits, "2 to 8")
    if group_size < 0 or group_size % 32:
        fail(op, "group_size", group_size, "a multiple of 32, or 0 for one scale per row")
    if w.dtype is not torch.float32 or w.dim() != 2 or not w.shape[1]:
        fail(op, "w", f"{w.dtype} {list(w.shape)}", "torch.float32 [out, in] with in >= 1")
    if not 1 <= steps <= 100:
        fail(op, "steps", steps, "1 to 100")
    if dtype not in CODE:
        fail(op, "dtype", dtype, FLOATS)
    n, k = w.shape
    if importance is not None and (importance.dtype is not torch.float32 or importance.shape != (k,)
                                   or not importance.is_contiguous() or importance.device != w.device):
        fail(op, "importance", f"{importance.dtype} {list(importance.shape)}", f"contiguous torch.float32 {[k]}")
    w = as_rows(w)
    groups = -(-k // group_size) if group_size else 1
    scales, zero_points = w.new_empty((n, groups)), w.new_empty((n, groups))
    _C.int_fit(w.data_ptr(), n, k, w.stride(0) if n > 1 else k, 0 if importance is None else importance.data_ptr(),
               bits, group_size, symmetric, steps, CODE[dtype], scales.data_ptr(), zero_points.data_ptr(), _threads())
    return scales, zero_points


def _int_fit_fake(w, importance, bits, group_size, symmetric, steps, dtype):
    groups = -(-w.shape[1] // group_size) if group_size else 1
    return w.new_empty((w.shape[0], groups)), w.new_empty((w.shape[0], groups))


def _int_fit_reference(w, importance, bits, group_size, symmetric, steps, dtype):
    from .formats.integer import fit_groups

    scales, zero_points = fit_groups(w.double(), bits, group_size, symmetric, steps, dtype, importance)
    return scales.float(), zero_points.float()


int_fit = Op(
    "int_fit",
    "(Tensor w, Tensor? importance, int bits, int group_size, bool symmetric, int steps, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _int_fit_cpu, _int_fit_fake, _int_fit_reference,
)


# -- beside the layers ------------------------------------------------------------------------------------------


def add_gram(gram: Tensor, x: Tensor) -> None:
    """``gram += x^T x`` on and above the diagonal, in place; some of what is below is written as well.

    ``x [tokens, k]`` of any supported dtype and ``gram [k, k]`` float32, contiguous, both on the CPU.
    """
    op = "add_gram"
    if x.dtype not in CODE or x.dim() != 2 or not x.is_cpu:
        fail(op, "x", f"{x.dtype} {list(x.shape)} on {x.device}", f"{FLOATS} [tokens, k] on cpu")
    tokens, k = x.shape
    if gram.dtype is not torch.float32 or gram.shape != (k, k) or not gram.is_contiguous() or not gram.is_cpu:
        fail(op, "gram", f"{gram.dtype} {list(gram.shape)} on {gram.device}",
             f"contiguous torch.float32 {[k, k]} on cpu")
    x = as_rows(x)
    _C.gram(x.data_ptr(), CODE[x.dtype], tokens, k, x.stride(0) if tokens > 1 else k, gram.data_ptr(), _threads())


def _rms_norm_cpu(x, weight, epsilon):
    code = CODE.get(x.dtype)
    if code is None or x.dim() < 1 or not x.is_cpu:
        fail("rms_norm", "x", f"{x.dtype} {list(x.shape)} on {x.device}", f"{FLOATS} [..., k] on cpu")
    k = x.shape[-1]
    if weight.dtype is not x.dtype or weight.shape != (k,) or not weight.is_contiguous() or not weight.is_cpu:
        fail("rms_norm", "weight", f"{weight.dtype} {list(weight.shape)} on {weight.device}",
             f"contiguous {x.dtype} {[k]} on cpu")
    rows = x if x.is_contiguous() else x.contiguous()
    y = torch.empty_like(rows)
    _C.rms_norm(rows.data_ptr(), weight.data_ptr(), y.data_ptr(), code, rows.numel() // k if k else 0, k, k, epsilon,
                _threads())
    return y


def _rms_norm_fake(x, weight, epsilon):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm_reference(x, weight, epsilon):
    wide = x.double()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


rms_norm = Op("rms_norm", "(Tensor x, Tensor weight, float epsilon) -> Tensor", _rms_norm_cpu, _rms_norm_fake,
              _rms_norm_reference)
