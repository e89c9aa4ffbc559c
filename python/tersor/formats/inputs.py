"""Inputs(inner): a format whose multiplication rounds its input to a small float on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops_float, ops_float_cuda, ops_round
from ..registry import register_format
from .base import Around, Shape, reference_kernel
from .byte_scales import ByteScales
from .floating import NVFP4, Float, Microscaling
from .integer import Int

_KINDS = ("fp8", "mxfp4", "mxfp6", "mxfp8", "nvfp4")
_SCALES = ("token", "tensor", "group")
# By kind, of fp8 by scale: the element, what a group is divided by, and its channels.
_ROUNDING = {
    "token": ("e4m3", "largest", 0),
    "tensor": ("e4m3", "whole", 0),
    "group": ("e4m3", "largest", 128),
    "mxfp4": ("e2m1", "power", Microscaling.group),
    "mxfp6": ("e2m3", "power", Microscaling.group),
    "mxfp8": ("e4m3", "power", Microscaling.group),
    "nvfp4": ("e2m1", "e4m3", NVFP4.group),
}


@dataclass(frozen=True)
class Inputs(Around):
    """Weights in ``inner``; the input is rounded to ``kind`` at each call.

    ``fp8`` is E4M3 with a scale per ``token``, per ``tensor`` or per ``group`` of 128 channels; ``mxfp4``, ``mxfp6``
    (E2M3), ``mxfp8`` and ``nvfp4`` bring their own groups. Every scale comes from the input of that call, also where
    a checkpoint format would fix it by calibration (FP8 per tensor, the global scale of NVFP4).
    """

    kind: str = "fp8"
    scale: str = "token"

    def __post_init__(self):
        if self.kind not in _KINDS:
            raise ValueError(f"found activations {self.kind!r}, accepted are {', '.join(_KINDS)}")
        if self.scale not in _SCALES or self.kind != "fp8" and self.scale != "token":
            raise ValueError(f"option 'scale': found {self.scale!r}, accepted are {', '.join(_SCALES)} (fp8 only)")
        if isinstance(self.inner, Inputs) or getattr(self.inner, "activation", 16) != 16:
            raise ValueError(f"found inputs quantized twice: {self.inner}; accepted is a format with 16-bit inputs")

    def quantize_input(self, x: Tensor) -> Tensor:
        """The rounded input, in x's dtype. A group of channels with NaN or Inf becomes NaN."""
        return ops_round.float_round(x, *self.rounding)

    @property
    def rounding(self) -> tuple[str, str, int]:
        """The element, the kind of scale and the channels of a group, as `ops_round.float_round` takes them."""
        return _ROUNDING[self.kind if self.kind != "fp8" else self.scale]

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        kernel = self._product(x.device, shape) if x.is_cuda and x.dtype in ops_float_cuda.HALVES else None
        if kernel is None:
            return self.inner.linear(self.quantize_input(x), tensors, bias, shape)
        if isinstance(self.inner, (Int, ByteScales)):
            group = getattr(self.inner, "inner", self.inner).group_size
            return ops_float.fp8_linear(x, tensors["qweight"], tensors["scales"], bias, shape[0], 1, group, self.scale,
                                        tensors.get("scale_multiplier"))
        codes, scales, one, rows, group = self.inner._operands(tensors, shape)
        if kernel == ops_float_cuda.FP4_KERNEL:
            return ops_float.fp4_linear(x, codes, scales, one, bias, shape[0])
        if kernel == ops_float_cuda.MX_KERNEL:
            return ops_float.mx_linear(x, codes, scales, bias, shape[0], _ROUNDING[self.kind][0])
        return ops_float.fp8_linear(x, codes, scales, bias, shape[0], rows, group, self.scale)

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape):
        """On the CPU: as `linear` does it, over scales in bytes that are widened once."""
        if not _on_cpu(tensors):
            return None
        product = self.inner.bind(tensors, shape)
        return Bound(product or (lambda x, bias: self.inner.linear(x, tensors, bias, shape)), self)

    def producer(self, tensors: Mapping[str, Tensor]) -> dict | None:
        """On the CPU, where the pass that rounds also runs a step."""
        return {} if _on_cpu(tensors) else None

    @property
    def bind_copies(self) -> bool:
        return self.inner.bind_copies

    def bind_grouped(self, tensors: Mapping[str, Tensor], shape: Shape):
        """Over scales of all experts, widened once, but where a kernel reads the bytes."""
        if not isinstance(self.inner, ByteScales) or self._product(tensors["qweight"].device, shape):
            return None
        wide, plain = self.inner.widened(tensors), replace(self, inner=self.inner.inner)
        return lambda x, ends, bias: plain.linear_grouped(x, ends, wide, bias, shape)

    def _product(self, device: torch.device, shape: Shape) -> str | None:
        """The kernel that multiplies rounded inputs as they are stored on this device; None: they go on in 16 bits."""
        inner = self.inner
        if self.kind == "fp8":
            codes = inner.inner if isinstance(inner, ByteScales) else inner
            weights = type(inner) is Float or type(codes) is Int and codes.num_bits == 4 and codes.symmetric
            return ops_float_cuda.FP8_KERNEL if weights and ops_float_cuda.takes_fp8(device) else None
        if self.kind in ("mxfp6", "mxfp8"):
            weights = isinstance(inner, Microscaling) and not inner._is_one_code(shape)
            return ops_float_cuda.MX_KERNEL if weights and ops_float_cuda.takes_fp4(device) else None
        same = {"mxfp4": Microscaling("e2m1"), "nvfp4": NVFP4()}.get(self.kind)
        return ops_float_cuda.FP4_KERNEL if inner == same and ops_float_cuda.takes_fp4(device) else None

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        device = torch.device(device)
        if kernel := self._product(device, shape):
            return f"{kernel} (float32 inputs: rounded alone, the unpacked weight)"
        inner, rounding = self.inner.kernel(shape, device), ops_round.float_round.kernel(device)
        if reference_kernel(inner) or reference_kernel(rounding):
            return f"reference: no kernel for {self.kind} activations"
        return f"{rounding} + {inner}"

    def text(self) -> str:
        from .presets import PRESETS

        for name, format in PRESETS.items():
            if format == self:
                return name
        scale = "" if self.scale == "token" else f"[scale={self.scale}]"
        return f"A{self.kind.upper()}{scale}/{self.inner.text()}"


def _on_cpu(tensors: Mapping[str, Tensor]) -> bool:
    return all(tensor.is_cpu for tensor in tensors.values())


class Bound:
    """`Inputs.linear` over a bound product."""

    def __init__(self, product, format: Inputs):
        self.product, self.format = product, format

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(self.format.quantize_input(x), bias)


@register_format(r"A(FP8|MXFP4|MXFP6|MXFP8|NVFP4)", "AFP8/W4A16", "quantizes the input of the format nested in it")
def _inputs(match, inner, *, scale: str = "token"):
    if inner is None:
        raise ValueError(f"it quantizes the input of another format: write {match[0]}/W4A16 or the like")
    return Inputs(inner, match[1].lower(), scale)
