"""One attention layer of a `Cache` as transformers sees it, over a `Store`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..op_checks import fail
from . import attention, devices
from .methods import CACHE_METHODS, CacheMethod
from .rotary import Rotary
from .settings import Settings
from .store import Shape, Step, Store, base_store


@dataclass(frozen=True)
class CacheRow:
    """One layer: how many tokens of how many sequences it holds, in how many bytes.

    ``tokens`` is what a head of a sequence holds (a mean, where heads differ), ``seen`` how many there were: fewer are
    held behind a sliding window, or after eviction. ``bytes_per_token`` is per sequence and token seen (held, behind a
    sliding window). ``bits`` is what one number costs in a packed page, scales and all counted. ``kernel`` says what
    reads it.
    """

    layer: int
    kind: str
    sequences: int
    tokens: float
    nbytes: int
    bits: float = 0.0
    kernel: str = ""
    seen: int = 0

    @property
    def bytes_per_token(self) -> float:
        tokens = self.tokens if "sliding" in self.kind else self.seen or self.tokens
        return self.nbytes / (self.sequences * tokens) if self.sequences * tokens else 0.0


class PackedLayer(CacheLayerMixin):
    """``update()`` keeps the fresh tokens aside and returns handles; the attention function stores them.

    ``methods``: pairs of a method and its calibrated tensors for this layer, outermost first.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, settings: Settings, index: int = 0, sliding_window: int = 0,
                 methods: Sequence[tuple[CacheMethod, dict[str, Tensor]]] = (), rotary: Rotary | None = None,
                 shared: dict | None = None, positions: int = 0, max_tokens: int = 0):
        super().__init__()
        self.settings, self.index, self.sliding_window = settings, index, sliding_window
        self.methods, self.rotary, self.shared = tuple(methods), rotary, {} if shared is None else shared
        self.positions = positions  # that the model has; 0: no limit
        self.max_tokens = max_tokens  # whose memory is made at the start; 0: it grows
        self.is_sliding = sliding_window > 0
        self.owner: weakref.ref | None = None  # the attention module that uses this layer
        self.store: Store | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.handles = attention.Handle(self, 0), attention.Handle(self, 1)
        self.record_past = self.unpacks = self.leaves = False
        self.mask_known = False  # that float masks only hide: to look at one waits for the GPU

    # -- what transformers calls ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        where = f"tersor.Cache: layer {self.index}"
        devices.check_device(where, key_states)
        if value_states.dtype != key_states.dtype or value_states.device != key_states.device:
            raise ValueError(f"{where}: found values of {value_states.dtype} on {value_states.device}, accepted is "
                             f"what keys are: {key_states.dtype} on {key_states.device}")
        batch, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        if key_dim % 16 or value_dim % 16 or max(key_dim, value_dim) > 1024 or value_states.shape[1] != heads:
            raise ValueError(f"{where}: found keys {list(key_states.shape)} and values {list(value_states.shape)}, "
                             "accepted are equal numbers of heads, of dimensions that are multiples of 16 to 1024")
        shape = Shape(self.index, batch, heads, key_dim, value_dim, key_states.dtype, self.settings,
                      self.sliding_window, rotary=self.rotary, shared=self.shared, device=key_states.device,
                      max_tokens=self.max_tokens)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.expected = heads, key_dim, value_dim
        self.store = build_store(shape, self.methods)
        if self.record_past:
            self.store.record_past()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if torch.compiler.is_compiling():
            return _update_apart(self, key_states, value_states)
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.fresh is not None:  # a forward pass that ended before its attention function
            self.flush()
        if key_states.requires_grad:
            key_states = key_states.detach()
        if value_states.requires_grad:
            value_states = value_states.detach()
        self._check(key_states, value_states)
        if self.positions and self.store.seen + key_states.shape[2] > self.positions:
            fail("cache", "tokens", self.store.seen + key_states.shape[2],
                 f"the {self.positions} positions that the model has (max_position_embeddings)")
        self.fresh = key_states, value_states
        return self.handles

    def _check(self, keys: Tensor, values: Tensor) -> None:
        heads, key_dim, value_dim = self.expected
        batch, tokens = self.store.batch, keys.shape[2] if keys.dim() == 4 else -1
        for name, x, dim in (("keys", keys, key_dim), ("values", values, value_dim)):
            if x.dtype is not self.dtype or x.shape != (batch, heads, tokens, dim) or x.device != self.device:
                fail("cache", name, f"{x.dtype} {list(x.shape)} on {x.device}",
                     f"{self.dtype} [{batch}, {heads}, tokens, {dim}] on {self.device}")

    def get_seq_length(self) -> int:
        if self.store is None:
            return 0
        seen = self.store.seen
        return seen if self.fresh is None else seen + self.fresh[0].shape[2]

    def get_max_length(self) -> int:
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.get_seq_length()
        first = max(held - self.sliding_window + 1, 0) if self.is_sliding else 0
        return held - first + query_length, first

    def reset(self) -> None:
        self.store = self.fresh = None
        self.shared.clear()
        self.is_initialized = self.unpacks = self.leaves = False

    def activate_past_recording(self) -> None:
        self.record_past = True
        if self.store is not None:
            self.store.record_past()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, accepted is a negative number of tokens to remove, or 0")
        if self.store is not None:
            self.flush()
            self.store.crop(min(-tokens_to_remove, self.store.seen))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.flush()
            rows = torch.arange(self.store.batch)[indices.cpu() if isinstance(indices, Tensor) else indices]
            self.store.select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.flush()
            self.store.select([row for row in range(self.store.batch) for _ in range(repeats)])

    def offload(self) -> None:
        """Leave the GPU for the host's memory (pages on the CPU are there): at once, or, where tokens have come that
        attention has not stored yet, after it."""
        if self.fresh is not None:
            self.leaves = True
        elif self.store is not None:
            self.store.offload()

    def prefetch(self) -> None:
        if self.store is not None:
            self.store.prefetch()

    # -- what the attention function calls --------------------------------------------------------------------------

    def bind(self, module) -> None:
        """Remember the attention module; ValueError for a second one."""
        owner = self.owner and self.owner()
        if owner is not None and owner is not module and self.store.seen:
            self.fresh = None  # of the other model
            fail("cache", "model", f"a second model, at layer {self.index}",
                 "the model whose tokens it holds, or reset()")
        self.owner = weakref.ref(module)

    def attended(self) -> None:
        """What waited for the attention function."""
        if self.leaves:
            self.leaves = False
            self.store.offload()

    def take_fresh(self) -> tuple[Tensor, Tensor] | None:
        fresh, self.fresh = self.fresh, None
        return fresh

    def flush(self) -> None:
        """Store fresh tokens that no attention function came for."""
        if self.fresh is not None:
            keys, values = self.take_fresh()
            empty = keys.new_empty((keys.shape[0], keys.shape[1], 0, keys.shape[3]))
            self.store.prompt(Step(empty, keys, values, 1.0))
            self.attended()

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values as tensors, for models that compute with them; RuntimeError where that would unpack a packed
        history at each step."""
        self.flush()
        found = self.store.dense(self.dtype)
        if found is None:
            names = "+".join(method.name for method, _ in self.methods)
            raise RuntimeError(
                f"tersor.Cache: layer {self.index}: this model computes with cached keys outside its attention "
                f"function (latent attention does), and {names + ':' if names else ''}{self.settings.name}"
                f"{' with a sliding window' if self.is_sliding else ''} would have to be unpacked at each step; "
                f"accepted is {'' if devices.on_cuda(self.device) else 'K16V16, or '}a transformers cache")
        self.unpacks = True
        return found

    def row(self) -> CacheRow:
        names = "+".join(method.name for method, _ in self.methods)
        kind = (f"{names}:" if names else "") + self.settings.name \
            + (f" sliding {self.sliding_window}" if self.is_sliding else "")
        store = self.store
        if store is None:
            return CacheRow(self.index, kind, 0, 0, 0)
        kernel = "copied out at each step: the model computes with keys" if self.unpacks else store.kernel
        nbytes = store.nbytes + sum(t.untyped_storage().nbytes() for t in self.fresh or ())
        return CacheRow(self.index, kind, store.batch, store.held, nbytes, store.bits, kernel, store.seen)


_update_apart = torch.compiler.disable(PackedLayer._update)


def build_store(shape: Shape, methods: Sequence[tuple[CacheMethod, dict[str, Tensor]]]) -> Store:
    """The stores of a chain of methods, outermost first, around pages."""
    if not methods:
        return base_store(shape)
    method, tensors = methods[0]
    if devices.on_cuda(shape.device):
        if not method.cuda:
            names = ", ".join(sorted(name for name, other in CACHE_METHODS.items() if other.cuda))
            raise ValueError(f"tersor.Cache: layer {shape.layer}: found method {method.name!r} on {shape.device}, "
                             f"accepted on CUDA are {names}, or none")
        tensors = {name: tensor.to(shape.device) for name, tensor in tensors.items()}
    return method.wrap(shape, tensors, lambda inner: build_store(inner, methods[1:]))
