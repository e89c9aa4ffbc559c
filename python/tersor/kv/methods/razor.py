"""RazorAttention (arXiv 2407.15891): heads that look things up keep all, others a window and one token for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..eviction import BLOCK, WindowStore, around_pages
from ..record import Seen, recording
from ..settings import Settings
from ..store import HeadGroups, Inner, PagedStore, Shape, Store
from .base import CacheMethod, register_cache_method


@register_cache_method("razor")
@dataclass(frozen=True)
class Razor(CacheMethod):
    """Retrieval heads keep every token: the share ``retrieval`` of all key heads of the model that induce most, and the
    share ``echo`` that echo most, on random tokens repeated ``repeats`` times. All other heads keep ``sinks`` first
    tokens, the last ``max(window, seen / ratio)``, and for the N tokens between one that stands for them: the mean of
    their keys and of their values, log N on its score (``compensate``).

    Calibration needs no data: ``tokens`` random ids, as many as the model has positions and ids for. Layers with a
    sliding window have no part in it.
    """

    retrieval: float = 0.14
    echo: float = 0.01
    sinks: int = 4
    window: int = 4000
    ratio: float = 5.0
    tokens: int = 2500
    repeats: int = 4
    seed: int = 0
    compensate: bool = True

    calibrated = True
    data = False
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        for name in ("retrieval", "echo"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"razor: {name}: found {getattr(self, name)}, accepted is a share of 0 to 1")
        for name, least in (("sinks", 0), ("window", 1), ("ratio", 1), ("tokens", 16), ("repeats", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"razor: {name}: found {getattr(self, name)}, accepted is {least} or more")
        if not full_layers(model):
            raise ValueError(f"razor: found {type(model).__name__} with sliding windows in all layers, accepted is a "
                             "model with layers of full attention")

    # -- which heads ------------------------------------------------------------------------------------------------

    def learn(self, model: nn.Module, batches, settings: Settings, progress) -> dict[int, dict[str, Tensor]]:
        ids = self.sequence(model).to(model.device)
        layers = set(full_layers(model))
        found: dict[int, dict[str, Tensor]] = {}

        def take(seen: Seen) -> None:
            if seen.layer in layers:
                induction, echo = head_scores(seen.query, seen.key, seen.scale, ids[0], self.repeats)
                found[seen.layer] = {"induction": induction, "echo": echo}
                progress(f"layer {seen.layer}: most induction {induction.max():.3f}, most echo {echo.max():.3f}")

        with torch.no_grad(), recording(model, take):
            model.base_model(ids, use_cache=False)
        if set(found) != layers:
            raise ValueError(f"razor: found {type(model).__name__}, whose layers {sorted(layers - set(found))} have no "
                             "attention of transformers' interface, accepted is a model where all have")
        chosen = self.choose(found)
        for layer, tensors in found.items():
            tensors["retrieval"] = torch.tensor([(layer, head) in chosen for head in range(len(tensors["echo"]))])
        return found

    def sequence(self, model: nn.Module) -> Tensor:
        """Ids ``[1, 1 + repeats * tokens]``: a beginning, then the same random tokens again and again."""
        config = model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or 1 << 30
        special = {i for name in ("bos_token_id", "eos_token_id", "pad_token_id")
                   for i in torch.tensor(getattr(config, name, None) or 0).flatten().tolist()}
        usable = torch.tensor([i for i in range(config.vocab_size) if i not in special])
        count = min(self.tokens, (positions - 1) // self.repeats, len(usable))
        if count < 16:
            raise ValueError(f"razor: found {positions} positions and {len(usable)} ids, accepted is a model with room "
                             f"for 16 different tokens, {self.repeats} times")
        generator = torch.Generator().manual_seed(self.seed)
        block = usable[torch.randperm(len(usable), generator=generator)[:count]]
        first = torch.tensor([config.bos_token_id if isinstance(config.bos_token_id, int) else 0])
        return torch.cat((first, block.repeat(self.repeats))).unsqueeze(0)

    def choose(self, scores: dict[int, dict[str, Tensor]]) -> set[tuple[int, int]]:
        """Layer and key head of those that keep all: the first in both rankings, of all layers together."""
        heads = [(layer, head) for layer in sorted(scores) for head in range(len(scores[layer]["echo"]))]
        kept: set[tuple[int, int]] = set()
        for name, share in (("induction", self.retrieval), ("echo", self.echo)):
            ranked = sorted(heads, key=lambda at: -scores[at[0]][name][at[1]].item())
            kept.update(ranked[:round(share * len(heads))])
        return kept

    def describe(self, tensors: dict[int, dict[str, Tensor]]) -> str:
        lines = []
        for layer in sorted(tensors):
            heads = tensors[layer]["retrieval"].nonzero().flatten().tolist()
            if heads:
                lines.append(f"layer {layer} keeps all of " + ", ".join(
                    f"head {h} (induction {tensors[layer]['induction'][h]:.3f}, echo {tensors[layer]['echo'][h]:.3f})"
                    for h in heads))
        return "\n".join(lines) or "no head keeps all"

    # -- the cache --------------------------------------------------------------------------------------------------

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)  # forgets by itself
        whole = tensors["retrieval"].tolist()
        return around_pages(inner(shape), self.name, lambda own, heads: self.split(own, [whole[h] for h in heads]))

    def split(self, shape: Shape, whole: Sequence[bool]) -> Store:
        """Pages for the heads that keep all, a window for the others."""
        groups = []
        for keeps in (True, False):
            heads = [h for h, own in enumerate(whole) if own == keeps]
            if heads:
                part = shape.changed(kv_heads=len(heads))
                groups.append((heads, PagedStore(part) if keeps else WindowStore(
                    part, self.sinks, self.window, self.ratio, self.compensate)))
        return groups[0][1] if len(groups) == 1 else HeadGroups(groups, shape.kv_heads)


def full_layers(model: nn.Module) -> list[int]:
    """Layers of the model whose attention sees everything."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def head_scores(query: Tensor, key: Tensor, scale: float, ids: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
    """Induction and echo of each key head ``[kv_heads]``, the largest of its query heads.

    ``query [1, heads, tokens, dim]`` and ``key [1, kv_heads, tokens, dim]`` of ``ids [tokens]``: one token and then
    ``repeats`` equal blocks. The echo of a position is the attention that it pays to all earlier tokens of its id, its
    induction what it pays to the tokens after those; both averaged over all blocks but the first. A block of rows of
    the score matrix is in memory at a time.
    """
    heads, tokens, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    block = (tokens - 1) // repeats
    query = query[0].float().unflatten(0, (kv_heads, -1)) * scale  # [kv_heads, group, tokens, dim]
    key = key[0].float().transpose(-1, -2).unsqueeze(1)
    sums = torch.zeros((heads, 2), dtype=torch.float64)
    rows = max(1, BLOCK // (heads * tokens))
    at = torch.arange(tokens, device=ids.device)
    for first in range(1 + block, tokens, rows):
        end = min(first + rows, tokens)
        scores = query[:, :, first:end] @ key[..., :end]
        own = at[first:end, None]
        weights = scores.masked_fill_(at[:end] > own, -torch.inf).softmax(-1)
        earlier = (ids[:end] == ids[first:end, None]) & (at[:end] < own)
        after = torch.nn.functional.pad(earlier[:, :-1], (1, 0))
        sums += (weights.flatten(2).flatten(0, 1) @ torch.stack((after, earlier), -1).flatten(0, 1).float()).cpu()
    induction, echo = (sums / (tokens - 1 - block)).view(kv_heads, -1, 2).amax(1).float().unbind(-1)
    return induction, echo
