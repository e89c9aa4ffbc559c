"""AWQ: scale up the channels that activations make important, then clip."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Format
from ..registry import register_method
from .base import Choice, Method, Statistics

_SMALLEST = 1e-4
_SCORES = re.compile(r"(.*_)?(q|k|qkv)(_.*)?|.*(query|key|wqkv|c_attn).*", re.IGNORECASE)
_ROWS = 1 << 24  # weights per slice of the clip search


@register_method("awq")
@dataclass(frozen=True)
class AWQ(Method):
    """Activation-aware scaling and clipping, rounding to nearest after (Lin et al. 2023, arXiv 2306.00978).

    For ratios r = 0, 1/grid, ...: ``s = mean|x|^r``, normalised to ``sqrt(max s * min s) = 1``, is tried on
    ``Q(W s) / s``; the ratio with the smallest change of the output of the module around the layers wins and is folded
    into the operation before. Where none can take it over, the group stays unscaled and the report says so. Then
    ``clip`` shrinks each group's largest magnitude in steps of 1/20 down to half, for the smallest squared error of
    the group's contribution to the output (not for query and key projections).

    ``grid``: ratios tried; ``tokens``: most tokens the search runs on.
    """

    grid: int = 20
    clip: bool = True
    tokens: int = 4096

    needs = frozenset({"abs_mean", "inputs", "block"})
    transforms = True

    def __post_init__(self):
        if self.grid < 1 or self.tokens < 1:
            raise ValueError(f"options 'grid' and 'tokens': found {self.grid} and {self.tokens}, accepted are positive")

    def transform(self, group) -> str:
        stats = self.require(group.stats, "abs_mean", "inputs")
        if group.producer is None:
            return f"awq: not scaled, {group.why}"
        best, s = self.search(group, group.tie(stats.abs_mean))
        if best:
            group.fold(s)
        return ""

    def search(self, group, magnitude: Tensor) -> tuple[float, Tensor]:
        """The best ratio and its scale ``[in]``, for ``magnitude [in]``."""
        best = (float("inf"), 0.0, torch.ones_like(magnitude))
        for step in range(self.grid):
            ratio = step / self.grid
            s = scale(magnitude, ratio)
            trial = {}
            for name, fmt in group.formats.items():
                w = group.weight(name)
                scaled = w * s.to(w)
                trial[name] = fmt.project(scaled, fmt.fit(scaled, dtype=group.dtype)) / s.to(w)
            loss = group.loss(trial)
            if loss < best[0]:
                best = (loss, ratio, s)
        return best[1:]

    def for_layer(self, name: str) -> "AWQ":
        return self if clippable(name) else dataclasses.replace(self, clip=False)

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        if self.clip and stats is not None and stats.inputs is not None:
            w = clipped(w, fmt, stats.inputs, dtype)
        params = fmt.fit(w, dtype=dtype)
        return Choice(fmt.project(w, params), params)


def scale(magnitude: Tensor, ratio: float) -> Tensor:
    """``magnitude^ratio [in]``, normalised so that the largest and the smallest multiply to one."""
    s = magnitude.clamp(min=0).pow(ratio).clamp(min=_SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def clippable(name: str) -> bool:
    """Whether a layer of this name may be clipped: not query and key projections, whose errors meet in products."""
    return not _SCORES.fullmatch(name.rpartition(".")[2])


def clipped(w: Tensor, fmt: Format, inputs: Tensor, dtype: torch.dtype | None, steps: int = 20,
            most: float = 0.5) -> Tensor:
    """``w [out, in]`` with each group clamped to the range that changes the layer's output on ``inputs [n, in]`` least.

    The change is counted per group, ``|x_g (w_g - q_g)^T|^2``, as if the groups' errors were independent.
    """
    size = fmt.group_columns or w.shape[1]
    rows = max(1, _ROWS // w.shape[1])
    grams = [x.t().to(w) @ x.to(w) for x in inputs.split(size, 1)]
    parts = [_clip_rows(part, fmt, grams, size, dtype, steps, most) for part in w.split(rows)]
    return torch.cat(parts)


def _clip_rows(w, fmt, grams, size, dtype, steps, most):
    best = w
    least = None
    groups = [slice(lo, min(lo + size, w.shape[1])) for lo in range(0, w.shape[1], size)]
    largest = torch.stack([w[:, g].abs().amax(1) for g in groups], 1)  # [rows, groups]
    chosen = largest
    for step in range(int(most * steps)):
        limit = largest * (1 - step / steps)
        trial = torch.cat([w[:, g].clamp(-limit[:, i, None], limit[:, i, None]) for i, g in enumerate(groups)], 1)
        difference = fmt.project(trial, fmt.fit(trial, dtype=dtype)) - w
        error = torch.stack([((difference[:, g] @ gram) * difference[:, g]).sum(1)
                             for g, gram in zip(groups, grams)], 1)
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better, limit, chosen)
    return torch.cat([best[:, g].clamp(-chosen[:, i, None], chosen[:, i, None]) for i, g in enumerate(groups)], 1)
