"""Keys and values to bytes and back: the codec for contexts that are kept or sent (after CacheGen, arXiv 2310.07240).

A context is cut into chunks of tokens that decode independently. In a chunk each layer, part and head is a stream of
its own: quantized with one step, keys turned back to what they were before rotary embedding, tokens coded as
differences from the mean of their channel and from the first token of their group of ten where that pays, and range
coded with the tables of the format. `cpp/cpu/kv_codec.h` has the bits. What is lost is what quantization loses: a
number is off by half a step at most (keys before their rotation).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..op_checks import CODE, FLOATS
from .rotary import Rotary

Parts = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [kv_heads, tokens, dim]

MAX_TOKENS, MAX_DIM, MAX_STREAMS = 4096, 1024, 1 << 20
_CHUNK = struct.Struct("<4sHHIIQQII")  # magic, version, 0, index, tokens, start, payload bytes, streams, payload crc
_CHUNK_CRC = struct.Struct("<I")
MAGIC, VERSION = b"TKVC", 1
HEADER_BYTES = _CHUNK.size + _CHUNK_CRC.size
BINS = "even numbers from 4 to 256"


class ContextError(ValueError):
    """Bytes that are not a context, or not this one: damaged, cut short, of another model. Nothing was decoded."""


@dataclass(frozen=True)
class Level:
    """How finely a context is coded: numbers of bins, from the first layer to the last.

    A tuple of any length is stretched over the layers: layer i of n has entry ``i * len // n``. The step of a head is
    the mean over tokens of the largest magnitude of a token's channels (their mean over the tokens taken off) over
    ``bins / 2 - 1``, rounded to float16, as CacheGen's is for a single token.
    """

    name: str
    key_bins: tuple[int, ...]
    value_bins: tuple[int, ...]

    def __post_init__(self):
        for what, bins in (("key_bins", self.key_bins), ("value_bins", self.value_bins)):
            if not bins or any(type(b) is not int or b % 2 or not 4 <= b <= 256 for b in bins) or len(bins) > 1024:
                raise ValueError(f"level {self.name!r}: {what}: found {bins!r}, accepted are {BINS}")
        if not self.name.isidentifier() or len(self.name) > 32:
            raise ValueError(f"level: name: found {self.name!r}, accepted is an identifier of up to 32 characters")

    def bins(self, layer: int, layers: int) -> tuple[int, int]:
        """Of the keys and of the values of a layer."""
        return tuple(b[layer * len(b) // layers] for b in (self.key_bins, self.value_bins))


# CacheGen spends most on the first layers. On the reference model it is the last layer that predictions depend on most
# (its keys ten times as much as any other's, at equal steps), and keys more than values: these levels are what
# `tune_level` finds there for 3.3, 2.2 and 1.8 bits a number. It finds them for other models too.
LEVELS = {level.name: level for level in (
    Level("high", (16, 16, 12, 12, 16, 20, 24, 64), (10, 10, 8, 8, 10, 10, 10, 24)),
    Level("medium", (8, 10, 8, 6, 10, 10, 12, 36), (4, 4, 4, 4, 6, 6, 6, 12)),
    Level("low", (6, 8, 6, 4, 8, 10, 10, 30), (4, 4, 4, 4, 4, 4, 4, 10)),
)}


def find_level(level: str | Level) -> Level:
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ValueError(f"level: found {level!r}, accepted are {', '.join(LEVELS)}, or a tersor.kv.Level")
    return LEVELS[level]


@dataclass(frozen=True)
class LayerShape:
    """``rotary``: what the keys were turned by, position by position from 0; None codes them as they are."""

    kv_heads: int
    key_dim: int
    value_dim: int
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Geometry:
    """What two sides must agree on to read a chunk."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.dtype not in CODE:
            raise ValueError(f"context: dtype: found {self.dtype}, accepted is {FLOATS}")
        for i, s in enumerate(self.layers):
            if s.kv_heads < 1 or not 1 <= min(s.key_dim, s.value_dim) <= max(s.key_dim, s.value_dim) <= MAX_DIM:
                raise ValueError(f"context: layer {i}: found {s}, accepted are 1 or more heads of dimensions to "
                                 f"{MAX_DIM}")
            if s.rotary is not None and not 0 < s.rotary.dim <= s.key_dim:
                raise ValueError(f"context: layer {i}: found {s.rotary.dim} rotary channels, accepted are to "
                                 f"{s.key_dim}")
        if not self.layers or self.streams > MAX_STREAMS:
            raise ValueError(f"context: found {len(self.layers)} layers, accepted are 1 or more, of up to "
                             f"{MAX_STREAMS} streams together")

    @property
    def streams(self) -> int:
        return 2 * sum(s.kv_heads for s in self.layers)

    @property
    def numbers(self) -> int:
        """In a token."""
        return sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.layers)


# -- streams ----------------------------------------------------------------------------------------------------------


def steps(x: Tensor, bins: int) -> Tensor:
    """Steps float16 ``[heads]`` for ``x [heads, tokens, dim]`` in ``bins`` bins, never under float16's least number,
    nor under 2^-11 of the largest number (a single token, or equal ones, do not spread at all)."""
    spread = (x.float() - x.float().mean(1, keepdim=True)).abs().amax(2).mean(1) / (bins // 2 - 1)
    return spread.maximum(x.float().abs().amax((1, 2)) / 2048).clamp(2.0**-24, 65504.0).to(torch.float16)


def encode_streams(x: Tensor, step: Tensor, threads: int | None = None) -> list[bytes]:
    """One stream for each head of ``x`` float32 ``[heads, tokens, dim]`` (unit stride along the last) with ``step``
    float16 ``[heads]``. ValueError for numbers that are not finite, or beyond 2^20 steps."""
    if x.dtype is not torch.float32 or x.dim() != 3 or x.stride(2) != 1 or not x.is_cpu:
        raise ValueError(f"kv_encode: x: found {x.dtype} {list(x.shape)} on {x.device}, accepted is torch.float32 "
                         "[heads, tokens, dim] on cpu, of unit stride along the last")
    if step.dtype is not torch.float16 or step.shape != x.shape[:1] or not step.is_cpu:
        raise ValueError(f"kv_encode: step: found {step.dtype} {list(step.shape)}, accepted is torch.float16 "
                         f"[{len(x)}]")
    heads, tokens, dim = x.shape
    if tokens > 1 and x.stride(1) < dim:
        x = x.contiguous()
    room = _C.kv_encode_room(tokens, dim)
    out = torch.empty((heads, room), dtype=torch.uint8)
    bits = step.view(torch.int16).tolist()
    jobs = torch.tensor([[x[h].data_ptr(), x.stride(1), out[h].data_ptr(), room, 0, 0, tokens, dim, 0, 0, 0, bits[h]]
                         for h in range(heads)], dtype=torch.int64)
    if heads:
        _C.kv_encode(jobs.data_ptr(), heads, threads or torch.get_num_threads())
    return [out[h, :size].numpy().tobytes() for h, size in enumerate(jobs[:, 3].tolist())]


def rotation(rotary: Rotary, start: int, tokens: int) -> Tensor:
    """Cosines, then sines, of positions from ``start`` on: float32 ``[2, rotary.dim / 2, tokens]``."""
    positions = torch.arange(start, start + tokens, dtype=torch.float64)
    angles = torch.tensor(rotary.inv_freq, dtype=torch.float64).view(-1, 1) * positions
    return torch.stack((angles.cos(), angles.sin())).float()


def decode_streams(data: Tensor, sizes: Sequence[int], geometry: Geometry, start: int, tokens: int,
                   dtype: torch.dtype | None = None, levels: list[Tensor] | None = None,
                   threads: int | None = None) -> Parts:
    """Streams that lie one after another in ``data`` uint8: for each layer the heads of the keys, then of the values.

    ``levels``, if given, gets int32 ``[heads, dim, tokens]`` for each of these: the integers, in eighths of a step.
    ValueError for a stream that is damaged; any bytes are safe to give.
    """
    dtype = dtype or geometry.dtype
    if data.dtype is not torch.uint8 or data.dim() != 1 or not data.is_contiguous() or not data.is_cpu:
        raise ValueError(f"kv_decode: data: found {data.dtype} {list(data.shape)}, accepted is contiguous torch.uint8 "
                         "[bytes] on cpu")
    if len(sizes) != geometry.streams or any(size < 0 for size in sizes) or sum(sizes) != len(data):
        raise ValueError(f"kv_decode: sizes: found {len(sizes)} of together {sum(sizes)}, accepted are "
                         f"{geometry.streams} of together {len(data)}")
    if dtype not in CODE or not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"kv_decode: dtype, tokens: found {dtype}, {tokens}, accepted are {FLOATS}, 1 to {MAX_TOKENS}")
    parts, jobs, tables, at, stream = [], [], {}, data.data_ptr(), 0
    for shape in geometry.layers:
        pair = []
        for part, dim in enumerate((shape.key_dim, shape.value_dim)):
            out = torch.empty((shape.kv_heads, tokens, dim), dtype=dtype)
            integers = torch.empty((shape.kv_heads, dim, tokens), dtype=torch.int32) if levels is not None else None
            turned = [0, 0, 0]
            if part == 0 and shape.rotary is not None:
                if shape.rotary not in tables:
                    tables[shape.rotary] = rotation(shape.rotary, start, tokens)
                turned = [tables[shape.rotary].data_ptr(), shape.rotary.dim, int(shape.rotary.interleaved)]
            for head in range(shape.kv_heads):
                jobs.append([out[head].data_ptr(), dim, at, sizes[stream], turned[0],
                             0 if integers is None else integers[head].data_ptr(), tokens, dim, CODE[dtype], turned[1],
                             turned[2], 0])
                at += sizes[stream]
                stream += 1
            pair.append(out)
            if levels is not None:
                levels.append(integers)
        parts.append(tuple(pair))
    table = torch.tensor(jobs, dtype=torch.int64)
    _C.kv_decode(table.data_ptr(), len(jobs), threads or torch.get_num_threads())
    return parts


# -- chunks -----------------------------------------------------------------------------------------------------------


def encode_chunk(parts: Parts, geometry: Geometry, level: Level, index: int, start: int) -> bytes:
    """A chunk of the tokens ``start`` and on, as bytes that say what they are and carry checksums.

    ``parts``: keys and values of each layer ``[kv_heads, tokens, dim]``, as attention takes them. ValueError for what
    the geometry does not describe, and for numbers that are not finite.
    """
    tokens = check_parts(parts, geometry)
    streams = []
    for i, ((keys, values), shape) in enumerate(zip(parts, geometry.layers)):
        if shape.rotary is not None:
            positions = torch.arange(start, start + tokens)
            keys = shape.rotary.turn(keys.double(), positions, back=True)
        for part, (x, bins) in enumerate(zip((keys, values), level.bins(i, len(geometry.layers)))):
            x = x.float().contiguous()
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"context: {('keys', 'values')[part]} of layer {i}: found numbers that are not "
                                 "finite, accepted are finite ones")
            try:
                streams += encode_streams(x, steps(x, bins))
            except ValueError as error:
                raise ValueError(f"context: {('keys', 'values')[part]} of layer {i}: found magnitudes to "
                                 f"{x.abs().max():g}, accepted are to 2^20 steps ({error})") from None
    payload = struct.pack(f"<{len(streams)}I", *map(len, streams)) + b"".join(streams)
    header = _CHUNK.pack(MAGIC, VERSION, 0, index, tokens, start, len(payload), len(streams), zlib.crc32(payload))
    return header + _CHUNK_CRC.pack(zlib.crc32(header)) + payload


def check_parts(parts: Parts, geometry: Geometry) -> int:
    """How many tokens there are; ValueError unless all layers have the shapes of the geometry and equally many."""
    if len(parts) != len(geometry.layers):
        raise ValueError(f"context: found {len(parts)} layers, accepted are {len(geometry.layers)}")
    tokens = parts[0][0].shape[1]
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"context: found a chunk of {tokens} tokens, accepted are 1 to {MAX_TOKENS}")
    for i, (pair, shape) in enumerate(zip(parts, geometry.layers)):
        for name, x, dim in (("keys", pair[0], shape.key_dim), ("values", pair[1], shape.value_dim)):
            if x.shape != (shape.kv_heads, tokens, dim) or not x.is_floating_point():
                raise ValueError(f"context: {name} of layer {i}: found {x.dtype} {list(x.shape)}, accepted is "
                                 f"{[shape.kv_heads, tokens, dim]}")
    return tokens


def decode_chunk(data: bytes, geometry: Geometry, index: int, start: int, tokens: int,
                 dtype: torch.dtype | None = None) -> Parts:
    """Keys and values of each layer, ``[kv_heads, tokens, dim]``. Checksums and lengths are verified first.

    ContextError for bytes that are cut short, damaged, or another chunk than the one asked for.
    """
    where = f"chunk {index}"
    if len(data) < HEADER_BYTES:
        raise ContextError(f"{where}: found {len(data)} bytes, accepted are at least {HEADER_BYTES}")
    header = bytes(data[:_CHUNK.size])
    magic, version, zero, got_index, got_tokens, got_start, size, streams, crc = _CHUNK.unpack(header)
    if magic != MAGIC:
        raise ContextError(f"{where}: found {magic!r}, accepted is {MAGIC!r} at the start: this is no chunk of a "
                           "context")
    if _CHUNK_CRC.unpack(data[_CHUNK.size:HEADER_BYTES])[0] != zlib.crc32(header):
        raise ContextError(f"{where}: its header does not have the checksum it states: damaged")
    if version != VERSION or zero:
        raise ContextError(f"{where}: found version {version}, accepted is {VERSION}")
    if (got_index, got_tokens, got_start) != (index, tokens, start):
        raise ContextError(f"{where}: found chunk {got_index} of {got_tokens} tokens from {got_start}, accepted is "
                           f"chunk {index} of {tokens} tokens from {start}")
    if streams != geometry.streams:
        raise ContextError(f"{where}: found {streams} streams, accepted are {geometry.streams} for this model")
    payload = memoryview(data)[HEADER_BYTES:]
    if len(payload) != size:
        raise ContextError(f"{where}: found {len(payload)} bytes after the header, accepted are the {size} it states")
    if zlib.crc32(payload) != crc:
        raise ContextError(f"{where}: its bytes do not have the checksum that the header states: damaged")
    if size < 4 * streams:
        raise ContextError(f"{where}: found {size} bytes, accepted are at least {4 * streams} for {streams} sizes")
    sizes = struct.unpack_from(f"<{streams}I", payload)
    try:
        body = torch.frombuffer(bytearray(payload[4 * streams:]) or bytearray(1), dtype=torch.uint8)
        return decode_streams(body[:size - 4 * streams], sizes, geometry, start, tokens, dtype)
    except ContextError:
        raise
    except ValueError as error:
        raise ContextError(f"{where}: {error}") from None
