"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Format
from ..registry import register_method
from .base import Choice, Method, Statistics


@register_method("rtn")
@dataclass(frozen=True)
class RTN(Method):
    """Round every weight to the nearest representable value. Needs no data.

    ``search``: look for clipped ranges with a smaller squared error (for integers a grid of 80, as in GPTQ's code)
    instead of spanning minimum to maximum. In a chain, the scales chosen before it are kept.
    """

    search: bool = True

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None = None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        params = fmt.fit(w, search=self.search, dtype=dtype) if previous is None else previous.params
        return Choice(fmt.project(w, params), params)
