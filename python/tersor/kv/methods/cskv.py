"""CSKV (Wang et al., 2024, arXiv 2409.10593): low-rank features in place of old keys and values, and a window of recent
tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..bases import LayerMoments, beside, check_fits, principal, refuse_latent, refuse_rope
from ..latent import Decoder, Encoder, WindowedFeatures, feature_pages, split_ranks
from ..record import Seen, record
from ..rotary import find_rotary
from ..settings import Settings
from ..store import Inner, Shape, Store, sylvester, value_group
from .base import CacheMethod, register_cache_method

KEPT_TOKENS = 4096  # of a layer, which training looks at


@register_cache_method("cskv")
@dataclass(frozen=True)
class CSKV(CacheMethod):
    """Tokens that leave a window of ``window`` are kept as features, ``keys`` and ``values`` times as many numbers as a
    layer's keys and values have, in the bits of the spec; layers with a sliding window stay as they are.

    For features ``A x`` of a layer's input and the factor ``B`` that takes them back, the best A for a given B is
    ``pinv(B) W``: features are then those of the keys (before rotary embedding) and values themselves, and nothing of
    the model changes. Under the layer-wise squared error the best B is principal, so that is its closed form. Features
    of values are turned by an orthogonal matrix, so that those which share a scale are of like size. Where features are
    quantized, ``steps`` steps of training at ``lr`` (relative to each factor's size) follow, with the rounding passed
    straight through. (Steps that lower the layer-wise error much further shrink keys, and flatten attention.)
    """

    keys: float = 0.5
    values: float = 0.5
    window: int = 32
    steps: int = 100
    lr: float = 0.003

    calibrated: ClassVar[bool] = True
    rotary: ClassVar[bool] = True
    cuda: ClassVar[bool] = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        refuse_latent(model, self.name)
        refuse_rope(settings, self.name)
        for part, share in (("keys", self.keys), ("values", self.values)):
            if not 0 < share <= 1:
                raise ValueError(f"{self.name}: {part}: found {share}, accepted is above 0 and at most 1")
        if self.window < 1 or self.steps < 0 or not self.lr > 0:
            raise ValueError(f"{self.name}: found window={self.window}, steps={self.steps}, lr={self.lr}, accepted are "
                             "a window of 1 or more, steps of 0 or more, and an lr above 0")

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        moments: dict[int, LayerMoments] = {}
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        rotaries = {}

        def take(seen: Seen) -> None:
            layer = seen.layer
            if layer not in moments:
                moments[layer] = LayerMoments(seen.key.shape[1], seen.key.shape[3], seen.value.shape[3])
                kept[layer], rotaries[layer] = [], find_rotary(model, layer)
            keys = rotaries[layer].turn(seen.key.cpu(), torch.arange(seen.key.shape[2]), back=True)
            flat = beside(keys).float(), beside(seen.value.cpu()).float()
            moments[layer].keys.add(flat[0])
            moments[layer].values.add(flat[1])
            if trains(settings) and self.steps and sum(k.shape[1] for k, _ in kept[layer]) < KEPT_TOKENS:
                kept[layer].append(flat)

        record(model, batches, take, progress)
        found = {}
        for layer, seen in moments.items():
            wide = [round(share * seen.heads * dim) for share, dim in
                    ((self.keys, seen.key_dim), (self.values, seen.value_dim))]
            heads, *ranks = split_ranks(*wide)
            found[layer] = {"heads": torch.tensor(seen.heads)}
            for i, (part, moment, dim) in enumerate((("key", seen.keys, seen.key_dim),
                                                     ("value", seen.values, seen.value_dim))):
                rank = min(ranks[i], seen.heads * dim)
                basis = principal(moment.covariance()[0])[0][:, :rank].float()
                mean = moment.mean[0, 0].float()
                if part == "value":
                    basis = basis @ even_turn(rank)
                there, back = basis, basis.T.contiguous()
                bits = settings.key_bits if part == "key" else settings.value_bits
                if bits < 16 and kept[layer]:
                    group = settings.group if part == "key" else value_group(rank // heads, settings.group)
                    rows = [pair[i][0] - mean for pair in kept[layer]]
                    there, back = self.fit(rows, there, back, part, bits, group)
                found[layer] |= {f"{part}_features": there, f"{part}_back": back, f"{part}_mean": mean}
            progress(f"layer {layer}: ranks {ranks[0]} and {ranks[1]}")
        return found

    def fit(self, rows: list[Tensor], there: Tensor, back: Tensor, part: str, bits: int,
            group: int) -> tuple[Tensor, Tensor]:
        """Factors ``[dim, rank]`` and ``[rank, dim]`` trained on pieces of ``rows`` (float32 ``[tokens, dim]``, around
        their mean) with quantized features; those that it was given where that came out no better."""
        pages = [row[:len(row) // group * group] for row in rows] if part == "key" else rows
        data = torch.cat(pages)
        if not len(data):
            return there, back

        def error(there: Tensor, back: Tensor, data: Tensor) -> Tensor:
            return (straight_through(data @ there, part, bits, group) @ back - data).square().mean()

        first = there, back
        there, back = (x.clone().requires_grad_() for x in first)
        optimizer = torch.optim.Adam([{"params": [x], "lr": self.lr * x.detach().square().mean().sqrt().item()}
                                      for x in (there, back)])
        generator, size = torch.Generator().manual_seed(0), group * max(1, 512 // group)
        with torch.enable_grad():
            for _ in range(self.steps):
                at = group * int(torch.randint(max(1, (len(data) - size) // group + 1), (), generator=generator))
                loss = error(there, back, data[at:at + size])
                there.grad, back.grad = torch.autograd.grad(loss, (there, back))
                optimizer.step()
        there, back = there.detach(), back.detach()
        return (there, back) if error(there, back, data) < error(*first, data) else first

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)
        heads = int(tensors["heads"])
        dims = [len(tensors[f"{part}_features"]) // heads for part in ("key", "value")]
        check_fits(self.name, shape, heads, *dims)
        ranks = [tensors[f"{part}_features"].shape[1] for part in ("key", "value")]
        pages = feature_pages(self.name, shape, *ranks, inner)
        names = "key_features", "value_features", "key_mean", "value_mean"
        encoder = Encoder(*(tensors[name] for name in names))
        values = tensors["value_back"].unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(0)
        decoder = Decoder(heads, tensors["key_back"].unsqueeze(0), values, tensors["key_mean"],
                          tensors["value_mean"].view(heads, 1, -1), shape.rotary)
        return WindowedFeatures(self.name, shape, self.window, pages, encoder, decoder)


def even_turn(rank: int) -> Tensor:
    """An orthogonal matrix that spreads each channel over all: a Hadamard matrix where there is one of that size."""
    if not rank & rank - 1:
        return sylvester(rank).float()
    return torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank)))[0]


def trains(settings: Settings) -> bool:
    """Whether pages quantize in a way that training can follow."""
    return settings.packs and (settings.levels, settings.keys, settings.values) == ("int", "channel", "token")


def straight_through(x: Tensor, part: str, bits: int, group: int) -> Tensor:
    """Features ``[tokens, rank]`` as pages of ``bits`` give them back, of keys per channel over ``group`` tokens, of
    values per token over ``group`` channels; gradients pass as if nothing had happened."""
    cut = x.unflatten(0, (-1, group)).transpose(1, 2) if part == "key" else x.unflatten(1, (-1, group))
    low, high = cut.detach().amin(-1, keepdim=True), cut.detach().amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    read = ((cut.detach() - low) / scale).round() * scale + low
    read = (read.transpose(1, 2).flatten(0, 1) if part == "key" else read.flatten(1))
    return x + (read - x).detach()
