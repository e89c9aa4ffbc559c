"""EMS (arXiv 2412.08521): evict the tokens that matter least, then merge the others into those that matter most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..eviction import CHUNK, Entries, EvictingStore, around_pages, best
from ..settings import Settings
from ..store import Inner, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("ems")
@dataclass(frozen=True)
class EMS(CacheMethod):
    """Each key head holds ``budget`` entries: the last ``window`` tokens, and the most important ones before them as
    centres. Importance is the larger of two sums of attention weights, over all queries (scaled to the other's mean)
    and over the last ``window``.

    What is no centre is evicted as long as all that is evicted got at most the share ``evict`` of a head's importance;
    the others go to the centre of largest ``cos(K, K') cos(V, V')`` (0 where a cosine is negative), into its average
    weighted by importance, if that exceeds ``similarity``, else to the zero class, which is nothing. A centre's score
    is raised by the logarithm of the tokens in it. Heads differ in all of this and share one set of tensor operations.
    The paper's thresholds are not public; these are ours.
    """

    budget: int = 256
    window: int = 32
    evict: float = 0.02
    similarity: float = 0.6

    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        if not 0 < self.window < self.budget:
            raise ValueError(f"ems: found budget {self.budget} and window {self.window}, accepted are a budget above "
                             "the window, and a window above 0")
        if not 0 <= self.evict < 1 or not 0 <= self.similarity <= 1:
            raise ValueError(f"ems: found evict {self.evict} and similarity {self.similarity}, accepted are shares "
                             "between 0 and 1")

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)  # forgets by itself
        return around_pages(inner(shape), self.name, lambda own, heads: EvictingStore(
            own, self.budget, self.window, self.window, self.window, self.compress))

    def compress(self, held: Entries) -> Entries:
        old, recent = held.part(0, -self.window), held.part(-self.window)
        score = self.score(old)
        kept, others = best(score, self.budget - self.window)
        centres, rest = old.take(kept), old.take(others)
        weights, importance = (score.gather(2, index) for index in (kept, others))
        irrelevant = self.irrelevant(importance, score.clamp_min(0).sum(-1, keepdim=True)) | (rest.count == 0)
        return self.merge(centres, weights, rest, importance, irrelevant).then(recent)

    def score(self, entries: Entries) -> Tensor:
        """Importance ``[batch, kv_heads, entries]``; padding is below all else."""
        total, local = entries.total, entries.local
        ratio = local.sum(-1, keepdim=True) / total.sum(-1, keepdim=True).clamp_min(1e-30)
        return torch.maximum(total * ratio, local).masked_fill(entries.count == 0, -1)

    def irrelevant(self, importance: Tensor, whole: Tensor) -> Tensor:
        """Which entries are evicted first: from the least on, while their sum is at most ``evict`` of the whole."""
        least = importance.clamp_min(0).sort(dim=-1, stable=True)
        first = least.values.cumsum(-1) <= self.evict * whole
        return torch.zeros_like(first).scatter(2, least.indices, first)

    def merge(self, centres: Entries, weights: Tensor, rest: Entries, importance: Tensor, evicted: Tensor) -> Entries:
        """``rest`` into ``centres``; both with their weights ``[batch, kv_heads, entries]``."""
        number = centres.count.shape[2]
        target = self.classes(centres, rest, evicted)
        gone = target == number

        def summed(own: Tensor, x: Tensor) -> Tensor:  # the last row is the zero class, which is left out
            index = target if x.dim() == 3 else target.unsqueeze(-1).expand_as(x)
            pad = (0, 1) if x.dim() == 3 else (0, 0, 0, 1)
            return torch.nn.functional.pad(own, pad).scatter_add(2, index, x)[:, :, :number]

        own, given = weights.clamp_min(1e-12), importance.clamp_min(1e-12).masked_fill(gone, 0)
        mass = summed(own, given)
        changed = summed(torch.zeros_like(own), (~gone).float()) > 0

        def averaged(own_x: Tensor, x: Tensor) -> Tensor:
            own_x, x = own_x.float(), x.float()
            mean = summed(own_x * own.unsqueeze(-1), x * given.unsqueeze(-1)) / mass.unsqueeze(-1)
            return torch.where(changed.unsqueeze(-1), mean, own_x)

        return Entries(averaged(centres.keys, rest.keys), averaged(centres.values, rest.values),
                       summed(centres.count, rest.count), summed(centres.total, rest.total),
                       summed(centres.local, rest.local))

    def classes(self, centres: Entries, rest: Entries, evicted: Tensor) -> Tensor:
        """The centre that each of the rest goes to, int64 ``[batch, kv_heads, entries]``; the number of centres is the
        zero class."""
        directions = [torch.nn.functional.normalize(x.float(), dim=-1).transpose(-1, -2)
                      for x in (centres.keys, centres.values)]
        found = []
        for first in range(0, rest.count.shape[2], CHUNK):
            part = rest.part(first, first + CHUNK)
            keys, values = ((torch.nn.functional.normalize(x.float(), dim=-1) @ d).clamp_min_(0)
                            for x, d in zip((part.keys, part.values), directions))
            likeness = keys.mul_(values).masked_fill_((centres.count == 0).unsqueeze(2), 0)
            most, target = likeness.max(-1)
            found.append(target.masked_fill_(most <= self.similarity, likeness.shape[-1]))
        return torch.cat(found, 2).masked_fill_(evicted, centres.count.shape[2])
