"""`Pages`: one layer's keys and values as a list of pages, and attention over them.

A sequence is the concatenation of its pages. The last page is raw (as the model computes) and takes fresh tokens; a
full page is packed once enough newer tokens follow it, and never touched again: history is not requantized, and pages
can be shared by sequences. Which row of a page a sequence reads stands in the table alone, so beam search reorders the
table and copies only the page that is still written. A run of packed pages can share the right factors of a low-rank
residual, a segment.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..op_checks import fail
from ..ops_kv import (NO_STRIDES, check_bias, check_log_sum_exp, check_options, check_positions, check_query,
                      check_tokens, native, restrictions)
from .layout import Layout

_threads = torch.get_num_threads


@dataclass
class Page:
    memory: Tensor  # uint8 [rows, kv_heads, bytes]
    kind: int  # 0: raw, else the number of its format, from 1 on
    rows: list[int]  # of each sequence
    segment: Tensor | None = None  # float16 [rows, kv_heads, rank, key_dim + value_dim]
    segment_rows: list[int] | None = None

    @property
    def packed(self) -> bool:
        return self.kind > 0

    def addresses(self) -> list[int]:
        start, step = self.memory.data_ptr(), self.memory.stride(0)
        return [start + row * step for row in self.rows]

    def entry(self, tokens: int, segments: bool) -> list[int]:
        """Its row of the table."""
        row = [tokens, self.kind, *self.addresses()]
        if not segments:
            return row
        if self.segment is None:
            return row + [0] * len(self.rows)
        start, step = self.segment.data_ptr(), self.segment.stride(0) * 2
        return row + [start + row * step for row in self.segment_rows]

    @property
    def exclusive(self) -> bool:
        """Whether each sequence has a row of its own, and no row is left over."""
        return self.rows == list(range(len(self.memory)))


class Pages:
    """``layout`` for ``batch`` sequences. The first ``sink_pages`` stay raw, and so do the last ``recent`` tokens;
    other full pages are packed in the layout's first format."""

    def __init__(self, layout: Layout, batch: int, recent: int = 0, sink_pages: int = 0):
        self.layout, self.recent, self.sink_pages = layout.check("cache"), recent, sink_pages
        if any(page.key_tokens for page in layout.formats):
            fail("cache", "key_tokens", [page.key_tokens for page in layout.formats],
                 "0 on the CPU: pages are as large")
        self.pages: list[Page] = []
        self.first = 0  # position of the first token held: earlier ones have left a sliding window
        self.tokens = 0  # tokens held
        self.settled = 0  # pages that need no more looking at: packed, or raw for good
        self._start(batch)

    def _start(self, batch: int) -> None:
        self.batch, self.stride = batch, 2 + batch * (2 if self.layout.rank else 1)
        self.table = array("q")
        self.native, self.rotary_table = native(self.layout, batch)
        self._publish()

    def _publish(self) -> None:
        self.native.set_table(self.table.buffer_info()[0], len(self.pages))

    @property
    def nbytes(self) -> int:
        segments = {id(page.segment): page.segment for page in self.pages if page.segment is not None}
        held = sum(page.memory.untyped_storage().nbytes() for page in self.pages)
        return held + sum(s.untyped_storage().nbytes() for s in segments.values()) + 8 * len(self.table)

    @property
    def kernel(self) -> str:
        return f"kv_attention {_C.isa()}"

    @property
    def page_bits(self) -> float:
        """Bits of one number in a packed page, scales and minima counted."""
        return self.layout.bits()

    def counts(self) -> list[int]:
        """Tokens in each page."""
        return list(self.table[::self.stride])

    # -- growing ----------------------------------------------------------------------------------------------------

    def _new(self, kind: int) -> Page:
        memory = torch.empty((self.batch, self.layout.kv_heads, self.layout.page_bytes(kind)), dtype=torch.uint8)
        return Page(memory, kind, list(range(self.batch)))

    def _add(self, kind: int, tokens: int) -> None:
        page = self._new(kind)
        self.pages.append(page)
        self.table.extend(page.entry(tokens, self.layout.rank > 0))

    def _rewrite(self, index: int) -> None:
        at = index * self.stride
        self.table[at:at + self.stride] = array("q", self.pages[index].entry(self.table[at], self.layout.rank > 0))

    def _make_room(self, tokens: int, pack: bool) -> tuple[int, int]:
        """Pages for ``tokens`` more, counted as if they were written; page and slot of the first. With ``pack``, full
        pages that are old enough become packed ones at once."""
        limit, index, slot = self.layout.page_tokens, len(self.pages), 0
        if self.pages and not self.pages[-1].packed and self.table[-self.stride] < limit:
            index, slot = index - 1, self.table[-self.stride]
            self._own(len(self.pages) - 1)
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
                packed = pack and count == limit and tokens >= self.recent and len(self.pages) >= self.sink_pages
                self._add(int(packed), count)
            self._publish()
        return index, slot

    def _own(self, index: int) -> None:
        """Make a page one that can be written: with a row of its own for each sequence."""
        page = self.pages[index]
        if not page.exclusive:
            page.memory = page.memory[page.rows]
            page.rows = list(range(self.batch))
            self._rewrite(index)

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
        page = self._new(1)
        self.native.pack(1, self.pages[index].addresses(), page.addresses(), _threads())
        self.pages[index] = page
        self._rewrite(index)

    def append(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Take fresh tokens ``[batch, kv_heads, tokens, dim]``; pages that fill up are packed where they are due.
        ``bias`` float32 ``[batch, kv_heads, tokens]`` is added to the scores of a biased layout's tokens (None: 0)."""
        keys, values = self._accept(keys, values)
        if keys.shape[2]:
            self._write(*self._make_room(keys.shape[2], pack=not self.tokens), keys, values, bias)

    def append_packed(self, keys: Tensor, values: Tensor, kind: int, bias: Tensor | None = None) -> None:
        """As `append`, but whole pages of tokens, straight into format ``kind`` (from 1 on) and new pages."""
        keys, values = self._accept(keys, values)
        count, limit = keys.shape[2], self.layout.page_tokens
        if not 1 <= kind <= len(self.layout.formats):
            fail("cache", "kind", kind, f"1 to {len(self.layout.formats)}")
        if count % limit:
            fail("cache", "keys", f"{count} tokens", f"whole pages of {limit}")
        if count:
            page = len(self.pages)
            for _ in range(count // limit):
                self._add(kind, limit)
            self.tokens += count
            self._publish()
            self._write(page, 0, keys, values, bias)

    def _write(self, page: int, slot: int, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        bias = self._accept_bias(bias, keys.shape[2])
        self.native.append(page, slot, keys.data_ptr(), values.data_ptr(), keys.shape[2], keys.stride()[:3],
                           values.stride()[:3], 0 if bias is None else bias.data_ptr(), _threads())
        self._settle()

    def _accept_bias(self, bias: Tensor | None, tokens: int) -> Tensor | None:
        if bias is not None:
            bias = bias.contiguous()
            check_bias("cache", bias, self.layout, self.batch, tokens)
        return bias

    def _accept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys = keys if keys.stride(-1) == 1 else keys.contiguous()
        values = values if values.stride(-1) == 1 else values.contiguous()
        check_tokens("cache", keys, values, self.layout, self.batch)
        return keys, values

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, keys: Tensor | None, values: Tensor | None, scale: float, causal: bool = True,
               window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, mask: Tensor | None = None,
               mask_first: int = 0, log_sum_exp: bool = False, bias: Tensor | None = None,
               positions: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Append ``keys`` and ``values`` (or None), then attention of ``query [batch, heads, queries, key_dim]``, the
        last positions of the cache, in one call. Returns ``[batch, queries, heads, value_dim]`` and, if asked for, the
        log-sum-exp ``[batch, heads, queries]`` in float32. ``mask`` is bool ``[batch, 1 or heads, queries, positions]``
        from position ``mask_first`` on; ``window`` counts the positions a query sees, up to its own; 0: all.
        ``positions`` int64 ``[queries]``: where the queries are, if they are not the last. ``bias``: of the fresh
        tokens, as in `append`."""
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
        bias = self._accept_bias(bias, fresh)
        if positions is not None:
            check_positions(op, positions, query)
        elif queries > self.tokens + fresh:
            fail(op, "query", f"{queries} queries", f"at most the {self.tokens + fresh} tokens held")
        if fresh:
            page, slot = self._make_room(fresh, pack=False)
        out = query.new_empty((batch, queries, heads, layout.value_dim))
        lse = query.new_empty((batch, heads, queries), dtype=torch.float32) if log_sum_exp else None
        self.native.attention(
            query.data_ptr(), heads, queries, query.stride()[:3], out.data_ptr(), 0 if lse is None else lse.data_ptr(),
            self.first, self.first + self.tokens - queries, 0 if positions is None else positions.data_ptr(), window,
            causal, *restrictions(mask, mask_first), 0 if sinks is None else sinks.data_ptr(), scale, softcap, page,
            slot, keys.data_ptr() if fresh else 0, values.data_ptr() if fresh else 0, fresh,
            keys.stride()[:3] if fresh else NO_STRIDES, values.stride()[:3] if fresh else NO_STRIDES,
            0 if bias is None else bias.data_ptr(), _threads())
        if len(self.pages) > self.settled + 1 or self.pages and self.table[-self.stride] == layout.page_tokens:
            self._settle()
        return out if lse is None else (out, lse)

    def mass(self, query: Tensor, log_sum_exp: Tensor, scale: float, position: int | None = None, causal: bool = True,
             window: int = 0, softcap: float = 0.0, mask: Tensor | None = None, mask_first: int = 0,
             positions: Tensor | None = None) -> Tensor:
        """What the weights of ``query [batch, heads, queries, key_dim]`` give each token held, summed over the queries
        and the query heads of a key head: float32 ``[batch, kv_heads, tokens]``. ``log_sum_exp`` is what `attend` gave
        for these queries (or what else the weights are to be relative to). The queries are the last positions, or
        follow one another from ``position`` on, or lie at ``positions`` (int64 ``[queries]``); the rest as in
        `attend`."""
        op = "cache"
        check_query(op, query, self.layout, self.batch)
        if query.stride(3) != 1:
            query = query.contiguous()
        log_sum_exp = log_sum_exp.contiguous()
        check_log_sum_exp(op, log_sum_exp, query)
        check_options(op, query, mask, None, window, softcap)
        if positions is not None:
            check_positions(op, positions, query)
        heads, queries = query.shape[1:3]
        if position is None:
            position = self.first + self.tokens - queries
        mass = query.new_empty((self.batch, self.layout.kv_heads, self.tokens), dtype=torch.float32)
        if mass.numel():
            self.native.mass(
                query.data_ptr(), heads, queries, query.stride()[:3], log_sum_exp.data_ptr(), self.first, position,
                0 if positions is None else positions.data_ptr(), window, causal, *restrictions(mask, mask_first),
                scale, softcap, mass.data_ptr(), _threads())
        return mass

    # -- editing ----------------------------------------------------------------------------------------------------

    def set_segment(self, first_page: int, count: int, pk: Tensor, pv: Tensor, qk: Tensor, qv: Tensor) -> None:
        """Give ``count`` packed pages from ``first_page`` on a residual of their format's rank: keys += qk^T pk, values
        += qv^T pv, in float16. ``pk [batch, kv_heads, rank, key_dim]``, ``pv [batch, kv_heads, rank, value_dim]``,
        ``qk`` and ``qv [batch, kv_heads, rank, count * page_tokens]``. What they had before is replaced."""
        op, layout, tokens = "cache", self.layout, self.layout.page_tokens
        if count < 1 or first_page < 0 or first_page + count > len(self.pages):
            fail(op, "first_page, count", [first_page, count], f"a run of the {len(self.pages)} pages")
        pages = self.pages[first_page:first_page + count]
        ranks = {layout.format(page.kind).rank if page.kind else 0 for page in pages}
        if len(ranks) > 1 or 0 in ranks:
            fail(op, "pages", f"ranks {sorted(ranks)}", "packed pages of one rank, 1 or more")
        rank = ranks.pop()
        shape = (self.batch, layout.kv_heads, rank)
        for name, x, size in (("pk", pk, layout.key_dim), ("pv", pv, layout.value_dim), ("qk", qk, count * tokens),
                              ("qv", qv, count * tokens)):
            if x.shape != (*shape, size) or not x.is_floating_point() or not x.is_cpu:
                fail(op, name, f"{x.dtype} {list(x.shape)} on {x.device}", f"floating-point {[*shape, size]} on cpu")
        segment = torch.cat((pk, pv), -1).half().contiguous()
        for i, page in enumerate(pages):
            self._own(first_page + i)
            parts = layout.parts(page.kind)
            for name, factor in (("key_rank", qk), ("value_rank", qv)):
                start, length = parts[name]
                own = factor[..., i * tokens:(i + 1) * tokens].half().contiguous()
                page.memory[..., start:start + length] = own.view(torch.uint8).flatten(-2)
            page.segment, page.segment_rows = segment, list(range(self.batch))
            self._rewrite(first_page + i)

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
        counts, pages = self.counts(), self.pages
        segments: dict[int, tuple[Tensor, Tensor, list[int]]] = {}  # by the old one's id: old, new and its rows
        self._start(len(sequences))
        for page, count in zip(pages, counts):
            page.memory, page.rows = _select(page.memory, [page.rows[s] for s in sequences])
            if page.segment is not None:
                old = page.segment
                if id(old) not in segments:
                    segments[id(old)] = old, *_select(old, [page.segment_rows[s] for s in sequences])
                _, page.segment, page.segment_rows = segments[id(old)]
            self.table.extend(page.entry(count, self.layout.rank > 0))
        self._publish()

    # -- reference --------------------------------------------------------------------------------------------------

    def decode_page(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, dim]`` of one page."""
        page, count = self.pages[index], self.table[index * self.stride]
        segment = None if page.segment is None else page.segment[page.segment_rows]
        keys, values = self.layout.decode(page.memory[page.rows], page.kind, dtype, segment)
        return keys[:, :, :count], values[:, :, :count]

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """All tokens held: keys ``[batch, kv_heads, tokens, key_dim]`` and values, as attention takes them."""
        parts = [self.decode_page(index, dtype) for index in range(len(self.pages))]
        shape = (self.batch, self.layout.kv_heads, 0)
        empty = [torch.empty((*shape, dim), dtype=dtype) for dim in (self.layout.key_dim, self.layout.value_dim)]
        return tuple(torch.cat([e, *(p[i] for p in parts)], 2) for i, e in enumerate(empty))

    def decode_bias(self, index: int) -> Tensor:
        """What is added to the scores of one page's tokens: float32 ``[batch, kv_heads, tokens]``."""
        page, count = self.pages[index], self.table[index * self.stride]
        return self.layout.decode_bias(page.memory[page.rows], page.kind)[:, :, :count]

    def biases(self) -> Tensor:
        """Of all tokens held."""
        parts = [self.decode_bias(index) for index in range(len(self.pages))]
        return torch.cat([torch.zeros(self.batch, self.layout.kv_heads, 0), *parts], 2)


def _select(memory: Tensor, rows: list[int]) -> tuple[Tensor, list[int]]:
    """The same rows, copied where at most half of the memory is still used."""
    used = sorted(set(rows))
    if 2 * len(used) > len(memory):
        return memory, rows
    return memory[used], [used.index(row) for row in rows]
