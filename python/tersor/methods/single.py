"""Compressing one weight outside a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Resolved
from ..transforms.group import Lone
from .base import Choice, Statistics, choose, transforms
from .statistics import Collector

_SAMPLE = 4096


def check_finite(w: Tensor, what: str) -> None:
    """ValueError naming ``what`` when a weight holds NaN or Inf."""
    if not bool(torch.isfinite(w).all()):
        count = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{what}: found {count} values that are NaN or Inf, accepted are finite weights")


def compress_weight(weight: Tensor, resolved: Resolved, inputs: Tensor | None = None) -> Choice:
    """Choose for one weight ``[out, in]`` in its model's dtype; ``inputs [..., in]`` serve methods that look at data.

    What a transform would fold into the operation before becomes a `ChannelScale` in ``pre``. ValueError: weights or
    inputs that are not finite, inputs missing or of another width.
    """
    check_finite(weight, "weight")
    resolved.format.check(tuple(weight.shape))
    w = weight if weight.dtype is torch.float64 else weight.float()
    needs = resolved.needs
    stats = None
    if needs:
        if inputs is None:
            raise ValueError(f"inputs: {resolved.method_text} looks at data and found none; accepted are samples "
                             f"[..., {weight.shape[1]}] of the layer's input")
        stats = _statistics(inputs.to(weight.device), weight.shape[1], needs)
    pre = ()
    steps, group = transforms(resolved.methods), None
    if steps:
        group = Lone(w, resolved.format, stats, weight.dtype)
        for method in steps:
            method.transform(group)
        w, stats, pre = group.weight("weight"), group.stats, group.steps
        if stats is None and needs:
            x = inputs.to(weight.device)
            for step in pre:
                x = step(x)
            stats = _statistics(x, weight.shape[1], needs)
    choice = choose(resolved.methods, w, resolved.format, stats, weight.dtype)
    if stats is not None:
        resolved.format.calibrate(choice.params, stats)
    if group is not None:
        choice.params.update(group.stored.get("weight", {}))
    choice.pre = pre
    return choice


def _statistics(x: Tensor, width: int, needs: frozenset[str]) -> Statistics:
    collector = Collector(width, needs, _SAMPLE, x.device)
    collector.add(x)
    return collector.finish()
