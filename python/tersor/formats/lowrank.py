"""LowRank(r): the product of two thin 16-bit matrices, alone or as a correction added to another format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import half, rounded


@dataclass(frozen=True)
class LowRank(Format):
    """``W = U V`` with ``U [out, rank]`` and ``V [rank, in]`` in 16 bits.

    `fit` takes the leading singular vectors (of the importance-weighted matrix where an importance is given, as in
    LQER, arXiv 2402.02446); a method then sees the set ``{U a}`` of columns in the span of ``U``.
    """

    rank: int = 32

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"found rank {self.rank}, accepted are ranks from 1")

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        store = half(dtype or w.dtype)
        root = None if importance is None else importance.to(w).clamp_min(1e-12).sqrt()
        u = leading_vectors(w if root is None else w * root, self.rank)
        if u.shape[1] < self.rank:
            u = F.pad(u, (0, self.rank - u.shape[1]))
        u = rounded(u, store).double()
        return Params(dtype=store, u=u, inverse=torch.linalg.pinv(u))

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        # 16-bit factors make exact products in float64, so the same columns come out whatever their neighbours are
        return (params["u"] @ self._coefficients(w, params)).to(w.dtype)

    def _coefficients(self, w, params):
        return rounded(params["inverse"] @ w.double(), params["dtype"])

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        return {
            "u": params["u"].to(params["dtype"]).contiguous(),
            "v": self._coefficients(w_hat, params).to(params["dtype"]).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return (tensors["u"].double() @ tensors["v"].double()).to(dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        return F.linear(F.linear(x, tensors["v"].to(x.dtype)), tensors["u"].to(x.dtype), bias)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {
            "u": TensorSpec((shape[0], self.rank), half(dtype)),
            "v": TensorSpec((self.rank, shape[1]), half(dtype)),
        }

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return "torch linear x2"

    def text(self) -> str:
        return f"lr{self.rank}"


def leading_vectors(w: Tensor, rank: int, passes: int = 4) -> Tensor:
    """The ``rank`` leading left singular vectors of ``w [out, in]``, by subspace iteration from a fixed start where
    the rank is small (Halko, Martinsson and Tropp 2011, arXiv 0909.4061), else by the full decomposition."""
    if 8 * rank >= min(w.shape):
        return torch.linalg.svd(w, full_matrices=False)[0][:, :rank]
    start = torch.randn(w.shape[1], rank + 8, generator=torch.Generator().manual_seed(0)).to(w)
    q = torch.linalg.qr(w @ start)[0]
    for _ in range(passes):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q)[0])[0]
    return q @ torch.linalg.svd(q.T @ w, full_matrices=False)[0][:, :rank]


@register_format(r"lr(\d+)", "lr32", "low rank: two 16-bit factors; add it to another format as a correction")
def _low_rank(match, inner):
    if inner is not None:
        raise ValueError(f"low-rank factors hold values and nothing nests in them, found {inner}")
    return LowRank(int(match[1]))
