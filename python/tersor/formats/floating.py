"""Small floating-point formats: FP8, the OCP microscaling formats (MXFP4/6/8) and NVFP4."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops_float, ops_float_cuda
from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import pack_bits, packed_bytes, unpack_bits

# element: (exponent bits, mantissa bits, lowest exponent of a normal number, largest value)
ELEMENTS = {"e2m1": (2, 1, 0, 6.0), "e2m3": (2, 3, 0, 7.5), "e4m3": (4, 3, -6, 448.0)}
_ROUNDS_UP = {"e2m1": 1.75, "e2m3": 1.9375, "e4m3": 1.75}  # mantissas from which the next power of two serves better
_NO_NUMBER = 255  # the E8M0 code of NaN
_BLOCK = 128  # rows and columns of a block that shares an FP8 scale


def element_bits(element: str) -> int:
    """Bits of one code: sign, exponent and mantissa."""
    return 1 + ELEMENTS[element][0] + ELEMENTS[element][1]


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^exponent`` for integer exponents, exact in ``dtype``."""
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)


def exponent_scales(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of E8M0 codes (uint8, any shape) in float32 or float64: ``2^(code - 127)``, NaN for 255 (OCP MX
    v1.0)."""
    return power_of_two(codes.int() - 127, dtype).masked_fill_(codes == _NO_NUMBER, torch.nan)


def round_to(x: Tensor, element: str) -> Tensor:
    """Nearest value of a small float type, ties to even, saturating; same shape and dtype as ``x``."""
    _, mantissa, lowest, top = ELEMENTS[element]
    x = x.clamp(-top, top)
    exponent = torch.frexp(x)[1].sub(1).clamp_min(lowest)
    step = power_of_two(exponent - mantissa, x.dtype)
    return torch.round(x / step) * step


@functools.lru_cache(maxsize=None)
def _magnitudes(element: str) -> Tensor:
    """Values of the codes without a sign bit, in code order."""
    bits, mantissa, lowest, top = ELEMENTS[element]
    values = [
        (m if e == 0 else m + 2**mantissa) * 2.0 ** (lowest - mantissa + max(e - 1, 0))
        for e in range(2**bits)
        for m in range(2**mantissa)
    ]
    return torch.tensor([value for value in values if value <= top])


def to_codes(values: Tensor, element: str) -> Tensor:
    """Representable values to codes (sign bit on top), int64."""
    table = _magnitudes(element).to(values.device, values.dtype)
    sign = torch.signbit(values).long() << element_bits(element) - 1
    return torch.searchsorted(table, values.abs().contiguous()) | sign


def from_codes(codes: Tensor, element: str, dtype: torch.dtype) -> Tensor:
    """Values that codes stand for."""
    table = _magnitudes(element).to(codes.device, dtype)
    sign = element_bits(element) - 1
    # a code beyond the largest number (the NaN of e4m3) cannot come from `to_codes`
    magnitude = table[(codes & 2**sign - 1).clamp_max(len(table) - 1)]
    return torch.where(codes >> sign & 1 == 1, -magnitude, magnitude)


def power_of_two_scale(top: Tensor, element: str) -> Tensor:
    """Exponent of the E8M0 scale (int32) for groups whose largest magnitude is ``top``: OCP MX v1.0, but one higher
    where the largest weight would round beyond the element's last binade, as compressed-tensors does."""
    fraction, exponent = torch.frexp(top)
    exponent = exponent - 1 + (2 * fraction >= _ROUNDS_UP[element]).int()
    return (exponent - math.floor(math.log2(ELEMENTS[element][3]))).clamp(-126, 127).where(top > 0, -126)


def fit_columns(index: Tensor, lo: int, count: int, size: int) -> Tensor:
    """``index [out, groups]`` broadcast to columns ``[lo, lo + count)`` of groups of ``size``."""
    return index[:, torch.arange(lo, lo + count, device=index.device) // size]


def grouped(w: Tensor, size: int) -> Tensor:
    """``[out, in]`` to ``[out, groups, size]``, padded with zeros."""
    return F.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))


class _Scaled(Format):
    """What the float formats share: ``w = element * scale``, with ``params["scales"]`` in ``w``'s dtype."""

    element: str

    def _columns(self, params: Params, lo: int, count: int) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say which scale belongs to which column")

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        scales = self._columns(params, lo, w.shape[1])
        return round_to(w / scales, self.element) * scales

    def _element_spec(self, shape: Shape) -> TensorSpec:
        if self.element == "e4m3":
            return TensorSpec(tuple(shape), torch.float8_e4m3fn)
        return TensorSpec((shape[0], packed_bytes(shape[1], element_bits(self.element))), torch.uint8)

    def _pack_elements(self, w_hat: Tensor, params: Params) -> Tensor:
        values = round_to(w_hat / self._columns(params, 0, w_hat.shape[1]), self.element)
        if self.element == "e4m3":
            return values.to(torch.float8_e4m3fn).contiguous()
        return pack_bits(to_codes(values, self.element), element_bits(self.element))

    def _unpack_elements(self, packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        if self.element == "e4m3":
            return packed.to(dtype)
        return from_codes(unpack_bits(packed, element_bits(self.element), shape[1]), self.element, dtype)

    def _is_one_code(self, shape: Shape) -> bool:
        """Rows of one e2m3: as long as rows of one e2m1, for which `ops_float.float_linear` takes them."""
        return self.element == "e2m3" and shape[1] == 1

    def _operands(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple | None:
        """Codes, scales, global scale, and the rows and columns that share a scale, as `ops_float.float_linear` takes
        them; None where it does not know the element."""
        return None

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        operands = self._operands(tensors, shape) if ops_float.takes(x) else None
        if operands is None:
            return super().linear(x, tensors, bias, shape)
        codes, scales, one, rows, group = operands
        return ops_float.float_linear(x, codes, scales, one, bias, shape[0], rows, group)

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        if self._is_one_code(shape):
            return "reference: no kernel for e2m3 over one channel"
        name = ops_float.float_linear.kernel(torch.device(device))
        return name + " (float32 inputs: the unpacked weight)" if name == ops_float_cuda.KERNEL else name

    def _searched(self, w: Tensor, candidates, importance: Tensor | None, size: int) -> Tensor:
        """Of scales ``[out, groups]`` the ones with the least (weighted) squared error per group."""
        values = grouped(w, size)
        weight = None if importance is None else grouped(importance.to(w)[None], size)
        best = least = None
        for scales in candidates:
            error = (round_to(values / scales[..., None], self.element) * scales[..., None] - values).square()
            error = (error if weight is None else error * weight).sum(-1)
            if best is None:
                best, least = scales, error
            else:
                best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
        return best


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic of a reference dequantization: float64 where asked for, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Float(_Scaled):
    """FP8 (E4M3) weights with one scale per tensor, per channel (row) or per block of 128 x 128, in the model's dtype.

    Stored as ``weight_packed`` float8_e4m3fn ``[out, in]`` (``weight`` in a compressed-tensors checkpoint) and
    ``weight_scale`` of shape ``[1]``, ``[out, 1]`` or ``[ceil(out / 128), ceil(in / 128)]``.
    """

    element: str = "e4m3"
    scale: str = "channel"

    def __post_init__(self):
        if self.element != "e4m3":
            raise ValueError(f"found element {self.element!r}, accepted is e4m3")
        if self.scale not in ("tensor", "channel", "block"):
            raise ValueError(f"option 'scale': found {self.scale!r}, accepted are tensor, channel and block")

    def _scale_dtype(self, dtype):
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def _scale_shape(self, shape: Shape) -> tuple[int, ...]:
        if self.scale == "block":
            return -(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK)
        return (shape[0], 1) if self.scale == "channel" else (1,)

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        magnitude = w.abs()
        if self.scale == "tensor":
            top = magnitude.amax().view(1)
        elif self.scale == "channel":
            top = magnitude.amax(1, keepdim=True)
        else:
            padded = F.pad(magnitude, (0, -w.shape[1] % _BLOCK, 0, -w.shape[0] % _BLOCK))
            top = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK)).amax((1, 3))
        store = self._scale_dtype(dtype or w.dtype)
        limits = torch.finfo(store)
        scales = (top / ELEMENTS[self.element][3]).clamp(limits.smallest_normal, limits.max).to(store)
        return Params(dtype=store, scales=scales.to(w.dtype), rows=w.shape[0])

    def _columns(self, params: Params, lo: int, count: int) -> Tensor:
        if self.scale != "block":
            return params["scales"]
        rows = params["scales"].repeat_interleave(_BLOCK, 0)[: params["rows"]]
        return fit_columns(rows, lo, count, _BLOCK)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        return {"weight_packed": self._pack_elements(w_hat, params),
                "weight_scale": params["scales"].to(params["dtype"]).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = _wide(dtype)
        params = Params(scales=tensors["weight_scale"].to(wide), rows=shape[0])
        return (tensors["weight_packed"].to(wide) * self._columns(params, 0, shape[1])).to(dtype)

    def _operands(self, tensors, shape):
        rows, group = {"tensor": shape, "channel": (1, shape[1]), "block": (_BLOCK, _BLOCK)}[self.scale]
        return tensors["weight_packed"], tensors["weight_scale"], None, max(rows, 1), max(group, 16)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {"weight_packed": self._element_spec(shape),
                "weight_scale": TensorSpec(self._scale_shape(shape), self._scale_dtype(dtype))}

    def text(self) -> str:
        return "FP8A16" + ("" if self.scale == "channel" else f"[scale={self.scale}]")


@dataclass(frozen=True)
class Microscaling(_Scaled):
    """OCP microscaling weights: E2M1 (MXFP4), E2M3 (MXFP6) or E4M3 (MXFP8) in groups of 32 inputs of a row that share
    a power-of-two scale (E8M0).

    Stored as ``weight_packed`` uint8 (dense codes, low bits first; float8_e4m3fn ``[out, in]`` for E4M3) and
    ``weight_scale`` uint8 ``[out, ceil(in / 32)]``, exponents with a bias of 127.
    """

    element: str = "e2m1"

    group = 32

    def __post_init__(self):
        if self.element not in ELEMENTS:
            raise ValueError(f"found element {self.element!r}, accepted are {', '.join(ELEMENTS)}")

    @property
    def group_columns(self) -> int:
        return self.group

    def _fit(self, w, search, importance):
        exponent = power_of_two_scale(grouped(w, self.group).abs().amax(-1), self.element)
        steps = (0, -1, 1) if search else (0,)
        candidates = [power_of_two((exponent + step).clamp(-126, 127), w.dtype) for step in steps]
        return self._searched(w, candidates, importance, self.group) if search else candidates[0]

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        return Params(scales=self._fit(w, search, importance))

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        scales = self._fit(w, search, None)
        first = lo // self.group
        params["scales"][:, first : first + scales.shape[1]] = scales

    def _columns(self, params: Params, lo: int, count: int) -> Tensor:
        return fit_columns(params["scales"], lo, count, self.group)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        exponent = torch.frexp(params["scales"])[1] - 1
        return {"weight_packed": self._pack_elements(w_hat, params), "weight_scale": (exponent + 127).to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = _wide(dtype)
        scales = exponent_scales(tensors["weight_scale"], wide)
        values = self._unpack_elements(tensors["weight_packed"], shape, wide)
        return (values * fit_columns(scales, 0, shape[1], self.group)).to(dtype)

    def _operands(self, tensors, shape):
        if self._is_one_code(shape):
            return None
        return tensors["weight_packed"], tensors["weight_scale"], None, 1, self.group

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {"weight_packed": self._element_spec(shape),
                "weight_scale": TensorSpec((shape[0], -(-shape[1] // self.group)), torch.uint8)}

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        wrong = (tensors["weight_scale"] == _NO_NUMBER).nonzero()
        if len(wrong):
            raise ValueError(f"weight_scale: found {_NO_NUMBER} (NaN) at {wrong[0].tolist()}, accepted are exponents "
                             f"of 0 to {_NO_NUMBER - 1}")

    def text(self) -> str:
        return f"MXFP{element_bits(self.element)}A16"


@dataclass(frozen=True)
class NVFP4(_Scaled):
    """E2M1 weights in groups of 16 inputs of a row; the groups' scales are E4M3 under one float32 scale per tensor.

    ``w = element * (weight_scale / weight_global_scale)``. Stored as ``weight_packed`` uint8 ``[out, ceil(in / 2)]``
    (low nibble first), ``weight_scale`` float8_e4m3fn ``[out, ceil(in / 16)]``, ``weight_global_scale`` float32
    ``[1]``.
    """

    element = "e2m1"
    group = 16

    @property
    def group_columns(self) -> int:
        return self.group

    def _fit(self, w, params, search, importance):
        top = grouped(w, self.group).abs().amax(-1)
        one = params["global"].to(w.dtype)
        candidates = [
            round_to(top * shrink / ELEMENTS["e2m1"][3] * one, "e4m3").clamp_min(2.0**-9) / one
            for shrink in ((1, 0.95, 0.9, 0.85, 0.8, 0.75, 2 / 3) if search else (1,))
        ]
        return self._searched(w, candidates, importance, self.group) if search else candidates[0]

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        top = w.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
        scale = (ELEMENTS["e4m3"][3] * ELEMENTS["e2m1"][3] / top).nan_to_num(posinf=1.0).view(1)
        params = Params({"global": scale})
        params["scales"] = self._fit(w, params, search, importance)
        return params

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        scales = self._fit(w, params, search, None)
        first = lo // self.group
        params["scales"][:, first : first + scales.shape[1]] = scales

    def _columns(self, params: Params, lo: int, count: int) -> Tensor:
        return fit_columns(params["scales"], lo, count, self.group)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        local = round_to(params["scales"] * params["global"].to(params["scales"].dtype), "e4m3")
        return {"weight_packed": self._pack_elements(w_hat, params), "weight_scale": local.to(torch.float8_e4m3fn),
                "weight_global_scale": params["global"].clone()}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = _wide(dtype)
        scales = tensors["weight_scale"].to(wide) / tensors["weight_global_scale"].to(wide)
        values = self._unpack_elements(tensors["weight_packed"], shape, wide)
        return (values * fit_columns(scales, 0, shape[1], self.group)).to(dtype)

    def _operands(self, tensors, shape):
        return tensors["weight_packed"], tensors["weight_scale"], tensors["weight_global_scale"], 1, self.group

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {"weight_packed": self._element_spec(shape),
                "weight_scale": TensorSpec((shape[0], -(-shape[1] // self.group)), torch.float8_e4m3fn),
                "weight_global_scale": TensorSpec((1,), torch.float32)}

    def text(self) -> str:
        return "NVFP4A16"


@register_format(r"FP8A16", "FP8A16", "FP8 (E4M3) weights, 16-bit activations; scale=tensor, channel or block")
def _fp8(match, inner, *, scale: str = "channel"):
    _leaf(inner)
    return Float("e4m3", scale)


@register_format(r"MXFP([468])A16", "MXFP4A16", "OCP microscaling weights of 4, 6 or 8 bits, 16-bit activations")
def _microscaling(match, inner):
    _leaf(inner)
    return Microscaling({"4": "e2m1", "6": "e2m3", "8": "e4m3"}[match[1]])


@register_format(r"NVFP4A16", "NVFP4A16", "NVIDIA's FP4 weights with FP8 group scales, 16-bit activations")
def _nvfp4(match, inner):
    _leaf(inner)
    return NVFP4()


def _leaf(inner: Format | None) -> None:
    if inner is not None:
        raise ValueError(f"a float format holds values and nothing nests in it, found {inner}")
