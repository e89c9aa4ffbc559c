"""Int(b): integers of 2 to 8 bits with scales per group or per channel, the format most checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec

TILE_ROWS = 16  # rows that a kernel tile interleaves
BLOCK_COLUMNS = 32  # columns of one block of a tile

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEARCH_STEPS = 80  # ranges tried: the full one down to a fifth of it, a hundredth at a time


@dataclass(frozen=True)
class Int(Format):
    """``w = (q - zero_point) * scale`` with ``q`` in ``0 .. 2^bits - 1``.

    Symmetric weights fix the zero point at ``2^(bits-1)``. ``group_size`` columns of a row share a scale; 0 means the
    whole row. ``activation`` is the input's precision inside the kernel: 16 leaves it exact, 8 quantizes each token to
    int8 on the fly in blocks of 32 channels, 4 does the same in four bits at reference level. ``scale_dtype`` is
    ``model`` (the weight's own dtype), ``fp32``, ``bf16`` or ``fp16``.
    """

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation: int = 16
    scale_dtype: str = "model"

    def __post_init__(self):
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"found {self.num_bits} weight bits, accepted are 2 to 8")
        if self.activation not in (4, 8, 16):
            raise ValueError(f"found {self.activation} activation bits, accepted are 4, 8 and 16")
        if self.group_size < 0 or self.group_size % BLOCK_COLUMNS:
            raise ValueError(f"found group={self.group_size}, accepted are multiples of {BLOCK_COLUMNS} "
                             "(32, 64, 128 are usual) and 0 for one scale per channel")
        if self.scale_dtype != "model" and self.scale_dtype not in _DTYPES:
            raise ValueError(f"found scale={self.scale_dtype!r}, accepted are model, {', '.join(_DTYPES)}")

    # -- parameters and projection ------------------------------------------------------------------------------

    @property
    def group_columns(self) -> int:
        return self.group_size

    @property
    def levels(self) -> int:
        return 2**self.num_bits - 1

    def _scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.scale_dtype == "model":
            return dtype if dtype in _DTYPES.values() else torch.float32
        return _DTYPES[self.scale_dtype]

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        """Scales and zero points ``[out, groups]`` from min and max, or from a grid of clipped ranges (``search``).

        Scales are rounded to the dtype they will be stored in (``dtype``: of the model, where the format says so),
        so that what a method sees is what is stored.
        """
        params = Params(dtype=self._scale_dtype(dtype or w.dtype))
        scales, zeros = self._fit_groups(w, params["dtype"], search, importance)
        params["scales"] = scales
        if zeros is not None:
            params["zero_points"] = zeros
        return params

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        if not self.group_size:
            return
        scales, zeros = self._fit_groups(w, params["dtype"], search, None)
        first = lo // self.group_size
        params["scales"][:, first : first + scales.shape[1]] = scales
        if zeros is not None:
            params["zero_points"][:, first : first + zeros.shape[1]] = zeros

    def _fit_groups(self, w, dtype, search, importance):
        steps = SEARCH_STEPS if search else 1
        if w.dtype == torch.float32 and w.is_cpu:
            weight = None if importance is None else importance.float().contiguous()
            fitted = ops.int_fit(w, weight, self.num_bits, self.group_size, self.symmetric, steps, dtype)
        else:
            fitted = fit_groups(w, self.num_bits, self.group_size, self.symmetric, steps, dtype, importance)
        return fitted[0], None if self.symmetric else fitted[1]

    def _columns(self, params: Params, lo: int, count: int):
        """Scales and zero points of columns ``[lo, lo + count)``, broadcastable to ``[out, count]``."""
        zero = params.get("zero_points")
        half = 2 ** (self.num_bits - 1)
        if not self.group_size:
            return params["scales"], half if zero is None else zero
        if lo // self.group_size == (lo + count - 1) // self.group_size:
            one = slice(lo // self.group_size, lo // self.group_size + 1)
            return params["scales"][:, one], half if zero is None else zero[:, one]
        index = torch.arange(lo, lo + count, device=params["scales"].device) // self.group_size
        return params["scales"][:, index], half if zero is None else zero[:, index]

    def codes(self, w: Tensor, params: Params, lo: int = 0) -> Tensor:
        """Unsigned integer codes, still in ``w``'s dtype."""
        scales, zero = self._columns(params, lo, w.shape[1])
        return torch.div(w, scales).round_().add_(zero).clamp_(0, self.levels)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        scales, zero = self._columns(params, lo, w.shape[1])
        return torch.div(w, scales).round_().add_(zero).clamp_(0, self.levels).sub_(zero).mul_(scales)

    # -- storage ------------------------------------------------------------------------------------------------

    def groups(self, in_features: int) -> int:
        return math.ceil(in_features / self.group_size) if self.group_size else 1

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        codes = self.codes(w_hat, params).to(torch.uint8)
        return self.pack_codes(codes, params["scales"].to(params["dtype"]), params.get("zero_points"))

    def pack_codes(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensors:
        """Stored tensors from ``codes`` uint8 ``[out, in]``, ``scales`` ``[out, groups]`` in their final dtype and
        ``zero_points`` ``[out, groups]`` (None where symmetric). The standard checkpoint layouts come in here."""
        tensors = {"qweight": ops.int_pack(codes.contiguous(), self.num_bits), "scales": tile_rows(scales)}
        if not self.symmetric:
            tensors["zero_points"] = tile_rows(zero_points.to(torch.uint8))
        return tensors

    def unpack_codes(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(codes, scales, zero_points)`` in row-major order, as `pack_codes` takes them."""
        zero = tensors.get("zero_points")
        return (
            ops.int_unpack(tensors["qweight"], *shape, self.num_bits),
            untile_rows(tensors["scales"], shape[0]),
            None if zero is None else untile_rows(zero, shape[0]),
        )

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype not in _DTYPES.values():  # float64 and the like: by the definition
            codes, scales, zero = self.unpack_codes(tensors, shape)
            half = 2 ** (self.num_bits - 1)
            q = codes.to(dtype)
            index = torch.arange(shape[1], device=q.device) // (self.group_size or shape[1])
            return (q - (half if zero is None else zero.to(dtype)[:, index])) * scales.to(dtype)[:, index]
        return ops.int_dequantize(tensors["qweight"], tensors["scales"], tensors.get("zero_points"), *shape,
                                  self.num_bits, self.group_size, dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        rows, blocks = math.ceil(shape[0] / TILE_ROWS), math.ceil(shape[1] / BLOCK_COLUMNS)
        scales = (rows, self.groups(shape[1]), TILE_ROWS)
        spec = {
            "qweight": TensorSpec((rows, blocks, 64 * self.num_bits), torch.uint8),
            "scales": TensorSpec(scales, self._scale_dtype(dtype)),
        }
        if not self.symmetric:
            spec["zero_points"] = TensorSpec(scales, torch.uint8)
        return spec

    # -- running ------------------------------------------------------------------------------------------------

    def quantize_input(self, x: Tensor) -> Tensor:
        return x if self.activation == 16 else quantize_activations(x, self.activation)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        if self.activation == 4:
            return super().linear(x, tensors, bias, shape)
        return ops.int_linear(x, tensors["qweight"], tensors["scales"], tensors.get("zero_points"), bias,
                              shape[0], self.num_bits, self.group_size, self.activation)

    def linear_grouped(self, x: Tensor, ends: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None,
                       shape: Shape) -> Tensor:
        if self.activation == 4:
            return super().linear_grouped(x, ends, tensors, bias, shape)
        return ops.int_linear_grouped(x, ends, tensors["qweight"], tensors["scales"], tensors.get("zero_points"), bias,
                                      shape[0], self.num_bits, self.group_size, self.activation)

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape):
        if self.activation == 4 or not tensors["qweight"].is_cpu:
            return None
        return ops.BoundIntLinear(tensors["qweight"], tensors["scales"], tensors.get("zero_points"), shape,
                                  self.num_bits, self.group_size, self.activation)

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        if self.activation == 4:
            return "reference: no kernel for 4-bit activations"
        if self.activation == 8 and torch.device(device).type == "cuda":
            return "reference: no CUDA kernel for 8-bit activations, torch rounds them for int_linear cuda"
        return ops.int_linear.kernel(torch.device(device))

    def kernel_grouped(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        kernel = self.kernel(shape, device)
        return kernel if kernel.startswith("reference") else ops.int_linear_grouped.kernel(torch.device(device))

    def text(self) -> str:
        shown = []
        if self.group_size != default_group(self.num_bits, self.activation):
            shown.append(f"group={self.group_size}")
        if not self.symmetric:
            shown.append("sym=false")
        if self.scale_dtype != "model":
            shown.append(f"scale={self.scale_dtype}")
        return f"W{self.num_bits}A{self.activation}" + (f"[{','.join(shown)}]" if shown else "")


def fit_groups(w: Tensor, bits: int, group_size: int, symmetric: bool, steps: int, dtype: torch.dtype,
               importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[out, groups]`` of ``w [out, in]``: the definition that `ops.int_fit` is tested against.

    The range of a group, times ``1 - step / 100`` for each of ``steps``; the first with the least squared error
    (weighted by ``importance [in]``) wins. Scales are rounded to ``dtype``.
    """
    g, levels = group_size or w.shape[1], 2**bits - 1
    padding = -w.shape[1] % g
    grouped = torch.nn.functional.pad(w, (0, padding)).unflatten(1, (-1, g))
    inside = torch.arange(w.shape[1] + padding, device=w.device).view(1, -1, g) < w.shape[1]
    low = grouped.masked_fill(~inside, float("inf")).amin(-1)
    high = grouped.masked_fill(~inside, float("-inf")).amax(-1)
    if not symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
    weight = inside.to(w)
    if importance is not None:
        weight = weight * torch.nn.functional.pad(importance.to(w), (0, padding)).view(1, -1, g)
    limits, best = torch.finfo(dtype), None
    for step in range(steps):
        lo, hi = low * (1 - step / 100), high * (1 - step / 100)
        scale = torch.maximum(-lo, hi) * (2 / levels) if symmetric else (hi - lo) / levels
        scale = scale.clamp(limits.smallest_normal, limits.max).to(dtype).to(w)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-lo / scale).round().clamp(0, levels)
        if steps == 1:
            return scale, zero
        s, z = scale[..., None], zero[..., None]
        error = (((grouped / s).round() + z).clamp(0, levels).sub(z).mul(s).sub(grouped).square() * weight).sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best))
    return best[1], best[2]


def default_group(num_bits: int, activation: int) -> int:
    """Group size of the compressed-tensors preset of this name: 128, and per channel for W8A8."""
    return 0 if (num_bits, activation) == (8, 8) else 128


def quantize_activations(x: Tensor, bits: int, block: int = BLOCK_COLUMNS) -> Tensor:
    """What the low-bit kernels see of ``x [..., in]``: symmetric integers per token and block of ``block`` channels,
    multiplied back, in ``x``'s dtype (float32 arithmetic inside)."""
    top = 2 ** (bits - 1) - 1
    padding = -x.shape[-1] % block
    blocks = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / top
    q = torch.where(scale > 0, (blocks / scale).round(), 0.0).clamp(-top, top)
    return (q * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def tile_rows(values: Tensor) -> Tensor:
    """``[out, groups]`` to ``[tiles, groups, 16]``, rows padded with zeros."""
    padding = -values.shape[0] % TILE_ROWS
    if padding:
        values = torch.cat([values, values.new_zeros(padding, values.shape[1])])
    return values.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2).contiguous()


def untile_rows(values: Tensor, rows: int) -> Tensor:
    """`tile_rows` undone."""
    return values.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


@register_format(r"W(\d+)A(\d+)(_ASYM)?", "W4A16", "integer weights of 2 to 8 bits, activations of 16, 8 or 4 bits")
def _integer(match, inner, *, group: int | None = None, sym: bool | None = None, scale: str = "model"):
    if inner is not None:
        raise ValueError(f"an integer format holds values and nothing nests in it, found {inner}")
    bits, activation = int(match[1]), int(match[2])
    if group is None:
        group = default_group(bits, activation)
    if group == -1:
        group = 0
    symmetric = match[3] is None if sym is None else sym
    return Int(bits, group, symmetric, activation, scale)
