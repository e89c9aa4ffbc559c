"""``tersor compress``: a model in, a smaller checkpoint and a report out."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .common import (HELD_OUT, Threads, console, load_model, megabytes, model_folder, progress_bar, read_text,
                     report_table, set_threads)

_SUFFIXES = {".txt", ".md", ".py", ".json", ".jsonl", ".rst", ".html", ".csv"}


class Container(str, enum.Enum):
    """Checkpoint layouts that can be asked for."""

    auto = "auto"
    compressed_tensors = "compressed-tensors"
    gptq = "gptq"
    awq = "awq"
    tersor = "tersor"


def compress(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A spec (gptq:W4A16) or a YAML file of patterns.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the compressed checkpoint.")],
    calibration: Annotated[list[Path] | None, typer.Option(
        help="Text file, or folder of text files; may be given several times. "
             "Default: this Python's standard library.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a calibration sequence.")] = 512,
    container: Annotated[Container, typer.Option("--as", help="Checkpoint layout.")] = Container.auto,
    strict: Annotated[bool, typer.Option(help="Refuse formats that no kernel serves.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that OUT holds.")] = False,
    report_path: Annotated[Path | None, typer.Option(
        "--report", help="HTML page of what was done (default: OUT/report.html).")] = None,
    text: Annotated[Path | None, typer.Option(
        help="Measure perplexity on this text, before and after.")] = None,
    threads: Threads = None,
) -> None:
    """Compress a model and write the checkpoint, with a report and a page of plots."""
    import tersor

    from .. import htmlreport
    from ..recipe import read_recipe
    from ..registry import resolve

    set_threads(threads)
    meaning = read_recipe(recipe)  # what cannot be read is said before the model is loaded
    for spec in [meaning] if isinstance(meaning, str) else meaning.values():
        if isinstance(spec, str) and spec != "keep":
            resolve(spec)
    _check_out(model, out, overwrite)
    given = None if not calibration else list(texts_of(calibration))
    windows_text = None if text is None else read_text(text)

    loaded, tokenizer = load_model(model)
    texts, source = (given, ", ".join(map(str, calibration))) if given else default_calibration(model, loaded, recipe)
    if source and not given:
        console.print(f"calibration: {source}")
    with progress_bar() as progress:
        before = _quality(loaded, tokenizer, windows_text, progress, "perplexity before")
        report = tersor.compress(loaded, recipe, calibration=texts, tokenizer=tokenizer, strict=strict,
                                 progress=progress, **({"samples": samples, "length": length} if texts else {}))
        after = _quality(loaded, tokenizer, windows_text, progress, "perplexity after")
    tersor.save(loaded, out, as_=container.value, tokenizer=tokenizer)

    console.print(report_table(report))
    for line in report.notes:
        console.print(f"note: {line}", style="yellow")
    facts = [("model", model), ("recipe", recipe), ("calibration", source or "none needed")]
    quality = None if before is None else (before, after)
    page = htmlreport.render(report, f"{Path(model).name} in {recipe}", facts, quality=quality)
    page_path = report_path or out / "report.html"
    htmlreport.write(page_path, page)
    if quality:
        console.print(f"perplexity {before.perplexity:.3f} -> {after.perplexity:.3f} on {text}")
    console.print(f"{megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)}, {report.bits:.2f} bits per "
                  f"compressed weight, {report.seconds:.1f} s")
    console.print(f"checkpoint: {out}\nreport: {page_path}")


def texts_of(paths: Iterable[Path]) -> Iterable[str]:
    """Texts of files, and of the text files below folders. ValueError where there is none."""
    for path in paths:
        if not path.is_dir():
            yield read_text(path)
            continue
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"calibration {path}: found no text files, accepted are {', '.join(sorted(_SUFFIXES))}")
        for file in files:
            content = file.read_text(encoding="utf-8", errors="ignore")
            if content.strip():
                yield content


def default_calibration(name: str, model, recipe) -> tuple[Iterable[str] | None, str]:
    """``(texts, where they are from)`` when nothing was given: none where the recipe looks at no data."""
    from ..calibration_text import standard_library_texts
    from ..recipe import make_plan

    if not make_plan(model, recipe).needs:
        return None, ""
    folder = model_folder(name)
    held_out = folder / HELD_OUT if folder else None
    exclude = read_text(held_out) if held_out is not None and held_out.is_file() else ""
    return standard_library_texts(exclude), "this Python's standard library (give --calibration for your own text)"


def _check_out(model: str, out: Path, overwrite: bool) -> None:
    """What would fail after hours of work fails now."""
    folder = model_folder(model)
    if folder is not None and out.resolve() == folder.resolve():
        raise ValueError(f"out {out}: found the model itself, accepted is another folder")
    if out.is_file():
        raise ValueError(f"out {out}: found a file, accepted is a new folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"out {out}: the folder is not empty; accepted is a new one, or --overwrite to replace a "
                             "model")
        if not (out / "config.json").is_file():
            raise ValueError(f"out {out}: --overwrite replaces models, and the folder holds something else")


def _quality(model, tokenizer, text: str | None, progress, task: str):
    if text is None:
        return None
    from .. import evaluate

    windows = evaluate.windows(evaluate.token_ids(tokenizer, text), 512, limit=100)
    with evaluate.computing_in(model, evaluate.arithmetic_dtype(model)):
        return evaluate.compare(model, None, windows, lambda _, done, total: progress(task, done, total))

