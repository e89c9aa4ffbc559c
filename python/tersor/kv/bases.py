"""Principal bases of recorded keys and values, for the methods that keep a cache in fewer coordinates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .record import Seen, record
from .settings import Settings
from .store import Shape


class Moments:
    """Mean and covariance of rows of groups, gathered piece by piece in float64."""

    def __init__(self):
        self.rows, self.total, self.square = 0, 0, 0

    def add(self, x: Tensor) -> None:
        """``x [groups, rows, dim]``."""
        x = x.detach().double()
        self.rows += x.shape[1]
        self.total = self.total + x.sum(1, keepdim=True)
        self.square = self.square + x.transpose(-1, -2) @ x

    @property
    def mean(self) -> Tensor:
        """``[groups, 1, dim]``."""
        return self.total / self.rows

    def covariance(self, centred: bool = True) -> Tensor:
        """``[groups, dim, dim]``."""
        square = self.square / self.rows
        return square - self.mean.transpose(-1, -2) @ self.mean if centred else square


@dataclass
class LayerMoments:
    """Of one layer's keys and values as a method arranges them, and the shapes they came in."""

    heads: int
    key_dim: int
    value_dim: int
    keys: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)


def gather(model: nn.Module, batches: list[Tensor], arrange_keys, arrange_values, progress) -> dict[int, LayerMoments]:
    """Moments of each layer; ``arrange(seen, x)`` turns ``x [batch, kv_heads, tokens, dim]`` into ``[groups, rows,
    dim]``."""
    found: dict[int, LayerMoments] = {}

    def take(seen: Seen) -> None:
        if seen.layer not in found:
            found[seen.layer] = LayerMoments(seen.key.shape[1], seen.key.shape[3], seen.value.shape[3])
        found[seen.layer].keys.add(arrange_keys(seen, seen.key))
        found[seen.layer].values.add(arrange_values(seen, seen.value))

    record(model, batches, take, progress)
    return found


def by_head(seen: Seen, x: Tensor) -> Tensor:
    """``[kv_heads, batch * tokens, dim]``."""
    return x.transpose(0, 1).flatten(1, 2)


def beside(x: Tensor) -> Tensor:
    """All heads of a token beside each other: ``[batch, tokens, kv_heads * dim]``."""
    return x.transpose(1, 2).flatten(2)


def principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases ``[..., dim, dim]``, columns by falling energy, and the energies ``[..., dim]``."""
    energies, vectors = torch.linalg.eigh(covariance)
    return vectors.flip(-1), energies.flip(-1).clamp_min(0)


def key_heads(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def refuse_latent(model: nn.Module, name: str) -> None:
    """ValueError for models that cache something else than their attention's keys."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name}: found {type(model).__name__} with latent attention, accepted is a model that caches "
                         "the keys of its attention")


def refuse_rope(settings: Settings, name: str) -> None:
    """ValueError where pages are asked to turn keys back that are in coordinates of their own. (Where levels=nuq alone
    brings rope=pre with it, keys stay as they come.)"""
    if settings.rope != "post" and settings.levels != "nuq":
        raise ValueError(f"{name}: found rope={settings.rope}, accepted is rope=post inside a method that changes the "
                         "coordinates of keys")


def shifts_matter(model: nn.Module) -> bool:
    """Whether a constant on all scores of a query changes attention: under softcap, or with sinks."""
    config = model.config.get_text_config(decoder=True)
    return bool(getattr(config, "attn_logit_softcapping", None)) or any(
        name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())


def check_fits(name: str, shape: Shape, heads: int, key_dim: int, value_dim: int) -> None:
    """ValueError for a layer that is not of the shape that a plan was made for."""
    if (shape.kv_heads, shape.key_dim, shape.value_dim) != (heads, key_dim, value_dim):
        raise ValueError(f"{name}: layer {shape.layer}: found {shape.kv_heads} heads with keys of {shape.key_dim} and "
                         f"values of {shape.value_dim}, accepted is what its plan was made for: {heads}, {key_dim} and "
                         f"{value_dim}")
    refuse_rope(shape.settings, f"{name}: layer {shape.layer}")
