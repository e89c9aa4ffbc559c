"""What a method is, what it is told about a layer's inputs, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..formats.base import Format, Params

if TYPE_CHECKING:
    from ..registry import Resolved
    from ..transforms.group import BlockView, Group
    from ..transforms.steps import Step

NEEDS = frozenset({"hessian", "abs_mean", "abs_max", "inputs", "block"})


@dataclass
class Statistics:
    """What was seen of one input of a group of linear layers; a field is None where nobody asked for it.

    ``hessian [in, in]`` is ``(2 / tokens) X^T X`` and ``abs_mean``, ``abs_max`` ``[in]`` are over tokens, all float32;
    ``inputs [n, in]`` is a bounded sample of tokens in the model's dtype. Layers that share the input share this
    object, and `memo` what was derived from it (the factor of the Hessian).
    """

    tokens: int
    hessian: Tensor | None = None
    abs_mean: Tensor | None = None
    abs_max: Tensor | None = None
    inputs: Tensor | None = None
    memo: dict = field(default_factory=dict, repr=False)

    def scaled(self, divisor: Tensor) -> "Statistics":
        """What the statistics are after channel ``c`` of the input was divided by ``divisor[c] > 0``."""
        d = divisor.float()
        return Statistics(
            self.tokens,
            None if self.hessian is None else self.hessian / d / d[:, None],
            None if self.abs_mean is None else self.abs_mean / d,
            None if self.abs_max is None else self.abs_max / d,
            None if self.inputs is None else (self.inputs / d).to(self.inputs.dtype),
        )


@dataclass
class Choice:
    """A point of a format: representable values ``w_hat [out, in]``, the parameters `Format.pack` takes with them,
    and online ``pre`` steps that the layer must run. ``loss`` is the method's own objective, where it has one."""

    w_hat: Tensor
    params: Params
    loss: float | None = None
    pre: Sequence["Step"] = ()


class Method:
    """A way to choose a point of a format. Subclasses are frozen dataclasses whose fields are the options.

    ``needs``: what to collect, out of hessian, abs_mean, abs_max, inputs (`Statistics`) and block (the group's
    inspected module can be run on captured inputs). A method that rewrites weights first, keeping the function,
    sets ``transforms``; one that decides codes sets ``chooses``.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    transforms: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    def prepare(self, model: nn.Module, entries: "Mapping[str, Resolved]", ids: Tensor) -> None:
        """Rewrite the whole model, keeping its function, before anything is collected. ``entries``: the layers that
        this method was given; ``ids [1, length]``: some tokens to try the model on. ValueError where the model is not
        one that the method can rewrite: it is untouched then."""

    def transform(self, group: "Group") -> str:
        """Rewrite a group's weights so that the model computes the same; returns a note for the report, or ''."""
        return ""

    def transform_block(self, block: "BlockView") -> None:
        """As `transform`, for all groups of a block together, before it is called for each."""

    def for_layer(self, name: str) -> "Method":
        """The method as it applies to the layer of this name."""
        return self

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        """Choose for ``w [out, in]`` (float32 or float64). ``dtype`` is the model's, in which scales are stored;
        ``previous`` is what the method before it in a chain chose."""
        params = fmt.fit(w, dtype=dtype)
        return Choice(fmt.project(w, params), params)

    def require(self, stats: Statistics | None, *fields: str) -> Statistics:
        """``stats`` with ``fields`` present, or a ValueError that says what is missing."""
        missing = [f for f in fields if stats is None or getattr(stats, f) is None]
        if missing:
            raise ValueError(f"{self.name}: found no {', '.join(missing)} of the layer's inputs; accepted are "
                             "statistics of calibration data, before another transform changes the input online")
        return stats


def choosers(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods of a chain that decide codes; round-to-nearest where none does."""
    from .rtn import RTN

    found = tuple(method for method in methods if method.chooses)
    return found or (RTN(),)


def transforms(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The methods of a chain that rewrite weights first, in order."""
    return tuple(method for method in methods if method.transforms)


def choose(methods: Sequence[Method], w: Tensor, fmt: Format, stats: Statistics | None,
           dtype: torch.dtype | None = None, name: str = "", params: Params | None = None) -> Choice:
    """Run a chain's choosers in order on ``w [out, in]``; each is given what the one before chose, the first one
    ``params`` where a transform has fitted them."""
    choice = None if params is None else Choice(fmt.project(w, params), params)
    for method in choosers(methods):
        choice = method.for_layer(name).choose(w, fmt, stats, choice, dtype=dtype)
    return choice
