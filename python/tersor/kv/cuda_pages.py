"""`CudaPages`: one layer's keys and values on a GPU, with the interface of `pages.Pages`.

The host knows which pages there are, so it never asks the device: a step adds to the count of the last page, which is a
launch; a new or a packed page is one entry of the table, copied from pinned memory. Nothing waits. Pages lie in slabs,
one allocation of several, which is freed at once when the last of its pages goes; a slab can leave for the host's
memory and come back (`offload`, `prefetch`). Which row of a page a sequence reads stands in the table alone: beams
reorder the table, and only the page that is still written is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops_kv_cuda as ops
from ..op_checks import fail
from . import cuda_layout
from .cuda_residuals import Residuals
from .cuda_slabs import Slab
from .devices import capturing, staged
from .layout import Layout

TOKENS = cuda_layout.TOKENS
SLAB_PAGES = 8  # of a slab at most, while pages come one by one
SCRATCH = 32 << 20  # bytes of raw pages through which a prompt is packed


def check_layout(where: str, layout: Layout) -> Layout:
    """Itself; ValueError that begins with ``tersor.where`` for a layout that no CUDA kernel takes."""
    return cuda_layout.check(where, layout)


@dataclass
class CudaPage:
    """A page of all sequences: ``rows[i]`` of the slab's page ``index`` is sequence i's."""

    slab: Slab
    index: int
    kind: int  # 0: raw, else the number of its format, from 1 on
    rows: tuple[int, ...]
    position: int  # of its first token
    tokens: int

    @property
    def packed(self) -> bool:
        return self.kind > 0

    @property
    def memory(self) -> Tensor:
        """uint8 ``[rows, kv_heads, bytes]``."""
        return self.slab.memory[self.index]

    def addresses(self) -> list[int]:
        memory = self.memory
        start, step = memory.data_ptr(), memory.stride(0)
        return [start + row * step for row in self.rows]

    @property
    def exclusive(self) -> bool:
        return self.rows == tuple(range(self.slab.memory.shape[1]))


class CudaPages:
    """``layout`` for ``batch`` sequences on ``device``. The first ``sink_pages`` stay raw, and so do the last
    ``recent`` tokens; other full pages are packed in the layout's first format. ``where`` begins the errors of layouts
    that no kernel takes (ValueError)."""

    def __init__(self, layout: Layout, batch: int, recent: int = 0, sink_pages: int = 0,
                 device: torch.device | str = "cuda", where: str = "cache"):
        self.layout, self.recent, self.sink_pages = check_layout(where, layout), recent, sink_pages
        self.device = torch.device(device)
        kinds = range(len(layout.formats) + 1)
        self.sizes = [layout.kv_heads * cuda_layout.layout_bytes(layout, kind) for kind in kinds]  # of all heads
        self.entries = [cuda_layout.entry_kind(layout, kind) << 40 for kind in kinds]
        self.bits = [(16, 16), *((page.key_bits, page.value_bits) for page in layout.formats)]
        # What launches are told: nothing where all is plain.
        plain = not layout.biased and layout.rotary is None and not cuda_layout.format_numbers(layout)
        self.described = {} if plain else {"layout": layout}
        self.pages: list[CudaPage] = []
        self.first = 0  # position of the first token held
        self.tokens = 0
        self.settled = 0  # pages that need no more looking at
        self.resident = True
        self.residuals = Residuals(batch, layout.kv_heads, layout.key_dim, self.device) if layout.rank else None
        self._start(batch)

    def _start(self, batch: int) -> None:
        self.batch = batch
        self._use(torch.zeros((batch, 16, 2), dtype=torch.int64, device=self.device))
        self.used = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.spare: list[tuple[Slab, int]] = []  # packed pages that have memory already

    @property
    def kernel(self) -> str:
        return f"kv_attention sm80 {self.layout.key_dim} (CUDA)"

    @property
    def nbytes(self) -> int:
        slabs = {id(slab): slab for slab in [page.slab for page in self.pages] + [slab for slab, _ in self.spare]}
        apart = 0 if self.residuals is None else self.residuals.nbytes
        return sum(slab.nbytes for slab in slabs.values()) + self.table.nbytes + self.used.nbytes + apart

    @property
    def page_bits(self) -> float:
        """Bits of one number in a packed page, scales and minima counted."""
        return self.sizes[int(self.layout.packs)] * 8 / (self.layout.kv_heads * TOKENS * 2 * self.layout.key_dim)

    def counts(self) -> list[int]:
        """Tokens in each page."""
        return [page.tokens for page in self.pages]

    # -- the table ----------------------------------------------------------------------------------------------------

    def _word(self, page: CudaPage) -> int:
        return page.position | page.tokens << 32 | self.entries[page.kind]

    def _use(self, table: Tensor) -> None:
        self.table, self.filled = table, table.view(torch.int16)[..., 6]  # the tokens of each entry (and its format: 0)

    def _publish(self, first: int, last: int | None = None) -> None:
        """Entries of pages ``first`` to before ``last``, and the number of pages, to the device."""
        count = len(self.pages)
        if count > self.table.shape[1]:
            room = max(count, 2 * self.table.shape[1])
            self._use(self.table.new_zeros((self.batch, room, 2)))
            first, last = 0, None
        entries = []
        for page in self.pages[first:last]:
            word = self._word(page)
            entries.append([(address, word) for address in page.addresses()])
        if entries:
            made = staged(entries, torch.int64, self.device)
            self.table[:, first:first + len(entries)] = made.transpose(0, 1)
        self.used.fill_(count)

    def _count(self, index: int, more: int) -> None:
        """``more`` tokens in page ``index``, which the table has: one launch."""
        self.pages[index].tokens += more
        self.filled[:, index].add_(more)

    # -- growing ----------------------------------------------------------------------------------------------------

    def _slab(self, kind: int, count: int) -> Slab:
        heads = self.layout.kv_heads
        shape = (count, self.batch, heads, self.sizes[kind] // heads)
        return Slab(torch.empty(shape, dtype=torch.uint8, device=self.device))

    def _new(self, kind: int, position: int, tokens: int) -> CudaPage:
        """A page of a kind that comes one by one and stays (packed in the first format, or raw where nothing packs) is
        one of a slab of several."""
        if kind == 1 or not self.layout.packs:
            if not self.spare:
                held = sum(page.kind == kind for page in self.pages)
                slab = self._slab(kind, min(SLAB_PAGES, max(1, held)))
                self.spare = [(slab, i) for i in reversed(range(len(slab.memory)))]
            slab, index = self.spare.pop()
            slab.current = False
        else:
            slab, index = self._slab(kind, 1), 0
        return CudaPage(slab, index, kind, tuple(range(self.batch)), position, tokens)

    def _make_room(self, tokens: int) -> None:
        """Raw pages for ``tokens`` more, counted in the table as if they were written."""
        if capturing(self.device):
            raise RuntimeError("tersor.Cache: found a CUDA graph being captured, whose replays would not count their "
                               "tokens here; accepted is tersor.StaticCache")
        end, changed = self.first + self.tokens, len(self.pages)
        self.tokens += tokens
        if self.pages and not self.pages[-1].packed and self.pages[-1].tokens < TOKENS:
            index = changed - 1
            self._own(index)
            taken = min(TOKENS - self.pages[index].tokens, tokens)
            self._count(index, taken)
            tokens, end = tokens - taken, end + taken
        while tokens:
            count = min(TOKENS, tokens)
            self.pages.append(self._new(0, end, count))
            tokens, end = tokens - count, end + count
        if changed < len(self.pages):
            self._publish(changed)

    def _own(self, index: int) -> None:
        """Make a page one that can be written: with a row of its own for each sequence."""
        page = self.pages[index]
        page.slab.current = False
        if not page.exclusive:
            rows = staged(page.rows, torch.int64, self.device)
            page.slab, page.index = Slab(page.memory.index_select(0, rows).unsqueeze(0)), 0
            page.rows = tuple(range(self.batch))
            self._publish(index, index + 1)

    def _settle(self) -> None:
        """Pack the full pages that are old enough."""
        later = sum(page.tokens for page in self.pages[self.settled:])
        first, jobs, raw = None, [], []  # raw pages keep their memory until they are packed
        for index in range(self.settled, len(self.pages)):
            page = self.pages[index]
            later -= page.tokens
            if not page.packed:
                if later < self.recent or page.tokens < TOKENS and index == len(self.pages) - 1:
                    break
                if self.layout.packs and page.tokens == TOKENS and index >= self.sink_pages:
                    packed = self._new(1, page.position, TOKENS)
                    jobs += list(zip(page.addresses(), packed.addresses()))
                    raw.append(page)
                    self.pages[index] = packed
                    first = index if first is None else first
            self.settled += 1
        if jobs:
            self._pack(jobs)
            self._publish(first, self.settled)

    def _pack(self, jobs: list[tuple[int, int]], kind: int = 1) -> None:
        """Raw pages to packed ones, by address. Once this is launched the raw ones may be given away: what gets their
        memory on this stream writes it later."""
        self._launch_pack(staged(jobs, torch.int64, self.device), kind)

    def _launch_pack(self, jobs: Tensor, kind: int) -> None:
        layout = self.layout
        described = self.described and self.described | {"kind": kind}
        ops.kv_pack_jobs(jobs, layout.kv_heads, layout.key_dim, *self.bits[kind], layout.dtype, **described)

    def _launch_append(self, table: Tensor, used: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        ops.kv_append(table, used, keys, values, bias=bias, **self.described)

    def append(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Take fresh tokens ``[batch, kv_heads, tokens, dim]``; pages that fill up are packed where they are due.
        ``bias`` float32 ``[batch, kv_heads, tokens]`` is added to the scores of a biased layout's tokens (None: 0)."""
        self._accept(keys, values, bias)
        tokens = keys.shape[2]
        if not tokens:
            return
        full = 0  # whole pages of a first prompt that are packed at once
        if not self.tokens and self.layout.packs:
            full = max(0, min(tokens // TOKENS, (tokens - self.recent) // TOKENS) - self.sink_pages)
        head = self.sink_pages * TOKENS if full else 0
        for part in (slice(0, head), slice(head, head + full * TOKENS), slice(head + full * TOKENS, tokens)):
            if part.start < part.stop:
                own = keys[:, :, part], values[:, :, part], None if bias is None else bias[:, :, part]
                if full and part.start == head:
                    self._append_packed(*own, 1)
                else:
                    self._make_room(part.stop - part.start)
                    self._launch_append(self.table, self.used, *own)
        self._settle()

    def append_packed(self, keys: Tensor, values: Tensor, kind: int, bias: Tensor | None = None) -> None:
        """As `append`, but whole pages of tokens, straight into format ``kind`` (from 1 on) and new pages."""
        self._accept(keys, values, bias)
        if not 1 <= kind <= len(self.layout.formats):
            fail("cache", "kind", kind, f"1 to {len(self.layout.formats)}")
        if keys.shape[2] % TOKENS:
            fail("cache", "keys", f"{keys.shape[2]} tokens", f"whole pages of {TOKENS}")
        if keys.shape[2]:
            self._append_packed(keys, values, bias, kind)
            self._settle()

    def _append_packed(self, keys: Tensor, values: Tensor, bias: Tensor | None, kind: int) -> None:
        """Whole pages, through raw ones that are used again and again."""
        batch, heads, tokens, _ = keys.shape
        count, step = tokens // TOKENS, self.sizes[0]
        slab, start, end = self._slab(kind, count), len(self.pages), self.first + self.tokens
        chunk = max(1, min(count, SCRATCH // (batch * step)))
        scratch = torch.empty((batch, chunk, step), dtype=torch.uint8, device=self.device)
        entries = [[(scratch.data_ptr() + (b * chunk + p) * step, p * TOKENS | TOKENS << 32 | self.entries[0])
                    for p in range(chunk)] for b in range(batch)]
        table = staged(entries, torch.int64, self.device)
        for first in range(0, count, chunk):
            now = min(chunk, count - first)
            used = torch.full((batch,), now, dtype=torch.int32, device=self.device)
            part = slice(first * TOKENS, (first + now) * TOKENS)
            self._launch_append(table, used, keys[:, :, part], values[:, :, part],
                                None if bias is None else bias[:, :, part])
            self._pack([(scratch.data_ptr() + (b * chunk + p) * step,
                         slab.memory.data_ptr() + ((first + p) * batch + b) * self.sizes[kind])
                        for p in range(now) for b in range(batch)], kind)
        rows = tuple(range(batch))
        self.pages += [CudaPage(slab, i, kind, rows, end + i * TOKENS, TOKENS) for i in range(count)]
        self.tokens += tokens
        self._publish(start)

    def _accept(self, keys: Tensor, values: Tensor, bias: Tensor | None) -> None:
        layout = self.layout
        wanted = (self.batch, layout.kv_heads, keys.shape[2] if keys.dim() == 4 else -1, layout.key_dim)
        for name, x in (("keys", keys), ("values", values)):
            if x.dtype is not layout.dtype or x.shape != wanted or x.device != self.device:
                fail("cache", name, f"{x.dtype} {list(x.shape)} on {x.device}",
                     f"{layout.dtype} [{self.batch}, {layout.kv_heads}, tokens, {layout.key_dim}] on {self.device}")
        if bias is not None and not layout.biased:
            fail("cache", "bias", "a tensor", "None: the layout is not biased")
        if bias is not None and (bias.dtype is not torch.float32 or bias.shape != wanted[:3]
                                 or bias.device != self.device):
            fail("cache", "bias", f"{bias.dtype} {list(bias.shape)} on {bias.device}",
                 f"torch.float32 {list(wanted[:3])} on {self.device}")
        self.prefetch()

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, keys: Tensor | None, values: Tensor | None, scale: float, causal: bool = True,
               window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, mask: Tensor | None = None,
               mask_first: int = 0, log_sum_exp: bool = False, bias: Tensor | None = None,
               positions: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As `Pages.attend`: append, then attention of ``query [batch, heads, queries, dim]``, the last positions of
        the cache. Two launches, one more for the count, and one to pack every 64 tokens."""
        if keys is not None:
            self._accept(keys, values, bias)
        else:
            self.prefetch()
        fresh = 0 if keys is None else keys.shape[2]
        if positions is not None:
            self._accept_positions(positions, query, fresh, causal, window, mask)
            found = [ops.kv_attention(query[:, :, part], self.table, self.used, self.layout.kv_heads, scale,
                                      softcap=softcap, sinks=sinks, **own, **self._described(query[:, :, part]))
                     for part, own in self._scattered(positions)]
            out, lse = torch.cat([o for o, _ in found], 1), torch.cat([s for _, s in found], 2)
            return (out, lse) if log_sum_exp else out
        if query.shape[2] > self.tokens + fresh:
            fail("cache", "query", f"{query.shape[2]} queries", f"at most the {self.tokens + fresh} tokens held")
        if fresh:
            self._make_room(fresh)
            self._launch_append(self.table, self.used, keys, values, bias)
        out, lse = ops.kv_attention(query, self.table, self.used, self.layout.kv_heads, scale, softcap=softcap,
                                    causal=causal, window=window, sinks=sinks, mask=mask, mask_first=mask_first,
                                    **self._described(query))
        if len(self.pages) > self.settled + 1 or self.pages and self.pages[-1].tokens == TOKENS:
            self._settle()
        return (out, lse) if log_sum_exp else out

    def mass(self, query: Tensor, log_sum_exp: Tensor, scale: float, position: int | None = None, causal: bool = True,
             window: int = 0, softcap: float = 0.0, mask: Tensor | None = None, mask_first: int = 0,
             positions: Tensor | None = None) -> Tensor:
        """As `Pages.mass`: what the weights of ``query`` give each token held, float32 ``[batch, kv_heads, tokens]``.
        The queries are the last positions, or follow one another from ``position`` on, or lie at ``positions``."""
        if self.residuals is not None:
            fail("cache", "rank", self.layout.rank, "0 for attention mass on CUDA")
        self.prefetch()
        if positions is not None:
            self._accept_positions(positions, query, 0, causal, window, mask)
            return sum(ops.kv_mass(query[:, :, part], self.table, self.used, log_sum_exp[:, :, part].contiguous(),
                                   self.layout.kv_heads, scale, self.tokens, softcap=softcap, **own, **self.described)
                       for part, own in self._scattered(positions))
        first = None
        if position is not None and position != self.first + self.tokens - query.shape[2]:
            first = torch.full((self.batch,), position, dtype=torch.int32, device=self.device)
        return ops.kv_mass(query, self.table, self.used, log_sum_exp.contiguous(), self.layout.kv_heads, scale,
                           self.tokens, softcap=softcap, causal=causal, window=window, positions=first, mask=mask,
                           mask_first=mask_first, **self.described)

    def _described(self, query: Tensor) -> dict:
        """What a launch of attention is told about the pages."""
        residual = None if self.residuals is None else self.residuals.for_attention(query, self.table.shape[1])
        return self.described if residual is None else self.described | {"residual": residual}

    def set_segment(self, first_page: int, count: int, pk: Tensor, pv: Tensor, qk: Tensor, qv: Tensor) -> None:
        """As `Pages.set_segment`, once for each page; all pages before are full, and the first is at position 0."""
        layout = self.layout
        pages = self.pages[first_page:first_page + count]
        ranks = {layout.format(page.kind).rank if page.kind else 0 for page in pages}
        if count < 1 or len(pages) != count or len(ranks) > 1 or 0 in ranks \
                or any(page.position != (first_page + i) * TOKENS for i, page in enumerate(pages)):
            fail("cache", "first_page, count", [first_page, count],
                 "a run of packed pages of one rank, all before full")
        rank = ranks.pop()
        for name, x, size in (("pk", pk, layout.key_dim), ("pv", pv, layout.key_dim), ("qk", qk, count * TOKENS),
                              ("qv", qv, count * TOKENS)):
            wanted = (self.batch, layout.kv_heads, rank, size)
            if x.shape != wanted or not x.is_floating_point() or x.device != self.device:
                fail("cache", name, f"{x.dtype} {list(x.shape)} on {x.device}",
                     f"floating-point {list(wanted)} on {self.device}")
        self.residuals.add(first_page, count, pk, pv, qk, qv)

    def _accept_positions(self, positions: Tensor, query: Tensor, fresh: int, causal: bool, window: int,
                          mask: Tensor | None) -> None:
        if positions.dtype is not torch.int64 or positions.shape != query.shape[2:3] or not len(positions) \
                or positions.device.type == "cuda" or (positions.diff() <= 0).any() or positions[0] < 0:
            fail("cache", "positions", f"{positions.dtype} {list(positions.shape)} on {positions.device}",
                 f"ascending torch.int64 [{query.shape[2]}] from 0 on, on cpu, with CUDA pages")
        if fresh or not causal or window or mask is not None:
            fail("cache", "positions", "a tensor",
                 "None for fresh tokens, with a window or mask, or not causal, on CUDA")

    def _scattered(self, positions: Tensor) -> Iterator[tuple[slice, dict]]:
        """Runs of queries at ascending positions, with what tells a launch where they are: the last ones that follow
        one another by the first of them, others by a mask, so many at a time that it stays small."""
        at = positions.tolist()
        last = len(at) - 1
        while last and at[last - 1] + 1 == at[last]:
            last -= 1
        held = torch.arange(self.first, self.first + self.tokens, device=self.device)
        step = max(1, SCRATCH // max(1, self.tokens))
        for first in range(0, last, step):
            part = slice(first, min(first + step, last))
            own = staged(at[part], torch.int64, self.device).view(1, 1, -1, 1)
            yield part, {"mask": own >= held, "mask_first": self.first, "causal": False}
        first = torch.full((self.batch,), at[last], dtype=torch.int32, device=self.device)
        yield slice(last, len(at)), {"positions": first}

    # -- editing ----------------------------------------------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Forget the last ``tokens``. A packed page only lowers its count."""
        left = min(tokens, self.tokens)
        if not left:
            return
        self.prefetch()
        self.tokens -= left
        while left:
            page = self.pages[-1]
            if page.tokens > left:
                page.tokens -= left
                break
            left -= page.tokens
            self.pages.pop()
        last = max(0, len(self.pages) - 1)
        self.settled = min(self.settled, last)
        self._publish(last)

    def drop_before(self, position: int) -> None:
        """Free pages whose tokens all lie before ``position``."""
        count = 0
        while count < len(self.pages) - 1 and self.first + self.pages[count].tokens <= position:
            self.first += self.pages[count].tokens
            self.tokens -= self.pages[count].tokens
            count += 1
        if count:
            self.prefetch()
            del self.pages[:count]
            self.settled = max(0, self.settled - count)
            self._publish(0)

    def select(self, sequences: list[int]) -> None:
        """Sequence i becomes what ``sequences[i]`` was; pages are shared, and those that lost most rows are copied."""
        if sequences == list(range(self.batch)):
            return
        if any(not 0 <= s < self.batch for s in sequences):
            fail("cache", "sequences", sequences, f"indices of {self.batch} sequences")
        self.prefetch()
        old, moved = self.table, False
        if self.residuals is not None:
            self.residuals.select(sequences)
        self._start(len(sequences))
        for page in self.pages:
            page.rows = tuple(page.rows[s] for s in sequences)
            moved |= self._gather(page)
        if moved:
            return self._publish(0)
        self._use(old.index_select(0, staged(sequences, torch.int64, self.device)))
        self.used.fill_(len(self.pages))

    def _gather(self, page: CudaPage) -> bool:
        """Copy a page of whose rows at most half are still used; whether it was."""
        used = sorted(set(page.rows))
        if 2 * len(used) > page.slab.memory.shape[1]:
            return False
        rows = staged(used, torch.int64, self.device)
        page.slab, page.index = Slab(page.memory.index_select(0, rows).unsqueeze(0)), 0
        page.rows = tuple(used.index(row) for row in page.rows)
        return True

    # -- the host's memory --------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Move the pages to the host's memory. Packed ones go there once: their copy stays."""
        if self.resident:
            packed = {id(page.slab) for page in self.pages if page.packed}
            for slab in {id(page.slab): page.slab for page in self.pages}.values():
                slab.offload(keep=id(slab) in packed)
            if self.residuals is not None:
                self.residuals.offload()
            self.resident = False

    def prefetch(self) -> None:
        """Bring the pages back, on the current stream."""
        if not self.resident:
            for page in self.pages:
                page.slab.prefetch(self.device)
            if self.residuals is not None:
                self.residuals.prefetch()
            self.resident = True
            self._publish(0)

    # -- reference --------------------------------------------------------------------------------------------------

    def decode_page(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, dim]`` of one page."""
        page = self.pages[index]
        keys, values = cuda_layout.decode_page(self.layout, self._rows(page), page.kind, torch.float64)
        more = self.residuals.of_page(index) if self.residuals is not None and page.packed else None
        keys, values = (keys, values) if more is None else (keys + more[0], values + more[1])
        return keys[:, :, :page.tokens].to(dtype), values[:, :, :page.tokens].to(dtype)

    def _rows(self, page: CudaPage, sequences: list[int] | None = None) -> Tensor:
        rows = page.rows if sequences is None else [page.rows[s] for s in sequences]
        return page.memory.index_select(0, staged(rows, torch.int64, self.device))

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """All tokens held: keys ``[batch, kv_heads, tokens, dim]`` and values, as attention takes them."""
        self.prefetch()
        parts = [self.decode_page(i, dtype) for i in range(len(self.pages))]
        empty = torch.empty((self.batch, self.layout.kv_heads, 0, self.layout.key_dim), dtype=dtype,
                            device=self.device)
        return tuple(torch.cat([empty, *(p[i] for p in parts)], 2) for i in (0, 1))

    def decode_bias(self, index: int) -> Tensor:
        """What is added to the scores of one page's tokens: float32 ``[batch, kv_heads, tokens]``."""
        page = self.pages[index]
        if not self.layout.biased:
            return torch.zeros((self.batch, self.layout.kv_heads, page.tokens), device=self.device)
        return cuda_layout.decode_bias(self.layout, self._rows(page), page.kind)[:, :, :page.tokens]

    def chunks(self, tokens: int, most: int, rows: list[int] | None = None,
               dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The first ``tokens``, at most ``most`` at a time (whole pages): the place of the first in the cache, keys and
        values ``[batch, tokens, kv_heads * dim]``. ``rows``: which sequence of these pages each one reads. Pages of a
        kind are unpacked together."""
        self.prefetch()
        at = index = 0
        while at < tokens and index < len(self.pages):
            first, start, kind = index, at, self.pages[index].kind
            while index < len(self.pages) and self.pages[index].kind == kind \
                    and (index == first or at - start + self.pages[index].tokens <= most) and at < tokens:
                at += self.pages[index].tokens
                index += 1
            pages = self.pages[first:index]
            if rows in (None, list(range(self.batch))) and all(page.exclusive for page in pages):
                memory = torch.stack([page.memory for page in pages])  # [pages, rows, kv_heads, bytes]
            else:
                memory = torch.stack([self._rows(page, rows) for page in pages])
            yield start, *(x.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, :tokens - start]
                           for x in cuda_layout.decode_page(self.layout, memory, kind, dtype))

    def biases(self) -> Tensor:
        """Of all tokens held."""
        self.prefetch()
        parts = [self.decode_bias(index) for index in range(len(self.pages))]
        return torch.cat([torch.zeros((self.batch, self.layout.kv_heads, 0), device=self.device), *parts], 2)
