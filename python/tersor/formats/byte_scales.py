"""ByteScales(Int): integer weights whose group scales are FP8 (E4M3) numbers under one multiplier of the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Around, Params, Shape, Tensors, TensorSpec, reference_kernel
from .floating import ELEMENTS, round_to
from .integer import Int

_TOP, _LEAST = ELEMENTS["e4m3"][3], 2.0**-9  # E4M3's largest and smallest number


@dataclass(frozen=True)
class ByteScales(Around):
    """``w = (q - zero_point) * (scales * scale_multiplier)`` with codes as ``inner``, an `Int` of float32 scales,
    stores them, ``scales`` float8_e4m3fn ``[tiles, groups, 16]`` and ``scale_multiplier`` float32 ``[1]``, a power of
    two.

    In the spec grammar ``W4A16[scale=e4m3]``; what FireQ (arXiv 2505.20839) chooses: ``fireq:AFP8/W4A16[scale=e4m3]``.
    Experts, and layers on the CPU, hold scales widened to float32 beside the stored ones, made in their first call: 6 %
    of 4-bit weights in groups of 128, where a call would widen those of all experts for the few that it multiplies. On
    CUDA `fp8_linear` reads the bytes; layers with rounded activations hold widened scales as well; layers of 16-bit
    activations take ones made in each call, as calls with gradients do everywhere. ValueError for an ``inner`` that is
    not such an `Int`.
    """

    inner: Int

    def __post_init__(self):
        if not isinstance(self.inner, Int) or self.inner.scale_dtype != "fp32":
            raise ValueError(f"found {self.inner}, accepted are integer weights with float32 scales")

    @property
    def activation(self) -> int:
        return self.inner.activation

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    def calibrate(self, params: Params, stats) -> None:
        self.inner.calibrate(params, stats)

    # -- parameters and storage -----------------------------------------------------------------------------------

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        params = self.inner.fit(w, search=search, importance=importance, dtype=torch.float32)
        largest = float(params["scales"].amax())
        exponent = math.frexp(_TOP / largest)[1] - 1 if largest > 0 else 0
        self.set_scales(params, params["scales"], 2.0 ** -max(-100, min(exponent, 100)))
        return params

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        self.inner.refit(params, w, lo, search=search)
        self.set_scales(params, params["scales"], float(params["scale_multiplier"]))

    @staticmethod
    def set_scales(params: Params, scales: Tensor, multiplier: float) -> None:
        """Note ``scales [out, groups]``, rounded to what a byte stands for under ``multiplier``, a power of two."""
        params["scale_multiplier"] = torch.tensor([multiplier])
        params["scales"] = round_to(scales / multiplier, "e4m3").clamp_min(_LEAST) * multiplier

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        tensors = self.inner.pack(w_hat, params)
        multiplier = params["scale_multiplier"].to(w_hat.device, torch.float32)
        return {**tensors, "scales": (tensors["scales"] / multiplier).to(torch.float8_e4m3fn),
                "scale_multiplier": multiplier}

    def widened(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors of ``inner``: scales in float32. Exact."""
        made = dict(tensors)
        made["scales"] = widen(made["scales"], made.pop("scale_multiplier"))
        return made

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.unpack(self.widened(tensors), shape, dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        spec = self.inner.spec(shape, dtype)
        return {**spec, "scales": TensorSpec(spec["scales"].shape, torch.float8_e4m3fn),
                "scale_multiplier": TensorSpec((1,), torch.float32)}

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        multiplier = float(tensors["scale_multiplier"])
        if not 0 < multiplier < math.inf or math.frexp(multiplier)[0] != 0.5:
            raise ValueError(f"scale_multiplier: found {multiplier:g}, accepted are finite positive powers of two")
        self.inner.verify(tensors, shape)

    # -- running ------------------------------------------------------------------------------------------------

    def quantize_input(self, x: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.inner.quantize_input(x, tensors)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        return self.inner.linear(x, self.widened(tensors), bias, shape)

    def linear_grouped(self, x: Tensor, ends: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None,
                       shape: Shape) -> Tensor:
        return self.inner.linear_grouped(x, ends, self.widened(tensors), bias, shape)

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape) -> Callable | None:
        if tensors["qweight"].is_cuda and self.activation == 16:
            return None  # as `inner` says
        return self.inner.bind(self.widened(tensors), shape)

    @property
    def bind_copies(self) -> bool:
        return True

    def bind_grouped(self, tensors: Mapping[str, Tensor], shape: Shape) -> Callable | None:
        wide = self.widened(tensors)
        return lambda x, ends, bias: self.inner.linear_grouped(x, ends, wide, bias, shape)

    def producer(self, tensors: Mapping[str, Tensor]) -> dict | None:
        return self.inner.producer(tensors)

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        kernel = self.inner.kernel(shape, device)
        return _each_call(kernel, device) if self.activation == 16 else kernel

    def kernel_grouped(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return self.inner.kernel_grouped(shape, device)

    def text(self) -> str:
        return self.inner.text().replace("scale=fp32", "scale=e4m3")


def _each_call(kernel: str, device: torch.device | str) -> str:
    """The name of a kernel that finds no widened scales to be held for it on a GPU."""
    if torch.device(device).type != "cuda" or reference_kernel(kernel):
        return kernel
    return f"{kernel} on scales widened in each call"


def widen(scales: Tensor, multiplier: Tensor) -> Tensor:
    """E4M3 ``scales [..., tiles, groups, 16]`` times ``multiplier [..., 1]`` in float32."""
    return scales.float() * multiplier.float()[..., None, None]
