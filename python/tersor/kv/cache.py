"""`Cache`: keys and values of past tokens, in a precision that a spec names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from . import attention
from .layer import CacheRow, PackedLayer
from .plan import CachePlan, plan_for
from .rotary import find_rotary


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, layer by layer; prints as a table."""

    spec: str
    rows: tuple[CacheRow, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token of one sequence takes, all layers together."""
        return sum(row.bytes_per_token for row in self.rows)

    def __str__(self) -> str:
        lines = [f"cache {self.spec}: {self.nbytes} bytes, {self.bytes_per_token:g} a token"]
        lines += [f"  layer {row.layer:3d}  {row.kind}  {row.sequences} x {row.tokens} tokens  {row.nbytes} bytes  "
                  f"{row.bytes_per_token:g} a token  {row.bits:.3g} bits  {row.kernel}" for row in self.rows]
        return "\n".join(lines)


class Cache(DynamicCache):
    """A cache for ``model.generate(..., past_key_values=tersor.Cache(model, "K4V4"))``.

    ``spec`` gives the bits of keys and of values: ``K16V16`` (as the model computes, exact), or 8, 4, 3, 2 for either.
    Options in brackets, which ``**options`` may give as well, are those of `tersor.kv.settings.Settings`. Methods stand
    before a colon (``razor:K8V8``, ``hadamard`` and all others in docs/cache.md); what a method has to learn from data
    first comes with a plan of `tersor.kv.calibrate`, given in place of the spec.

    Sets the model's attention implementation to ``"tersor"``, which serves any other cache as before. ValueError for
    what cannot be served: an unknown spec, option or method, a method without its plan, a model without configuration
    or without exchangeable attention, layers of another kind, heads that are not multiples of 16, a device other than
    the CPU and CUDA; on CUDA (docs/cache.md lists what it takes) when a layer's first tokens come.

    ``offloading``: layers wait for their turn in pinned memory of the host, as those of transformers; needs a GPU.
    """

    def __init__(self, model, spec: str | CachePlan, *, offloading: bool = False, **options):
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise ValueError(f"model: found {type(model).__name__}, accepted is a transformers model")
        if config.is_encoder_decoder:
            raise ValueError(f"model: found {type(model).__name__} with an encoder, accepted is a decoder")
        plan = plan_for(model, spec, options)
        if offloading and not torch.cuda.is_available():
            raise ValueError("tersor.Cache: offloading: found no GPU, accepted is false: pages are on the host")
        super().__init__(config=config, offloading=offloading)
        self.spec, self.plan, shared = plan.spec, plan, {}
        positions = position_limit(config.get_text_config(decoder=True))
        for i, layer in enumerate(self.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                settings, methods = plan.layer(i)
                rotary = find_rotary(model, i) if plan.needs_rotary else None
                self.layers[i] = self._make_layer(settings, i, getattr(layer, "sliding_window", 0), methods, rotary,
                                                  shared, positions)
            elif isinstance(layer, CacheLayerMixin) and not plan.exact:
                raise ValueError(f"layer {i}: found {type(layer).__name__}, accepted are full and sliding attention; "
                                 "K16V16 leaves such layers to transformers")
        attention.register()
        if config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        if config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
            raise ValueError(f"model: found {type(model).__name__}, whose attention cannot be exchanged, accepted is a "
                             "model that uses transformers' AttentionInterface")

    def _make_layer(self, *arguments) -> PackedLayer:
        return PackedLayer(*arguments)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        on_host = indices.cpu() if isinstance(indices, Tensor) else indices  # waits for a GPU once, not in each layer
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.batch_select_indices(on_host)
            else:
                layer.batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that the cache keeps alive now."""
        return self.report().nbytes

    def report(self) -> CacheReport:
        """Tokens and bytes of each layer; memory that layers share is counted with the first."""
        seen: set[int] = set()
        rows = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer):
                rows.append(layer.row())
                continue
            nbytes = 0
            for tensor in _tensors(vars(layer)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    nbytes += storage.nbytes()
            keys = getattr(layer, "keys", None)
            held = keys.shape if isinstance(keys, Tensor) and keys.dim() == 4 else (0, 0, 0, 0)
            rows.append(CacheRow(index, type(layer).__name__, held[0], held[2], nbytes, 0.0, "transformers"))
        return CacheReport(str(self.spec), tuple(rows))


def position_limit(config) -> int:
    """The most tokens that a model has positions for; 0 where its rotary embedding adapts to any length."""
    rope = getattr(config, "rope_parameters", None) or {}
    types = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    return 0 if types & {"dynamic", "longrope"} else getattr(config, "max_position_embeddings", 0) or 0


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
