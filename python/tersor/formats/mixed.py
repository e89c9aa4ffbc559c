"""W4Ax: integer weights whose inputs have four or eight bits, block by block of 128 channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Around, Params, Shape, Tensors, TensorSpec
from .integer import Int, quantize_activations

BLOCK = 128  # channels that have one number of bits


@dataclass(frozen=True)
class MixedInputs(Around):
    """Weights as ``inner`` (an `Int` with four-bit inputs in groups of 32, 64 or 128) stores them; each 128 channels of
    the input are rounded to 4 or 8 bits, as ``block_bits`` uint8 ``[ceil(in / 128)]`` says: ``params["block_bits"]``,
    or 4 throughout (COMET, arXiv 2410.12168)."""

    inner: Int

    def __post_init__(self):
        if not isinstance(self.inner, Int) or self.inner.activation != 4:
            raise ValueError(f"found {self.inner}, accepted are integer weights with 4-bit inputs")
        if self.inner.act_group not in (32, 64, BLOCK) or not self.inner.act_sym or self.inner.act_scale != "dynamic":
            raise ValueError(f"found {self.inner}, accepted are dynamic symmetric inputs in groups of 32, 64 or 128")

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        count = -(-w_hat.shape[1] // BLOCK)
        bits = params.get("block_bits")
        bits = torch.full((count,), 4) if bits is None else bits
        if bits.shape != (count,) or not bool(((bits == 4) | (bits == 8)).all()):
            raise ValueError(f"{self}: found block_bits {bits.tolist()}, accepted are {count} of 4 or 8")
        return {**self.inner.pack(w_hat, params), "block_bits": bits.to(w_hat.device, torch.uint8, copy=True)}

    def quantize_input(self, x: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        bits = None if tensors is None else tensors["block_bits"]
        return quantize_activations(x, 4, self.inner.act_group, self.inner.act_clip, block_bits=bits)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return F.linear(self.quantize_input(x, tensors), self.unpack(tensors, shape, x.dtype), bias)
        inner, zero = self.inner, tensors.get("zero_points")
        return ops_fused().int_linear_fused.dispatch(
            x, None, [tensors["qweight"]], [tensors["scales"]], [] if zero is None else [zero],
            [] if bias is None else [bias], [shape[0]], inner.num_bits, inner.group_size, 4, inner.act_group,
            inner.act_clip, True, None, block_bits=tensors["block_bits"])[0]

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape):
        bound = self.inner.bind(tensors, shape)
        if bound is None:
            return None
        fused = ops_fused()
        call = fused.bound_fused([bound], fused.Producer(**self.producer(tensors)))
        return Bound(bound, call)

    def producer(self, tensors: Mapping[str, Tensor]) -> dict:
        return {"block_bits": tensors["block_bits"]}

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {**self.inner.spec(shape, dtype), "block_bits": TensorSpec((-(-shape[1] // BLOCK),), torch.uint8)}

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return self.inner.kernel(shape, device)

    def text(self) -> str:
        return self.inner.text().replace(f"W{self.inner.num_bits}A4", f"W{self.inner.num_bits}Ax", 1)


class Bound:
    """`MixedInputs.linear` on tensors that were checked once; ``weights`` serves a call that runs a step as well."""

    def __init__(self, weights, call):
        self.weights, self.call = weights, call

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.call(x, [bias])[0]


def ops_fused():
    from .. import ops_fused as module  # which knows formats

    return module


@register_format(r"W(\d+)Ax", "W4Ax", "integer weights, inputs of 4 or 8 bits by blocks of 128 channels (comet)")
def _mixed(match, inner, *, group: int = 128, sym: bool = True, scale: str = "model", act_group: int = 32,
           act_clip: float = 1.0):
    if inner is not None:
        raise ValueError(f"an integer format holds values and nothing nests in it, found {inner}")
    if scale == "e4m3":
        raise ValueError("found scale='e4m3', accepted are model, fp32, bf16, fp16, int8: one call rounds the blocks "
                         "of an input and multiplies, and knows no such scales")
    return MixedInputs(Int(int(match[1]), 0 if group == -1 else group, sym, 4, scale, act_group, act_clip))
