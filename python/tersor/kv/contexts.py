"""Contexts in files: the cache of a prompt that has been read, saved small and loaded into a cache again.

A context file is a manifest and its chunks. The manifest says what the context is, and where each chunk lies, how long
it is and what its checksum is; it has a checksum of its own. `tersor.kv.streaming` sends the same chunks over HTTP.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..op_checks import CODE
from .cache import Cache
from .codec import (MAX_TOKENS, ContextError, Geometry, LayerShape, Level, Parts, decode_chunk, encode_chunk,
                    find_level)
from .layer import PackedLayer
from .rotary import Rotary, find_rotary

MAGIC, VERSION = b"TERSORKV", 1
CHUNK_TOKENS = 256
MAX_MANIFEST = 1 << 28
_HEAD = struct.Struct("<8sHHI")  # magic, version, 0, bytes of the body
_BODY = struct.Struct("<IIQHHHH")  # layers, chunk_tokens, tokens, dtype, rotary tables, levels, has token ids
_LAYER = struct.Struct("<IIIi")  # kv_heads, key_dim, value_dim, rotary table or -1
_ROTARY = struct.Struct("<IHH")  # pairs, interleaved, 0
_ENTRY = struct.Struct("<QII")  # offset in the file, bytes, crc
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Entry:
    """One chunk at one level: where it lies in the file, how long it is, its checksum (CRC-32)."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Manifest:
    """What a context is. ``entries[level][chunk]``; ``token_ids`` are there if they were given when it was saved."""

    geometry: Geometry
    tokens: int
    chunk_tokens: int
    levels: tuple[Level, ...]
    entries: tuple[tuple[Entry, ...], ...]
    token_ids: tuple[int, ...] | None = None

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk_tokens)

    def span(self, chunk: int) -> tuple[int, int]:
        """First token of a chunk, and how many it has."""
        start = chunk * self.chunk_tokens
        return start, min(self.chunk_tokens, self.tokens - start)

    def nbytes(self, level: int = 0) -> int:
        """Of all chunks at a level."""
        return sum(entry.size for entry in self.entries[level])

    def bits(self, level: int = 0) -> float:
        """Of one number at a level, headers and scales and all counted."""
        return 8 * self.nbytes(level) / (self.tokens * self.geometry.numbers)

    def decode(self, data: bytes, level: int, chunk: int, dtype: torch.dtype | None = None) -> Parts:
        """Keys and values ``[kv_heads, tokens, dim]`` of each layer; ContextError for bytes that are not this chunk."""
        entry = self.entries[level][chunk]
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise ContextError(f"chunk {chunk} at level {self.levels[level].name}: found {len(data)} bytes of checksum "
                               f"{zlib.crc32(data):08x}, accepted are {entry.size} of {entry.crc:08x}: cut short, "
                               "damaged or of another context")
        return decode_chunk(data, self.geometry, chunk, *self.span(chunk), dtype)

    # -- bytes ------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        tables: list[Rotary] = []
        layers = []
        for s in self.geometry.layers:
            if s.rotary is not None and s.rotary not in tables:
                tables.append(s.rotary)
            layers.append(_LAYER.pack(s.kv_heads, s.key_dim, s.value_dim,
                                      -1 if s.rotary is None else tables.index(s.rotary)))
        parts = [_BODY.pack(len(layers), self.chunk_tokens, self.tokens, CODE[self.geometry.dtype], len(tables),
                            len(self.levels), self.token_ids is not None), *layers]
        for r in tables:
            parts.append(_ROTARY.pack(len(r.inv_freq), r.interleaved, 0))
            parts.append(struct.pack(f"<{len(r.inv_freq)}d", *r.inv_freq))
        for level, entries in zip(self.levels, self.entries):
            name = level.name.encode()
            parts.append(struct.pack("<HHH", len(name), len(level.key_bins), len(level.value_bins)) + name)
            parts.append(struct.pack(f"<{len(level.key_bins)}H{len(level.value_bins)}H", *level.key_bins,
                                     *level.value_bins))
            parts += [_ENTRY.pack(e.offset, e.size, e.crc) for e in entries]
        if self.token_ids is not None:
            parts.append(struct.pack(f"<{self.tokens}i", *self.token_ids))
        body = b"".join(parts)
        head = _HEAD.pack(MAGIC, VERSION, 0, len(body)) + body
        return head + _CRC.pack(zlib.crc32(head))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "context") -> "Manifest":
        """From the start of ``data``. ContextError for anything but a whole manifest with the right checksum."""
        size = manifest_size(data, where)
        if len(data) < size:
            raise ContextError(f"{where}: found {len(data)} bytes, accepted are at least the {size} of its manifest: "
                               "cut short")
        if _CRC.unpack_from(data, size - _CRC.size)[0] != zlib.crc32(data[:size - _CRC.size]):
            raise ContextError(f"{where}: its manifest does not have the checksum it states: damaged")
        try:
            return cls._read(_Reader(data[_HEAD.size:size - _CRC.size]))
        except (struct.error, ValueError, IndexError, OverflowError) as error:
            raise ContextError(f"{where}: its manifest contradicts itself: {error}") from None

    @classmethod
    def _read(cls, reader: "_Reader") -> "Manifest":
        count, chunk_tokens, tokens, code, tables, levels, has_ids = reader.take(_BODY)
        if not 1 <= chunk_tokens <= MAX_TOKENS or not tokens:
            raise ValueError(f"found {tokens} tokens in chunks of {chunk_tokens}, accepted are 1 or more, in chunks of "
                             f"1 to {MAX_TOKENS}")
        layers = [reader.take(_LAYER) for _ in range(count)]
        rotary = []
        for _ in range(tables):
            pairs, interleaved, _ = reader.take(_ROTARY)
            frequencies = reader.many("d", pairs)
            if not all(map(math.isfinite, frequencies)):
                raise ValueError("found rotary frequencies that are not finite")
            rotary.append(Rotary(frequencies, bool(interleaved)))
        if any(not -1 <= layer[3] < tables for layer in layers):
            raise ValueError("found a layer with a rotary table that is not there")
        dtype = {value: key for key, value in CODE.items()}.get(code)
        geometry = Geometry(tuple(LayerShape(*layer[:3], None if layer[3] < 0 else rotary[layer[3]])
                                  for layer in layers), dtype)
        found, entries, chunks = [], [], -(-tokens // chunk_tokens)
        for _ in range(levels):
            name, keys, values = reader.many("H", 3)
            name = reader.bytes(name).decode()
            found.append(Level(name, reader.many("H", keys), reader.many("H", values)))
            entries.append(tuple(Entry(*item) for item in _ENTRY.iter_unpack(reader.bytes(chunks * _ENTRY.size))))
        ids = reader.many("i", tokens) if has_ids else None
        if reader.left or not found or len({level.name for level in found}) < len(found):
            raise ValueError(f"found {reader.left} bytes too many, and {len(found)} levels")
        return cls(geometry, tokens, chunk_tokens, tuple(found), tuple(entries), ids)


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"found {self.left} bytes where {count} are needed")
        self.at += count
        return self.data[self.at - count:self.at]

    def take(self, form: struct.Struct) -> tuple:
        return form.unpack(self.bytes(form.size))

    def many(self, kind: str, count: int) -> tuple:
        form = f"<{count}{kind}" if count * struct.calcsize(kind) <= self.left else None
        if form is None:
            raise ValueError(f"found {self.left} bytes where {count} numbers are needed")
        return struct.unpack(form, self.bytes(struct.calcsize(form)))


def manifest_size(data: bytes, where: str = "context") -> int:
    """Of the manifest that ``data`` starts with, from its first 16 bytes."""
    if len(data) < _HEAD.size:
        raise ContextError(f"{where}: found {len(data)} bytes, accepted are at least {_HEAD.size}")
    magic, version, zero, size = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ContextError(f"{where}: found {magic!r}, accepted is {MAGIC!r} at the start: this is no context")
    if version != VERSION or zero:
        raise ContextError(f"{where}: found version {version}, accepted is {VERSION}")
    if size > MAX_MANIFEST:
        raise ContextError(f"{where}: found a manifest of {size} bytes, accepted are to {MAX_MANIFEST}")
    return _HEAD.size + size + _CRC.size


# -- caches -----------------------------------------------------------------------------------------------------------


def read_cache(cache, row: int = 0) -> tuple[Parts, torch.dtype]:
    """Keys and values ``[kv_heads, tokens, dim]`` of one sequence of a cache, and the dtype that the model computes in.

    ValueError for a cache that does not hold every token of every layer: empty, behind a sliding window, evicted.
    """
    parts, tokens, dtype = [], None, None
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer) and layer.store is not None:
            layer.flush()
            keys, values = (t.cpu() for t in layer.store.decode(torch.float32))
            seen, kind = layer.store.seen, layer.dtype
        elif type(layer) is DynamicLayer and layer.is_initialized:
            keys, values = layer.keys.detach().cpu(), layer.values.detach().cpu()
            seen, kind = keys.shape[2], keys.dtype
        else:
            raise ValueError(f"context: layer {i}: found {type(layer).__name__}"
                             f"{'' if getattr(layer, 'is_initialized', True) else ' without tokens'}, accepted are "
                             "layers of full attention of a DynamicCache or a tersor.Cache that holds tokens")
        if keys.shape[2] != seen or tokens not in (None, seen):
            raise ValueError(f"context: layer {i}: found {keys.shape[2]} tokens of {seen}, accepted is a cache whose "
                             "layers all hold every token (no sliding window, no eviction)")
        if not 0 <= row < len(keys):
            raise ValueError(f"context: row: found {row}, accepted is 0 to {len(keys) - 1}")
        parts.append((keys[row], values[row]))
        tokens, dtype = seen, kind
    if not tokens:
        raise ValueError("context: found a cache without tokens, accepted is one that has read a prompt")
    return parts, dtype


def rotary_of(model: nn.Module | None, layer: int, key_dim: int) -> Rotary | None:
    """What keys of a layer are turned by; None where that cannot be told, and keys are coded as they are."""
    if model is None:
        return None
    try:
        rotary = find_rotary(model, layer)
    except ValueError:
        return None
    return rotary if rotary.dim <= key_dim else None


def geometry_of(parts: Parts, dtype: torch.dtype, model: nn.Module | None) -> Geometry:
    return Geometry(tuple(LayerShape(len(k), k.shape[2], v.shape[2], rotary_of(model, i, k.shape[2]))
                          for i, (k, v) in enumerate(parts)), dtype)


def check_model(geometry: Geometry, tokens: int, model: nn.Module, where: str) -> None:
    """ValueError where a context cannot be of this model: other layers, heads or rotary embedding, too many tokens."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if config.num_hidden_layers != len(geometry.layers):
        raise ValueError(f"{where}: found {len(geometry.layers)} layers, accepted are {config.num_hidden_layers} of "
                         f"{name}")
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    dim = getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads)
    latent = getattr(config, "kv_lora_rank", None)
    for i, s in enumerate(geometry.layers):
        if latent is None and isinstance(heads, int) and (s.kv_heads, s.key_dim) != (heads, dim):
            raise ValueError(f"{where}: layer {i}: found {s.kv_heads} heads of {s.key_dim} channels, accepted are "
                             f"{heads} of {dim} for {name}")
        if s.rotary is not None and not _same_rotary(rotary_of(model, i, s.key_dim), s.rotary):
            raise ValueError(f"{where}: layer {i}: found keys turned by another rotary embedding than that of {name}, "
                             "accepted is the model that the context was made with")
    limit = getattr(config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ValueError(f"{where}: found {tokens} tokens, accepted are to {limit}, the positions of {name}")


def _same_rotary(one: Rotary | None, other: Rotary) -> bool:
    return one is not None and one.interleaved == other.interleaved and one.dim == other.dim \
        and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one.inv_freq, other.inv_freq))


def new_cache(model: nn.Module, spec: str | None):
    """`tersor.Cache` of a spec, or a DynamicCache without one."""
    return DynamicCache(config=model.config) if spec is None else Cache(model, spec)


def append(cache, parts: Parts, device: torch.device | None = None) -> None:
    """Put decoded tokens at the end of a cache of one sequence, on ``device`` (None: where they are)."""
    for layer, (keys, values) in zip(cache.layers, parts):
        layer.update(keys.unsqueeze(0).to(device), values.unsqueeze(0).to(device))
        if isinstance(layer, PackedLayer):
            layer.flush()


def _chunks(parts: Parts, chunk_tokens: int) -> Iterator[tuple[int, int, Parts]]:
    tokens = parts[0][0].shape[1]
    for index, start in enumerate(range(0, tokens, chunk_tokens)):
        end = min(tokens, start + chunk_tokens)
        yield index, start, [(k[:, start:end], v[:, start:end]) for k, v in parts]


def quantized(cache, model: nn.Module, level: str | Level = "medium", spec: str | None = None, row: int = 0,
              chunk_tokens: int = CHUNK_TOKENS):
    """The cache that `load_context` gives after `save_context`, made without a file: what quantization alone does."""
    parts, dtype = read_cache(cache, row)
    geometry, level, out = geometry_of(parts, dtype, model), find_level(level), new_cache(model, spec)
    for index, start, chunk in _chunks(parts, chunk_tokens):
        data = encode_chunk(chunk, geometry, level, index, start)
        append(out, decode_chunk(data, geometry, index, start, chunk[0][0].shape[1]), model.device)
    return out


def encode_context(cache, model: nn.Module | None, levels: Sequence[str | Level], token_ids=None, row: int = 0,
                   chunk_tokens: int = CHUNK_TOKENS) -> tuple[Manifest, list[list[bytes]]]:
    """A manifest, and ``[level][chunk]`` bytes. Offsets count from the end of the manifest, level after level."""
    if not 1 <= chunk_tokens <= MAX_TOKENS:
        raise ValueError(f"context: chunk_tokens: found {chunk_tokens}, accepted are 1 to {MAX_TOKENS}")
    found = tuple(find_level(level) for level in levels)
    if not found or len({level.name for level in found}) < len(found):
        raise ValueError(f"context: levels: found {[level.name for level in found]}, accepted are one or more, once "
                         "each")
    parts, dtype = read_cache(cache, row)
    tokens = parts[0][0].shape[1]
    if token_ids is not None:
        ids = token_ids.flatten().tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        if len(ids) != tokens or any(not 0 <= i < 2**31 for i in ids):
            raise ValueError(f"context: token_ids: found {len(ids)}, accepted are {tokens}, those of the cache, from 0 "
                             "on")
        token_ids = tuple(ids)
    geometry = geometry_of(parts, dtype, model)
    data = [[encode_chunk(chunk, geometry, level, index, start) for index, start, chunk in _chunks(parts, chunk_tokens)]
            for level in found]
    entries, offset = [], 0
    for chunks in data:
        row_entries = []
        for chunk in chunks:
            row_entries.append(Entry(offset, len(chunk), zlib.crc32(chunk)))
            offset += len(chunk)
        entries.append(tuple(row_entries))
    return Manifest(geometry, tokens, chunk_tokens, found, tuple(entries), token_ids), data


# -- files ------------------------------------------------------------------------------------------------------------


def write_beside(path: Path, pieces) -> None:
    """Write a file under another name, sync and rename it: it is there whole, or as it was."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def save_context(cache, path: str | os.PathLike, model: nn.Module | None = None, level: str | Level = "medium",
                 token_ids=None, row: int = 0, chunk_tokens: int = CHUNK_TOKENS) -> Manifest:
    """Write the context that ``cache`` holds to a file, and return its manifest (``.bits()`` is what a number took).

    ``cache``: a DynamicCache or a `tersor.Cache`, whose ``row``-th sequence is saved. With ``model``, keys are coded as
    they were before rotary embedding, which takes fewer bits. ``level``: ``"high"``, ``"medium"``, ``"low"`` or a
    `Level`. ``token_ids``: what was read, if the file shall say so. ValueError for a cache that does not hold every
    token, and for numbers that are not finite.
    """
    manifest, data = encode_context(cache, model, [level], token_ids, row, chunk_tokens)
    write_beside(Path(path), [manifest.to_bytes(), *data[0]])
    return manifest


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Of a context file. ContextError for a file that is none, or damaged."""
    with open(path, "rb") as file:
        head = file.read(_HEAD.size)
        return Manifest.from_bytes(head + file.read(manifest_size(head, str(path)) - len(head)), str(path))


def load_context(path: str | os.PathLike, model: nn.Module, spec: str | None = None):
    """The context of a file in a new cache: `tersor.Cache` of ``spec``, or a DynamicCache without one.

    Generation goes on from it as from the cache that was saved, quantized by the level. ContextError (a ValueError) for
    a file that is damaged, cut short or no context; ValueError for one of another model.
    """
    manifest = read_manifest(path)
    check_model(manifest.geometry, manifest.tokens, model, str(path))
    base = len(manifest.to_bytes())
    expected = base + sum(map(manifest.nbytes, range(len(manifest.levels))))
    if os.path.getsize(path) != expected:
        raise ContextError(f"{path}: found {os.path.getsize(path)} bytes, accepted are {expected}: cut short or "
                           "damaged")
    cache = new_cache(model, spec)
    with open(path, "rb") as file:
        for chunk, entry in enumerate(manifest.entries[0]):
            file.seek(base + entry.offset)
            append(cache, manifest.decode(file.read(entry.size), 0, chunk, model.dtype), model.device)
    return cache
