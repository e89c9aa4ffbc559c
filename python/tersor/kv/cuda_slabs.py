"""Memory of several pages on a GPU, which can leave for the host's and come back."""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import host_like


class Slab:
    """One allocation of several pages, uint8 ``[pages, sequences, kv_heads, bytes]``."""

    __slots__ = ("memory", "host", "current")

    def __init__(self, memory: Tensor):
        self.memory: Tensor | None = memory
        self.host: Tensor | None = None  # what it was when it left last; packed pages do not change
        self.current = False  # whether the host's copy still is what the device has

    def offload(self, keep: bool) -> None:
        """Leave the device; ``keep``: the pages stay as they are, so that the copy serves again."""
        if self.memory is None:
            return
        if self.host is None:
            self.host = host_like(self.memory)
        if not self.current:
            self.host.copy_(self.memory, non_blocking=True)
        self.memory, self.current = None, keep

    def prefetch(self, device: torch.device) -> None:
        if self.memory is None:
            self.memory = torch.empty(self.host.shape, dtype=torch.uint8, device=device)
            self.memory.copy_(self.host, non_blocking=True)
            if not self.current:
                self.host = None

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.memory, self.host) if t is not None)
