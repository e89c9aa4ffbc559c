"""MatryoshkaKV (Lin et al., 2024, arXiv 2410.14731): trained orthogonal bases of keys and values, of which each head
keeps as many leading coordinates as a budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..bases import by_head, check_fits, gather, principal, refuse_latent, refuse_rope, shifts_matter
from ..record import Seen, recording
from ..settings import Settings
from ..store import HeadGroups, Inner, Projected, Shape, Store
from .base import CacheMethod, register_cache_method

BLOCK = 16  # ranks are multiples of it: what kernels take
SAMPLE_TOKENS = 256  # of each sequence that the search for ranks measures on
KL_SHARE = 0.25  # of the loss; the rest is cross entropy


@register_cache_method("matryoshka")
@dataclass(frozen=True)
class Matryoshka(CacheMethod):
    """Keys (after rotary embedding) and values of each head are held as their first coordinates in an orthogonal basis.

    ``budget``: share of all coordinates of keys and values that is kept; ``train``: bases are trained for ``steps``
    steps at ``lr`` from their principal ones, with ranks drawn anew for each head and step, so that every leading part
    of a basis is a good one; ``mean``: coordinates are around the mean (not possible under softcap or sinks).

    A basis is its principal one times the Cayley map of a free skew-symmetric matrix, so it stays orthogonal. Ranks
    start full; those whose loss changes the last hidden state of ``samples`` sequences least go first, keys and values
    ranked together.
    """

    budget: float = 0.5
    train: bool = True
    steps: int = 200
    lr: float = 1e-3
    mean: bool = True
    samples: int = 8
    seed: int = 0

    calibrated: ClassVar[bool] = True
    cuda: ClassVar[bool] = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        refuse_latent(model, self.name)
        refuse_rope(settings, self.name)
        if not 0 < self.budget <= 1:
            raise ValueError(f"{self.name}: budget: found {self.budget}, accepted is above 0 and at most 1")
        if self.steps < 0 or not self.lr > 0 or self.samples < 1:
            raise ValueError(f"{self.name}: found steps={self.steps}, lr={self.lr}, samples={self.samples}, accepted "
                             "are steps of 0 or more, an lr above 0, and samples of 1 or more")
        if self.mean and shifts_matter(model):
            raise ValueError(f"{self.name}: found {type(model).__name__} with softcap or sinks, which see a mean that "
                             "is taken off all keys; accepted is mean=false")

    def learn(self, model, batches, settings, progress) -> dict[int, dict[str, Tensor]]:
        batches = [ids.to(model.device) for ids in batches]
        layers = {}
        for layer, moments in gather(model, batches, by_head, by_head, progress).items():
            layers[layer] = Bases.of(moments, self.mean)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.requires_grad_(False)
        try:
            if self.train and self.steps:
                self.fit(model, batches, layers, progress)
            samples = [ids[:, :SAMPLE_TOKENS] for ids in batches[:self.samples]]
            search_ranks(model, samples, layers, self.budget, progress)
        finally:
            for p in parameters:
                p.requires_grad_(True)
        return {layer: bases.tensors() for layer, bases in layers.items()}

    def fit(self, model, batches: list[Tensor], layers: dict[int, "Bases"], progress) -> None:
        """Train the bases with 0.25 KL(teacher || student) + 0.75 cross entropy."""
        generator = torch.Generator().manual_seed(self.seed)
        turns = {layer: [torch.zeros_like(u).requires_grad_() for u in bases.bases] for layer, bases in layers.items()}
        free = [t for pair in turns.values() for t in pair]
        optimizer = torch.optim.Adam(free, lr=self.lr)
        warm = max(1, min(100, self.steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
            (step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, self.steps - warm))))
        active = False

        def take(seen: Seen):
            if not active:
                return None
            return layers[seen.layer].through(seen, [u @ cayley(x) for u, x in
                                                     zip(layers[seen.layer].bases, turns[seen.layer])])

        with torch.enable_grad(), recording(model, take):
            for step in range(self.steps):
                ids = batches[int(torch.randint(len(batches), (), generator=generator))]
                with torch.no_grad():
                    teacher = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
                for bases in layers.values():
                    bases.draw(generator)
                active = True
                student = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
                active = False
                divergence = nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
                entropy = nn.functional.nll_loss(student[:-1], ids[0, 1:])
                loss = KL_SHARE * divergence + (1 - KL_SHARE) * entropy
                for parameter, gradient in zip(free, torch.autograd.grad(loss, free)):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                if step % 10 == 9:
                    progress(f"step {step + 1} of {self.steps}: loss {loss.item():.4f}")
        for layer, bases in layers.items():
            bases.bases = [u @ cayley(x.detach()) for u, x in zip(bases.bases, turns[layer])]

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        keys, values = tensors["key_basis"], tensors["value_basis"]  # [kv_heads, dim, dim]
        check_fits(self.name, shape, len(keys), keys.shape[1], values.shape[1])
        ranks = list(zip(tensors["key_ranks"].tolist(), tensors["value_ranks"].tolist()))
        groups = []
        for pair in sorted(set(ranks)):
            heads = [head for head, rank in enumerate(ranks) if rank == pair]
            into, out = keys[heads, :, :pair[0]], values[heads, :, :pair[1]]
            means = [tensors[name][heads] if name in tensors else None for name in ("key_mean", "value_mean")]
            part = shape.changed(kv_heads=len(heads), key_dim=pair[0], value_dim=pair[1], rotary=None)
            groups.append((heads, Projected(inner(part), len(heads), into, into, out, out.transpose(-1, -2), *means,
                                            dtype=shape.dtype)))
        return groups[0][1] if len(groups) == 1 else HeadGroups(groups, shape.kv_heads)


@dataclass
class Bases:
    """Of one layer: ``bases``, ``means`` (or None) and ``ranks [kv_heads]`` of keys and of values."""

    bases: list[Tensor]  # float32 [kv_heads, dim, dim]
    means: list[Tensor] | None  # float32 [kv_heads, 1, dim]
    ranks: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, moments, mean: bool) -> "Bases":
        parts = (moments.keys, moments.values)
        bases = [principal(part.covariance(mean))[0].float() for part in parts]
        found = cls(bases, [part.mean.float() for part in parts] if mean else None)
        found.ranks = [torch.full((len(u),), u.shape[-1]) for u in bases]
        return found

    def draw(self, generator: torch.Generator) -> None:
        """Random ranks for each head."""
        self.ranks = [BLOCK * torch.randint(1, u.shape[-1] // BLOCK + 1, (len(u),), generator=generator)
                      for u in self.bases]

    def through(self, seen: Seen, bases: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What attention sees when keys and values have gone through the leading coordinates of their bases."""
        parts = []
        for i, (x, basis) in enumerate(zip((seen.key, seen.value), bases)):
            basis = basis.to(x.device, torch.float32)
            kept = (torch.arange(basis.shape[-1]) < self.ranks[i].view(-1, 1)).to(basis).unsqueeze(1)
            mean = 0 if self.means is None else self.means[i].to(x.device)
            parts.append((((x.float() - mean) @ basis * kept) @ basis.transpose(-1, -2) + mean).to(x.dtype))
        return seen.query, *parts

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, part in enumerate(("key", "value")):
            found |= {f"{part}_basis": self.bases[i], f"{part}_ranks": self.ranks[i]}
            if self.means is not None:
                found[f"{part}_mean"] = self.means[i]
        return found


def cayley(x: Tensor) -> Tensor:
    """Orthogonal ``[..., dim, dim]`` of any square matrices: (I - A/2)^-1 (I + A/2) with A = X - X^T; I for 0."""
    half = (x - x.transpose(-1, -2)) / 2
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(one - half, one + half)


def search_ranks(model, samples: list[Tensor], layers: dict[int, Bases], budget: float, progress) -> None:
    """Lower ranks, a block at a time, until the share ``budget`` of all coordinates is left. Each round measures what a
    lower rank of each head's keys or values does to the last hidden state, and lowers the third that does least."""
    units = [(bases.ranks[i], head) for bases in layers.values() for i in (0, 1) for head in range(len(bases.ranks[i]))]
    for bases in layers.values():
        for ranks, basis in zip(bases.ranks, bases.bases):
            ranks.fill_(basis.shape[-1])
    full = sum(int(ranks[head]) for ranks, head in units)
    if BLOCK * len(units) > budget * full:
        raise ValueError(f"matryoshka: budget: found {budget}, accepted is at least {BLOCK * len(units) / full:g}, "
                         f"which is {BLOCK} coordinates for each head")
    active = False

    def take(seen: Seen):
        return layers[seen.layer].through(seen, layers[seen.layer].bases) if active else None

    def hidden() -> list[Tensor]:
        return [model.base_model(ids, use_cache=False).last_hidden_state.float() for ids in samples]

    with torch.no_grad(), recording(model, take):
        truth = hidden()
        active, kept = True, full
        while kept > budget * full:
            errors = []
            for index, (ranks, head) in enumerate(units):
                if ranks[head] > BLOCK:
                    ranks[head] -= BLOCK
                    errors.append((sum(((h - t).norm() / t.norm()).item() for h, t in zip(hidden(), truth)), index))
                    ranks[head] += BLOCK
            for _, index in sorted(errors)[:max(1, len(errors) // 3)]:
                if kept > budget * full:
                    ranks, head = units[index]
                    ranks[head] -= BLOCK
                    kept -= BLOCK
            progress(f"ranks: {kept / full:.3f} of all coordinates left")
