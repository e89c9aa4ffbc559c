"""`StaticCache`: a compressed cache whose memory is all there from the start, for decode steps as CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op_checks import fail
from . import devices
from .cache import Cache
from .layer import PackedLayer
from .plan import CachePlan


class StaticLayer(PackedLayer):
    """Of `StaticCache`: counts its tokens on the device."""

    supports_early_init = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if not devices.on_cuda(key_states.device):
            fail("StaticCache", f"layer {self.index}", f"keys on {key_states.device}",
                 "a CUDA device: there are no graphs elsewhere, and tersor.Cache needs no maximum")
        super().lazy_initialization(key_states, value_states)
        from .static_pages import static_pages

        self.pages = static_pages(self.store)

    def get_seq_length(self):
        """An int64 tensor without dimensions, on the device, as transformers' static layers have it."""
        if self.store is None:
            return 0
        length = self.pages[0].length()
        return length if self.fresh is None else length + self.fresh[0].shape[2]

    def get_max_length(self) -> int:
        return self.max_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_tokens, 0

    def reset(self) -> None:
        """Forget all tokens; the memory stays where it is."""
        self.fresh, self.leaves = None, False
        for pages in self.pages if self.store is not None else ():
            pages.clear()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, accepted is a negative number of tokens to remove, or 0")
        if self.store is not None and tokens_to_remove:
            self.flush()
            self.store.crop(-tokens_to_remove)


class StaticCache(Cache):
    """`Cache` with memory for ``max_tokens`` made at the first forward pass, or at once for ``batch`` sequences. CUDA
    only.

    What a decode step launches, and with what arguments, does not depend on how many tokens there are: the page table
    is advanced on the device. A step that was captured into a CUDA graph can therefore be replayed::

        cache = tersor.StaticCache(model, "K4V4", max_tokens=4096)
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        model(token, past_key_values=cache)            # once as it is: kernels are loaded
        cache.crop(-1)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            token.copy_(model(token, past_key_values=cache).logits.argmax(-1))
        graph.replay()                                 # as often as there is room

    `get_seq_length` is a tensor on the device, as that of transformers' own static cache. Keys and values are those of
    `Cache` with the same spec. Methods that hold tokens in pages of one kind work inside it. `crop` takes back up to
    some 190 tokens, beams are reordered by copies in place, and nothing is ever freed. Replays past ``max_tokens``
    change nothing but a counter: `report` then raises RuntimeError. ValueError as for `Cache`, and for ``max_tokens``
    below 1.
    """

    def __init__(self, model, spec: str | CachePlan, *, max_tokens: int, batch: int = 0, **options):
        if type(max_tokens) is not int or not 1 <= max_tokens <= 1 << 30:
            fail("StaticCache", "max_tokens", max_tokens, "1 to 2^30")
        if type(batch) is not int or batch < 0:
            fail("StaticCache", "batch", batch, "0, or the number of sequences that memory is made for")
        if "offloading" in options:
            fail("StaticCache", "offloading", options["offloading"], "none: its memory stays where it is")
        self.max_tokens = max_tokens
        super().__init__(model, spec, **options)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, StaticLayer):
                fail("StaticCache", f"layer {i}", type(layer).__name__, "full and sliding attention")
        if batch:
            config = model.config.get_text_config(decoder=True)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.early_initialization(batch, heads, dim, model.dtype, torch.device(model.device))

    def _make_layer(self, *arguments) -> StaticLayer:
        return StaticLayer(*arguments, max_tokens=self.max_tokens)
