"""Stores that hold a part of the tokens: `WindowStore` the first and the last ones, `EvictingStore` those that a method
chooses for each head.

Both take the place of the pages inside whatever else a spec nests (`around_pages`), so they see keys as they are held:
after rotary embedding, and projected where a method projects. Positions need no change: a key carries its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .store import HeadGroups, PagedStore, Projected, Shape, Step, Store, Wrapper, merge

BLOCK = 1 << 23  # scores that are in memory at once while attention mass is summed
CHUNK = 1024  # tokens that are summed, or compared with centres, at once


def around_pages(store: Store, name: str, make: Callable[[Shape, Sequence[int]], Store],
                 heads: Sequence[int] | None = None) -> Store:
    """``store`` with ``make(shape, heads)`` in place of its pages; ``heads``: which of the layer's the shape's are.
    ValueError for stores that hold tokens in another way."""
    if type(store) is PagedStore:
        return make(store.shape, range(store.shape.kv_heads) if heads is None else heads)
    if isinstance(store, HeadGroups):
        every = range(store.kv_heads) if heads is None else heads
        store.groups = [(own, around_pages(part, name, make, [every[i] for i in own.tolist()]))
                        for own, part in store.groups]
        return store
    if isinstance(store, Projected) and store.together == 1:
        store.inner = around_pages(store.inner, name, make, heads)
        return store
    raise ValueError(f"{name}: found {type(store).__name__} inside it, accepted are methods that hold tokens in pages "
                     "of one kind, such as kvquant, fireq, smoothattention, matryoshka, or none")


def pages_for(shape: Shape, **changes) -> PagedStore:
    """Pages without 16-bit sinks of their own: what stays here is chosen."""
    return PagedStore(shape.changed(settings=replace(shape.settings, sinks=0), **changes))


# -- attention mass -------------------------------------------------------------------------------------------------


def prompt_mass(step: Step, last: int = 0) -> tuple[Tensor, Tensor]:
    """How much attention each fresh token gets from the step's queries (its own and later ones), and from the ``last``
    of them: float32 ``[batch, kv_heads, tokens]`` each; the query heads of a key head are added. A block of rows of
    the score matrix is in memory at a time."""
    batch, kv_heads, tokens, _ = step.keys.shape
    queries = step.query.shape[2]
    group = step.query.shape[1] // kv_heads
    device = step.query.device
    total, local = (torch.zeros((batch, kv_heads, tokens), dtype=torch.float32, device=device) for _ in range(2))
    rows = max(1, BLOCK // max(1, batch * step.query.shape[1] * tokens))
    cut = max(queries - last, 0)
    query, keys = step.query.float() * step.scale, step.keys.float().transpose(-1, -2)
    real = real_of(step)
    for first in [*range(0, cut, rows), *range(cut, queries, rows)]:
        end = min(first + rows, cut if first < cut else queries)
        width = tokens - queries + end if step.causal else tokens
        block = query[:, :, first:end].unflatten(1, (kv_heads, group))
        scores = block.flatten(2, 3) @ keys[..., :width]  # [batch, kv_heads, group * rows, width]
        scores = scores.unflatten(2, (group, -1))
        if step.softcap:
            scores = step.softcap * (scores / step.softcap).tanh()
        if step.causal:
            own = torch.arange(tokens - queries + first, tokens - queries + end, device=device).view(-1, 1)
            later = torch.arange(width, device=device) > own
            scores.masked_fill_(later, -torch.inf)
        if step.mask is not None:
            mask = step.mask[:, :, first:end, -tokens:][..., :width]
            mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, group))
            scores.masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(-1).nan_to_num_(0)  # a row that sees nothing
        if real is not None and queries == tokens:
            weights.mul_(real[:, None, None, first:end, None])
        found = weights.sum((2, 3))
        total[..., :width] += found
        if first >= cut:
            local[..., :width] += found
    return total, local


def real_of(step: Step) -> Tensor | None:
    """Bool ``[batch, tokens]``: fresh tokens that are no padding; None: all."""
    hidden = step.hidden()
    return None if hidden is None else ~hidden


def attend_few(step: Step, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the step's queries to a handful of entries ``[batch, kv_heads, entries, dim]`` whose scores get
    ``bias [batch, 1, 1, queries or 1, entries]``, in float32: outputs ``[batch, queries, heads, dim]`` and log-sum-exps
    ``[batch, heads, queries]``."""
    kv_heads = keys.shape[1]
    query = step.query.float().unflatten(1, (kv_heads, -1)) * step.scale
    scores = query @ keys.float().unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, group, queries, entries]
    if step.softcap:
        scores = step.softcap * (scores / step.softcap).tanh()
    scores = scores + bias
    total = scores.logsumexp(-1)
    weights = (scores - total.unsqueeze(-1)).exp().nan_to_num(0)
    out = weights @ values.float().unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).to(step.query.dtype), total.flatten(1, 2)


def from_position(step: Step, first: int, before: int = 0) -> Step:
    """The step for a store of ``before`` entries that every query sees, and then positions from ``first`` on."""
    if step.mask is None:
        return step
    skip = first - step.mask_first
    mask, start = (step.mask[..., skip:], 0) if skip > 0 else (step.mask, -skip)
    if before:
        rows = mask.shape[:3]
        mask = torch.cat((mask.new_ones((*rows, before)), mask.new_zeros((*rows, start)), mask), 3)
        start = 0
    return step.changed(mask=mask, mask_first=start)


# -- the first tokens, the last ones, and a mean of the others ------------------------------------------------------


class WindowStore(Wrapper):
    """The first ``sinks`` tokens in 16 bits and the last ``window``, in pages.

    Without ``compensate`` a query sees exactly ``window`` tokens up to its own. With it, whole pages leave once
    ``max(window, seen / ratio)`` newer tokens are held, and an entry takes their place: the mean of their keys and of
    their values, its score raised by the logarithm of their number. Padding counts neither as a sink nor in the mean.
    """

    def __init__(self, shape: Shape, sinks: int, window: int, ratio: float = torch.inf, compensate: bool = False):
        self.sinks, self.window, self.ratio, self.compensate = sinks, window, ratio, compensate
        self.inner = pages_for(shape, window=0 if compensate else window)
        self.skipped = 0  # tokens of the first prompt that never came into pages
        self.keeps = False
        batch, heads, device = shape.batch, shape.kv_heads, shape.device
        self.sink_keys = torch.zeros((batch, heads, sinks, shape.key_dim), dtype=shape.dtype, device=device)
        self.sink_values = torch.zeros((batch, heads, sinks, shape.value_dim), dtype=shape.dtype, device=device)
        self.sink_at = torch.full((batch, sinks), -1, device=device)  # positions; -1: none yet
        self.noted = not sinks  # all are there: known without a look at the device
        self.real: Tensor | None = None  # [batch, tokens held]: no padding; None: all
        self.key_sum = torch.zeros((batch, heads, shape.key_dim), dtype=torch.float64, device=device)
        self.value_sum = torch.zeros((batch, heads, shape.value_dim), dtype=torch.float64, device=device)
        self.count = torch.zeros(batch, dtype=torch.float64, device=device)

    @property
    def seen(self) -> int:
        return self.skipped + self.inner.seen

    @property
    def gone(self) -> int:
        """Tokens that are no longer in pages."""
        return self.skipped + self.inner.pages.first

    def prompt(self, step: Step) -> None:
        real, tokens = real_of(step), step.fresh
        self._note(step, real)
        keys, values = step.keys, step.values
        if self.compensate and not self.keeps and not self.seen:
            leave = max(tokens - self._buffer(tokens), 0)
            self._retire(keys[:, :, :leave], values[:, :, :leave], 0, None if real is None else real[:, :leave])
            self.skipped = leave
            keys, values = keys[:, :, leave:], values[:, :, leave:]
            if self.real is not None:
                self.real = self.real[:, leave:].clone()
        self.inner.append(keys, values)
        self._trim()

    def attend(self, step: Step):
        if self.keeps:
            self._trim()
        if step.fresh:
            self._note(step, real_of(step))
        queries, after = step.query.shape[2], self.seen + step.fresh
        inner = from_position(step, self.skipped)
        first, end = (self.gone, self.gone + 1) if self.compensate else \
            (after - queries - self.window + 1, after - self.window + 1)
        if end <= 1:
            out = self.inner.attend(inner)
        else:
            part = self.inner.attend(inner.changed(log_sum_exp=True))
            out, total = merge([part, attend_few(step, *self._entries(first, end))])
            out = (out, total) if step.log_sum_exp else out
        if not self.keeps:
            self._trim()
        return out

    def _entries(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks that stand before ``first`` to ``end - 1`` (for each query, or one number for all) and the mean: keys,
        values and the bias on their scores."""
        limit = torch.arange(first, end, device=self.sink_at.device)
        seen = (self.sink_at[:, None] >= 0) & (self.sink_at[:, None] < limit.view(1, -1, 1))  # [batch, queries, sinks]
        bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
        keys, values = self.sink_keys, self.sink_values
        if self.compensate:
            mean = self.count.clamp_min(1).view(-1, 1, 1)
            keys = torch.cat((keys.float(), (self.key_sum / mean).float().unsqueeze(2)), 2)
            values = torch.cat((values.float(), (self.value_sum / mean).float().unsqueeze(2)), 2)
            bias = torch.cat((bias, self.count.log().float().view(-1, 1, 1).expand(-1, bias.shape[1], 1)), 2)
        return keys, values, bias[:, None, None]

    def _note(self, step: Step, real: Tensor | None) -> None:
        """Keep fresh tokens that are among the first, and which are padding."""
        tokens, first, device = step.fresh, self.seen, self.sink_at.device
        if self.compensate and (real is not None or self.real is not None):
            before = self.sink_at.new_ones((self.batch, first - self.gone), dtype=torch.bool) if self.real is None \
                else self.real
            fresh = self.sink_at.new_ones((self.batch, tokens), dtype=torch.bool) if real is None else real
            self.real = torch.cat((before, fresh), 1)
        self.noted = self.noted or bool((self.sink_at >= 0).all())
        if self.noted:
            return
        rank = torch.arange(tokens, device=device).expand(self.batch, -1) if real is None else real.cumsum(1) - 1
        rank = rank + (self.sink_at >= 0).sum(1, keepdim=True)
        chosen = rank < self.sinks if real is None else (rank < self.sinks) & real
        rows, columns = chosen.nonzero(as_tuple=True)
        slots = rank[rows, columns]
        self.sink_keys[rows, :, slots] = step.keys[rows, :, columns]
        self.sink_values[rows, :, slots] = step.values[rows, :, columns]
        self.sink_at[rows, slots] = first + columns

    # -- leaving ----------------------------------------------------------------------------------------------------

    def _buffer(self, seen: int) -> int:
        return max(self.window, int(seen / self.ratio))

    def _trim(self) -> None:
        """Free whole pages before the buffer, into the mean."""
        pages = self.inner.pages
        limit = self.seen - self._buffer(self.seen) - self.skipped if self.compensate else 0
        while len(pages.pages) > 1 and pages.first + pages.counts()[0] <= limit:
            tokens = pages.counts()[0]
            keys, values = pages.decode_page(0, torch.float32)
            self._retire(keys, values, self.gone, None if self.real is None else self.real[:, :tokens])
            if self.real is not None:
                self.real = self.real[:, tokens:].clone()
            pages.drop_before(pages.first + tokens)

    def _retire(self, keys: Tensor, values: Tensor, first: int, real: Tensor | None) -> None:
        """Count tokens from position ``first`` on into the mean, unless they are sinks or padding."""
        for at in range(0, keys.shape[2], CHUNK):
            positions = torch.arange(first + at, first + min(at + CHUNK, keys.shape[2]), device=keys.device)
            counted = (positions.view(1, -1, 1) != self.sink_at.unsqueeze(1)).all(2)
            if real is not None:
                counted &= real[:, at:at + CHUNK]
            out = ~counted[:, None, :, None]
            self.key_sum += keys[:, :, at:at + CHUNK].masked_fill(out, 0).sum(2, dtype=torch.float64)
            self.value_sum += values[:, :, at:at + CHUNK].masked_fill(out, 0).sum(2, dtype=torch.float64)
            self.count += counted.sum(1)

    # -- editing ----------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        if self.compensate and tokens > self.seen - self.gone:
            raise RuntimeError(f"crop: {tokens} tokens cannot be removed, because only the last "
                               f"{self.seen - self.gone} are still whole, and earlier ones are a mean")
        self.inner.crop(tokens)
        self.sink_at.masked_fill_(self.sink_at >= self.seen, -1)
        self.noted = not self.sinks
        if self.real is not None:
            self.real = self.real[:, :self.seen - self.gone]

    def select(self, sequences: list[int]) -> None:
        self.inner.select(sequences)
        for name in ("sink_keys", "sink_values", "sink_at", "real", "key_sum", "value_sum", "count"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[sequences])

    def record_past(self) -> None:
        self.keeps = True
        self.inner.record_past()

    @property
    def held(self) -> int:
        apart = int(((self.sink_at >= 0) & (self.sink_at < self.gone)).sum(1).max()) if self.sinks else 0
        return self.inner.held + apart + bool(self.compensate and self.gone)

    @property
    def nbytes(self) -> int:
        own = (self.sink_keys, self.sink_values, self.sink_at, self.real, self.key_sum, self.value_sum, self.count)
        return self.inner.nbytes + sum(t.untyped_storage().nbytes() for t in own if t is not None)

    @property
    def kernel(self) -> str:
        return f"{self.sinks} first and last {self._buffer(self.seen)}{' and a mean' if self.compensate else ''}, " \
               f"{self.inner.kernel}"


# -- entries that a method chooses ----------------------------------------------------------------------------------


@dataclass
class Entries:
    """What heads hold: ``keys``, ``values [batch, kv_heads, entries, dim]``; float32 ``[batch, kv_heads, entries]`` are
    the ``count`` of tokens that an entry stands for (0: padding), the attention ``total`` that it got, and ``local``,
    that of the last queries."""

    keys: Tensor
    values: Tensor
    count: Tensor
    total: Tensor
    local: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Entries":
        return Entries(*(function(getattr(self, name)) for name in ("keys", "values", "count", "total", "local")))

    def take(self, index: Tensor) -> "Entries":
        """Entries ``index [batch, kv_heads, n]`` of each head."""
        return self.map(lambda t: t.gather(2, index) if t.dim() == 3 else take_rows(t, index))

    def part(self, first: int, end: int | None = None) -> "Entries":
        return self.map(lambda t: t[:, :, first:end])

    def then(self, other: "Entries") -> "Entries":
        return Entries(*(torch.cat((getattr(self, name), getattr(other, name)), 2)
                         for name in ("keys", "values", "count", "total", "local")))


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [batch, heads, n]`` of ``x [batch, heads, rows, dim]``."""
    return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Indices of the ``number`` largest of the last dimension, in the order they stand in, and those of the others;
    of equal ones the later."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = scores.shape[-1] - 1 - order
    return order[..., :number].sort(-1).values, order[..., number:].sort(-1).values


class EvictingStore(Wrapper):
    """At most ``budget`` entries of each head, between ``slack`` and none more while tokens come: then ``compress``
    makes ``budget`` of them. The last ``window`` tokens stay whole in all heads.

    Each step adds the attention mass that entries get to their scores; `Entries.local` counts the queries since the
    last compression, or the last ``last`` ones of a longer step.
    """

    def __init__(self, shape: Shape, budget: int, window: int, slack: int, last: int,
                 compress: Callable[[Entries], Entries]):
        self.shape = shape.changed(biased=True)
        self.budget, self.window, self.slack, self.last, self.compress = budget, window, slack, last, compress
        self.inner = pages_for(self.shape)
        self.whole = self.tokens = 0  # last entries that are one token in all heads; all tokens so far
        self.keeps = False
        none = torch.zeros((3, shape.batch, shape.kv_heads, 0), device=shape.device)
        self.count, self.total, self.local = none.unbind(0)

    @property
    def seen(self) -> int:
        return self.tokens

    def prompt(self, step: Step) -> None:
        mass = prompt_mass(step, self.last)
        fresh = Entries(step.keys, step.values, self._counts(step), *mass)
        if not self.tokens and step.fresh > self.budget + self.slack and step.query.shape[2] and not self.keeps:
            self._hold(self.compress(fresh))  # before anything is packed
            self.tokens, self.whole = step.fresh, self.window
            return
        self.inner.append(step.keys, step.values, fresh.count.log())
        self._add(step, fresh.count)
        self.total[:, :, -step.fresh:] += mass[0]
        self.local[:, :, -step.fresh:] += mass[1]

    def attend(self, step: Step):
        if self.keeps:
            self._trim()
        before = self.inner.held - self.whole
        inner = from_position(step, self.tokens - self.whole, before).changed(log_sum_exp=True)
        out, total = self.inner.attend(inner)
        if step.fresh:
            self._add(step, self._counts(step))
        self._count_mass(inner, total)
        if not self.keeps:
            self._trim()
        return (out, total) if step.log_sum_exp else out

    def _counts(self, step: Step) -> Tensor:
        real = real_of(step)
        counts = torch.ones((self.batch, self.shape.kv_heads, step.fresh), device=self.shape.device)
        return counts if real is None else counts * real[:, None]

    def _add(self, step: Step, counts: Tensor) -> None:
        self.count = torch.cat((self.count, counts), 2)
        self.total, self.local = (torch.nn.functional.pad(t, (0, step.fresh)) for t in (self.total, self.local))
        self.tokens += step.fresh
        self.whole += step.fresh

    def _count_mass(self, step: Step, log_sum_exp: Tensor) -> None:
        """Add what the entries got from the queries of this step; of a long one, `local` has only the last queries."""
        queries = step.query.shape[2]
        cut = max(queries - self.last, 0) if self.last else 0
        for first, end in ((0, cut), (cut, queries)):
            if first < end:
                mask = None if step.mask is None else step.mask[:, :, first:end]
                mass = self.inner.pages.mass(step.query[:, :, first:end], log_sum_exp[:, :, first:end], step.scale,
                                             self.inner.held - queries + first, step.causal, 0, step.softcap, mask,
                                             step.mask_first)
                self.total += mass
                self.local = self.local + mass if first == 0 else mass

    def _trim(self) -> None:
        held = self.inner.held
        if held <= self.budget + self.slack:
            return
        keys, values = self.inner.decode(torch.float32)
        self._hold(self.compress(Entries(keys, values, self.count, self.total, self.local)))
        self.whole = self.window

    def _hold(self, entries: Entries) -> None:
        self.inner = pages_for(self.shape)
        dtype = self.shape.dtype
        self.inner.append(entries.keys.to(dtype), entries.values.to(dtype), entries.count.log())
        self.count, self.total = entries.count.contiguous(), entries.total.contiguous()
        self.local = torch.zeros_like(self.total)

    # -- editing ----------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        if tokens > self.whole:
            raise RuntimeError(f"crop: {tokens} tokens cannot be removed, because only the last {self.whole} are still "
                               "whole; call activate_past_recording() first to keep those of a step until the next")
        self.inner.crop(tokens)
        self.tokens -= tokens
        self.whole -= tokens
        self.count, self.total, self.local = (t[:, :, :t.shape[2] - tokens] for t in
                                              (self.count, self.total, self.local))

    def select(self, sequences: list[int]) -> None:
        self.inner.select(sequences)
        self.shape = self.shape.changed(batch=len(sequences))
        self.count, self.total, self.local = (t[sequences] for t in (self.count, self.total, self.local))

    def record_past(self) -> None:
        self.keeps = True

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + sum(t.untyped_storage().nbytes() for t in (self.count, self.total, self.local))

    @property
    def kernel(self) -> str:
        return f"at most {self.budget} of a head, {self.inner.kernel}"
