"""`BlockStore`: a raw tail that a method packs block by block, with more than rounding: by saliency, or with a
residual."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .layout import Layout
from .store import OverPages, Shape, Step, check_shape, make_pages


class BlockStore(OverPages):
    """``recent`` tokens and up to ``block`` more stay raw; then whole pages of the oldest are handed to `pack`."""

    def __init__(self, shape: Shape, layout: Layout, block: int):
        check_shape(shape)
        if shape.window:
            raise ValueError(f"tersor.Cache: layer {shape.layer}: found a sliding window, accepted are layers of full "
                             "attention for a method that packs blocks of tokens")
        if shape.max_tokens:
            raise ValueError(f"tersor.StaticCache: layer {shape.layer}: found a method that packs blocks of tokens, "
                             "accepted are methods that hold tokens in pages of one kind; tersor.Cache takes it")
        self.shape, self.layout, self.block = shape, layout, max(block, layout.page_tokens)
        # Pages would pack by themselves what is older than `recent`; here only `pack` does.
        self.pages = make_pages(shape, layout, recent=1 << 60)
        self.packed = 0  # tokens

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor, bias: Tensor | None, tokens: int) -> None:
        """Append the block ``[batch, kv_heads, tokens, dim]``, the oldest raw tokens, to ``self.pages`` as packed
        pages; ``tokens`` is a multiple of a page."""

    @property
    def raw(self) -> int:
        return self.pages.tokens - self.packed

    def prompt(self, step: Step) -> None:
        self.pages.append(step.keys, step.values)
        self.settle(step)

    def attend(self, step: Step):
        out = self.attend_pages(step)
        self.settle(step)
        return out

    def settle(self, step: Step) -> None:
        """Pack what is due."""
        recent = self.shape.settings.recent
        if self.raw - recent < self.block:
            return
        tokens = (self.raw - recent) // self.layout.page_tokens * self.layout.page_tokens
        keys, values, bias = self._take_raw(step)
        self.pack(keys[:, :, :tokens], values[:, :, :tokens], None if bias is None else bias[:, :, :tokens], tokens)
        self.packed += tokens
        if keys.shape[2] > tokens:
            rest = (keys[:, :, tokens:], values[:, :, tokens:])
            self.pages.append(*rest) if bias is None else self.pages.append(*rest, bias[:, :, tokens:])

    def _take_raw(self, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """The raw tail, taken off the pages."""
        first, left = len(self.pages.pages), self.raw
        for count in reversed(self.pages.counts()):
            if left <= 0:
                break
            first, left = first - 1, left - count
        raw, bias = range(first, len(self.pages.pages)), None
        if self.layout.biased:
            bias = torch.cat([self.pages.decode_bias(i) for i in raw], 2)
        if step.fresh == self.raw:
            keys, values = step.keys, step.values
        else:
            pages = [self.pages.decode_page(i, self.shape.dtype) for i in raw]
            keys, values = (torch.cat(part, 2) for part in zip(*pages))
        self.pages.crop(self.raw)
        return keys, values, bias

    def crop(self, tokens: int) -> None:
        if tokens > self.raw:
            raise RuntimeError(f"crop: {tokens} tokens cannot be removed, because only the last {self.raw} are not "
                               "packed yet; accepted are so many")
        self.pages.crop(tokens)
