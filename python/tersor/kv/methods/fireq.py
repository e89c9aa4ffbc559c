"""FireQ's scaling of keys around the rotary embedding (arXiv 2505.20839), for a 4-bit cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..record import Seen, record
from ..rotary import Rotary, find_rotary
from ..store import Inner, Shape, Store
from .base import CacheMethod, register_cache_method
from .smooth_attention import scaled


def pair_norms(keys: Tensor, rotary: Rotary) -> Tensor:
    """``[..., dim]``: for each channel the length of its rotary pair; outside the pairs its magnitude. Turning a pair
    does not change it."""
    keys, dim = keys.float(), rotary.dim
    part = keys[..., :dim]
    if rotary.interleaved:
        norms = part.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    else:
        norms = part.unflatten(-1, (2, -1)).norm(dim=-2)
        norms = torch.cat((norms, norms), -1)
    return torch.cat((norms, keys[..., dim:].abs()), -1)


@register_cache_method("fireq")
@dataclass(frozen=True)
class FireQ(CacheMethod):
    """Two scalings of key channels, undone on the queries.

    Before the rotary embedding, each pair is scaled so that its largest length on calibration data is ``alpha``. After
    it, the ``channels`` of each key head that still reach furthest, and their partners, are scaled so that they reach
    ``beta``. Both are applied after the rotary embedding here: the first is equal in a pair and commutes with it.
    """

    alpha: float = 8.0
    beta: float = 8.0
    channels: int = 8

    calibrated = True
    rotary = True
    cuda = True

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        norms: dict[int, Tensor] = {}
        tops: dict[int, Tensor] = {}

        def take(seen: Seen) -> None:
            norm = pair_norms(seen.key, find_rotary(model, seen.layer)).amax((0, 2))
            top = seen.key.float().abs().amax((0, 2))
            for held, new in ((norms, norm), (tops, top)):
                held[seen.layer] = torch.maximum(held[seen.layer], new) if seen.layer in held else new

        record(model, batches, take, progress)
        return {layer: {"pair_norm": norms[layer], "key_max": tops[layer]} for layer in norms}

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        return scaled(shape, self.factor(tensors["pair_norm"], tensors["key_max"], shape.rotary), inner)

    def factor(self, norm: Tensor, top: Tensor, rotary: Rotary) -> Tensor:
        """What key channels are multiplied by, ``[kv_heads, dim]``."""
        first = self.alpha / norm.clamp_min(1e-5)
        reach = top * first
        chosen = torch.zeros_like(reach, dtype=torch.bool)
        chosen.scatter_(-1, reach.topk(min(self.channels, reach.shape[-1])).indices, True)
        chosen[..., :rotary.dim] |= partners(chosen[..., :rotary.dim], rotary)
        return torch.where(chosen, first * self.beta / reach.clamp_min(1e-5), first)


def partners(x: Tensor, rotary: Rotary) -> Tensor:
    """The channels of a rotary pair changed for one another, along the last dimension."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if rotary.interleaved \
        else x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
