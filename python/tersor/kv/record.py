"""What a model's attention sees on calibration data: queries, keys and values of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .attention import plain_attention

NAME = "tersor_recording"


@dataclass
class Seen:
    """One call of a layer's attention: ``query [batch, heads, tokens, dim]``, ``key`` and ``value [batch, kv_heads,
    tokens, dim]`` as attention takes them (after rotary embedding), and the scale of scores."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


_takers: list[Callable[[Seen], tuple[Tensor, Tensor, Tensor] | None]] = []


def _attention(module, query, key, value, mask, scaling=None, dropout=0.0, is_causal=None, **options):
    scale = query.shape[-1]**-0.5 if scaling is None else scaling
    for take in _takers:
        changed = take(Seen(module.layer_idx, query, key, value, scale))
        if changed is not None:
            query, key, value = changed
    return plain_attention(module, query, key, value, mask, scaling, dropout, is_causal, **options)


@contextmanager
def recording(model: nn.Module, take: Callable[[Seen], tuple[Tensor, Tensor, Tensor] | None]) -> Iterator[None]:
    """While inside, ``take`` is called with what each layer's attention sees; what it returns, if anything, is what
    attention goes on with. Runs of the model must not use a cache."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ValueError(f"model: found {type(model).__name__}, whose attention cannot be exchanged, accepted is a "
                         "model that uses transformers' AttentionInterface")
    _takers.append(take)
    try:
        yield
    finally:
        _takers.remove(take)
        model.set_attn_implementation(before)


@contextmanager
def recording_block(attention: nn.Module,
                    take: Callable[[Seen], tuple[Tensor, Tensor, Tensor] | None]) -> Iterator[None]:
    """`recording`, for a block that is run without its model: ``attention`` is its module, with a ``config``."""
    AttentionInterface.register(NAME, _attention)
    config = attention.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    _takers.append(take)
    try:
        yield
    finally:
        _takers.remove(take)
        config._attn_implementation = before


def record(model: nn.Module, batches: list[Tensor], take: Callable[[Seen], None], progress=None) -> None:
    """Run ``batches`` of token ids through the model without gradients, and ``take`` what each layer sees."""
    def keep(seen: Seen) -> None:
        take(seen)

    with torch.no_grad(), recording(model, keep):
        for index, ids in enumerate(batches):
            model(ids.to(model.device), use_cache=False)
            if progress is not None:
                progress(f"{index + 1} of {len(batches)} sequences")
