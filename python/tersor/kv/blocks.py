"""`BlockStore`: a raw tail that a method packs block by block, with more than rounding: by saliency, or with a residual."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .layout import Layout
from .pages import Pages
from .store import Shape, Step, Store, check_shape


class BlockStore(Store):
    """``recent`` tokens and up to ``block`` more stay raw; then whole pages of the oldest are handed to `pack`."""

    def __init__(self, shape: Shape, layout: Layout, block: int):
        check_shape(shape)
        if shape.window:
            raise ValueError(f"tersor.Cache: layer {shape.layer}: found a sliding window, accepted are layers of full "
                             "attention for a method that packs blocks of tokens")
        self.shape, self.layout, self.block = shape, layout, max(block, layout.page_tokens)
        # Pages would pack by themselves what is older than `recent`; here only `pack` does.
        self.pages = Pages(layout, shape.batch, recent=1 << 60)
        self.packed = 0  # tokens

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor, bias: Tensor | None, tokens: int) -> None:
        """Append the block ``[batch, kv_heads, tokens, dim]``, the oldest raw tokens, to ``self.pages`` as packed pages;
        ``tokens`` is a multiple of a page."""

    @property
    def seen(self) -> int:
        return self.pages.tokens

    @property
    def batch(self) -> int:
        return self.pages.batch

    @property
    def raw(self) -> int:
        return self.pages.tokens - self.packed

    def prompt(self, step: Step) -> None:
        self.pages.append(step.keys, step.values)
        self.settle(step)

    def attend(self, step: Step):
        out = self.pages.attend(step.query, step.keys, step.values, step.scale, step.causal, 0, step.softcap, step.sinks,
                                step.mask, step.mask_first, step.log_sum_exp)
        self.settle(step)
        return out

    def settle(self, step: Step) -> None:
        """Pack what is due."""
        recent = self.shape.settings.recent
        if self.raw - recent < self.block:
            return
        tokens = (self.raw - recent) // self.layout.page_tokens * self.layout.page_tokens
        keys, values, bias = self._take_raw()
        self.pack(keys[:, :, :tokens], values[:, :, :tokens], None if bias is None else bias[:, :, :tokens], tokens)
        self.packed += tokens
        if keys.shape[2] > tokens:
            rest = (keys[:, :, tokens:], values[:, :, tokens:])
            self.pages.append(*rest) if bias is None else self.pages.append(*rest, bias[:, :, tokens:])

    def _take_raw(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The raw tail, taken off the pages."""
        parts, left = [], self.raw
        for page, count in zip(reversed(self.pages.pages), reversed(self.pages.counts())):
            if left <= 0:
                break
            memory = page.memory[page.rows]
            keys, values = self.layout.decode(memory, 0, self.shape.dtype)
            bias = self.layout.decode_bias(memory, 0)
            parts.append((keys[:, :, :count], values[:, :, :count], bias[:, :, :count]))
            left -= count
        self.pages.crop(self.raw)
        keys, values, bias = (torch.cat(p, 2) for p in zip(*reversed(parts)))
        return keys, values, bias if self.layout.biased else None

    def crop(self, tokens: int) -> None:
        if tokens > self.raw:
            raise RuntimeError(f"crop: {tokens} tokens cannot be removed, because only the last {self.raw} are not packed "
                               "yet; accepted are so many")
        self.pages.crop(tokens)

    def select(self, sequences: list[int]) -> None:
        self.pages.select(sequences)

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return self.pages.decode(dtype)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    @property
    def bits(self) -> float:
        return self.pages.layout.bits()
