"""Low-rank residuals of packed pages on a GPU: what a run of pages shares, and the table that attention finds it
through.

Keys are read as they are stored plus ``left^T right``, values alike, with factors of their own. Queries times the right
factors of keys are one product for all pages, which a launch takes; left factors and those of values it reads where
they lie. The host knows where: nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_layout import TOKENS
from .cuda_slabs import Slab
from .devices import chosen, staged


@dataclass
class Segment:
    """Pages ``first`` to before ``first + count``. A row of the slab ``[1, rows, bytes]`` is a sequence's left factors,
    float16 ``[count, kv_heads, 2, rank, 64]`` of keys and values, and its right ones of values ``[kv_heads, rank,
    dim]``; those of keys begin at ``column``."""

    slab: Slab
    rows: tuple[int, ...]
    first: int
    count: int
    rank: int
    column: int


class Residuals:
    """Of the pages of one layer, all of them full and the first at position 0."""

    def __init__(self, batch: int, kv_heads: int, dim: int, device: torch.device):
        self.batch, self.kv_heads, self.dim, self.device = batch, kv_heads, dim, device
        self.segments: list[Segment] = []
        self.columns = 0
        self.keys = torch.zeros((batch, kv_heads, 0, dim), device=device)  # right factors, and room for more
        self.table = torch.zeros((batch, 1, 4), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return sum(s.slab.nbytes for s in self.segments) + self.keys.nbytes + self.table.nbytes

    def add(self, first: int, count: int, pk: Tensor, pv: Tensor, qk: Tensor, qv: Tensor) -> None:
        """Right factors ``pk``, ``pv [batch, kv_heads, rank, dim]`` and left ones ``qk``, ``qv [batch, kv_heads, rank,
        count * 64]`` for pages from ``first`` on, kept in float16."""
        rank, batch = pk.shape[2], self.batch
        left = torch.stack((qk, qv), 2).half().unflatten(-1, (count, TOKENS)).permute(0, 4, 1, 2, 3, 5)
        memory = torch.cat((left.flatten(1), pv.half().flatten(1)), 1).contiguous().view(torch.uint8)
        segment = Segment(Slab(memory.unsqueeze(0)), tuple(range(batch)), first, count, rank, self.columns)
        if self.columns + rank > self.keys.shape[2]:
            room = self.keys.new_zeros((batch, self.kv_heads, max(self.columns + rank, 2 * self.columns, 16), self.dim))
            room[:, :, :self.columns] = self.keys[:, :, :self.columns]
            self.keys = room
        self.keys[:, :, self.columns:self.columns + rank] = pk.half()
        self.columns += rank
        self.segments.append(segment)
        self._make_room(first + count)
        self._publish(segment)

    def _make_room(self, pages: int) -> None:
        more = pages - self.table.shape[1]
        if more > 0:
            self.table = torch.nn.functional.pad(self.table, (0, 0, 0, more))

    def _publish(self, segment: Segment) -> None:
        memory = segment.slab.memory[0]
        start, step, page = memory.data_ptr(), memory.stride(0), self.kv_heads * 4 * segment.rank * TOKENS
        rows = [[(first + i * page, first + segment.count * page, segment.column, segment.rank)
                 for i in range(segment.count)] for first in (start + row * step for row in segment.rows)]
        self.table[:, segment.first:segment.first + segment.count] = staged(rows, torch.int64, self.device)

    def for_attention(self, query: Tensor, pages: int) -> tuple[Tensor, Tensor] | None:
        """What `ops_kv_cuda.kv_attention` takes for ``query [batch, heads, queries, dim]`` and a table with room for so
        many ``pages``."""
        if not self.segments:
            return None
        self._make_room(pages)
        grouped = query.float().unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        products = grouped @ self.keys[:, :, :self.columns].transpose(-1, -2)
        return self.table[:, :pages].contiguous(), products.view(*query.shape[:3], self.columns)

    def of_page(self, index: int) -> tuple[Tensor, Tensor] | None:
        """What is added to keys and to values ``[batch, kv_heads, 64, dim]`` of a page, in float64."""
        for s in self.segments:
            if s.first <= index < s.first + s.count:
                rows = chosen(s.slab.memory[0], list(s.rows)).view(torch.float16)
                left, right = rows.split([rows.shape[1] - self.kv_heads * s.rank * self.dim,
                                          self.kv_heads * s.rank * self.dim], 1)
                left = left.view(self.batch, s.count, self.kv_heads, 2, s.rank, TOKENS)[:, index - s.first].double()
                rights = (self.keys[:, :, s.column:s.column + s.rank],
                          right.view(self.batch, self.kv_heads, s.rank, self.dim))
                return tuple(left[:, :, i].transpose(-1, -2) @ right.double() for i, right in enumerate(rights))
        return None

    def select(self, sequences: list[int]) -> None:
        """Sequence i becomes what ``sequences[i]`` was; memory is shared, and copied where at most half is used."""
        self.batch = len(sequences)
        self.keys, self.table = chosen(self.keys, sequences), chosen(self.table, sequences)
        for segment in self.segments:
            rows = tuple(segment.rows[s] for s in sequences)
            used = sorted(set(rows))
            if 2 * len(used) <= segment.slab.memory.shape[1]:
                segment.slab = Slab(chosen(segment.slab.memory[0], used).unsqueeze(0))
                segment.rows = tuple(used.index(row) for row in rows)
                self._publish(segment)
            else:
                segment.rows = rows

    def offload(self) -> None:
        for segment in self.segments:
            segment.slab.offload(keep=True)

    def prefetch(self) -> None:
        for segment in self.segments:
            segment.slab.prefetch(self.device)
            self._publish(segment)
