"""Sum(a, b, ...): matrices that are sums of one point of each of several formats."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, Params, Shape, Tensors, TensorSpec, prefixed, reference_kernel, under
from .bits import agrees


@dataclass(frozen=True)
class Sum(Format):
    """``W = W_1 + W_2 + ...``, one point of each term: quantized plus low rank, quantized plus outliers.

    The first term is the one a method works on: column by column it takes what the others leave, and they take the
    residual. `fit` lets the other terms fit the residual of the first (those marked `takes_first`, such as outliers,
    are taken out of the weight beforehand) and then fits the first term again to the rest. Which part of the sum
    belongs to which term is noted in ``params["parts"]``, a list of ``[out, in]``; a method that chooses parts by
    itself writes them there.
    """

    terms: tuple[Format, ...] = ()

    def __post_init__(self):
        if len(self.terms) < 2:
            raise ValueError(f"found a sum of {len(self.terms)} formats, accepted are sums of two or more")
        for term in self.terms[1:]:
            if term.block != 1 and self.terms[0].block % term.block:
                raise ValueError(f"{term} decides {term.block} columns together, which does not divide the "
                                 f"{self.terms[0].block} of {self.terms[0]}")

    @property
    def block(self) -> int:
        return self.terms[0].block

    @property
    def group_columns(self) -> int:
        return self.terms[0].group_columns

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        options = {"search": search, "importance": importance, "dtype": dtype}
        params: list[Params | None] = [None] * len(self.terms)
        parts = [torch.zeros_like(w) for _ in self.terms]
        first = self.terms[0]
        for early in (True, False):
            for i, term in enumerate(self.terms):
                if i == 0 or term.takes_first is not early:
                    continue
                left = w - sum(parts[1:])
                if not early:
                    left = left - first.project(left, first.fit(left, **options), importance=importance)
                params[i] = term.fit(left, **options)
                parts[i] = term.project(left, params[i], importance=importance)
        left = w - sum(parts[1:])
        params[0] = first.fit(left, **options)
        parts[0] = first.project(left, params[0], importance=importance)
        return Params(terms=params, parts=parts)

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        columns = slice(lo, lo + w.shape[1])
        rest = sum(part[:, columns] for part in params["parts"][1:])
        self.terms[0].refit(params["terms"][0], w - rest, lo, search=search)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        columns = slice(lo, lo + w.shape[1])
        parts = params["parts"]
        noted = _total(part[:, columns] for part in parts)
        if agrees(noted, w).all():
            return noted
        left = w - _total(part[:, columns] for part in parts[1:])
        found = []
        for term, own in zip(self.terms, params["terms"]):
            found.append(term.project(left, own, lo, importance=importance))
            left = w - _total(found)
        for part, value in zip(parts, found):
            part[:, columns] = value
        return _total(found)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        self.project(w_hat, params)  # a no-op for the values that were noted
        tensors: Tensors = {}
        for i, (term, own, part) in enumerate(zip(self.terms, params["terms"], params["parts"])):
            tensors.update(prefixed(term.pack(part, own), str(i)))
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return _total(term.unpack(under(tensors, str(i)), shape, wide) for i, term in enumerate(self.terms)).to(dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        return _total(
            term.linear(x, under(tensors, str(i)), None if i else bias, shape) for i, term in enumerate(self.terms)
        )

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return {
            name: tensor
            for i, term in enumerate(self.terms)
            for name, tensor in prefixed(term.spec(shape, dtype), str(i)).items()
        }

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        names = [term.kernel(shape, device) for term in self.terms]
        missing = [f"{term}: {name}" for term, name in zip(self.terms, names) if reference_kernel(name)]
        return f"reference: {missing[0]}" if missing else " + ".join(names)

    def check(self, shape: Shape) -> None:
        for term in self.terms:
            term.check(shape)

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        for i, term in enumerate(self.terms):
            term.verify(under(tensors, str(i)), shape)

    def text(self) -> str:
        return "+".join(term.text() for term in self.terms)


def _total(parts) -> Tensor:
    """Sum in order, so that the same parts always round to the same total."""
    return functools.reduce(operator.add, parts)
