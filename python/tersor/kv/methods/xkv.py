"""xKV (Chang et al., 2025, arXiv 2503.18893): the prompt's keys and values of neighbouring layers in one shared basis
of tokens, found for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attention import FEW_QUERIES
from ..bases import beside, refuse_rope
from ..devices import chosen
from ..latent import (Decoder, append_features, attend_features, chunk_tokens, decode_features, feature_heads,
                      feature_pages, read_features, refuse_static, rotary_offsets, split_ranks, tail_mask)
from ..pages import Pages
from ..rotary import Rotary
from ..settings import Settings
from ..store import Inner, PagedStore, Shape, Step, Store, merge
from .base import CacheMethod, register_cache_method


@register_cache_method("xkv")
@dataclass(frozen=True)
class XKV(CacheMethod):
    """``layers`` neighbouring layers share a basis; ``keys`` and ``values`` are its ranks as a share of their channels
    together, rounded up to multiples of 16. Layers with a sliding window stay as they are, and do not count as
    neighbours.

    When the last layer of a group has its prompt, the keys of all (before rotary embedding), side by side as ``[tokens,
    channels]``, are cut to their leading singular directions: a token keeps one feature vector for all layers, and each
    layer a matrix that takes it back. Values likewise. Features are stored in the bits of the spec, tokens after the
    prompt as the rest of the spec says. A prompt too short to gain by it stays whole. Each sequence has a basis of its
    own, padding excluded. In latent attention the latent vectors count as keys, and the rotary part as values.
    """

    layers: int = 4
    keys: float = 0.125
    values: float = 0.1875

    rotary: ClassVar[bool] = True
    cuda: ClassVar[bool] = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        refuse_rope(settings, self.name)
        if self.layers < 1:
            raise ValueError(f"{self.name}: layers: found {self.layers}, accepted is 1 or more")
        for part, share in (("keys", self.keys), ("values", self.values)):
            if not 0 < share <= 1:
                raise ValueError(f"{self.name}: {part}: found {share}, accepted is above 0 and at most 1")

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        if shape.window:
            return inner(shape)
        refuse_rope(shape.settings, f"{self.name}: layer {shape.layer}")
        refuse_static(shape, self.name)
        groups: list[LayerGroup] = shape.shared.setdefault(self.name, [])
        if not groups or groups[-1].done or len(groups[-1].members) == self.layers:
            groups.append(LayerGroup(self, inner))
        return groups[-1].join(shape, inner(shape))


@dataclass
class Prompt:
    """A layer's prompt until its group is complete: ``keys``, ``values [batch, kv_heads, tokens, dim]`` as they came,
    bool ``hidden [batch, tokens]`` or None, and whether keys are of latent attention, which no rotation touched."""

    keys: Tensor
    values: Tensor
    hidden: Tensor | None
    latent: bool

    @property
    def nbytes(self) -> int:
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()


class LayerGroup:
    """Layers that share features: ``pages`` once their prompts are in, which are then forgotten."""

    def __init__(self, method: XKV, inner: Inner):
        self.method, self.inner = method, inner
        self.members: list[SharedFeatures] = []
        self.pages: Pages | None = None
        self.done = False

    def join(self, shape: Shape, tail: Store) -> "SharedFeatures":
        if self.members:
            first = self.members[0].shape
            if (first.kv_heads, first.key_dim, first.value_dim) != (shape.kv_heads, shape.key_dim, shape.value_dim):
                raise ValueError(
                    f"xkv: layer {shape.layer}: found {shape.kv_heads} heads with keys of {shape.key_dim} and values "
                    f"of {shape.value_dim}, accepted is what layer {first.layer} of its group has: {first.kv_heads}, "
                    f"{first.key_dim} and {first.value_dim}; layers=1 shares nothing")
        self.members.append(SharedFeatures(self, shape, tail))
        return self.members[-1]

    @property
    def complete(self) -> bool:
        return len(self.members) == self.method.layers and all(m.waiting is not None for m in self.members)

    def finish(self) -> None:
        """Features in place of the prompts of all members."""
        if self.done:
            return
        self.done = True
        members = [m for m in self.members if m.waiting is not None]
        if not members:
            return
        prompts = [m.waiting for m in members]
        tokens, first = prompts[0].keys.shape[2], members[0]
        if any(p.keys.shape != prompts[0].keys.shape for p in prompts):
            raise RuntimeError(f"xkv: layers {', '.join(str(m.shape.layer) for m in members)}: found prompts of "
                               "different lengths, accepted are equal ones")
        channels = [len(members) * first.shape.kv_heads * dim for dim in (first.shape.key_dim, first.shape.value_dim)]
        _, *ranks = split_ranks(*(min(round(share * c), c, tokens) for share, c in
                                      zip((self.method.keys, self.method.values), channels)))
        if not self.gains(tokens, channels, ranks):
            for member in members:
                member.keep_whole()
            return
        self.pages = feature_pages("xkv", first.shape, *ranks, self.inner)
        shared, own = [], []
        for part, rank in zip(("keys", "values"), ranks):
            found = [shared_basis(torch.cat([m.flat(part, row) for m in members], 1), rank)
                     for row in range(len(prompts[0].keys))]
            features, matrices = (torch.stack(t) for t in zip(*found))
            shared.append(features)
            own.append(matrices.to(first.shape.dtype).chunk(len(members), -1))
        append_features(self.pages, *shared)
        for i, member in enumerate(members):
            member.take_features(own[0][i].contiguous(), own[1][i])

    def gains(self, tokens: int, channels: list[int], ranks: list[int]) -> bool:
        """Whether features and matrices are smaller than keys and values in the bits of the spec."""
        shape = self.members[0].shape
        heads, *dims = feature_heads(shape.device, *ranks)
        wide = 8 * shape.dtype.itemsize
        bits = [b if b < 16 else wide for b in (shape.settings.key_bits, shape.settings.value_bits)]
        return sum(tokens * heads * d * b + r * c * wide for d, r, c, b in zip(dims, ranks, channels, bits)) \
            < sum(tokens * c * b for c, b in zip(channels, bits))

    def selected(self) -> None:
        """Let go of sequences that no layer reads any more, once all layers agree on what they read."""
        readers = [m for m in self.members if m.decoder is not None]
        rows = readers[0].rows
        if all(m.rows == rows for m in readers):
            self.pages.select(rows)
            for member in readers:
                member.rows = list(range(len(rows)))


def shared_basis(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of ``features [tokens, rank]`` (singular vectors times singular values) and an orthonormal
    ``[rank, channels]`` for ``x [tokens, channels]``, in float32. Ranks beyond the tokens or channels are zero."""
    wide = x.double()
    tokens, channels = x.shape
    if channels <= tokens:
        directions = torch.linalg.eigh(wide.T @ wide)[1].flip(-1)[:, :rank].T
    else:
        energies, vectors = torch.linalg.eigh(wide @ wide.T)
        values = energies.flip(-1)[:rank].clamp_min(0).sqrt().unsqueeze(-1)
        directions = vectors.flip(-1)[:, :rank].T @ wide
        directions = torch.where(values > 1e-7 * values.max(), directions / values.clamp_min(1e-300), 0)
    directions = torch.nn.functional.pad(directions, (0, 0, 0, rank - len(directions)))
    return (wide @ directions.T).float(), directions.float()


class SharedFeatures(Store):
    """One layer of a group: the prompt as features that the group holds, and what came after in ``tail``. Only the tail
    leaves a GPU: features are read by the next layer at once."""

    def __init__(self, group: LayerGroup, shape: Shape, tail: Store):
        self.group, self.shape, self.tail = group, shape, tail
        self.waiting: Prompt | None = None
        self.whole: Prompt | None = None  # for a model that computes with its prompt's keys still in this pass
        self.offsets: Tensor | None = None
        self.decoder: Decoder | None = None
        self.rows = list(range(shape.batch))
        self.tokens = 0  # of the prompt

    @property
    def first(self) -> bool:
        return self.group.members[0] is self

    @property
    def seen(self) -> int:
        return self.tokens + self.tail.seen

    @property
    def batch(self) -> int:
        return self.tail.batch

    def prompt(self, step: Step) -> None:
        if self.seen or self.group.done:
            self._settle()
            self.tail.prompt(tail_mask(step, self.tokens))
            return
        latent = not step.query.shape[2]
        self.offsets = rotary_offsets("xkv", self.shape.layer, step, 0, None)
        self.waiting, self.tokens = Prompt(step.keys, step.values, step.hidden(), latent), step.fresh
        self.whole = self.waiting if latent else None
        if self.group.complete:
            self.group.finish()

    def attend(self, step: Step):
        if not self.seen and step.fresh > FEW_QUERIES:  # softcap or sinks, which a first prompt is not read apart for
            exact = PagedStore(self.shape.changed(settings=Settings(16, 16), rotary=None))
            out = exact.attend(step)
            self.prompt(step)
            return out
        self._settle()
        if not self.tokens:
            return self.tail.attend(step)
        late = self.tail.attend(tail_mask(step, self.tokens).changed(log_sum_exp=True))
        early = attend_features(step, self._read(), self.decoder, self.offsets)
        out = merge([late, early])
        return out if step.log_sum_exp else out[0]

    def _read(self, dtype: torch.dtype = torch.float32):
        return read_features(self.group.pages, self.tokens, self.rows, dtype, chunk_tokens(self.shape))

    def _settle(self) -> None:
        self.whole = None
        if self.waiting is not None:
            self.group.finish()

    # -- what the group calls -----------------------------------------------------------------------------------------

    @property
    def rotary(self) -> Rotary | None:
        return None if self.waiting.latent else self.shape.rotary

    def flat(self, part: str, row: int) -> Tensor:
        """Keys before rotary embedding, or values, of one sequence, float32 ``[tokens, channels]``; padding is zero."""
        x = getattr(self.waiting, part)[row:row + 1].float()
        if part == "keys" and self.rotary is not None:
            places = torch.arange(x.shape[2], device=x.device)
            x = self.rotary.turn(x, places + self.offsets[row], back=True)
        x = beside(x)[0]
        return x if self.waiting.hidden is None else x.masked_fill(self.waiting.hidden[row].unsqueeze(-1), 0)

    def take_features(self, keys: Tensor, values: Tensor) -> None:
        heads = self.shape.kv_heads
        values = values.unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
        self.decoder = Decoder(heads, keys, values, rotary=self.rotary)
        self.waiting = None

    def keep_whole(self) -> None:
        prompt, self.waiting, self.tokens = self.waiting, None, 0
        empty = prompt.keys.new_empty((*prompt.keys.shape[:2], 0, prompt.keys.shape[3]))
        self.tail.prompt(Step(empty, prompt.keys, prompt.values, 1.0))

    # -- editing ------------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        self._settle()
        last = min(tokens, self.tail.seen)
        self.tail.crop(last)
        self.tokens -= min(tokens - last, self.tokens)

    def select(self, sequences: list[int]) -> None:
        self._settle()
        self.tail.select(sequences)
        if self.offsets is not None:
            self.offsets = chosen(self.offsets, sequences)
        if self.decoder is not None:
            self.decoder.select(sequences)
            self.rows = [self.rows[s] for s in sequences]
            self.group.selected()

    def within(self) -> Sequence[Store]:
        return (self.tail,)

    def record_past(self) -> None:
        self.tail.record_past()

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        self._settle()
        late = self.tail.decode(dtype)
        if not self.tokens:
            return late
        early = decode_features(self._read(dtype if dtype is torch.float64 else torch.float32), self.decoder,
                                self.offsets, dtype)
        return tuple(torch.cat(pair, 2) for pair in zip(early, late))

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.whole is not None:
            return self.whole.keys, self.whole.values
        return None if self.shape.settings.packs else self.decode(dtype)

    @property
    def held(self) -> float:
        return self.tokens + self.tail.held

    @property
    def nbytes(self) -> int:
        held = {id(p): p.nbytes for p in (self.waiting, self.whole) if p is not None}
        shared = self.group.pages.nbytes if self.first and self.group.pages is not None else 0
        return sum(held.values()) + shared + self.tail.nbytes + (0 if self.decoder is None else self.decoder.nbytes)

    @property
    def bits(self) -> float:
        return self.tail.bits

    @property
    def kernel(self) -> str:
        if self.decoder is None:
            return self.tail.kernel
        ranks = self.decoder.keys.shape[1], self.decoder.values.shape[2]
        return f"features of {len(self.group.members)} layers of rank {ranks[0]} and {ranks[1]}, {self.tail.kernel}"
