"""FireQ: four-bit weights under FP8 scales, for FP8 inputs; channels are brought to one size first."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Format, Params
from ..formats.byte_scales import ByteScales
from ..formats.floating import ELEMENTS, grouped, round_to
from ..formats.inputs import Inputs
from ..formats.integer import Int
from ..methods.base import Choice, Method, Statistics
from ..registry import register_method
from .group import Group

_TOP = ELEMENTS["e4m3"][3]
_LEAST = 2.0**-9  # E4M3's smallest number
_ATTENTION = re.compile(r"(^|[._])(self_)?att(n|ention)([._]|$)", re.IGNORECASE)


@register_method("fireq")
@dataclass(frozen=True)
class FireQ(Method):
    """Channel-wise scaling and FP8 group scales (arXiv 2505.20839): ``fireq:W4AFP8``.

    Input channels of the feed-forward layers are divided by the mean (``statistic=max``: the largest) magnitude of the
    weights that read them, up to a constant, and the operation before is multiplied: groups of weights then have one
    range. The paper leaves attention's projections alone; ``attention=true`` scales them as well. A group's scale is
    its largest weight over 7 as an E4M3 number, under one power of two per matrix: the smallest up to 2^14 that loses
    least to E4M3's underflow and lets nothing overflow. Scales times that power are exact in bfloat16 and float32, so
    ``W4AFP8`` stores them as 16 bits each; ``fireq:AFP8/W4A16[scale=e4m3]`` stores the bytes and the power. Keys and
    queries are scaled by the cache's ``fireq``.

    ValueError for formats other than integers of 4 bits, symmetric, with inputs of 16 bits, FP8 or integers.
    """

    statistic: str = "mean"
    attention: bool = False

    needs = frozenset({"inputs"})
    transforms = True

    def __post_init__(self):
        if self.statistic not in ("mean", "max"):
            raise ValueError(f"option 'statistic': found {self.statistic!r}, accepted are mean and max")

    def transform(self, group: Group) -> str:
        if group.producer is None:
            return f"fireq: not scaled, {group.why}"
        if not self.attention and any(_ATTENTION.search(name) for name in group.names):
            return ""
        size = torch.stack([group.weight(name).abs().mean(0) if self.statistic == "mean" else
                            group.weight(name).abs().amax(0) for name in group.names]).mean(0)
        s = group.tie(1 / size.clamp_min(size[size > 0].min() if bool((size > 0).any()) else 1.0))
        group.fold(s / s.log().mean().exp())
        return ""

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        stored = fmt.inner if isinstance(fmt, Inputs) else fmt
        inner = stored.inner if isinstance(stored, ByteScales) else stored
        if not isinstance(inner, Int) or inner.num_bits != 4 or not inner.symmetric or inner.two_level:
            raise ValueError(f"found format {fmt}, accepted are W4AFP8 and other symmetric integers of 4 bits")
        params = fmt.fit(w, dtype=dtype)
        params["scales"] = group_scales(w, inner.group_size)
        if isinstance(stored, ByteScales):
            stored.set_scales(params, params["scales"], 1 / power(_largest(w, inner.group_size)))
        elif dtype is torch.float16:
            params["dtype"] = torch.float16
            params["scales"] = params["scales"].half().to(w)
        return Choice(fmt.project(w, params), Params(params))


def group_scales(w: Tensor, group_size: int) -> Tensor:
    """E4M3 scales ``[out, groups]`` of ``w [out, in]`` under the matrix's power of two, divided by it again."""
    largest = _largest(w, group_size)
    multiplier = power(largest)
    return round_to(largest * multiplier / 7, "e4m3").clamp_min(_LEAST) / multiplier


def _largest(w: Tensor, group_size: int) -> Tensor:
    return grouped(w, group_size or w.shape[1]).abs().amax(2)


def power(largest: Tensor) -> float:
    """The power of two for groups whose largest magnitudes are ``largest``."""
    best, slack = 1.0, math.inf
    for exponent in range(15):
        t = 2.0**exponent
        if bool((largest * t > _TOP).any()):
            break
        under = (7 * _LEAST - largest * t).clamp_min(0).sum().item() / (7 * _LEAST)
        if under < slack:
            best, slack = t, under
    return best
