"""BCT's rounding: integers in small blocks under powers of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..blockwise import shifts
from ..formats.base import Format
from ..formats.floating import grouped
from ..formats.integer import Int
from ..registry import register_method
from .base import Choice, Method, Statistics


@register_method("bct")
@dataclass(frozen=True)
class BCT(Method):
    """Blockwise compression without retraining (arXiv 2304.01483): ``bct:W8A8[group=64,act_group=64]``.

    A block is a group of the format; its scale is ``2^-e`` with the largest e at which ``max|w| 2^e`` is at most
    ``2^(bits-1) - 1``, so that rescaling is a shift. `tersor.blockwise.convert` does the same to what is between the
    layers: normalisation, GELU, softmax and the products of attention. Scales that are powers of two are exact in
    bfloat16 and float32; float16 holds those down to 2^-24, smaller ones are raised to it.

    ValueError for formats other than symmetric integers.
    """

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None = None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        if not isinstance(fmt, Int) or not fmt.symmetric or fmt.two_level:
            raise ValueError(f"found format {fmt}, accepted are symmetric integers with scales in "
                             "one level, such as W8A8[group=64]")
        params = fmt.fit(w, dtype=dtype)
        exponent = shifts(grouped(w, fmt.group_size or w.shape[1]).abs().amax(2), fmt.num_bits)
        if params["dtype"] is torch.float16:
            exponent = exponent.clamp(max=24)
        params["scales"] = torch.ldexp(torch.ones_like(exponent, dtype=w.dtype), -exponent)
        return Choice(fmt.project(w, params), params)
