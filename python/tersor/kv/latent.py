"""Low-rank features in place of keys and values, and attention that reads them.

A feature vector of a token stands for the keys of all heads, as they were before rotary embedding, and another for
their values. Values are never rebuilt: features are summed with attention's weights, and the sum is taken back. Keys
have to be rotated by their positions, which no low-rank basis commutes with, so they are rebuilt, `CHUNK` tokens at a
time, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import devices
from .bases import beside
from .devices import chosen
from .pages import Pages
from .rotary import Rotary
from .settings import Settings
from .store import Inner, PagedStore, Shape, Step, Store, merge

CHUNK = 256  # tokens whose keys are rebuilt at a time
REBUILT = 16 << 20  # bytes of rebuilt keys on a GPU, where a chunk costs some fifty launches: at least `CHUNK` tokens
WIDEST = 1024  # of one head of a page


@dataclass
class Decoder:
    """From features to keys and values. ``keys [rows, key_rank, kv_heads * key_dim]`` and ``values [rows, kv_heads,
    value_rank, value_dim]``, rows: 1, or one for each sequence; ``key_mean [kv_heads * key_dim]`` and ``value_mean
    [kv_heads, 1, value_dim]`` or None. ``rotary``: what rebuilt keys are turned by, or None."""

    heads: int
    keys: Tensor
    values: Tensor
    key_mean: Tensor | None = None
    value_mean: Tensor | None = None
    rotary: Rotary | None = None

    def rebuild_keys(self, features: Tensor, positions: Tensor) -> Tensor:
        """``features [batch, tokens, key_rank]`` at ``positions [batch, tokens]`` to float32 (or the features' wider
        dtype) ``[batch, kv_heads, tokens, key_dim]``."""
        flat = times(features, self.keys)
        if self.key_mean is not None:
            flat = flat + self.key_mean
        keys = flat.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return keys if self.rotary is None else self.rotary.turn(keys, positions.unsqueeze(1))

    def rebuild_values(self, features: Tensor) -> Tensor:
        """``[batch, kv_heads, tokens, value_dim]``."""
        values = times(features.unsqueeze(1), self.values)
        return values if self.value_mean is None else values + self.value_mean

    def select(self, sequences: list[int]) -> None:
        if len(self.keys) > 1:
            self.keys, self.values = chosen(self.keys, sequences), chosen(self.values, sequences)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values))


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Product in the matrix's dtype, so that a 16-bit matrix is never widened, or in x's float64; as x's dtype. What x
    has beyond the matrix's rows is padding."""
    x = x[..., :matrix.shape[-2]]
    if x.dtype is torch.float64:
        return x @ matrix.double()
    return (x.to(matrix.dtype) @ matrix).to(x.dtype)


Chunk = tuple[int, Tensor, Tensor]  # position in the sequence, features of keys and of values [batch, tokens, rank]


def attend_features(step: Step, chunks: Iterator[Chunk], decoder: Decoder, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over features that are all older than the step's queries: ``[batch, queries, heads, value_dim]`` of the
    query's dtype and the log-sum-exp, float32 ``[batch, heads, queries]``. ``offsets [batch]`` is what is added to a
    token's place in the sequence for its rotary position. The step's own keys are not looked at, nor its sinks."""
    batch, heads, queries, _ = step.query.shape
    group = heads // decoder.heads
    query = step.query.float().unflatten(1, (decoder.heads, group)).flatten(2, 3) * step.scale
    top = query.new_full((batch, decoder.heads, group * queries, 1), -torch.inf)
    total = torch.zeros_like(top)
    summed = 0
    for first, keys, values in chunks:
        places = torch.arange(first, first + keys.shape[1], device=keys.device)
        rebuilt = decoder.rebuild_keys(keys, offsets.view(-1, 1) + places)
        scores = query @ rebuilt.transpose(-1, -2)
        if step.softcap:
            scores = step.softcap * torch.tanh(scores / step.softcap)
        if step.mask is not None:
            seen = _columns(step.mask, first - step.mask_first, keys.shape[1])
            seen = seen.expand(batch, heads, queries, -1).unflatten(1, (decoder.heads, group)).flatten(2, 3)
            scores = scores.masked_fill(~seen, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = higher.masked_fill(higher.isneginf(), 0)
        weights, kept = (scores - safe).exp(), (top - safe).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        summed = summed * kept + weights @ values.unsqueeze(1)
        top = higher
    out = summed / total.clamp_min(torch.finfo(total.dtype).tiny)
    out = times(out, decoder.values)
    if decoder.value_mean is not None:
        out = out + decoder.value_mean * (total > 0)
    scores = (top + total.log()).masked_fill(total == 0, -torch.inf)
    out = out.unflatten(2, (group, queries)).flatten(1, 2).transpose(1, 2)
    return out.to(step.query.dtype), scores.squeeze(-1).unflatten(2, (group, queries)).flatten(1, 2)


def _columns(mask: Tensor, first: int, count: int) -> Tensor:
    """Columns ``first .. first + count`` of a mask; those before its first are hidden."""
    found = mask[..., max(first, 0):max(first + count, 0)]
    return torch.nn.functional.pad(found, (count - found.shape[-1], 0)) if found.shape[-1] < count else found


# -- features in pages ------------------------------------------------------------------------------------------------


def split_ranks(key_rank: int, value_rank: int) -> tuple[int, int, int]:
    """Heads that a page spreads features over, and the ranks rounded up so that each head has a multiple of 16."""
    heads = -(-max(key_rank, value_rank) // WIDEST)
    unit = 16 * heads
    return heads, -(-key_rank // unit) * unit, -(-value_rank // unit) * unit


def feature_heads(device: torch.device, key_rank: int, value_rank: int) -> tuple[int, int, int]:
    """Heads that a page spreads features over, and their dimensions."""
    heads = split_ranks(key_rank, value_rank)[0]
    if not devices.on_cuda(device):
        return heads, key_rank // heads, value_rank // heads
    from .cuda_layout import DIMS

    widest = max(key_rank, value_rank)
    dim = min(DIMS, key=lambda dim: (-(-widest // dim) * dim, -dim))
    return -(-widest // dim), dim, dim


def refuse_static(shape: Shape, name: str) -> None:
    """ValueError where `tersor.StaticCache` asks for a method that holds features."""
    if shape.max_tokens:
        raise ValueError(f"tersor.StaticCache: layer {shape.layer}: found {name}, accepted are methods that hold "
                         "tokens in pages of one kind; tersor.Cache takes it")


def feature_pages(name: str, shape: Shape, key_rank: int, value_rank: int, inner: Inner) -> Pages:
    """Pages, as the spec stores them, for features of ranks that `split_ranks` made. On CUDA features of keys and of
    values are padded to one width, so many heads of a dimension that kernels take. ValueError where a method or
    Hadamard matrices stand inside ``name``: nothing but pages can hold features."""
    refuse_static(shape, name)
    heads, *dims = feature_heads(shape.device, key_rank, value_rank)
    settings = replace(shape.settings, recent=0)
    store = inner(shape.changed(kv_heads=heads, key_dim=dims[0], value_dim=dims[1], settings=settings, rotary=None,
                                window=0))
    if type(store) is not PagedStore:
        raise ValueError(f"{name}: layer {shape.layer}: found a method, or hadamard, inside; accepted are bits and "
                         "options of pages: features have no heads and no attention of their own")
    return store.pages


def append_features(pages: Pages, keys: Tensor, values: Tensor) -> None:
    """Features ``[batch, tokens, rank]`` into pages, filled up with zeros to their width."""
    layout = pages.layout
    padded = (torch.nn.functional.pad(x.to(layout.dtype), (0, layout.kv_heads * dim - x.shape[2]))
              for x, dim in ((keys, layout.key_dim), (values, layout.value_dim)))
    pages.append(*(x.unflatten(2, (layout.kv_heads, -1)).transpose(1, 2).contiguous() for x in padded))


def read_features(pages: Pages, tokens: int, rows: list[int] | None = None, dtype: torch.dtype = torch.float32,
                  most: int = CHUNK) -> Iterator[Chunk]:
    """Features of the first ``tokens``, at most ``most`` at a time; ``rows``: the sequence of the pages that each
    sequence reads."""
    if not isinstance(pages, Pages):
        yield from pages.chunks(tokens, most, rows, dtype)
        return
    at, held = 0, []
    for page, count in zip(pages.pages, pages.counts()):
        count = min(count, tokens - at - sum(k.shape[1] for k, _ in held))
        if count <= 0:
            break
        if held and sum(k.shape[1] for k, _ in held) + count > most:
            yield _joined(at, held)
            at, held = at + sum(k.shape[1] for k, _ in held), []
        own = page.rows if rows is None else [page.rows[row] for row in rows]
        held.append([beside(x[:, :, :count]) for x in pages.layout.decode(page.memory[own], page.kind, dtype)])
    if held:
        yield _joined(at, held)


def chunk_tokens(shape: Shape) -> int:
    """Tokens whose keys are rebuilt at a time, a multiple of `CHUNK`."""
    if not devices.on_cuda(shape.device):
        return CHUNK
    return max(1, REBUILT // (4 * CHUNK * shape.batch * shape.kv_heads * shape.key_dim)) * CHUNK


def _joined(at: int, held: list[tuple[Tensor, Tensor]]) -> Chunk:
    keys, values = zip(*held)
    return at, torch.cat(keys, 1), torch.cat(values, 1)


def tail_mask(step: Step, first: int) -> Step:
    """The step as a store sees it that counts positions from ``first`` on."""
    if step.mask is None or not first:
        return step
    if step.mask_first >= first:
        return step.changed(mask_first=step.mask_first - first)
    return step.changed(mask=step.mask[..., first - step.mask_first:], mask_first=0)


def rotary_offsets(name: str, layer: int, step: Step, seen: int, known: Tensor | None) -> Tensor:
    """What is to be added to places in the sequence for rotary positions, int64 ``[batch]``. ValueError for positions
    that do not count up by one from token to token; on a GPU, which has to be waited for, those of the first tokens and
    of several at once are looked at, a single one's are not."""
    batch = len(step.keys)
    if step.positions is None:
        return torch.zeros(batch, dtype=torch.int64, device=step.keys.device) if known is None else known
    positions = step.positions
    if positions.dim() != 2 or positions.shape[-1] != step.fresh:
        raise ValueError(f"{name}: layer {layer}: found positions {list(positions.shape)}, accepted are [batch, "
                         "tokens]")
    if known is not None and step.fresh == 1 and devices.on_cuda(step.keys.device):
        return known
    positions = positions.expand(batch, -1)
    found = positions[:, -1] - (seen + step.fresh - 1)
    even = positions.diff() == 1
    if not even.all():
        hidden = step.hidden()  # padding may stand anywhere
        even = even if hidden is None else even | hidden[:, :-1]
    if not even.all() or known is not None and not torch.equal(known, found):
        raise ValueError(f"{name}: layer {layer}: found positions that jump, accepted are positions that count up by "
                         "one from token to token")
    return found


# -- a window as it is, older tokens as features ----------------------------------------------------------------------


@dataclass
class Encoder:
    """From keys before rotary embedding and values, heads beside each other, to features: ``keys [kv_heads * key_dim,
    key_rank]``, ``values [kv_heads * value_dim, value_rank]``, and means ``[kv_heads * dim]`` taken off first."""

    keys: Tensor
    values: Tensor
    key_mean: Tensor
    value_mean: Tensor


class WindowedFeatures(Store):
    """The last ``window`` tokens or more in 16 bits; older ones as features in pages. ``block`` tokens leave the window
    together, a page of it."""

    def __init__(self, name: str, shape: Shape, window: int, pages: Pages, encoder: Encoder, decoder: Decoder):
        self.name, self.shape, self.window = name, shape, window
        self.older, self.encoder, self.decoder, self.chunk = pages, encoder, decoder, chunk_tokens(shape)
        self.block = 64 if devices.on_cuda(shape.device) else 32
        exact = Settings(16, 16, group=self.block)
        self.recent = PagedStore(shape.changed(settings=exact, rotary=None))
        self.offsets: Tensor | None = None

    @property
    def seen(self) -> int:
        return self.older.tokens + self.recent.pages.tokens

    @property
    def batch(self) -> int:
        return self.recent.batch

    def prompt(self, step: Step) -> None:
        self.offsets = rotary_offsets(self.name, self.shape.layer, step, self.seen, self.offsets)
        older = 0
        if not self.seen:
            older = max(0, step.fresh - self.window) // self.block * self.block
            for at in range(0, older, self.chunk):
                part = slice(at, min(at + self.chunk, older))
                self._compress(step.keys[:, :, part], step.values[:, :, part])
            self.recent.pages.first = older
        self.recent.append(step.keys[:, :, older:], step.values[:, :, older:])
        self._shift()

    def attend(self, step: Step):
        if step.fresh:
            self.offsets = rotary_offsets(self.name, self.shape.layer, step, self.seen, self.offsets)
        if not self.older.tokens:
            out = self.recent.attend(step)
        else:
            recent = self.recent.attend(step.changed(log_sum_exp=True))
            chunks = read_features(self.older, self.older.tokens, most=self.chunk)
            older = attend_features(step, chunks, self.decoder, self.offsets)
            out = merge([recent, older])
            out = out if step.log_sum_exp else out[0]
        self._shift()
        return out

    def _shift(self) -> None:
        """Make features of what has left the window, a page at a time."""
        pages = self.recent.pages
        while pages.tokens >= self.window + self.block:
            self._compress(*pages.decode_page(0, self.shape.dtype))
            pages.drop_before(pages.first + self.block)

    def _compress(self, keys: Tensor, values: Tensor) -> None:
        places = torch.arange(self.older.tokens, self.older.tokens + keys.shape[2], device=keys.device)
        flat = keys.float()
        if self.decoder.rotary is not None:
            flat = self.decoder.rotary.turn(flat, (self.offsets.view(-1, 1) + places).unsqueeze(1), back=True)
        encoder = self.encoder
        append_features(self.older, (beside(flat) - encoder.key_mean) @ encoder.keys,
                        (beside(values.float()) - encoder.value_mean) @ encoder.values)

    def crop(self, tokens: int) -> None:
        last = min(tokens, self.recent.pages.tokens)
        self.recent.pages.crop(last)
        if tokens > last:
            self.older.crop(tokens - last)
            self.recent.pages.first = self.older.tokens

    def select(self, sequences: list[int]) -> None:
        self.recent.select(sequences)
        self.older.select(sequences)
        if self.offsets is not None:
            self.offsets = chosen(self.offsets, sequences)

    def within(self) -> Sequence[Store]:
        return (self.recent,)

    def offload(self) -> None:
        super().offload()
        if devices.on_cuda(self.shape.device):
            self.older.offload()

    def prefetch(self) -> None:
        super().prefetch()
        if devices.on_cuda(self.shape.device):
            self.older.prefetch()

    def decode(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        recent = self.recent.decode(dtype)
        if not self.older.tokens:
            return recent
        chunks = read_features(self.older, self.older.tokens, dtype=dtype)
        older = decode_features(chunks, self.decoder, self.offsets, dtype)
        return tuple(torch.cat(pair, 2) for pair in zip(older, recent))

    @property
    def nbytes(self) -> int:
        return self.recent.nbytes + self.older.nbytes

    @property
    def bits(self) -> float:
        return self.older.page_bits

    @property
    def kernel(self) -> str:
        ranks = self.encoder.keys.shape[1], self.encoder.values.shape[1]
        return f"features of rank {ranks[0]} and {ranks[1]} in chunks of {self.chunk}, {self.recent.kernel}"


def decode_features(chunks: Iterator[Chunk], decoder: Decoder, offsets: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """All keys and values that features stand for, ``[batch, kv_heads, tokens, dim]``."""
    parts = []
    for first, keys, values in chunks:
        places = torch.arange(first, first + keys.shape[1], device=keys.device)
        parts.append((decoder.rebuild_keys(keys, offsets.view(-1, 1) + places).to(dtype),
                      decoder.rebuild_values(values).to(dtype)))
    return tuple(torch.cat(p, 2) for p in zip(*parts))
