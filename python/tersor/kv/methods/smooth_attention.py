"""SmoothAttention of QServe (arXiv 2405.04532), under KV4 of COMET (arXiv 2410.12168) as well: outlier channels of keys
are scaled down before they are quantized, and queries up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..record import Seen, record
from ..rotary import Rotary
from ..settings import Settings
from ..store import Inner, Projected, Shape, Store
from .base import CacheMethod, register_cache_method


def pair_max(x: Tensor, rotary: Rotary | None) -> Tensor:
    """``x [..., dim]`` with each channel of a rotary pair raised to the larger of the two."""
    if rotary is None:
        return x
    half, result = rotary.dim // 2, x.clone()
    first, second = (slice(0, rotary.dim, 2), slice(1, rotary.dim, 2)) if rotary.interleaved \
        else (slice(0, half), slice(half, rotary.dim))
    result[..., first] = result[..., second] = torch.maximum(x[..., first], x[..., second])
    return result


def scaled(shape: Shape, factor: Tensor, inner: Inner) -> Store:
    """A store that holds keys times ``factor [kv_heads, dim]`` and reads them by queries over it."""
    factor = factor.double().unsqueeze(-2)
    return Projected(inner(shape), shape.kv_heads, queries=1 / factor, keys=factor, dtype=shape.dtype)


def key_maxima(model: nn.Module, batches: list[Tensor], progress) -> dict[int, Tensor]:
    """Largest magnitude of each channel of the keys that attention takes, ``[kv_heads, dim]`` for each layer."""
    found: dict[int, Tensor] = {}

    def take(seen: Seen) -> None:
        top = seen.key.float().abs().amax((0, 2))
        found[seen.layer] = torch.maximum(found[seen.layer], top) if seen.layer in found else top

    record(model, batches, take, progress)
    return found


@register_cache_method("smoothattention")
@dataclass(frozen=True)
class SmoothAttention(CacheMethod):
    """``lambda_c = max |K_c| ** alpha``, the larger of a rotary pair's two channels, so that it could stand before the
    rotary embedding as well; keys are held over lambda, queries are multiplied by it. The product is the same."""

    alpha: float = 0.5

    calibrated = True
    rotary = True
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothattention: alpha: found {self.alpha}, accepted is 0 to 1")

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        return {layer: {"key_max": top} for layer, top in key_maxima(model, batches, progress).items()}

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        top = pair_max(tensors["key_max"], shape.rotary).clamp_min(1e-5)
        return scaled(shape, top.pow(-self.alpha), inner)
