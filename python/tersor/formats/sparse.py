"""Sparse24(inner): two of four weights kept, and Outliers(ratio): few weights kept in 16 bits beside another format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec, prefixed, under
from .bits import half, pack_bits, packed_bytes, rounded, unpack_bits
from .dense import Dense


@dataclass(frozen=True)
class Sparse24(Format):
    """Of every four weights along the input two are kept, in the format ``inner``.

    ``inner`` stores the kept values as a matrix ``[out, 2 * ceil(in / 4)]``: its groups count kept values. Their
    positions take two bits each. Stored as ``values.*`` and ``positions`` uint8 ``[out, ceil(ceil(in / 4) / 2)]``,
    one nibble per four weights (first position low, ascending). Widths that are no multiple of 4 are padded.
    `project` keeps the largest ``w^2 * importance``; with ``importance = 1 / U_jj^2`` of the inverse Hessian's factor
    that is SparseGPT's choice (arXiv 2301.00774), with the mean square of the inputs Wanda's (arXiv 2306.11695).
    """

    inner: Format = Dense()
    block = 4

    def __post_init__(self):
        if self.inner.block != 1:
            raise ValueError(f"found {self.inner} nested in 2:4, which decides {self.inner.block} columns together; "
                             "accepted are formats that decide each column alone")

    @property
    def group_columns(self) -> int:
        return 2 * self.inner.group_columns

    def kept_shape(self, shape: Shape) -> Shape:
        """Shape of the matrix of kept values."""
        return shape[0], 2 * math.ceil(shape[1] / 4)

    def positions(self, w: Tensor, importance: Tensor | None = None) -> Tensor:
        """Columns to keep within each four, ascending: int64 ``[out, ceil(columns / 4), 2]``."""
        score = w.square() if importance is None else w.square() * importance.to(w)
        groups = F.pad(score, (0, -w.shape[1] % 4), value=-1.0).unflatten(1, (-1, 4))  # padding goes first
        return groups.topk(2, -1).indices.sort(-1).values

    def gather(self, w: Tensor, positions: Tensor) -> Tensor:
        """Kept values ``[out, 2 * ceil(columns / 4)]``."""
        return F.pad(w, (0, -w.shape[1] % 4)).unflatten(1, (-1, 4)).gather(-1, positions).flatten(1)

    def scatter(self, kept: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Kept values back in their places ``[out, columns]``, zeros elsewhere."""
        groups = kept.new_zeros(*positions.shape[:2], 4)
        return groups.scatter(-1, positions, kept.unflatten(1, (-1, 2))).flatten(1)[:, :columns].contiguous()

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        # The inner importance is left out: which columns end up side by side differs from row to row.
        kept = self.gather(w, self.positions(w, importance))
        return Params(inner=self.inner.fit(kept, search=search, dtype=dtype))

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        self.inner.refit(params["inner"], self.gather(w, self.positions(w)), lo // 2, search=search)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        positions = self.positions(w, importance)
        kept = self.inner.project(self.gather(w, positions), params["inner"], lo // 2)
        return self.scatter(kept, positions, w.shape[1])

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        positions = self.positions(w_hat)
        nibbles = positions[..., 0] | positions[..., 1] << 2
        tensors = prefixed(self.inner.pack(self.gather(w_hat, positions), params["inner"]), "values")
        return {**tensors, "positions": pack_bits(nibbles, 4)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        nibbles = unpack_bits(tensors["positions"], 4, math.ceil(shape[1] / 4))
        positions = torch.stack([nibbles & 3, nibbles >> 2], -1)
        return self.scatter(self.inner.unpack(under(tensors, "values"), self.kept_shape(shape), dtype), positions,
                            shape[1])

    def quantize_input(self, x: Tensor) -> Tensor:
        return self.inner.quantize_input(x)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        groups = math.ceil(shape[1] / 4)
        return {
            **prefixed(self.inner.spec(self.kept_shape(shape), dtype), "values"),
            "positions": TensorSpec((shape[0], packed_bytes(groups, 4)), torch.uint8),
        }

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return "reference: no kernel for 2:4 sparsity"

    def check(self, shape: Shape) -> None:
        self.inner.check(self.kept_shape(shape))

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        self.inner.verify(under(tensors, "values"), self.kept_shape(shape))

    def text(self) -> str:
        return "2:4" if self.inner == Dense() else f"2:4/{self.inner.text()}"


@dataclass(frozen=True)
class Outliers(Format):
    """At most ``ratio`` of all weights, each a 16-bit value at a 16- or 32-bit column (CSR); zero elsewhere.

    Made to be added to another format (``W3A16+outliers0.01``): then they are taken out of the weight first, and the
    other format spends its range on the rest. `fit` keeps the largest deviations ``(w - mean)^2 * importance`` from
    the mean of 16 neighbours in the row; a method that knows better sets the boolean ``params["mask"] [out, in]``.

    Stored as ``values`` 16 bits ``[n]``, ``columns`` int16 (int32 above 32768 columns) ``[n]``, ``row_offsets`` int32
    ``[out + 1]`` with ``n = ceil(ratio * out * in)``; entries from ``row_offsets[-1]`` on are unused.
    """

    ratio: float = 0.01
    takes_first = True

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"found an outlier ratio of {self.ratio}, accepted are ratios above 0 up to 1")

    def capacity(self, shape: Shape) -> int:
        """Entries that are stored for a weight of ``shape``."""
        return min(math.ceil(self.ratio * shape[0] * shape[1]), shape[0] * shape[1])

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        groups = F.pad(w[:, None], (0, -w.shape[1] % 16), mode="replicate")[:, 0].unflatten(1, (-1, 16))
        deviation = (groups - groups.mean(-1, keepdim=True)).flatten(1)[:, : w.shape[1]].square()
        if importance is not None:
            deviation = deviation * importance.to(w)
        mask = torch.zeros_like(w, dtype=torch.bool)
        mask.view(-1)[deviation.flatten().topk(self.capacity(w.shape)).indices] = True
        return Params(dtype=half(dtype or w.dtype), mask=mask)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        mask = params["mask"][:, lo : lo + w.shape[1]]
        return torch.where(mask, rounded(w, params["dtype"]), 0.0)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        shape = tuple(w_hat.shape)
        mask, capacity = params["mask"], self.capacity(shape)
        count = int(mask.sum())
        if count > capacity:
            raise ValueError(f"found {count} outliers in a {shape[0]} x {shape[1]} weight, accepted are up to "
                             f"{capacity} (a ratio of {self.ratio})")
        row, column = mask.nonzero(as_tuple=True)
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int32, device=w_hat.device)
        offsets[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
        pad = (0, capacity - count)
        return {
            "values": F.pad(w_hat[mask], pad).to(params["dtype"]),
            "columns": F.pad(column, pad).to(_column_dtype(shape)),
            "row_offsets": offsets,
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        offsets = tensors["row_offsets"].long()
        count, capacity = int(offsets[-1]), self.capacity(shape)
        if offsets[0] != 0 or count > capacity or (offsets.diff() < 0).any():
            raise ValueError(f"row_offsets: found {count} entries or offsets out of order, accepted are ascending "
                             f"offsets up to {capacity}")
        columns = tensors["columns"][:count].long()
        if count and not (0 <= int(columns.min()) and int(columns.max()) < shape[1]):
            raise ValueError(f"columns: found {int(columns.min())} to {int(columns.max())}, accepted are 0 to "
                             f"{shape[1] - 1}")
        w = torch.zeros(shape, dtype=dtype, device=columns.device)
        rows = torch.repeat_interleave(torch.arange(shape[0], device=columns.device), offsets.diff())
        w[rows, columns] = tensors["values"][:count].to(dtype)
        return w

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        n = self.capacity(shape)
        return {
            "values": TensorSpec((n,), half(dtype)),
            "columns": TensorSpec((n,), _column_dtype(shape)),
            "row_offsets": TensorSpec((shape[0] + 1,), torch.int32),
        }

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        return "reference: no kernel for sparse outliers"

    def text(self) -> str:
        return f"outliers{Decimal(repr(self.ratio)):f}"  # no exponent: the grammar has no signs in names


def _column_dtype(shape: Shape) -> torch.dtype:
    return torch.int16 if shape[1] <= 1 << 15 else torch.int32


@register_format("2:4", "2:4/W4A16", "two of four weights kept, in the format nested in it (16 bits when alone)")
def _sparse(match, inner):
    return Sparse24(inner or Dense())


@register_format(r"outliers(\d*\.?\d+)", "outliers0.01", "few weights in 16 bits; add it to another format")
def _outliers(match, inner):
    if inner is not None:
        raise ValueError(f"outliers are 16-bit values and nothing nests in them, found {inner}")
    return Outliers(float(match[1]))
