"""Text that every machine has: the source of the running interpreter's standard library.

It is what the command line calibrates on when it is given nothing else, and what the reference model in
``examples/models/stdlib-llama`` was trained on. Nothing is downloaded.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_EVERY = 20  # every 20th file of the sorted list is held out
HELD_OUT_CHARACTERS = 400_000  # how much of the held-out files a heldout.txt keeps
_LARGEST_FILE = 300_000  # bytes; above are generated tables
_NOT_TEXT = {"site-packages", "dist-packages", "encodings"}
_PROBE = 200  # characters that tell whether a file is part of an excluded text


def read(file: Path) -> str:
    """A source file as text; undecodable bytes are dropped."""
    return file.read_text(encoding="utf-8", errors="ignore")


def split_standard_library(root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """``(kept, held_out)`` source files under ``root`` (default: the interpreter's standard library), both sorted.

    Raises ValueError where no source is found (a stripped or zipped standard library).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = sorted(
        file for file in root.rglob("*.py")
        if not _NOT_TEXT.intersection(file.relative_to(root).parts) and file.stat().st_size < _LARGEST_FILE
    )
    held_out = files[::HELD_OUT_EVERY]
    kept = sorted(set(files) - set(held_out))
    if not kept:
        raise ValueError(f"standard library {root}: found no Python source to calibrate on; give --calibration")
    return kept, held_out


def standard_library_texts(exclude: str = "", seed: int = 0, excerpt: int | None = 2000,
                           root: Path | None = None) -> Iterator[str]:
    """Excerpts of ``excerpt`` characters (None: whole files), one of each file that is not held out.

    Order and excerpts depend on ``seed`` alone. Files that are part of ``exclude`` are dropped as well: another version
    of Python holds out other files, and a text that a model is judged on must not be calibrated on.
    """
    files, _ = split_standard_library(root)
    chance = random.Random(seed)
    chance.shuffle(files)
    for text in map(read, files):
        if len(text) <= 2 * _PROBE or _overlaps(text, exclude):
            continue
        if excerpt is not None and len(text) > excerpt:
            start = text.rfind("\n", 0, chance.randrange(len(text) - excerpt) + 1) + 1  # at the beginning of a line
            text = text[start : start + excerpt]
        yield text


def _overlaps(text: str, other: str) -> bool:
    middle = len(text) // 2
    return bool(other) and (text[:_PROBE] in other or text[middle : middle + _PROBE] in other
                            or text[-_PROBE:] in other)
