"""Dense(): the weight itself in 16 bits, the innermost format where a wrapper stores unquantized values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import half, rounded


@dataclass(frozen=True)
class Dense(Format):
    """Values ``[out, in]`` in the model's dtype where that has 16 bits, else in bfloat16."""

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        return Params(dtype=half(dtype or w.dtype))

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        return rounded(w, params["dtype"])

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        return {"values": w_hat.to(params["dtype"]).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensors["values"].to(dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(tuple(shape), half(dtype))}

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return "torch linear"

    def text(self) -> str:
        return "dense"


@register_format("dense", "dense", "16-bit values, unquantized")
def _dense(match, inner):
    if inner is not None:
        raise ValueError(f"a dense format holds values and nothing nests in it, found {inner}")
    return Dense()
