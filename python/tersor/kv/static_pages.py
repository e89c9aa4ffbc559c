"""`StaticPages`: one layer's pages on a GPU with all memory there from the start, for steps that run as CUDA graphs.

Where a page lies follows from its index, and what becomes of it from how many tokens there are, so a kernel keeps the
table (cuda/kernels/kv_advance.cu): a step launches the same four kernels with the same arguments, whatever it finds.
Raw pages are a ring, which every page passes through; packed ones stand beside it, a ring as well behind a sliding
window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops_kv_cuda as ops
from ..op_checks import fail
from . import cuda_layout
from .cuda_pages import TOKENS, CudaPages
from .devices import capturing, staged
from .layout import Layout
from .store import OverPages, Shape, Step, Store, make_layout

MOST = 128  # tokens of a step; more are taken so many at a time


class StaticPages(CudaPages):
    """``layout`` for ``batch`` sequences of up to ``max_tokens``; the rest as in `CudaPages`. ``window``: tokens that
    queries see, 0 for all.

    ``tokens`` is what this process knows: replays of a graph count on the device alone (`length`)."""

    def __init__(self, layout: Layout, batch: int, max_tokens: int, recent: int = 0, sink_pages: int = 0,
                 window: int = 0, device: torch.device | str = "cuda", where: str = "StaticCache"):
        self.max_tokens, self.window = max_tokens, window
        room = -(-max_tokens // TOKENS)
        self.room, self.sinks = room, min(sink_pages, room) if layout.packs else 0
        self.after = max(1, room - self.sinks)
        self.top = 0  # the most tokens there were: what the rings were written for
        super().__init__(layout, batch, recent, sink_pages, device, where)

    def _start(self, batch: int) -> None:
        self.batch = batch
        after, pages = self.after, -(-(self.recent + MOST) // TOKENS) + 2
        self.raw_pages = min(after, pages) if self.layout.packs else after
        seen = -(-(self.window + MOST) // TOKENS) + 2 if self.window else after
        heads, device, kind = self.layout.kv_heads, self.device, int(self.layout.packs)

        def region(count: int, kind: int) -> Tensor:
            return torch.empty((batch, count, heads, self.sizes[kind] // heads), dtype=torch.uint8, device=device)

        self.sink_memory, self.raw = region(self.sinks, 0), region(self.raw_pages, 0)
        self.packed = region(min(after, seen) if self.layout.packs else 0, kind)
        self.table = torch.zeros((batch, self.room, 2), dtype=torch.int64, device=device)
        self.used = torch.zeros(batch, dtype=torch.int32, device=device)
        self.state = torch.zeros((batch, 2), dtype=torch.int32, device=device)
        self.jobs = torch.zeros((batch * (MOST // TOKENS), 2), dtype=torch.int64, device=device)
        self.arguments = [
            self.table.data_ptr(), self.used.data_ptr(), self.state.data_ptr(), self.jobs.data_ptr(),
            self.sink_memory.data_ptr(), self.raw.data_ptr(), self.packed.data_ptr(), batch, self.room, MOST // TOKENS,
            self.sinks, self.raw_pages, self.packed.shape[1], self.sizes[0], self.sizes[kind], *self.bits[kind],
            self.entries[kind] >> 40 & 255, self.recent, MOST, self.max_tokens]

    @property
    def kernel(self) -> str:
        return f"{super().kernel}, static"

    @property
    def nbytes(self) -> int:
        held = (self.sink_memory, self.raw, self.packed, self.table, self.used, self.state, self.jobs)
        return sum(t.untyped_storage().nbytes() for t in held)

    def length(self) -> Tensor:
        """Tokens of a sequence, an int64 without dimensions on the device."""
        return self.state[0, 0].long()

    def held(self) -> int:
        """The same for the host, which waits for it. RuntimeError where replays went past `max_tokens`."""
        tokens, missed = self.state[0].tolist()
        if missed:
            raise RuntimeError(f"tersor.StaticCache: found {missed} steps past max_tokens = {self.max_tokens}, whose "
                               "tokens are not held; accepted is a cache that is large enough")
        self.tokens, self.top = tokens, max(self.top, tokens)
        return tokens

    def counts(self) -> list[int]:
        return [int(word) >> 32 & 255 for word in self.table[0, :int(self.used[0]), 1]]

    # -- growing ----------------------------------------------------------------------------------------------------

    def _advance(self, tokens: int) -> None:
        with ops._on(self.device):
            ops._C.cuda_kv_advance(self.arguments, tokens, ops._stream(self.device))
        if not capturing(self.device):
            self.tokens += tokens
            self.top = max(self.top, self.tokens)

    def _steps(self, tokens: int) -> list[slice]:
        if not capturing(self.device) and self.tokens + tokens > self.max_tokens:
            fail("StaticCache", "tokens", self.tokens + tokens, f"at most max_tokens = {self.max_tokens}")
        return [slice(at, min(at + MOST, tokens)) for at in range(0, tokens, MOST)]

    def _store(self, keys: Tensor, values: Tensor) -> None:
        self._advance(keys.shape[2])
        self._launch_append(self.table, self.used, keys, values, None)

    def _pack_old(self) -> None:
        if self.layout.packs:
            self._launch_pack(self.jobs, 1)

    def append(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        self._accept(keys, values, bias)
        for part in self._steps(keys.shape[2]):
            self._store(keys[:, :, part], values[:, :, part])
            self._pack_old()

    def attend(self, query: Tensor, keys: Tensor | None, values: Tensor | None, scale: float, causal: bool = True,
               window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, mask: Tensor | None = None,
               mask_first: int = 0, log_sum_exp: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """As `CudaPages.attend`. What is too long for a step is several; without a mask the queries are causal."""
        fresh = 0 if keys is None else keys.shape[2]
        if fresh:
            self._accept(keys, values, None)
        if fresh > MOST and (query.shape[2] != fresh or not causal and mask is None):
            fail("StaticCache", "query", f"{query.shape[2]} queries of {fresh} tokens, causal={causal}",
                 f"a causal query for each token of a step of more than {MOST}")
        whole = slice(0, query.shape[2])
        outs = []
        for part in self._steps(fresh) or [whole]:
            if fresh:
                self._store(keys[:, :, part], values[:, :, part])
            own = part if fresh > MOST else whole
            outs.append(ops.kv_attention(query[:, :, own], self.table, self.used, self.layout.kv_heads, scale,
                                         softcap=softcap, causal=causal, window=window, sinks=sinks,
                                         mask=None if mask is None else mask[:, :, own], mask_first=mask_first,
                                         **self.described))
            if fresh:
                self._pack_old()
        out, lse = outs[0]
        if len(outs) > 1:
            out, lse = torch.cat([o for o, _ in outs], 1), torch.cat([s for _, s in outs], 2)
        return (out, lse) if log_sum_exp else out

    # -- editing ----------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.state.zero_()
        self.used.zero_()
        self.jobs.zero_()
        self.tokens = self.top = 0

    def crop(self, tokens: int) -> None:
        """Forget the last ``tokens``, as long as the rings still have what is needed then, or all. Waits for the
        device."""
        held = self.held()
        if tokens >= held:
            return self.clear()
        # The first page that is not written over, of those that will be read raw, and of the packed ones in a window.
        raw, packed = -(-self.top // TOKENS) - self.raw_pages, (self.top - self.recent) // TOKENS - self.packed.shape[1]
        most = held - self.recent - TOKENS * raw if raw > self.sinks else held
        if self.window and packed > self.sinks:
            most = min(most, held - self.window - TOKENS * packed)
        if tokens > most:
            fail("StaticCache", "tokens to remove", tokens,
                 f"at most {max(most, 0)}, or all: older pages are written over")
        self.state[:, 0].sub_(tokens)
        self.tokens = held - tokens
        self._advance(0)

    def drop_before(self, position: int) -> None:
        """Nothing: pages behind a window are written over."""

    def select(self, sequences: list[int]) -> None:
        """Sequence i becomes what ``sequences[i]`` was, by copies in place; ValueError for another number of them."""
        if sequences == list(range(self.batch)):
            return
        if len(sequences) != self.batch or any(not 0 <= s < self.batch for s in sequences):
            fail("StaticCache", "sequences", sequences, f"{self.batch} indices of {self.batch} sequences")
        rows = staged(sequences, torch.int64, self.device)
        for memory in (self.sink_memory, self.raw, self.packed):
            if memory.numel():
                memory.copy_(memory.index_select(0, rows))

    def offload(self) -> None:
        """Nothing: what graphs use stays where it is."""

    def prefetch(self) -> None:
        pass

    # -- reference --------------------------------------------------------------------------------------------------

    def decode_page(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        word = int(self.table[0, index, 1])
        packed = self.layout.packs and (word >> 48 & 255, word >> 56 & 255) == self.bits[1]
        place = index - self.sinks
        if place < 0:
            memory = self.sink_memory[:, index]
        elif not packed:
            memory = self.raw[:, place % self.raw_pages]
        else:
            memory = self.packed[:, place % self.packed.shape[1]]
        keys, values = cuda_layout.decode_page(self.layout, memory, int(packed), dtype)
        return keys[:, :, :word >> 32 & 255], values[:, :, :word >> 32 & 255]

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """All tokens held (behind a window, those whose pages were written over come out as what stands there now)."""
        parts = [self.decode_page(i, dtype) for i in range(int(self.used[0]))]
        empty = torch.empty((self.batch, self.layout.kv_heads, 0, self.layout.key_dim), dtype=dtype,
                            device=self.device)
        return tuple(torch.cat([empty, *(p[i] for p in parts)], 2) for i in (0, 1))


class StaticStore(OverPages):
    """`StaticPages` as a store; ``seen`` is as far as this process knows."""

    def __init__(self, shape: Shape):
        s = shape.settings
        self.shape, self.window = shape, shape.window
        self.pages = StaticPages(make_layout(shape), shape.batch, shape.max_tokens, s.recent,
                                 0 if shape.window else -(-s.sinks // TOKENS), shape.window, shape.device,
                                 f"StaticCache: layer {shape.layer}")

    def prompt(self, step: Step) -> None:
        self.pages.append(step.keys, step.values)

    def attend(self, step: Step):
        return self.attend_pages(step)

    def crop(self, tokens: int) -> None:
        self.pages.crop(tokens)

    @property
    def held(self) -> int:
        return self.pages.held()


def static_pages(store: Store) -> list[StaticPages]:
    """Those inside a store, all of them."""
    if isinstance(store, StaticStore):
        return [store.pages]
    return [pages for inner in store.within() for pages in static_pages(inner)]
