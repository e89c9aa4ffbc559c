"""Choosing a codec's level for a model: how many bins each layer's keys and values deserve."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .codec import Level, Parts, decode_chunk, encode_chunk
from .contexts import append, geometry_of

PROBE = 8  # bins of the layer that is looked at
LEAST, MOST = 4, 64


def sensitivity(model: nn.Module, token_ids: Tensor, prompt: int | None = None) -> Tensor:
    """Float64 ``[layers, 2]``: how much the model's predictions suffer when the keys, or the values, of one layer of
    the prompt are coded with 8 bins: the Kullback-Leibler divergence, in nats a token, from the exact prompt's.

    ``token_ids [sequences, tokens]``, of which the first ``prompt`` (default: half) are the prompt.
    """
    prompt = token_ids.shape[1] // 2 if prompt is None else prompt
    if token_ids.dim() != 2 or not 1 <= prompt < token_ids.shape[1]:
        raise ValueError(f"token_ids: found {list(token_ids.shape)}, accepted is [sequences, tokens], with a prompt of "
                         "1 to one less")
    total = None
    for ids in token_ids:
        parts = _read(model, ids[:prompt])
        coarse = _coded(parts, model, Level("probe", (PROBE,), (PROBE,)))[0]
        exact = _predict(model, parts, ids[prompt:])
        found = torch.zeros(len(parts), 2, dtype=torch.float64)
        for layer in range(len(parts)):
            for part in (0, 1):
                changed = list(parts)
                pair = list(parts[layer])
                pair[part] = coarse[layer][part]
                changed[layer] = tuple(pair)
                other = _predict(model, changed, ids[prompt:])
                found[layer, part] = (exact.exp() * (exact - other)).sum(-1).mean()
        total = found if total is None else total + found
    return total / len(token_ids)


def tune_level(model: nn.Module, token_ids: Tensor, bits: float = 2.2, name: str = "tuned",
               prompt: int | None = None) -> Level:
    """The level of up to ``bits`` bits a number that hurts the model least on ``token_ids [sequences, tokens]``.

    To first order the harm of a layer grows with the square of its step, and its bits fall with the step's logarithm;
    the sum of harms at given bits is least where all harms are equal. ValueError where no level is small enough.
    """
    share = sensitivity(model, token_ids, prompt).clamp_min(1e-12).sqrt()
    prompt = token_ids.shape[1] // 2 if prompt is None else prompt
    contexts = [_read(model, ids[:prompt]) for ids in token_ids[:2]]
    best, low, high = None, 0.1, 100.0
    for _ in range(10):
        middle = (low * high)**0.5
        level = _level(name, share / share.log().mean().exp() * middle)
        if sum(_coded(parts, model, level)[1] for parts in contexts) / len(contexts) <= bits:
            best, low = level, middle
        else:
            high = middle
    if best is None:
        raise ValueError(f"bits: found {bits}, accepted is more: {LEAST} bins everywhere take more")
    return best


def _level(name: str, steps: Tensor) -> Level:
    """``steps [layers, 2]``: how many steps half the range is to have."""
    bins = (2 * steps.round() + 2).clamp(LEAST, MOST).int().T.tolist()
    return Level(name, tuple(bins[0]), tuple(bins[1]))


def _read(model: nn.Module, ids: Tensor) -> Parts:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _coded(parts: Parts, model: nn.Module, level: Level) -> tuple[Parts, float]:
    """What comes back at a level, and the bits a number takes."""
    geometry = geometry_of(parts, parts[0][0].dtype, model)
    tokens = parts[0][0].shape[1]
    data = encode_chunk(parts, geometry, level, 0, 0)
    return decode_chunk(data, geometry, 0, 0, tokens), 8 * len(data) / (tokens * geometry.numbers)


def _predict(model: nn.Module, parts: Parts, ids: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    append(cache, parts)
    with torch.no_grad():
        return model(ids[None], past_key_values=cache, use_cache=True).logits[0].double().log_softmax(-1)
