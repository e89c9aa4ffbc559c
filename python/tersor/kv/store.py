"""What holds the keys and values of one layer. Stores nest: a method wraps the store that the rest of a spec makes.

A store takes the tokens of a `Step`, and attends to all it holds. `PagedStore` is the innermost: pages, one native call
a step. `HeadGroups` gives groups of heads stores of their own; `Projected` keeps keys and values in other coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import _C
from ..op_checks import CODE, FLOATS
from . import devices
from .layout import E4M3, Layout, PageFormat, normal_levels
from .pages import Pages
from .rotary import Rotary
from .settings import Settings


@dataclass(frozen=True, eq=False)
class Shape:
    """What a store is made for. ``window``: tokens that a query sees, its own included; 0: all. ``biased``: entries
    have a bias of their own on their score. ``shared``: what layers of one cache have in common (methods keep it).
    ``max_tokens``: memory for so many is made at the start; 0: it grows."""

    layer: int
    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    settings: Settings
    window: int = 0
    biased: bool = False
    rotary: Rotary | None = None
    shared: dict = field(default_factory=dict)
    device: torch.device = devices.CPU
    max_tokens: int = 0

    def changed(self, **changes) -> "Shape":
        return replace(self, **changes)


class Step:
    """Fresh tokens, and the queries that read them and all before.

    ``query [batch, heads, queries, key_dim]``; ``keys``, ``values [batch, kv_heads, tokens, dim]`` or None, None; the
    score is ``softcap(query . key * scale)``; ``mask`` bool ``[batch or 1, 1 or heads, queries, positions]``, whose
    columns start at position ``mask_first``; ``sinks [heads]`` float32; ``positions [batch, tokens]`` or None: what the
    model counts them as. ``log_sum_exp``: whether `Store.attend` returns it as well.
    """

    __slots__ = ("query", "keys", "values", "scale", "causal", "softcap", "sinks", "mask", "mask_first", "positions",
                 "log_sum_exp")

    def __init__(self, query, keys, values, scale, causal=True, softcap=0.0, sinks=None, mask=None, mask_first=0,
                 positions=None, log_sum_exp=False):
        self.query, self.keys, self.values, self.scale, self.causal = query, keys, values, scale, causal
        self.softcap, self.sinks, self.mask, self.mask_first = softcap, sinks, mask, mask_first
        self.positions, self.log_sum_exp = positions, log_sum_exp

    def changed(self, **changes) -> "Step":
        step = Step(*(getattr(self, name) for name in self.__slots__))
        for name, value in changes.items():
            setattr(step, name, value)
        return step

    @property
    def fresh(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def hidden(self) -> Tensor | None:
        """Bool ``[batch, tokens]``: fresh tokens that no query of this step may see (padding), or None. On a GPU, which
        would have to be waited for, None only where nothing masks."""
        if self.mask is None or not self.fresh:
            return None
        seen = self.mask[..., -self.fresh:].any(2).any(1).expand(len(self.query), -1)
        return None if not devices.on_cuda(seen.device) and seen.all() else ~seen


class Store(ABC):
    """The interface. ``seen``: tokens of the sequence so far, those that are no longer held included."""

    seen: int
    batch: int

    @abstractmethod
    def prompt(self, step: Step) -> None:
        """Take the tokens of the first prompt, which have been attended to already."""

    @abstractmethod
    def attend(self, step: Step):
        """Take the fresh tokens and attend to everything held: ``[batch, queries, heads, value_dim]``; with
        ``step.log_sum_exp`` a pair with float32 ``[batch, heads, queries]``."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget the last ``tokens``; RuntimeError where what would be needed then is gone."""

    @abstractmethod
    def select(self, sequences: list[int]) -> None:
        """Sequence i becomes what ``sequences[i]`` was."""

    @abstractmethod
    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Keys and values held, ``[batch, kv_heads, entries, dim]``, as attention takes them."""

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """As `decode`, for models that compute with keys outside attention; None where that would unpack a packed
        history at each step."""
        return None

    def record_past(self) -> None:
        """Keep what `crop` may need."""

    def within(self) -> Sequence["Store"]:
        """The stores inside."""
        return ()

    def offload(self) -> None:
        """Move what is on a GPU to the host's memory."""
        for store in self.within():
            store.offload()

    def prefetch(self) -> None:
        """Bring it back."""
        for store in self.within():
            store.prefetch()

    @property
    def held(self) -> int:
        """Entries held for a sequence and head (the mean, where heads differ)."""
        return self.seen

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all memory that is held."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits of one number in a packed page, scales and all counted."""

    @property
    def kernel(self) -> str:
        return f"kv_attention {_C.isa()}"


def check_shape(shape: Shape) -> None:
    where = f"tersor.Cache: layer {shape.layer}"
    if shape.dtype not in CODE:
        raise ValueError(f"{where}: found {shape.dtype}, accepted is {FLOATS} on cpu")
    if shape.key_dim % 16 or shape.value_dim % 16 or not 16 <= min(shape.key_dim, shape.value_dim) \
            or max(shape.key_dim, shape.value_dim) > 1024:
        raise ValueError(f"{where}: found keys of {shape.key_dim} channels and values of {shape.value_dim}, accepted "
                         "are dimensions that are multiples of 16 to 1024")


def value_group(dim: int, wanted: int) -> int:
    """Channels that share a value's scale: the largest multiple of 16 that divides ``dim`` and exceeds ``wanted`` by at
    most a half."""
    return max(g for g in range(16, dim + 1, 16) if dim % g == 0 and (g <= wanted * 3 // 2 or g == 16))


def page_tokens(shape: Shape) -> int:
    """Tokens of a page: the group of the spec, on CUDA always 64, whose keys share scales in groups of 32 or 64."""
    return 64 if devices.on_cuda(shape.device) else shape.settings.group


def page_format(shape: Shape, settings: Settings | None = None, rank: int = 0) -> PageFormat:
    """How packed pages of the shape are stored, with ``settings`` in place of its own."""
    s = settings or shape.settings
    parts, tokens = {}, page_tokens(shape)
    separable, group = s.values == "separable", value_group(shape.value_dim, s.group)
    if s.keys == "channel" and s.group < tokens and s.key_bits < 16:
        parts["key_tokens"] = s.group
    for part, bits, dim, levels, length in (
            ("key", s.key_bits, shape.key_dim, s.key_levels,
             min(s.group, tokens) if s.keys == "channel" else shape.key_dim),
            ("value", s.value_bits, shape.value_dim, s.value_levels, shape.value_dim if separable else group)):
        packed = bits < 16
        if s.levels == "nuq" and packed:
            parts[f"{part}_levels"] = levels if levels and len(levels) == 2**bits else \
                normal_levels(bits, length, s.outliers)
        elif s.levels == "e4m3" and packed:
            parts[f"{part}_levels"] = E4M3
        if s.outliers and packed:
            parts[f"{part}_outliers"] = max(1, round(s.outliers * tokens * dim))
    return PageFormat(s.key_bits, s.value_bits, key_axis=s.keys, value_axis=s.values,
                      value_group=0 if separable else group, rank=rank, **parts)


def make_layout(shape: Shape, *formats: PageFormat) -> Layout:
    """How pages are stored: in the shape's settings, or in ``formats``."""
    s, turned = shape.settings, None
    if s.rope == "pre" and shape.rotary is not None:
        turned = shape.rotary
    if not formats and s.packs:
        formats = (page_format(shape),)
    return Layout(shape.kv_heads, shape.key_dim, shape.value_dim, shape.dtype, page_tokens(shape), formats, turned,
                  shape.biased)


def make_pages(shape: Shape, layout: Layout, recent: int = 0, sink_pages: int = 0):
    """Pages where the shape's tensors are: `Pages` on the CPU, `CudaPages` on a GPU. ValueError, which names the layer,
    for a layout that no kernel of the device takes."""
    if not devices.on_cuda(shape.device):
        return Pages(layout, shape.batch, recent, sink_pages)
    from .cuda_pages import CudaPages

    return CudaPages(layout, shape.batch, recent, sink_pages, shape.device, f"Cache: layer {shape.layer}")


class OverPages(Store):
    """A store whose tokens are all in ``pages``, one layer's of ``shape``; subclasses say what becomes of new ones."""

    shape: Shape
    pages: Pages
    window = 0

    @property
    def seen(self) -> int:
        return self.pages.tokens

    @property
    def batch(self) -> int:
        return self.pages.batch

    def attend_pages(self, step: Step):
        """`attend` by the pages, which take the fresh tokens."""
        return self.pages.attend(step.query, step.keys, step.values, step.scale, step.causal, self.window, step.softcap,
                                 step.sinks, step.mask, step.mask_first, step.log_sum_exp)

    def select(self, sequences: list[int]) -> None:
        self.pages.select(sequences)

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return self.pages.decode(dtype)

    def offload(self) -> None:
        if devices.on_cuda(self.shape.device):
            self.pages.offload()

    def prefetch(self) -> None:
        if devices.on_cuda(self.shape.device):
            self.pages.prefetch()

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    @property
    def bits(self) -> float:
        return self.pages.page_bits

    @property
    def kernel(self) -> str:
        return self.pages.kernel


class PagedStore(OverPages):
    """Pages: raw while they fill, packed once enough newer tokens follow; freed when they leave a sliding window."""

    def __init__(self, shape: Shape):
        check_shape(shape)
        s = shape.settings
        self.shape, self.window, self.keeps = shape, shape.window, False
        self.pages = make_pages(shape, make_layout(shape), s.recent,
                                0 if shape.window else -(-s.sinks // page_tokens(shape)))

    @property
    def seen(self) -> int:
        return self.pages.first + self.pages.tokens

    def prompt(self, step: Step) -> None:
        self.append(step.keys, step.values)

    def append(self, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Take tokens that have been attended to; of a sliding window only what later queries can see."""
        spare = keys.shape[2] - self.window + 1
        if self.window and not self.keeps and not self.pages.tokens and spare > 0:
            self.pages.first += spare
            keys, values = keys[:, :, spare:], values[:, :, spare:]
        if bias is None:
            self.pages.append(keys, values)
        else:
            self.pages.append(keys, values, bias)
        self.trim()

    def attend(self, step: Step):
        out = self.attend_pages(step)
        if self.window:
            self.trim()
        return out

    def trim(self, after_crop: bool = False) -> None:
        """Free what has left the sliding window."""
        if self.window and (after_crop or not self.keeps):
            self.pages.drop_before(self.seen - self.window + 1)

    def crop(self, tokens: int) -> None:
        needed = max(self.seen - tokens - self.window + 1, 0) if self.window else 0
        if self.pages.first > needed:
            raise RuntimeError(f"crop: {tokens} tokens cannot be removed, because what the sliding window then needs "
                               "has been freed; call activate_past_recording() first")
        self.pages.crop(tokens)
        self.trim(after_crop=True)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        on_cuda = devices.on_cuda(self.shape.device)
        return None if self.shape.settings.packs or self.window or on_cuda else self.decode(dtype)

    def record_past(self) -> None:
        self.keeps = True

    @property
    def held(self) -> int:
        return self.pages.tokens


class HeadGroups(Store):
    """Groups of key heads, each with a store of its own: what the heads hold may differ in dimensions and length.

    ``groups``: the key heads of each store, together all of ``0 .. kv_heads - 1``.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[int], Store]], kv_heads: int):
        if sorted(h for heads, _ in groups for h in heads) != list(range(kv_heads)):
            raise ValueError(f"groups: found heads {[list(heads) for heads, _ in groups]}, accepted is each of "
                             f"0 to {kv_heads - 1} once")
        self.groups = [(torch.tensor(list(heads)), store) for heads, store in groups]
        self.kv_heads = kv_heads
        self.indices: dict[tuple, list[tuple[Tensor, Tensor]]] = {}  # of heads and their queries, on a device

    @property
    def seen(self) -> int:
        return self.groups[0][1].seen

    @property
    def batch(self) -> int:
        return self.groups[0][1].batch

    def within(self) -> Sequence[Store]:
        return [store for _, store in self.groups]

    def _parts(self, step: Step):
        queries, device = step.query.shape[1] // self.kv_heads, step.query.device
        if (queries, device) not in self.indices:
            self.indices[queries, device] = [
                (heads.to(device), (heads.view(-1, 1) * queries + torch.arange(queries)).flatten().to(device))
                for heads, _ in self.groups]
        for (heads, own), (_, store) in zip(self.indices[queries, device], self.groups):
            yield own, store, step.changed(
                query=step.query[:, own], keys=None if step.keys is None else step.keys[:, heads],
                values=None if step.values is None else step.values[:, heads],
                sinks=None if step.sinks is None else step.sinks[own].contiguous(),
                mask=step.mask if step.mask is None or step.mask.shape[1] == 1 else step.mask[:, own])

    def prompt(self, step: Step) -> None:
        for _, store, part in self._parts(step):
            store.prompt(part)

    def attend(self, step: Step):
        batch, heads, queries, _ = step.query.shape
        out = scores = None
        for own, store, part in self._parts(step):
            found = store.attend(part)
            found, total = found if step.log_sum_exp else (found, None)
            if out is None:
                out = found.new_empty((batch, queries, heads, found.shape[-1]))
                scores = None if total is None else total.new_empty((batch, heads, queries))
            out[:, :, own] = found
            if total is not None:
                scores[:, own] = total
        return out if scores is None else (out, scores)

    def crop(self, tokens: int) -> None:
        for _, store in self.groups:
            store.crop(tokens)

    def select(self, sequences: list[int]) -> None:
        for _, store in self.groups:
            store.select(sequences)

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """RuntimeError where the groups hold different numbers of entries, or dimensions."""
        parts = [store.decode(dtype) for _, store in self.groups]
        if len({p[0].shape[2:] for p in parts}) > 1 or len({p[1].shape[2:] for p in parts}) > 1:
            raise RuntimeError("decode: found heads of different lengths or dimensions, accepted are equal ones; "
                               "decode the groups one by one")
        order = torch.cat([heads for heads, _ in self.groups]).argsort()
        return tuple(torch.cat([p[i] for p in parts], 1)[:, order] for i in (0, 1))

    def record_past(self) -> None:
        for _, store in self.groups:
            store.record_past()

    @property
    def held(self) -> float:
        return sum(len(heads) * store.held for heads, store in self.groups) / self.kv_heads

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for _, store in self.groups)

    @property
    def bits(self) -> float:
        return sum(len(heads) * store.bits for heads, store in self.groups) / self.kv_heads

    @property
    def kernel(self) -> str:
        names = dict.fromkeys(store.kernel for _, store in self.groups)
        return f"{len(self.groups)} groups of heads: {', '.join(names)}"


class Wrapper(Store):
    """A store around ``inner``, which holds the tokens; subclasses say what goes in and what comes out."""

    inner: Store

    @property
    def seen(self) -> int:
        return self.inner.seen

    @property
    def batch(self) -> int:
        return self.inner.batch

    def crop(self, tokens: int) -> None:
        self.inner.crop(tokens)

    def select(self, sequences: list[int]) -> None:
        self.inner.select(sequences)

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """What ``inner`` holds, as it takes it."""
        return self.inner.decode(dtype)

    def record_past(self) -> None:
        self.inner.record_past()

    def within(self) -> Sequence[Store]:
        return (self.inner,)

    @property
    def held(self) -> float:
        return self.inner.held

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def bits(self) -> float:
        return self.inner.bits


class Projected(Wrapper):
    """Keys and values in other coordinates: attention runs in them, nothing is projected back but the result.

    A key ``k`` is held as ``(k - key_mean) @ keys`` and read by ``query @ queries``; a value as
    ``(v - value_mean) @ values``; what comes out is ``out @ outputs + value_mean``. Matrices are ``[kv_heads, dim,
    rank]`` (``outputs [kv_heads, rank, dim]``), or ``[dim, rank]`` for all heads; of one row, ``[..., 1, dim]``, they
    scale channels; None: as they are. The mean of the keys moves all scores of a query alike, so softmax does not see
    it; means must be None where a constant matters (softcap), or weights do not sum to 1 (sinks).

    ``together``: so many neighbouring key heads are held as one, which all their queries read; ``keys`` and ``values``
    are then ``[kv_heads / together, together * dim, rank]``.
    """

    def __init__(self, inner: Store, kv_heads: int, queries: Tensor | None = None, keys: Tensor | None = None,
                 values: Tensor | None = None, outputs: Tensor | None = None, key_mean: Tensor | None = None,
                 value_mean: Tensor | None = None, dtype: torch.dtype = torch.float32, together: int = 1,
                 device: torch.device | None = None):
        self.inner, self.kv_heads, self.together = inner, kv_heads, together
        self.queries, self.keys, self.values, self.outputs, self.key_mean, self.value_mean = (
            None if t is None else t.to(device, dtype) for t in (queries, keys, values, outputs, key_mean, value_mean))

    def _into(self, step: Step) -> Step:
        query, keys, values = step.query, step.keys, step.values
        if (self.key_mean is not None or self.value_mean is not None) and (step.softcap or step.sinks is not None):
            raise ValueError("cache: found keys and values around their mean in a layer with softcap or sinks, "
                             "accepted is attention where a constant on all scores does not matter")
        if self.queries is not None:
            matrix = self.queries if self.queries.dim() == 2 else self.queries.unsqueeze(1)
            query = _times(query.unflatten(1, (self.kv_heads, -1)), matrix).flatten(1, 2)
        if keys is not None and self.keys is not None:
            keys = _times(self._beside(keys if self.key_mean is None else keys - self.key_mean), self.keys)
        if values is not None and self.values is not None:
            values = _times(self._beside(values if self.value_mean is None else values - self.value_mean), self.values)
        return step.changed(query=query, keys=keys, values=values)

    def _beside(self, x: Tensor) -> Tensor:
        """Heads that are held together, beside each other: ``[batch, heads / together, tokens, together * dim]``."""
        return x if self.together == 1 else x.unflatten(1, (-1, self.together)).transpose(2, 3).flatten(3)

    def prompt(self, step: Step) -> None:
        self.inner.prompt(self._into(step))

    def attend(self, step: Step):
        out = self.inner.attend(self._into(step))
        out, total = out if step.log_sum_exp else (out, None)
        if self.outputs is not None:
            grouped = out.unflatten(2, (self.kv_heads, -1))  # [batch, queries, kv_heads, group, rank]
            out = _times(grouped, self.outputs).flatten(2, 3)
        if self.value_mean is not None:
            mean = self.value_mean.squeeze(1)  # [kv_heads, 1, dim]
            out = (out.unflatten(2, (self.kv_heads, -1)) + mean.unsqueeze(1)).flatten(2, 3)
        if total is not None and self.key_mean is not None:  # a constant within this store, not beside others
            grouped = step.query.float().unflatten(1, (self.kv_heads, -1))
            constant = grouped @ self.key_mean.float().unsqueeze(1).transpose(-1, -2)
            total = total + constant.squeeze(-1).flatten(1, 2) * step.scale
        return out if total is None else (out, total)

    @property
    def kernel(self) -> str:
        return f"projected, {self.inner.kernel}"


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return x * matrix if matrix.shape[-2] == 1 else x @ matrix


Inner = Callable[[Shape], Store]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of what each part attended to: outputs ``[batch, queries, heads, dim]`` with their
    log-sum-exps ``[batch, heads, queries]``, to the same pair."""
    scores = torch.stack([score for _, score in parts])
    total = scores.logsumexp(0)
    out = 0
    for (part, _), score in zip(parts, scores):
        weight = (score - total).exp().nan_to_num(0)  # a part that sees nothing has a score of -infinity
        out = out + part.float() * weight.transpose(1, 2).unsqueeze(-1)
    return out.to(parts[0][0].dtype), total


def sylvester(size: int) -> Tensor:
    """A symmetric orthogonal Hadamard matrix ``[size, size]`` in float64 for a power of two; ValueError otherwise."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard: found a head dimension of {size}, accepted is a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def base_store(shape: Shape) -> Store:
    """The store of a spec without methods."""
    pages = PagedStore
    if shape.max_tokens:
        from .static_pages import StaticStore as pages
    if not shape.settings.hadamard:
        return pages(shape)
    keys, values = sylvester(shape.key_dim), sylvester(shape.value_dim)
    return Projected(pages(shape), shape.kv_heads, keys, keys, values, values, dtype=shape.dtype,
                     device=shape.device)
