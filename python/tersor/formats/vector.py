"""OutputVectors(v, B): vectors along the outputs of each input column from one codebook, the format of VPTQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import agrees, half, kmeans, nearest, pack_bits, packed_bytes, rounded, sample, unpack_bits


@dataclass(frozen=True)
class OutputVectors(Format):
    """Columns are cut into vectors of ``length`` outputs: ``scale[column] * (main[code] + residual[code])``.

    VPTQ (arXiv 2409.17066): a codebook of ``2^nbits`` vectors, and with ``residual > 0`` a second one of
    ``2^residual`` for what the first leaves. Columns are independent (`block` is 1), so methods treat them like
    scalars. Stored as ``codes`` uint8 ``[in, ceil(vectors * nbits / 8)]``, ``codebook [2^nbits, length]``, ``scales
    [1, in]`` and, with a residual, ``residual_codes`` and ``residual_codebook`` alike; 16-bit values. `project` notes
    codes in ``params["codes"]`` and ``params["residual_codes"] [in, vectors]``.
    """

    length: int = 8
    nbits: int = 12
    residual: int = 0

    def __post_init__(self):
        for name, low, high in (("length", 1, 64), ("nbits", 1, 16), ("residual", 0, 16)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"found {name}={getattr(self, name)}, accepted are {low} to {high}")

    def vectors(self, w: Tensor) -> Tensor:
        """``[out, columns]`` as ``[columns, ceil(out / length), length]``, padded with zeros."""
        return F.pad(w.T, (0, -w.shape[0] % self.length)).unflatten(1, (-1, self.length))

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        """Scales are the columns' root mean squares; k-means weighs a vector by its column's importance * scale^2."""
        store = half(dtype or w.dtype)
        scales = w.square().mean(0, keepdim=True).sqrt().clamp_min(torch.finfo(store).smallest_normal)
        params = Params(dtype=store, scales=rounded(scales, store), out=w.shape[0])
        params["weight"] = (params["scales"][0].square() * (1 if importance is None else importance.to(w)))
        count = math.ceil(w.shape[0] / self.length)
        params["codes"] = torch.zeros(w.shape[1], count, dtype=torch.int32, device=w.device)
        points = self.vectors(w / params["scales"])
        params["codebook"] = self.cluster(points, 2**self.nbits, params)
        if self.residual:
            index = nearest(points.flatten(0, 1), params["codebook"]).view(points.shape[:2])
            params["residual_codes"] = torch.zeros_like(params["codes"])
            params["residual_codebook"] = self.cluster(points - params["codebook"][index], 2**self.residual, params)
        return params

    def cluster(self, points: Tensor, k: int, params: Params) -> Tensor:
        """Centroids ``[k, length]`` of normalised vectors ``[columns, vectors, length]``, rounded to 16 bits."""
        weight = params["weight"][:, None].expand(points.shape[:2]).flatten()
        points, weight = sample(points.flatten(0, 1), weight, k)
        return rounded(kmeans(points, k, weight), params["dtype"])

    def _decode(self, codes, residual_codes, params, scales, out):
        values = params["codebook"][codes.long()]
        if self.residual:
            values = values + params["residual_codebook"][residual_codes.long()]
        return values.flatten(1)[:, :out].T * scales

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        columns = slice(lo, lo + w.shape[1])
        scales, out = params["scales"][:, columns], w.shape[0]
        codes, residual_codes = params["codes"][columns], None
        if self.residual:
            residual_codes = params["residual_codes"][columns]
        value = self._decode(codes, residual_codes, params, scales, out)
        same = agrees(value, w).all(0)[:, None]
        if same.all():
            return value
        points = self.vectors(w / scales)
        found = nearest(points.flatten(0, 1), params["codebook"]).view(points.shape[:2])
        codes = params["codes"][columns] = torch.where(same, codes, found.int())
        if self.residual:
            left = points - params["codebook"][found]
            found = nearest(left.flatten(0, 1), params["residual_codebook"]).view(points.shape[:2])
            residual_codes = params["residual_codes"][columns] = torch.where(same, residual_codes, found.int())
        return self._decode(codes, residual_codes, params, scales, out)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        self.project(w_hat, params)
        store = params["dtype"]
        tensors = {"codes": pack_bits(params["codes"], self.nbits),
                   "codebook": params["codebook"].to(store), "scales": params["scales"].to(store)}
        if self.residual:
            tensors["residual_codes"] = pack_bits(params["residual_codes"], self.residual)
            tensors["residual_codebook"] = params["residual_codebook"].to(store)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        count = math.ceil(shape[0] / self.length)
        params = {name: tensors[name].to(wide) for name in ("codebook", "residual_codebook") if name in tensors}
        codes = unpack_bits(tensors["codes"], self.nbits, count)
        residual = unpack_bits(tensors["residual_codes"], self.residual, count) if self.residual else None
        return self._decode(codes, residual, params, tensors["scales"].to(wide), shape[0]).to(dtype).contiguous()

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        store, count = half(dtype), math.ceil(shape[0] / self.length)

        def codes(bits):
            return TensorSpec((shape[1], packed_bytes(count, bits)), torch.uint8)

        spec = {"codes": codes(self.nbits), "codebook": TensorSpec((2**self.nbits, self.length), store),
                "scales": TensorSpec((1, shape[1]), store)}
        if self.residual:
            spec["residual_codes"] = codes(self.residual)
            spec["residual_codebook"] = TensorSpec((2**self.residual, self.length), store)
        return spec

    def text(self) -> str:
        return f"v{self.length}x{self.nbits}" + (f"[residual={self.residual}]" if self.residual else "")


@register_format(r"v(\d+)x(\d+)", "v8x12", "VPTQ: vectors of 8 outputs from a codebook of 2^12; residual=8 adds one")
def _vectors(match, inner, *, residual: int = 0):
    if inner is not None:
        raise ValueError(f"a codebook format holds values and nothing nests in it, found {inner}")
    return OutputVectors(int(match[1]), int(match[2]), residual)
