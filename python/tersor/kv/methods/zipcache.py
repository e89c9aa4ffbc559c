"""ZipCache (arXiv 2405.14256): tokens that attention dwells on get more bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..blocks import BlockStore
from ..devices import chosen, staged
from ..settings import BITS, Settings
from ..store import Inner, Shape, Step, Store, make_layout, page_format
from .base import CacheMethod, register_cache_method


@register_cache_method("zipcache")
@dataclass(frozen=True)
class ZipCache(CacheMethod):
    """The ``unimportant`` share of tokens of each key head is stored in ``low_bits``, the others in the spec's bits;
    keys per channel, values token by token over channels that are brought to one size first ("channel-separable").

    How important a token is: the attention it gets from probes (the last ``recent_probes`` and a random
    ``random_probes`` of the prompt's queries) over how many probes can see it (``normalise``; the released code leaves
    the sum). While decoding, tokens wait in 16 bits until ``gap`` of them are there, and are judged by a like share of
    the queries that came meanwhile.
    """

    low_bits: int = 2
    unimportant: float = 0.4
    recent_probes: float = 0.05
    random_probes: float = 0.05
    gap: int = 100
    normalise: bool = True

    innermost = True
    cuda = True

    def check(self, model: nn.Module, settings: Settings) -> None:
        bits = settings.key_bits, settings.value_bits
        if self.low_bits not in BITS or max(bits) > 8 or self.low_bits >= min(bits):
            raise ValueError(f"zipcache: found {settings.name} with low_bits={self.low_bits}, accepted are 8, 4 or 3 "
                             "bits and fewer low_bits (4, 3, 2)")
        for name in ("unimportant", "recent_probes", "random_probes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"zipcache: {name}: found {getattr(self, name)}, accepted is 0 to 1")
        if self.gap < 1:
            raise ValueError(f"zipcache: gap: found {self.gap}, accepted is 1 or more")

    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        return ZipStore(shape.changed(settings=replace(shape.settings, values="separable"), biased=True), self)

    def unimportant_pages(self, pages: int) -> int:
        """Of so many packed pages in all."""
        return int(self.unimportant * pages + 0.5)


class ZipStore(BlockStore):
    def __init__(self, shape: Shape, method: ZipCache):
        low = replace(shape.settings, key_bits=method.low_bits, value_bits=method.low_bits)
        super().__init__(shape, make_layout(shape, page_format(shape), page_format(shape, low)), method.gap)
        self.method, self.low_pages = method, 0
        self.mass: Tensor | None = None  # of the raw tokens: [batch, kv_heads, tokens]
        self.probes: Tensor | None = None  # how many could see each: [tokens]
        self.generator = torch.Generator().manual_seed(shape.layer)

    def prompt(self, step: Step) -> None:
        hidden = step.hidden()
        bias = None
        if hidden is not None:
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -math.inf).unsqueeze(1)
            bias = bias.expand(-1, self.shape.kv_heads, -1)
        self.pages.append(step.keys, step.values, bias)
        tokens = step.fresh
        if step.query.shape[2] == tokens:
            last = max(1, math.ceil(self.method.recent_probes * tokens))
            few = int(self.method.random_probes * (tokens - last))
            early = torch.randperm(max(1, tokens - last), generator=self.generator)[:few].sort().values
            self._judge(step, torch.cat((early, torch.arange(tokens - last, tokens))))
        self.settle(step)

    def attend(self, step: Step):
        # Order and padding are in the pages: what is older than this step is seen, or hidden by its bias.
        if step.mask is not None and step.mask.shape[-1] > step.fresh:
            step = step.changed(mask=None, causal=True)
        tokens = self.pages.tokens
        out = self.attend_pages(step)
        # As for a prompt, a share of the queries judges, and always the one before a block is packed.
        share = self.method.recent_probes + self.method.random_probes
        due = self.raw - self.shape.settings.recent >= self.block
        if step.fresh and (due or torch.rand(1, generator=self.generator).item() < share):
            self._judge(step, torch.arange(tokens, tokens + step.fresh)[-step.query.shape[2]:])
        self.settle(step)
        return out

    def _judge(self, step: Step, positions: Tensor) -> None:
        """Add what the queries at ``positions`` give to the raw tokens."""
        total, queries = self.pages.tokens, step.query.shape[2]
        device = step.query.device
        query = step.query.index_select(2, staged((positions - (total - queries)).tolist(), torch.int64, device))
        _, score = self.pages.attend(query, None, None, step.scale, True, 0, step.softcap, step.sinks,
                                     log_sum_exp=True, positions=positions)
        mass = self.pages.mass(query, score, step.scale, softcap=step.softcap, positions=positions)[:, :, self.packed:]
        seen = len(positions) - torch.searchsorted(positions, torch.arange(self.packed, total))
        seen = staged(seen.tolist(), torch.int64, device)
        if self.mass is not None:
            more = total - self.packed - self.mass.shape[2]
            mass = mass + nn.functional.pad(self.mass, (0, more))
            seen = seen + nn.functional.pad(self.probes, (0, more))
        self.mass, self.probes = mass, seen

    def pack(self, keys: Tensor, values: Tensor, bias: Tensor | None, tokens: int) -> None:
        page = self.layout.page_tokens
        pages = (self.packed + tokens) // page
        low = min(self.method.unimportant_pages(pages) - self.low_pages, tokens // page)
        score = torch.zeros(keys.shape[:3], device=keys.device) if self.mass is None else self.mass[:, :, :tokens]
        if self.mass is not None:
            if self.method.normalise:
                score = score / self.probes[:tokens].clamp_min(1)
            self.mass, self.probes = self.mass[:, :, tokens:].clone(), self.probes[tokens:].clone()
        order = score.argsort(dim=-1, stable=True)
        self.low_pages += low
        for kind, places in ((1, order[:, :, low * page:]), (2, order[:, :, :low * page])):
            if places.shape[2]:
                places = places.sort(-1).values
                part = [t.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])) for t in (keys, values)]
                self.pages.append_packed(*part, kind, None if bias is None else bias.gather(2, places))

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        if self.mass is not None:
            keep = max(0, self.mass.shape[2] - tokens)
            self.mass, self.probes = self.mass[:, :, :keep], self.probes[:keep]

    def select(self, sequences: list[int]) -> None:
        super().select(sequences)
        if self.mass is not None:
            self.mass = chosen(self.mass, sequences)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + sum(t.nbytes for t in (self.mass, self.probes) if t is not None)
