"""`Pages`: one layer's keys and values as a list of pages, and attention over them.

A sequence is the concatenation of its pages. The last page is raw (as the model computes) and takes fresh tokens; a
full page is packed once enough newer tokens follow it, and never touched again: history is not requantized, and pages
can be shared by sequences. Which row of a page a sequence reads stands in the table alone, so beam search reorders the
table and copies only the page that is still written.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from ..op_checks import fail
from ..ops_kv import (NO_MASK, NO_STRIDES, check_options, check_query, check_tokens, mask_strides, native)
from .layout import Layout

_threads = torch.get_num_threads


@dataclass
class Page:
    memory: Tensor  # uint8 [rows, kv_heads, bytes]
    packed: bool
    rows: list[int]  # of each sequence

    def addresses(self) -> list[int]:
        start, step = self.memory.data_ptr(), self.memory.stride(0)
        return [start + row * step for row in self.rows]

    @property
    def exclusive(self) -> bool:
        """Whether each sequence has a row of its own, and no row is left over."""
        return self.rows == list(range(len(self.memory)))


class Pages:
    """``layout`` for ``batch`` sequences. The first ``sink_pages`` stay raw, and so do the last ``recent`` tokens."""

    def __init__(self, layout: Layout, batch: int, recent: int = 0, sink_pages: int = 0):
        self.layout, self.recent, self.sink_pages = layout, recent, sink_pages
        self.pages: list[Page] = []
        self.first = 0  # position of the first token held: earlier ones have left a sliding window
        self.tokens = 0  # tokens held
        self.settled = 0  # pages that need no more looking at: packed, or raw for good
        self._start(batch)

    def _start(self, batch: int) -> None:
        self.batch, self.stride = batch, batch + 2
        self.table = array("q")
        self.native = native(self.layout, batch)
        self._publish()

    def _publish(self) -> None:
        self.native.set_table(self.table.buffer_info()[0], len(self.pages))

    @property
    def nbytes(self) -> int:
        return sum(page.memory.untyped_storage().nbytes() for page in self.pages) + 8 * len(self.table)

    def counts(self) -> list[int]:
        """Tokens in each page."""
        return list(self.table[::self.stride])

    # -- growing ----------------------------------------------------------------------------------------------------

    def _add(self, packed: bool, tokens: int) -> Page:
        memory = torch.empty((self.batch, self.layout.kv_heads, self.layout.page_bytes(packed)), dtype=torch.uint8)
        page = Page(memory, packed, list(range(self.batch)))
        self.pages.append(page)
        self.table.extend([tokens, int(packed), *page.addresses()])
        return page

    def _make_room(self, tokens: int, pack: bool) -> tuple[int, int]:
        """Pages for ``tokens`` more, counted as if they were written; page and slot of the first. With ``pack``, full
        pages that are old enough become packed ones at once."""
        limit, index, slot = self.layout.page_tokens, len(self.pages), 0
        if self.pages and not self.pages[-1].packed and self.table[-self.stride] < limit:
            index, slot = index - 1, self.table[-self.stride]
            if not self.pages[-1].exclusive:
                self._own(self.pages[-1])
            taken = min(limit - slot, tokens)
            self.table[-self.stride] = slot + taken
            self.tokens += taken
            tokens -= taken
        if tokens:
            self.tokens += tokens
            pack = pack and self.layout.packs
            while tokens:
                count = min(limit, tokens)
                tokens -= count
                self._add(pack and count == limit and tokens >= self.recent and len(self.pages) >= self.sink_pages,
                          count)
            self._publish()
        return index, slot

    def _own(self, page: Page) -> None:
        page.memory = page.memory[page.rows]
        page.rows = list(range(self.batch))
        self.table[-self.batch:] = array("q", page.addresses())

    def _settle(self) -> None:
        """Pack the full pages that are old enough."""
        counts = self.table[self.settled * self.stride::self.stride]
        later = sum(counts)
        for count in counts:
            index, page = self.settled, self.pages[self.settled]
            later -= count
            if not page.packed:
                if later < self.recent or count < self.layout.page_tokens and index == len(self.pages) - 1:
                    return
                if self.layout.packs and count == self.layout.page_tokens and index >= self.sink_pages:
                    self._pack(index)
            self.settled += 1

    def _pack(self, index: int) -> None:
        raw = self.pages[index].addresses()
        memory = torch.empty((self.batch, self.layout.kv_heads, self.layout.page_bytes(True)), dtype=torch.uint8)
        page = Page(memory, True, list(range(self.batch)))
        self.native.pack(raw, page.addresses(), _threads())
        at = index * self.stride + 1
        self.table[at:at + 1 + self.batch] = array("q", [1, *page.addresses()])
        self.pages[index] = page

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take fresh tokens ``[batch, kv_heads, tokens, dim]``; pages that fill up are packed where they are due."""
        keys, values = self._accept(keys, values)
        count = keys.shape[2]
        if count:
            empty = not self.tokens
            page, slot = self._make_room(count, pack=empty)
            self.native.append(page, slot, keys.data_ptr(), values.data_ptr(), count, keys.stride()[:3],
                               values.stride()[:3], _threads())
            self._settle()

    def _accept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys = keys if keys.stride(-1) == 1 else keys.contiguous()
        values = values if values.stride(-1) == 1 else values.contiguous()
        check_tokens("cache", keys, values, self.layout, self.batch)
        return keys, values

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, keys: Tensor | None, values: Tensor | None, scale: float, causal: bool = True,
               window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, mask: Tensor | None = None,
               mask_first: int = 0, log_sum_exp: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Append ``keys`` and ``values`` (or None), then attention of ``query [batch, heads, queries, key_dim]``, the
        last positions of the cache, in one call. Returns ``[batch, queries, heads, value_dim]`` and, if asked for, the
        log-sum-exp ``[batch, heads, queries]`` in float32. ``mask`` is bool ``[batch, 1 or heads, queries, positions]``
        from position ``mask_first`` on; ``window`` counts the positions a query sees, up to its own; 0: all."""
        op, layout = "cache", self.layout
        check_query(op, query, layout, self.batch)
        if query.stride(3) != 1:
            query = query.contiguous()
        check_options(op, query, mask, sinks, window, softcap)
        batch, heads, queries, _ = query.shape
        page = slot = fresh = 0
        if keys is not None:
            keys, values = self._accept(keys, values)
            fresh = keys.shape[2]
        if queries > self.tokens + fresh:
            fail(op, "query", f"{queries} queries", f"at most the {self.tokens + fresh} tokens held")
        if fresh:
            page, slot = self._make_room(fresh, pack=False)
        out = query.new_empty((batch, queries, heads, layout.value_dim))
        lse = query.new_empty((batch, heads, queries), dtype=torch.float32) if log_sum_exp else None
        self.native.attention(
            query.data_ptr(), heads, queries, query.stride()[:3], out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            self.first, self.first + self.tokens - queries, window, causal, 0 if mask is None else mask.data_ptr(),
            NO_MASK if mask is None else mask_strides(mask), mask_first, 0 if mask is None else mask.shape[3],
            0 if sinks is None else sinks.data_ptr(), scale, softcap, page, slot,
            keys.data_ptr() if fresh else 0, values.data_ptr() if fresh else 0, fresh,
            keys.stride()[:3] if fresh else NO_STRIDES, values.stride()[:3] if fresh else NO_STRIDES, _threads())
        if len(self.pages) > self.settled + 1 or self.pages and self.table[-self.stride] == layout.page_tokens:
            self._settle()
        return out if lse is None else (out, lse)

    # -- editing ----------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the last ``tokens``. A packed page only lowers its count."""
        left = min(tokens, self.tokens)
        self.tokens -= left
        while left:
            held = self.table[-self.stride]
            if held > left:
                self.table[-self.stride] = held - left
                break
            left -= held
            self.pages.pop()
            del self.table[-self.stride:]
        self.settled = min(self.settled, max(0, len(self.pages) - 1))
        self._publish()

    def drop_before(self, position: int) -> None:
        """Free pages whose tokens all lie before ``position``."""
        count = 0
        while count < len(self.pages) - 1 and self.first + self.table[count * self.stride] <= position:
            self.first += self.table[count * self.stride]
            self.tokens -= self.table[count * self.stride]
            count += 1
        if count:
            del self.pages[:count]
            del self.table[:count * self.stride]
            self.settled = max(0, self.settled - count)
            self._publish()

    def select(self, sequences: list[int]) -> None:
        """Sequence i becomes what ``sequences[i]`` was; pages are shared, and those that lost most rows are copied."""
        if sequences == list(range(self.batch)):
            return
        if any(not 0 <= s < self.batch for s in sequences):
            fail("cache", "sequences", sequences, f"indices of {self.batch} sequences")
        counts, packed = self.counts(), [int(page.packed) for page in self.pages]
        self.batch, self.stride = len(sequences), len(sequences) + 2
        self.table = array("q")
        for page, count, flag in zip(self.pages, counts, packed):
            page.rows = [page.rows[s] for s in sequences]
            used = sorted(set(page.rows))
            if 2 * len(used) <= len(page.memory):
                page.memory = page.memory[used]
                page.rows = [used.index(row) for row in page.rows]
            self.table.extend([count, flag, *page.addresses()])
        self.native = native(self.layout, self.batch)
        self._publish()

    # -- reference --------------------------------------------------------------------------------------------------

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """All tokens held: keys ``[batch, kv_heads, tokens, key_dim]`` and values, as attention takes them."""
        parts = []
        for page, count in zip(self.pages, self.counts()):
            keys, values = self.layout.decode(page.memory[page.rows], page.packed, dtype)
            parts.append((keys[:, :, :count], values[:, :, :count]))
        shape = (self.batch, self.layout.kv_heads, 0)
        empty = [torch.empty((*shape, dim), dtype=dtype) for dim in (self.layout.key_dim, self.layout.value_dim)]
        return tuple(torch.cat([e, *(p[i] for p in parts)], 2) for i, e in enumerate(empty))
