"""SmoothQuant: move outliers of activations into the weights that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..methods.base import Method
from ..registry import register_method
from .group import Group

_LEAST = 1e-5  # of magnitudes and scales: dead channels have none


@register_method("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Method):
    """Divide a norm's output by ``s`` and multiply the weights that read it (Xiao et al. 2022, arXiv 2211.10438).

    ``s_j = max|X_j|^alpha / max|W_:j|^(1-alpha)``, the weights' maximum over all layers that share the input.
    Layers that do not read a norm's output are left as they are, as published: attention output and down projections.
    ``alpha``: 0 leaves activations unsmoothed, 1 moves all their range into the weights.
    """

    alpha: float = 0.5

    needs = frozenset({"abs_max"})
    transforms = True
    chooses = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"option 'alpha': found {self.alpha}, accepted are numbers from 0 to 1")

    def transform(self, group: Group) -> str:
        largest = self.require(group.stats, "abs_max").abs_max
        if group.producer is None:
            return f"smoothquant: not smoothed, {group.why}"
        if group.producer.kind == "rows":
            return ""
        weights = torch.stack([group.weight(name).abs().amax(0) for name in group.names]).amax(0).clamp(min=_LEAST)
        s = (largest.to(weights).pow(self.alpha) / weights.pow(1 - self.alpha)).clamp(min=_LEAST)
        group.fold(s)
        return ""

