"""The attention function of transformers that reads a `tersor.Cache` as it is stored.

A cache layer's ``update()`` returns a `Handle` for the keys and one for the values, and models pass them on untouched
to the attention function, which appends the fresh tokens and attends in one native call. On any other cache the
function is what transformers would have run. Models that compute with keys after ``update()`` (latent attention) meet
the handle: it turns into the tensor where the cache holds 16 bits, and refuses where it would have to unpack history.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..op_checks import fail
from . import devices
from .store import Step

NAME = "tersor"
FEW_QUERIES = 8  # up to here, and over history, our kernel; a first prompt of more goes to SDPA, then into the cache


class Handle:
    """The keys or the values of one layer, in place of the tensor that ``update()`` returns elsewhere."""

    __slots__ = ("layer", "part")

    def __init__(self, layer, part: int):
        self.layer, self.part = layer, part

    def tensor(self) -> Tensor:
        """What it stands for, ``[batch, kv_heads, tokens, dim]``; RuntimeError for a cache of fewer bits."""
        return self.layer.dense()[self.part]

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index):
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*_dense(args), **_dense(kwargs or {}))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "neg", "pow"):
    def _operator(self, *others, _name=f"__{_name}__"):
        return getattr(self.tensor(), _name)(*_dense(others))
    setattr(Handle, f"__{_name}__", _operator)


def _dense(value):
    if isinstance(value, Handle):
        return value.tensor()
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **options):
    """As transformers' interface has it: ``query [batch, heads, queries, dim]`` to ``([batch, queries, heads, dim],
    None)``."""
    if not isinstance(key, Handle):
        return plain_attention(module, query, key, value, attention_mask, scaling, dropout, is_causal, **options)
    if torch.compiler.is_compiling():
        return _attend_apart(module, query, key, value, attention_mask, scaling, dropout, is_causal, options)
    return _attend(module, query, key, value, attention_mask, scaling, dropout, is_causal, options)


def _attend(module, query, key, value, mask, scaling, dropout, is_causal, options):
    layer = key.layer
    if not isinstance(value, Handle) or value.layer is not layer:
        fail("Cache", "value", type(value).__name__, "the values of the layer that the keys are of")
    if query.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("tersor.Cache has no backward: run the model under torch.no_grad(), or without this cache")
    if dropout:
        fail("Cache", "dropout", dropout, "0: call model.eval()")
    if options.get("position_bias") is not None:
        fail("Cache", "position_bias", "a tensor", "none: use a transformers cache for this model")
    if layer.owner is None or layer.owner() is not module:
        layer.bind(module)
    softcap, sinks = options.get("softcap") or 0.0, options.get("s_aux")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    store, fresh = layer.store, layer.take_fresh()
    keys, values = fresh or (None, None)
    tokens = 0 if fresh is None else keys.shape[2]
    queries = query.shape[2]
    scale = query.shape[-1]**-0.5 if scaling is None else scaling
    step = Step(query.detach(), keys, values, scale, causal, softcap, None, None, 0, options.get("position_ids"))
    if sinks is not None:
        step.sinks = sinks.detach().float().contiguous()
    if mask is not None and layer.max_tokens:  # masks of static caches have columns for all that may come
        if fresh is not None and not store.seen:
            mask = mask[..., :tokens]
    elif mask is not None:
        step.mask_first = store.seen + tokens - mask.shape[-1]
    if fresh is not None and not store.seen and queries > FEW_QUERIES and queries == tokens and not softcap \
            and sinks is None and (mask is None or mask.shape[-1] == queries):
        out = sdpa_attention_forward(module, query, keys, values, mask, dropout, scaling, is_causal)
        if mask is not None:
            step.mask, step.causal = _boolean(mask, layer), False
        store.prompt(step)
        layer.attended()
        return out
    if mask is not None:
        step.mask, step.causal = _boolean(mask, layer), False
    out = store.attend(step)
    if layer.leaves:
        layer.attended()
    return out, None


_attend_apart = torch.compiler.disable(_attend)


def _boolean(mask: Tensor, layer) -> Tensor:
    """What is seen. On a GPU, where to look at a float mask waits for it, that is done for several queries, and for the
    first single one of a layer; a graph that is being captured cannot wait."""
    if mask.dtype is torch.bool:
        return mask
    seen = mask == 0
    known = devices.on_cuda(mask.device) and layer.mask_known and mask.shape[2] == 1
    if not known and not devices.capturing(mask.device):
        if not (seen | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            fail("Cache", "attention_mask", f"{mask.dtype} with a bias", "a mask: bool, or 0 and the lowest number")
        layer.mask_known = True
    return seen


def plain_attention(module, query, key, value, mask, scaling, dropout, is_causal, **options):
    """For tensors: SDPA, or the model's own function where SDPA cannot express what the model asks for."""
    if isinstance(value, Handle):
        value = value.tensor()
    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        fail("Cache", "model", type(module).__name__,
             "a model with eager_attention_forward, or without softcap and sinks")
    queries, tokens = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)[None, None]
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)


def register() -> None:
    """Make ``"tersor"`` an attention implementation of transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
