"""StreamingLLM (arXiv 2309.17453): the first tokens, which attention sinks into, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..eviction import WindowStore, around_pages
from ..settings import Settings
from ..store import Inner, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("streaming")
@dataclass(frozen=True)
class Streaming(CacheMethod):
    """The first ``sinks`` tokens and the last ``window``, of which a query's own is one. Keys keep the positions that
    they came with (the paper counts positions within the cache)."""

    sinks: int = 4
    window: int = 1024

    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"streaming: found sinks {self.sinks} and window {self.window}, accepted are sinks of 0 "
                             "or more and a window of 1 or more")

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)  # forgets by itself
        return around_pages(inner(shape), self.name, lambda own, heads: WindowStore(own, self.sinks, self.window))
