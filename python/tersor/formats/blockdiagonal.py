"""BlockDiagonal(core): a matrix of another format between block-diagonal wrappers, the format of ARMOR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec, prefixed, under
from .bits import agrees, half, rounded


@dataclass(frozen=True)
class BlockDiagonal(Format):
    """``W = diag(r) A S B diag(c)``: ``S`` in the format ``core``, ``A``, ``B`` block-diagonal with blocks of ``size``.

    ARMOR (arXiv 2510.05528) with a 2:4 core: rotating within blocks moves what pruning would lose into what it keeps.
    `fit` starts at identity blocks and normalises columns, then rows, to unit length (NoWag); a method improves
    ``params["a"] [out / size, size, size]`` and ``params["b"] [in / size, size, size]``. `project` takes columns to
    the core by the blocks' inverses: the exact nearest point while the blocks are orthogonal, a good one near that.
    Stored as ``core.*``, ``a``, ``b``, ``rows [out, 1]``, ``columns [1, in]``, 16-bit values.
    """

    core: Format
    size: int = 32

    def __post_init__(self):
        if self.size < 1 or self.size % self.core.block:
            raise ValueError(f"found blocks of {self.size}, accepted are multiples of the {self.core.block} columns "
                             f"that {self.core} decides together")

    @property
    def block(self) -> int:
        return self.size

    def check(self, shape: Shape) -> None:
        if shape[0] % self.size or shape[1] % self.size:
            raise ValueError(f"format {self}: found a {shape[0]} x {shape[1]} weight, accepted are sizes divisible by "
                             f"{self.size}")
        self.core.check(shape)

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        self.check(tuple(w.shape))
        store = half(dtype or w.dtype)
        tiny = torch.finfo(store).smallest_normal
        columns = rounded(w.norm(dim=0, keepdim=True).clamp_min(tiny), store)
        rows = rounded((w / columns).norm(dim=1, keepdim=True).clamp_min(tiny), store)
        eye = torch.eye(self.size, dtype=w.dtype, device=w.device)
        normal = w / columns / rows
        if importance is not None:
            importance = importance.to(w) * columns[0].square()
        return Params(
            dtype=store, rows=rows, columns=columns, a=eye.repeat(w.shape[0] // self.size, 1, 1),
            b=eye.repeat(w.shape[1] // self.size, 1, 1), noted=torch.zeros_like(w),
            core=self.core.fit(normal, search=search, importance=importance, dtype=dtype),
        )

    def wrap(self, core: Tensor, params: Mapping[str, Tensor], lo: int = 0) -> Tensor:
        """``diag(r) A core B diag(c)`` for columns ``[lo, lo + core.shape[1])``."""
        blocks = slice(lo // self.size, (lo + core.shape[1]) // self.size)
        product = _sandwich(params["a"].double(), core, params["b"][blocks].double())
        columns = params["columns"][:, lo : lo + core.shape[1]].double()
        return (product * params["rows"].double() * columns).to(core.dtype)

    def unwrap(self, w: Tensor, params: Params, lo: int = 0) -> Tensor:
        """`wrap` undone: the core that would give ``w`` exactly."""
        blocks = slice(lo // self.size, (lo + w.shape[1]) // self.size)
        normal = w.double() / params["columns"][:, lo : lo + w.shape[1]] / params["rows"]
        inverse_b = torch.linalg.inv(params["b"][blocks].double())
        return _sandwich(torch.linalg.inv(params["a"].double()), normal, inverse_b).to(w.dtype)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        columns = slice(lo, lo + w.shape[1])
        noted = self.wrap(params["noted"][:, columns], params, lo)
        if agrees(noted, w).all():
            return noted
        core = self.core.project(self.unwrap(w, params, lo), params["core"], lo, importance=importance)
        params["noted"][:, columns] = core
        return self.wrap(core, params, lo)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        self.project(w_hat, params)
        store = params["dtype"]
        values = {name: params[name].to(store).contiguous() for name in ("a", "b", "rows", "columns")}
        return {**prefixed(self.core.pack(params["noted"], params["core"]), "core"), **values}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return self.wrap(self.core.unpack(under(tensors, "core"), shape, wide), tensors).to(dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        x = _blocks(x * tensors["columns"][0].to(x.dtype), tensors["b"].to(x.dtype))
        y = self.core.linear(x, under(tensors, "core"), None, shape)
        y = _blocks(y, tensors["a"].to(x.dtype)) * tensors["rows"][:, 0].to(x.dtype)
        return y if bias is None else y + bias

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        store, size = half(dtype), self.size
        return {
            **prefixed(self.core.spec(shape, dtype), "core"),
            "a": TensorSpec((shape[0] // size, size, size), store),
            "b": TensorSpec((shape[1] // size, size, size), store),
            "rows": TensorSpec((shape[0], 1), store),
            "columns": TensorSpec((1, shape[1]), store),
        }

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        self.core.verify(under(tensors, "core"), shape)

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return "reference: no kernel for block-diagonal wrappers"

    def text(self) -> str:
        return f"bd{self.size}/{self.core.text()}"


def _blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x [..., n * size]`` times each of ``blocks [n, size, size]`` transposed, block by block."""
    return torch.einsum("...nj,nij->...ni", x.unflatten(-1, (len(blocks), -1)), blocks).flatten(-2)


def _sandwich(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """``blockdiag(a) core blockdiag(b)`` in float64."""
    size = a.shape[-1]
    tiles = core.double().unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)  # [I, J, size, size]
    return (a[:, None] @ tiles @ b[None]).transpose(1, 2).flatten(0, 1).flatten(1)


@register_format(r"bd(\d+)", "bd32/2:4", "ARMOR: the format nested in it between block-diagonal wrappers of this size")
def _block_diagonal(match, inner):
    if inner is None:
        raise ValueError(f"it wraps another format: write {match[0]}/2:4 or the like")
    return BlockDiagonal(inner, int(match[1]))
