"""Fewer cached heads: groups of key heads are held as one ("Effectively Compress KV Heads for LLM", arXiv
2406.07056)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..bases import check_fits, gather, key_heads, principal, refuse_latent, refuse_rope
from ..geometry import geometry_of
from ..settings import Settings
from ..store import Inner, Projected, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("share_heads")
@dataclass(frozen=True)
class ShareHeads(CacheMethod):
    """``heads`` cached heads in place of a layer's key heads (0: half of them); neighbours share one.

    The keys of a group, after rotary embedding, stand beside each other as ``[tokens, t * dim]``; their leading
    ``rank`` right singular vectors (0: as many as a head is wide) are the basis in which they are held. Its rows of
    each head go to that head's queries after rotation, so that nothing has to commute with it; values likewise, and
    outputs back. `tersor.kv.convert.share_heads` makes a smaller model of it instead.
    """

    heads: int = 0
    rank: int = 0

    calibrated: ClassVar[bool] = True
    cuda: ClassVar[bool] = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        refuse_latent(model, self.name)
        refuse_rope(settings, self.name)
        self.together(key_heads(model))

    def together(self, kv_heads: int) -> int:
        """Heads of a group. ValueError for a number of heads that does not divide ``kv_heads``."""
        heads = self.heads or kv_heads // 2
        if heads < 1 or kv_heads % heads:
            raise ValueError(f"{self.name}: heads: found {heads} for {kv_heads} key heads, accepted are divisors of "
                             f"{kv_heads}")
        return kv_heads // heads

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        def arrange(seen, x: Tensor) -> Tensor:
            together = self.together(x.shape[1])
            return x.unflatten(1, (-1, together)).transpose(2, 3).flatten(3).transpose(0, 1).flatten(1, 2)

        found = {}
        for layer, moments in gather(model, batches, arrange, arrange, progress).items():
            together = self.together(moments.heads)
            found[layer] = {}
            for part, seen, dim in (("key", moments.keys, moments.key_dim),
                                    ("value", moments.values, moments.value_dim)):
                rank = self.rank or dim
                if rank % 16 or not 16 <= rank <= together * dim:
                    raise ValueError(f"{self.name}: rank: found {rank} for {together} heads of {dim}, accepted are "
                                     f"multiples of 16 to {together * dim}")
                basis, energies = principal(seen.covariance(centred=False))
                found[layer][f"{part}_basis"] = basis[..., :rank].float()
                found[layer][f"{part}_discarded"] = energies[:, rank:].sum(-1) / energies.sum(-1)
        return found

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        keys, values = tensors["key_basis"], tensors["value_basis"]  # [groups, together * dim, rank]
        groups, together = len(keys), self.together(shape.kv_heads)
        check_fits(self.name, shape, groups * together, keys.shape[1] // together, values.shape[1] // together)
        part = shape.changed(kv_heads=groups, key_dim=keys.shape[2], value_dim=values.shape[2], rotary=None)
        queries = keys.unflatten(1, (together, -1)).flatten(0, 1)  # [kv_heads, dim, rank]
        outputs = values.unflatten(1, (together, -1)).flatten(0, 1).transpose(-1, -2)
        return Projected(inner(part), shape.kv_heads, queries, keys, values, outputs, dtype=shape.dtype,
                         together=together)
