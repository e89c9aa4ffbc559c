"""KVQuant (arXiv 2401.18079): levels of keys and values learned from data, weighted by sensitivity."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..record import Seen, recording
from ..rotary import Rotary, find_rotary
from ..settings import Settings
from ..store import Inner, Shape, Store, value_group
from .base import CacheMethod, register_cache_method

SAMPLE = 1 << 16  # numbers of a part, layer and batch that the levels are fitted to


@register_cache_method("kvquant")
@dataclass(frozen=True)
class KVQuant(CacheMethod):
    """Non-uniform levels ("nuq") of each layer's keys and values by k-means on normalised numbers, weighted by the
    diagonal of the Fisher information (``fisher``: squared gradients of the loss), keys before rotary embedding
    (``pre_rope``), outliers as the spec's ``outliers`` says, and, at 2 bits, levels moved so that mean and deviation of
    what is read equal those of what was written (``qnorm``, "Q-Norm").

    Here a number is normalised by the range of its channel in a page, or of its token's group, once outliers are out,
    since pages are packed one by one; the paper's own ranges of keys come from calibration.
    """

    fisher: bool = True
    pre_rope: bool = True
    qnorm: bool = True
    iterations: int = 50

    calibrated = True
    rotary = True
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        low = {bits for bits in (settings.key_bits, settings.value_bits) if bits < 16}
        if not low or 8 in low:
            raise ValueError(f"kvquant: found {settings.name}, accepted are 2, 3 or 4 bits (16 for one of the two)")
        if settings.levels == "e4m3":
            raise ValueError("kvquant: found levels=e4m3, accepted are levels that it may choose")

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        samples: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        generator = torch.Generator().manual_seed(0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.requires_grad_(False)
        try:
            for index, ids in enumerate(batches):
                self._see(model, ids.to(model.device), settings, samples, generator)
                progress(f"{index + 1} of {len(batches)} sequences")
        finally:
            for p in parameters:
                p.requires_grad_(True)
        found: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for (layer, part), pieces in samples.items():
            bits = settings.key_bits if part == "key" else settings.value_bits
            numbers, weights = (torch.cat(p) for p in zip(*pieces))
            found[layer][f"{part}_levels"] = self.levels(numbers, weights, bits)
        return dict(found)

    def _see(self, model, ids: Tensor, settings: Settings, samples, generator) -> None:
        kept: list[tuple[Seen, Tensor, Tensor]] = []

        def take(seen: Seen):
            if not self.fisher:
                kept.append((seen, seen.key, seen.value))
                return None
            key, value = (t if t.requires_grad else t.detach().requires_grad_() for t in (seen.key, seen.value))
            key.retain_grad()
            value.retain_grad()
            kept.append((seen, key, value))
            return seen.query, key, value

        with torch.set_grad_enabled(self.fisher), recording(model, take):
            logits = model(ids, use_cache=False).logits
            if self.fisher:
                loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
                loss.backward()
        for seen, key, value in kept:
            rotary = find_rotary(model, seen.layer) if self.pre_rope else None
            for part, bits, x in (("key", settings.key_bits, key), ("value", settings.value_bits, value)):
                if bits == 16:
                    continue
                gradient = x.grad if self.fisher else torch.ones_like(x)
                numbers, weight = normalised(x.detach(), gradient, part, settings, rotary)
                few = torch.randperm(len(numbers), generator=generator)[:SAMPLE]
                samples[seen.layer, part].append((numbers[few], weight[few]))

    def levels(self, numbers: Tensor, weights: Tensor, bits: int) -> Tensor:
        """Ascending levels in [-1, 1], int8 over 127."""
        centres = kmeans(numbers, weights, 2**bits, self.iterations)
        if self.qnorm and bits == 2:
            read = centres[nearest(numbers, centres)]
            ratio = numbers.std() / read.std().clamp_min(1e-6)
            centres = centres * ratio + (numbers.mean() - ratio * read.mean())
        levels = (centres.clamp(-1, 1) * 127).round().int().tolist()
        for i in range(len(levels)):  # distinct, also where the data has fewer values than levels
            least = -127 if i == 0 else levels[i - 1] + 1
            levels[i] = min(max(levels[i], least), 127 - (len(levels) - 1 - i))
        return torch.tensor(levels, dtype=torch.int8)

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        keys, values = (tuple(tensors[name].tolist()) if name in tensors else None
                        for name in ("key_levels", "value_levels"))
        settings = replace(shape.settings, levels="nuq", key_levels=keys, value_levels=values,
                           rope="pre" if self.pre_rope else shape.settings.rope)
        return inner(shape.changed(settings=settings))


def normalised(x: Tensor, gradient: Tensor, part: str, settings: Settings,
               rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Numbers ``[batch, heads, tokens, dim]`` over the range of what shares a scale, in [-1, 1], and their weights
    (gradients squared); the outermost ones, as many as the settings store apart, are left out."""
    x, gradient = x.float(), gradient.float()
    if part == "key":
        tokens = x.shape[2] // settings.group * settings.group or x.shape[2]
        x, gradient = x[:, :, :tokens], gradient[:, :, :tokens]
        if rotary is not None:
            x, gradient = (rotary.turn(t, torch.arange(tokens), back=True) for t in (x, gradient))
        groups, weights = (t.unflatten(2, (-1, min(settings.group, tokens))).transpose(-1, -2) for t in (x, gradient))
    else:
        size = value_group(x.shape[-1], settings.group)
        groups, weights = (t.unflatten(-1, (-1, size)) for t in (x, gradient))
    groups, weights = groups.flatten(0, -2), weights.flatten(0, -2).square()
    apart = settings.outliers * groups.numel()
    middle = groups.median(-1, keepdim=True).values
    far = (groups - middle).abs()
    inlier = torch.ones_like(groups, dtype=torch.bool)
    if apart >= 1:
        inlier = far < far.flatten().kthvalue(max(1, far.numel() - int(apart))).values
    low = groups.masked_fill(~inlier, torch.inf).amin(-1, keepdim=True)
    high = groups.masked_fill(~inlier, -torch.inf).amax(-1, keepdim=True)
    half = (high - low) / 2
    numbers = (groups - (high + low) / 2) / half
    inlier &= half > 0
    return numbers[inlier], weights[inlier]


def nearest(numbers: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest of ascending ``centres``."""
    return torch.bucketize(numbers, (centres[1:] + centres[:-1]) / 2)


def kmeans(numbers: Tensor, weights: Tensor, count: int, iterations: int = 50) -> Tensor:
    """Weighted k-means of ``numbers [n]`` on a line: ``count`` ascending centres in float64.

    Numbers are sorted once; a round is ``count`` differences of cumulative sums. Starts from weighted quantiles.
    """
    order = numbers.argsort()
    x, w = numbers[order].double(), weights[order].double()
    w = w / w.mean().clamp_min(1e-300) + 1e-6  # a number that nothing depends on still counts a little
    mass, moment = (torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in (w, w * x))
    targets = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[-1]
    centres = x[torch.searchsorted(mass[1:], targets).clamp_max(len(x) - 1)]
    for _ in range(iterations):
        cuts = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat((cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))))
        total, sums = mass[ends].diff(), moment[ends].diff()
        moved = torch.where(total > 0, sums / total.clamp_min(1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
