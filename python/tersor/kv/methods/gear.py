"""GEAR (arXiv 2403.05527): what quantization loses is kept as a low-rank matrix and a few outliers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..blocks import BlockStore
from ..settings import Settings
from ..store import Inner, Shape, Store, make_layout, page_format, page_tokens
from .base import CacheMethod, register_cache_method


@register_cache_method("gear")
@dataclass(frozen=True)
class Gear(CacheMethod):
    """Pages quantized as the spec says, ``outliers`` of the numbers of each apart, and of what is then still missing
    the ``rank`` largest directions (``decode_rank`` for pages that fill while decoding), head by head, found by
    ``loops`` rounds of power iteration. A block of pages that are packed together shares its directions. ``outliers=0``
    is the paper's GEAR-L.
    """

    rank: int = 4
    decode_rank: int = 2
    outliers: float = 0.02
    loops: int = 3

    innermost = True
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        if not settings.packs or settings.key_bits == 16 or settings.value_bits == 16:
            raise ValueError(f"gear: found {settings.name}, accepted are 8, 4, 3 or 2 bits for keys and values")
        if not 1 <= self.decode_rank <= self.rank <= 16:
            raise ValueError(f"gear: rank and decode_rank: found {self.rank} and {self.decode_rank}, accepted are 1 to "
                             "16, decode_rank at most rank")
        if not 0 <= self.outliers <= 0.1 or self.loops < 1:
            raise ValueError(f"gear: outliers and loops: found {self.outliers} and {self.loops}, accepted are 0 to 0.1 "
                             "and 1 or more")

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        settings = replace(shape.settings, outliers=self.outliers, recent=max(shape.settings.recent, 0))
        return GearStore(shape.changed(settings=settings), self)


class GearStore(BlockStore):
    def __init__(self, shape: Shape, method: Gear):
        ranks = method.rank, method.decode_rank
        super().__init__(shape, make_layout(shape, *(page_format(shape, rank=rank) for rank in ranks)),
                         block=page_tokens(shape))
        self.method = method

    def pack(self, keys: Tensor, values: Tensor, bias: Tensor | None, tokens: int) -> None:
        first, count = len(self.pages.pages), tokens // self.layout.page_tokens
        kind = 1 if count > 1 else 2  # a prompt's pages share their directions, and can afford more of them
        self.pages.append_packed(keys, values, kind)
        pages = [self.pages.decode_page(first + i, torch.float32) for i in range(count)]
        rank = self.layout.formats[kind - 1].rank
        (key_q, key_p), (value_q, value_p) = (
            low_rank(true.float() - torch.cat(read, 2), rank, self.method.loops)
            for true, read in zip((keys, values), zip(*pages)))
        self.pages.set_segment(first, count, *(t.transpose(-1, -2) for t in (key_p, value_p, key_q, value_q)))


@lru_cache(maxsize=64)
def _start(dim: int, rank: int, device: torch.device) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, rank, generator=torch.Generator().manual_seed(0))).Q.to(device)


def low_rank(residual: Tensor, rank: int, loops: int) -> tuple[Tensor, Tensor]:
    """``residual [..., tokens, dim]`` near ``Q P^T``: ``Q [..., tokens, rank]``, ``P [..., dim, rank]`` with
    orthonormal columns, in float32. Deterministic: starts from a fixed random matrix."""
    residual = residual.nan_to_num(0, 0, 0).float()
    dim = residual.shape[-1]
    p = _start(dim, rank, residual.device).expand(*residual.shape[:-2], dim, rank)
    for _ in range(loops):
        p = torch.linalg.qr(residual.transpose(-1, -2) @ (residual @ p)).Q
    return residual @ p, p
