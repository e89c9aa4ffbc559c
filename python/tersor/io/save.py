"""`save`: a compressed model to a directory that is never half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from .shards import CONFIG
from .write import choose

# What a model directory is made of. Anything else in a directory makes us leave it alone.
_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".py", ".bin", ".html", ".gitattributes",
             ".tiktoken", ".spm", ".bpe", ".vocab"}


def save(model: nn.Module, path: str | os.PathLike, as_: str = "auto", tokenizer=None, overwrite: bool = False,
         max_shard_size: int | str = "5GB") -> str:
    """Write a compressed transformers model to a directory, and return the container it is in.

    ``as_``: ``compressed-tensors``, ``gptq``, ``awq``, ``tersor``, or ``auto`` for the first of them that holds every
    layer as it is. ``tokenizer`` (or the model's attribute of that name) is saved beside. The directory is written
    under another name, synced, and renamed; a model directory that is there already is replaced, another one only
    with ``overwrite``.

    Raises TypeError for models that are not transformers', ValueError when the container cannot hold a layer (named,
    with the reason), the model has no compressed layer, or the path holds something else.
    """
    from transformers import PreTrainedModel

    from ..integrations.transformers import attach

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: found {type(model).__name__}, accepted is a transformers model")
    target = Path(os.path.realpath(path))
    _check_target(target, overwrite)
    container = choose(model, as_).container
    attach(model, container)
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(beside, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        os.chmod(beside, 0o777 & ~_umask())
        _sync(beside)
        _put(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return container


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"path {target}: found a file, accepted is a directory")
    if overwrite or not any(target.iterdir()):
        return
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        known = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    except (OSError, ValueError):
        known = False
    foreign = [entry.name for entry in target.iterdir()
               if not entry.is_file() or (entry.suffix or entry.name) not in _SUFFIXES]
    if not known or foreign:
        why = f"it also holds {foreign[0]!r}" if known else f"it has no {CONFIG} of a model"
        raise ValueError(f"path {target}: found a directory that is not just a model ({why}); accepted are an empty or "
                         "new directory, one with a model, or overwrite=True")


def _sync(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put(beside: Path, target: Path) -> None:
    """Rename into place. What was there is kept under another name until the new directory is."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old)
    try:
        os.rename(beside, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
