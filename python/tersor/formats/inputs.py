"""Inputs(inner): a format whose multiplication quantizes its input to a small float on the fly, at reference level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Around, Shape
from .floating import ELEMENTS, NVFP4, Microscaling, power_of_two, power_of_two_scale, round_to

_KINDS = ("fp8", "mxfp4", "mxfp8", "nvfp4")
_SCALES = ("token", "tensor", "group")
_GROUP = 128  # channels that share a scale with scale=group


@dataclass(frozen=True)
class Inputs(Around):
    """Weights in ``inner``; the input is rounded to ``kind`` at each call.

    ``fp8`` is E4M3 with a scale per ``token``, per ``tensor`` or per ``group`` of 128 channels; ``mxfp4``, ``mxfp8``
    and ``nvfp4`` bring their own groups. Every scale comes from the input of that call, also where a checkpoint
    format would fix it by calibration (FP8 per tensor, the global scale of NVFP4).
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
        wide = x if x.dtype is torch.float64 else x.float()
        if self.kind == "fp8":
            return _fp8(wide, self.scale).to(x.dtype)
        size = NVFP4.group if self.kind == "nvfp4" else Microscaling.group
        groups = F.pad(wide, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        top = groups.abs().amax(-1, keepdim=True)
        element = "e4m3" if self.kind == "mxfp8" else "e2m1"
        if self.kind == "nvfp4":
            one = ELEMENTS["e4m3"][3] * ELEMENTS["e2m1"][3] / top.amax().clamp_min(torch.finfo(torch.float32).tiny)
            one = one.nan_to_num(posinf=1.0)
            scale = round_to(top / ELEMENTS["e2m1"][3] * one, "e4m3").clamp_min(2.0**-9) / one
        else:
            scale = power_of_two(power_of_two_scale(top, element), wide.dtype)
        return (round_to(groups / scale, element) * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        return self.inner.linear(self.quantize_input(x), tensors, bias, shape)

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return f"reference: no kernel for {self.kind} activations"

    def text(self) -> str:
        from .presets import PRESETS

        for name, format in PRESETS.items():
            if format == self:
                return name
        scale = "" if self.scale == "token" else f"[scale={self.scale}]"
        return f"A{self.kind.upper()}{scale}/{self.inner.text()}"


def _fp8(x: Tensor, scale: str) -> Tensor:
    """Nearest E4M3 values under a scale per token, tensor or group of channels, multiplied back."""
    if scale == "group":
        groups = F.pad(x, (0, -x.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
        return _fp8(groups, "token").flatten(-2)[..., : x.shape[-1]]
    if not x.numel():
        return x
    top = x.abs().amax(-1, keepdim=True) if scale == "token" else x.abs().amax()
    step = (top / ELEMENTS["e4m3"][3]).clamp_min(torch.finfo(torch.float32).smallest_normal)
    return round_to(x / step, "e4m3") * step


@register_format(r"A(FP8|MXFP4|MXFP8|NVFP4)", "AFP8/W4A16", "quantizes the input of the format nested in it")
def _inputs(match, inner, *, scale: str = "token"):
    if inner is None:
        raise ValueError(f"it quantizes the input of another format: write {match[0]}/W4A16 or the like")
    return Inputs(inner, match[1].lower(), scale)
