"""Dense little-endian bit streams in int32 words, the storage that all standard integer layouts share.

Code ``i`` of a row starts at bit ``i * bits`` of the row's words, low bit first, and may cross into the next word.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_CHUNK = 1 << 15  # codes widened to 64 bits at a time: stays in the cache, and below what torch splits over threads
_LITTLE = sys.byteorder == "little"


def words(count: int, bits: int) -> int:
    """int32 words that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """``codes`` uint8 ``[rows, n]``, each below ``2^bits`` (1 to 8), to int32 ``[rows, words(n, bits)]``."""
    rows, count = codes.shape
    padding = -count % 32
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    stream = _pack_bytes(codes.contiguous().view(-1), bits).view(rows, -1)
    return _as_words(stream)[:, : words(count, bits)].contiguous()


def unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """`pack_words` undone: int32 ``[rows, words(count, bits)]`` to uint8 codes ``[rows, count]``."""
    rows, held = packed.shape
    padding = -held % bits
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    return _unpack_bytes(_as_bytes(packed.contiguous()).view(-1), bits).view(rows, -1)[:, :count].contiguous()


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    if bits in (1, 2, 4):
        fields = codes.view(-1, 8 // bits)
        out = fields[:, 0].clone()
        for i in range(1, 8 // bits):
            out |= fields[:, i] << bits * i
        return out
    out = codes.new_empty(codes.numel() // 8 * bits)  # eight codes are `bits` bytes and fit a 64-bit word
    for start in range(0, codes.numel(), _CHUNK):
        fields = codes[start : start + _CHUNK].view(-1, 8)
        word = fields[:, 0].long()
        for i in range(1, 8):
            word |= fields[:, i].long() << bits * i
        piece = _bytes_of(word)[:, :bits].reshape(-1)
        out[start // 8 * bits :][: piece.numel()] = piece
    return out


def _unpack_bytes(stream: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return stream
    mask = 2**bits - 1
    if bits in (1, 2, 4):
        return torch.stack([stream >> bits * i & mask for i in range(8 // bits)], -1).view(-1)
    count = stream.numel() // bits * 8
    out = stream.new_empty(count)
    for start in range(0, count, _CHUNK):
        part = stream[start // 8 * bits : min(start + _CHUNK, count) // 8 * bits].view(-1, bits)
        word = part[:, 0].long()
        for i in range(1, bits):
            word |= part[:, i].long() << 8 * i
        fields = out[start : start + _CHUNK].view(-1, 8)
        for i in range(8):
            fields[:, i] = (word >> bits * i & mask).to(torch.uint8)
    return out


# Reinterpreting memory follows the host's byte order; the layouts are little-endian everywhere.


def _as_words(stream: Tensor) -> Tensor:
    quads = stream.contiguous().view(stream.shape[0], -1, 4)
    return (quads if _LITTLE else quads.flip(-1)).contiguous().view(torch.int32)[..., 0]


def _as_bytes(packed: Tensor) -> Tensor:
    quads = packed.view(torch.uint8).view(*packed.shape, 4)
    return (quads if _LITTLE else quads.flip(-1)).contiguous()


def _bytes_of(word: Tensor) -> Tensor:
    octets = word.view(torch.uint8).view(-1, 8)
    return octets if _LITTLE else octets.flip(-1)
