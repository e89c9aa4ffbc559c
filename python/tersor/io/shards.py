"""Reading a checkpoint directory without trusting it: JSON files, shard names, safetensors headers, tensor bytes.

Everything is verified before a tensor library opens a file, and every error names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library limits it
_SIZE_LIMIT = 1 << 62
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Checkpoint:
    """A verified set of safetensors files: `entries` by tensor name."""

    directory: Path
    entries: Mapping[str, Entry]

    def where(self, name: str) -> str:
        """``file: tensor 'name'``, for messages."""
        entry = self.entries.get(name)
        return f"{entry.file if entry else self.directory}: tensor {name!r}"

    def read(self, name: str) -> Tensor:
        """A copy of one tensor. CheckpointError when it is absent or its file shrank since it was verified."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.where(name)}: not in the checkpoint")
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            raw = bytearray(file.read(entry.stop - entry.start))
        if len(raw) != entry.stop - entry.start:
            raise CheckpointError(f"{self.where(name)}: found {len(raw)} bytes, accepted are "
                                  f"{entry.stop - entry.start}")
        if not raw:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(entry.dtype).view(entry.shape)


def read_json(path: Path) -> dict:
    """A JSON file whose top level is an object, without duplicate keys."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return parse_object(raw, str(path))


def parse_object(raw: bytes, what: str) -> dict:
    """JSON bytes of an object; CheckpointError starting with ``what`` otherwise."""

    def unique(pairs):
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{what}: key {twice!r} is given twice")
        return made

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: found a JSON {type(value).__name__}, accepted is an object")
    return value


def open_directory(directory: str | os.PathLike) -> Checkpoint:
    """The tensors of a local model directory: ``model.safetensors``, or the shards that its index names."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: found no such directory, accepted is a model directory")
    index = directory / INDEX
    if not index.exists():
        single = directory / SINGLE
        if not single.exists():
            raise CheckpointError(f"{directory}: found neither {SINGLE} nor {INDEX}")
        return open_files([single])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: found {type(weight_map).__name__}, accepted is an object of "
                              "tensor names and file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _plain(name):
            raise CheckpointError(f"{index}: tensor {tensor!r}: found file {name!r}, accepted is the plain name of a "
                                  ".safetensors file in the same directory")
    checkpoint = open_files([directory / name for name in sorted(set(weight_map.values()))])
    for tensor, name in weight_map.items():
        entry = checkpoint.entries.get(tensor)
        if entry is None or entry.file.name != name:
            raise CheckpointError(f"{index}: tensor {tensor!r}: not in {name}, where the index says it is")
    return checkpoint


def open_files(files: Iterable[str | os.PathLike]) -> Checkpoint:
    """The tensors of some safetensors files, each tensor in one of them."""
    paths = [Path(file) for file in files]
    entries: dict[str, Entry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(f"{path}: tensor {name!r}: also in {entries[name].file}")
            entries[name] = entry
    return Checkpoint(paths[0].parent if paths else Path(), entries)


def _plain(name: str) -> bool:
    return (name.endswith(".safetensors") and name == os.path.basename(name) and "\\" not in name
            and "\0" not in name and not name.startswith("."))


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes, shapes and positions in one safetensors file, verified against its length."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: found {size} bytes, which is too short for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path}: header: found a length of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    header = parse_object(raw, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__: accepted is an object of strings")
    base, data = 8 + length, size - 8 - length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start - base != end:
            raise CheckpointError(f"{path}: tensor {name!r}: starts at byte {entry.start - base}, accepted is {end}, "
                                  "where the one before it ends")
        end = entry.stop - base
    if end != data:
        raise CheckpointError(f"{path}: tensors: found {data} bytes, the header lists {end} "
                              "(a truncated or overlong file)")
    return entries


def _entry(path: Path, name: str, value: object, base: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry: accepted is an object of dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{where}: dtype: found {code!r}, accepted are {', '.join(_DTYPES)}")
    if not _sizes(shape):
        raise CheckpointError(f"{where}: shape: found {shape!r}, accepted is a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets: found {offsets!r}, accepted are two byte positions")
    dtype = _DTYPES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _SIZE_LIMIT or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: data_offsets: found {offsets[1] - offsets[0]} bytes, {dtype} {shape} takes "
                              f"{nbytes}")
    return Entry(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: object) -> bool:
    return (isinstance(value, list) and len(value) <= 16
            and all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value))
