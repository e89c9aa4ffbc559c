"""FlatQuant's map of keys (arXiv 2410.09426), learned while the model was compressed, for a cache of few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...transforms.steps import KEY_TRANSFORM
from ..bases import refuse_rope
from ..geometry import geometry_of
from ..settings import Settings
from ..store import Inner, Projected, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("flatquant")
@dataclass(frozen=True)
class FlatQuant(CacheMethod):
    """Keys (after rotary embedding) are held as ``k P``, read by queries ``q P^-T``: the product is the same.

    ``P [head_dim, head_dim]`` of each layer is the model's own, from ``tersor.compress(model, "flatquant[kv=4]:...")``,
    which also turned its values where they are made.
    """

    given = True
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        refuse_rope(settings, self.name)
        if settings.hadamard:
            raise ValueError(f"{self.name}: found hadamard=true, accepted is false: keys have a learned map already")

    def find(self, model: nn.Module) -> dict[int, dict[str, Tensor]]:
        geometry, found = geometry_of(model), {}
        for name, module in model.named_modules():
            matrix = module._buffers.get(KEY_TRANSFORM)
            if matrix is None:
                continue
            size = geometry["head_dim"]
            inverse = torch.linalg.inv_ex(matrix.double()) if tuple(matrix.shape) == (size, size) else None
            if inverse is None or int(inverse.info) or not bool(inverse.inverse.isfinite().all()):
                raise ValueError(f"{self.name}: {name}.{KEY_TRANSFORM}: found {list(matrix.shape)}, accepted is a "
                                 f"finite matrix [{size}, {size}] with an inverse")
            found[module.layer_idx] = {"keys": matrix.detach(), "queries": inverse.inverse.T}
        missing = [layer for layer in range(geometry["layers"]) if layer not in found]
        if missing:
            raise ValueError(f"{self.name}: layer {missing[0]}: found no {KEY_TRANSFORM}, accepted are models of "
                             'tersor.compress(model, "flatquant[kv=4]:...")')
        return found

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        return Projected(inner(shape.changed(rotary=None)), shape.kv_heads, queries=tensors["queries"],
                         keys=tensors["keys"], dtype=shape.dtype, device=shape.device)
