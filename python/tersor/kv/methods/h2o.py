"""H2O (arXiv 2306.14048): the tokens that got most attention so far, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..eviction import Entries, EvictingStore, around_pages, best
from ..settings import Settings
from ..store import Inner, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("h2o")
@dataclass(frozen=True)
class H2O(CacheMethod):
    """Each key head holds ``budget`` tokens: the last ``recent`` (0: half of them), and of the others those with the
    largest sum of attention weights over all queries so far (query heads of a key head together). ``slack``: so many
    more may come before the least are evicted."""

    budget: int = 512
    recent: int = 0
    slack: int = 32

    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        if not 0 <= self.recent < self.budget or self.budget < 2 or self.slack < 0:
            raise ValueError(f"h2o: found budget {self.budget}, recent {self.recent} and slack {self.slack}, accepted "
                             "are a budget of 2 or more and above recent, recent and slack of 0 or more")

    @property
    def last(self) -> int:
        return self.recent or self.budget // 2

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)  # forgets by itself
        return around_pages(inner(shape), self.name, lambda own, heads: EvictingStore(
            own, self.budget, self.last, self.slack, 0, self.compress))

    def compress(self, held: Entries) -> Entries:
        old, recent = held.part(0, -self.last), held.part(-self.last)
        kept, _ = best(self.score(old), self.budget - self.last)
        return old.take(kept).then(recent)

    def score(self, entries: Entries) -> Tensor:
        """What decides, ``[batch, kv_heads, entries]``; padding is below all else."""
        return entries.total.masked_fill(entries.count == 0, -1)
