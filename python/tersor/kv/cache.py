"""`Cache`: keys and values of past tokens, in a precision that a spec names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .. import _C
from ..op_checks import CODE, FLOATS
from ..spec import CacheSpec, parse_cache
from . import attention
from .layout import BITS, Layout
from .pages import Pages

OPTIONS = {"group": "32, 64 or 128", "recent": "0 or more", "sinks": "0 or more"}


@dataclass(frozen=True)
class CacheRow:
    """One layer: how many tokens of how many sequences it holds, in how many bytes.

    ``bytes_per_token`` is per sequence; layers with a sliding window hold at most a window of tokens and a page.
    ``bits`` is what one number costs in a packed page, scales and minima counted. ``kernel`` says what reads it.
    """

    layer: int
    kind: str
    sequences: int
    tokens: int
    nbytes: int
    bits: float = 0.0
    kernel: str = ""

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / (self.sequences * self.tokens) if self.sequences * self.tokens else 0.0


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


@dataclass(frozen=True)
class Settings:
    """A spec's options with their defaults filled in."""

    key_bits: int
    value_bits: int
    group: int
    recent: int
    sinks: int

    @classmethod
    def of(cls, spec: str, options: dict) -> "Settings":
        parsed = parse_cache(spec)
        low = min(parsed.key_bits, parsed.value_bits)
        name = f"K{parsed.key_bits}V{parsed.value_bits}"
        for which, bits in (("keys", parsed.key_bits), ("values", parsed.value_bits)):
            if bits not in BITS:
                raise ValueError(f"cache spec {spec!r}: found {bits} bits for {which}, accepted are "
                                 f"{', '.join(map(str, BITS))}")
        given = dict(parsed.options) | options
        accepted = OPTIONS if low < 16 else {}
        for key, value in given.items():
            if key not in accepted:
                raise ValueError(f"cache spec {spec!r}: found option {key!r}, accepted is {name} "
                                 f"{'with ' + ', '.join(accepted) if accepted else 'without options'}")
            if type(value) is not int or value < 0 or key == "group" and value not in (32, 64, 128):
                raise ValueError(f"cache spec {spec!r}: {key}: found {value!r}, accepted is {OPTIONS[key]}")
        few = low < 8  # where the first tokens and the last ones matter
        return cls(parsed.key_bits, parsed.value_bits, given.get("group", 64 if low > 3 else 32),
                   given.get("recent", 32 if few else 0), given.get("sinks", 4 if few else 0))


class PackedLayer(CacheLayerMixin):
    """One attention layer of a `Cache`: the layer that transformers sees, over `Pages`.

    ``update()`` keeps the fresh tokens aside and returns handles; the attention function stores them.
    """

    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, settings: Settings, index: int = 0, sliding_window: int = 0):
        super().__init__()
        self.settings, self.index, self.sliding_window = settings, index, sliding_window
        self.is_sliding = sliding_window > 0
        self.pages: Pages | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.handles = attention.Handle(self, 0), attention.Handle(self, 1)
        self.record_past = self.unpacks = False

    # -- what transformers calls ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        where, s = f"tersor.Cache: layer {self.index}", self.settings
        if key_states.device.type != "cpu" or key_states.dtype not in CODE or value_states.dtype != key_states.dtype:
            raise ValueError(f"{where}: found {key_states.dtype} on {key_states.device}, accepted is {FLOATS} on cpu")
        batch, heads, _, key_dim = key_states.shape
        value_dim = value_states.shape[-1]
        if key_dim % 16 or value_dim % 16 or max(key_dim, value_dim) > 1024 or value_states.shape[1] != heads:
            raise ValueError(f"{where}: found keys {list(key_states.shape)} and values {list(value_states.shape)}, "
                             "accepted are equal numbers of heads, of dimensions that are multiples of 16 to 1024")
        group = value_group(value_dim, s.group)
        layout = Layout(heads, key_dim, value_dim, key_states.dtype, s.key_bits, s.value_bits, s.group, group)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pages = Pages(layout, batch, s.recent, 0 if self.is_sliding else -(-s.sinks // s.group))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if torch.compiler.is_compiling():
            return _update_apart(self, key_states, value_states)
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.fresh is not None:  # a forward pass that ended before its attention function
            self.store(*self.take_fresh())
        if key_states.requires_grad:
            key_states = key_states.detach()
        if value_states.requires_grad:
            value_states = value_states.detach()
        self.pages._accept(key_states, value_states)
        self.fresh = key_states, value_states
        return self.handles

    def get_seq_length(self) -> int:
        if self.pages is None:
            return 0
        held = self.pages.first + self.pages.tokens
        return held if self.fresh is None else held + self.fresh[0].shape[2]

    def get_max_length(self) -> int:
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.get_seq_length()
        first = max(held - self.sliding_window + 1, 0) if self.is_sliding else 0
        return held - first + query_length, first

    def reset(self) -> None:
        self.pages = self.fresh = None
        self.is_initialized = self.unpacks = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop: found {tokens_to_remove}, accepted is a negative number of tokens to remove, or 0")
        if self.pages is None:
            return
        self._flush()
        total, removed = self.get_seq_length(), -tokens_to_remove
        needed = max(total - removed - self.sliding_window + 1, 0) if self.is_sliding else 0
        if self.pages.first > needed:
            raise RuntimeError(f"crop: {removed} tokens cannot be removed, because what the sliding window then needs "
                               "has been freed; call activate_past_recording() first")
        self.pages.crop(removed)
        self.trim(after_crop=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pages is not None:
            self._flush()
            rows = torch.arange(self.pages.batch)[indices.cpu() if isinstance(indices, Tensor) else indices]
            self.pages.select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pages is not None:
            self._flush()
            self.pages.select([row for row in range(self.pages.batch) for _ in range(repeats)])

    def offload(self) -> None:
        pass  # the pages are in the host's memory

    def prefetch(self) -> None:
        pass

    # -- what the attention function calls --------------------------------------------------------------------------

    def take_fresh(self) -> tuple[Tensor, Tensor] | None:
        fresh, self.fresh = self.fresh, None
        return fresh

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens that have been attended to; of a sliding window only what later queries can see."""
        spare = keys.shape[2] - self.sliding_window + 1
        if self.is_sliding and not self.record_past and not self.pages.tokens and spare > 0:
            self.pages.first += spare
            keys, values = keys[:, :, spare:], values[:, :, spare:]
        self.pages.append(keys, values)
        self.trim()

    def trim(self, after_crop: bool = False) -> None:
        """Free what has left the sliding window."""
        if self.is_sliding and (after_crop or not self.record_past):
            self.pages.drop_before(self.pages.first + self.pages.tokens - self.sliding_window + 1)

    def _flush(self) -> None:
        if self.fresh is not None:
            self.store(*self.take_fresh())

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values as tensors, for models that compute with them; RuntimeError unless all are 16 bits."""
        if min(self.settings.key_bits, self.settings.value_bits) < 16:
            raise RuntimeError(
                f"tersor.Cache: layer {self.index}: this model computes with cached keys outside its attention "
                f"function (latent attention does), and K{self.settings.key_bits}V{self.settings.value_bits} would "
                "have to be unpacked at each step; accepted is K16V16, or a transformers cache")
        if self.is_sliding:
            raise RuntimeError(f"tersor.Cache: layer {self.index}: this model computes with cached keys of a sliding "
                               "window; accepted is a transformers cache")
        self._flush()
        self.unpacks = True
        return self.pages.decode(self.dtype)

    def row(self) -> CacheRow:
        s, pages = self.settings, self.pages
        kind = f"K{s.key_bits}V{s.value_bits}" + (f" sliding {self.sliding_window}" if self.is_sliding else "")
        if pages is None:
            return CacheRow(self.index, kind, 0, 0, 0)
        kernel = "copied out at each step: the model computes with keys" if self.unpacks \
            else f"kv_attention {_C.isa()}"
        nbytes = pages.nbytes + sum(t.untyped_storage().nbytes() for t in self.fresh or ())
        return CacheRow(self.index, kind, pages.batch, pages.tokens, nbytes, pages.layout.bits(), kernel)


_update_apart = torch.compiler.disable(PackedLayer._update)


def value_group(dim: int, wanted: int) -> int:
    """Channels that share a value's scale: the largest multiple of 16 that divides ``dim`` and exceeds ``wanted`` by at
    most a half."""
    return max(g for g in range(16, dim + 1, 16) if dim % g == 0 and (g <= wanted * 3 // 2 or g == 16))


class Cache(DynamicCache):
    """A cache for ``model.generate(..., past_key_values=tersor.Cache(model, "K4V4"))``.

    ``spec`` gives the bits of keys and of values: ``K16V16`` (as the model computes, exact), or 8, 4, 3, 2 for either.
    Options in brackets, which ``**options`` may give as well: ``group`` (32, 64, 128: tokens of a page, which share the
    scale of a key's channel, and channels that share a value's scale as far as the head dimension allows), ``recent``
    (at least so many last tokens stay 16-bit), ``sinks`` (at least so many first tokens stay 16-bit, in whole pages).

    Sets the model's attention implementation to ``"tersor"``, which serves any other cache as before. ValueError for
    what cannot be served: an unknown spec or option, a model without configuration or without exchangeable attention,
    layers of another kind, heads that are not multiples of 16, a device other than the CPU.
    """

    def __init__(self, model, spec: str, **options):
        settings = Settings.of(spec, options)
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise ValueError(f"model: found {type(model).__name__}, accepted is a transformers model")
        if config.is_encoder_decoder:
            raise ValueError(f"model: found {type(model).__name__} with an encoder, accepted is a decoder")
        super().__init__(config=config)
        given = tuple((dict(parse_cache(spec).options) | options).items())
        self.spec = CacheSpec(settings.key_bits, settings.value_bits, given)
        for i, layer in enumerate(self.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                self.layers[i] = PackedLayer(settings, i, getattr(layer, "sliding_window", 0))
            elif isinstance(layer, CacheLayerMixin) and min(settings.key_bits, settings.value_bits) < 16:
                raise ValueError(f"layer {i}: found {type(layer).__name__}, accepted are full and sliding attention; "
                                 "K16V16 leaves such layers to transformers")
        attention.register()
        if config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        if config.get_text_config(decoder=True)._attn_implementation != attention.NAME:
            raise ValueError(f"model: found {type(model).__name__}, whose attention cannot be exchanged, accepted is a "
                             "model that uses transformers' AttentionInterface")

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


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
