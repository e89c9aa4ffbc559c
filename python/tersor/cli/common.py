"""What the commands share: consoles, progress bars, loading models and texts, tables."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Into a pipe or a file, tables are not squeezed into a terminal that is not there.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
console_err = Console(stderr=True, highlight=False)

Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's own choice).")]
HELD_OUT = "heldout.txt"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def set_threads(threads: int | None) -> None:
    """Threads of torch, which our kernels follow."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quiet_transformers() -> None:
    """No progress bars and advice of transformers between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_folder(model: str) -> Path | None:
    """The local folder that ``model`` names, or None for a name on the hub. ValueError for neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model}: the folder has no config.json, accepted is a folder that "
                             "save_pretrained wrote")
        return path
    if path.exists():
        raise ValueError(f"model {model}: found a file, accepted is a model folder or a name on the hub")
    # A name on the hub is owner/model; where the owner is a folder here, a path was meant.
    if not _HUB_NAME.fullmatch(model) or Path(model).parts[0] in (".", "..", "~") or path.parent.is_dir() or _offline():
        raise ValueError(f"model {model}: no such folder")
    return None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def load_model(model: str):
    """``(model, tokenizer)`` from a folder or the hub; compressed checkpoints stay packed on our kernels.

    Raises ValueError when the checkpoint lacks weights that the architecture needs: they would be random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import tersor

    quiet_transformers()
    folder = model_folder(model)
    source = model if folder is None else str(folder)
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        loaded = tersor.load(source)
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"model {model}: the checkpoint lacks {', '.join(missing[:4])}"
                             f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}")
    return loaded.eval(), load_tokenizer(source)


def load_tokenizer(source: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def read_text(path: Path) -> str:
    """A text file. ValueError where it is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror or error}") from None
    if not text.strip():
        raise ValueError(f"text {path}: found no text, accepted is a UTF-8 file with some")
    return text


def held_out_text(given: Path | None, *models: str | None) -> tuple[str, str]:
    """``(text, where it is from)``: the file given, else a held-out text beside a model, else what is held out of the
    standard library."""
    if given is not None:
        return read_text(given), str(given)
    for model in models:
        if model is not None and (Path(model) / HELD_OUT).is_file():
            return read_text(Path(model) / HELD_OUT), str(Path(model) / HELD_OUT)
    from ..calibration_text import HELD_OUT_CHARACTERS, read, split_standard_library

    _, held_out = split_standard_library()
    text = "\n".join(map(read, held_out))[:HELD_OUT_CHARACTERS]
    return text, "files held out of this Python's standard library (give --text for another text)"


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A live bar per task, as the ``progress(task, done, total)`` that the package calls."""
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console_err) as bar:
        tasks: dict[str, int] = {}

        def update(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done, total=total)

        yield update


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table: the first column to the left, numbers (names that begin with ``>``) to the right."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left",
                        overflow="fold")
    return made


def megabytes(count: int | None) -> str:
    """Bytes in units of 10^6."""
    return "" if count is None else f"{count / 1e6:.1f} MB"


def ratio(after: float | None, before: float | None) -> str:
    """``after / before`` as a factor."""
    return "" if not after or not before else f"{after / before:.2f}x"


def report_table(report) -> Table:
    """A `Report`'s rows as a table; layers that no kernel serves stand out."""
    from rich.text import Text

    from ..formats.base import reference_kernel

    columns = {
        "layer": lambda row: row.name, "format": lambda row: row.format, "method": lambda row: row.method,
        ">bits": lambda row: f"{row.bits:.2f}",
        ">error": lambda row: "" if row.relative_error is None else f"{row.relative_error:.4f}",
        ">seconds": lambda row: "" if row.seconds is None else f"{row.seconds:.2f}",
        "kernel": lambda row: row.kernel, "note": lambda row: row.note,
    }
    shown = {name: value for name, value in columns.items() if any(map(value, report.rows))}
    made = table(*shown)
    made.columns[0].no_wrap = True
    for row in report.rows:
        made.add_row(*(Text(value(row)) for value in shown.values()),
                     style="yellow" if reference_kernel(row.kernel) else None)
    return made
