"""A report as one self-contained HTML page: what each layer became, what it cost, and plots. Nothing is fetched."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import svg
from .evaluate import Evaluation, Quality
from .formats.base import reference_kernel
from .report import Report, Row

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #666c75; --line: #dcdfe4; --page: #ffffff; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ec; --soft: #9aa1ab; --line: #363b43; --page: #16181c; --card: #1f2228; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2.2rem auto;
  max-width: 960px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p.soft, td.soft, .tile small { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.tile { background: var(--card); border-radius: 8px; padding: .6rem 1rem; min-width: 120px; }
.tile b { display: block; font-size: 1.25rem; } .tile small { font-size: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th { text-align: left; border-bottom: 2px solid var(--line); padding: .3rem .7rem .3rem 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: .22rem .7rem .22rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.reference td { color: #c2410c; }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .82rem; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .tick { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); } svg .ghost { fill: var(--soft); opacity: .28; }
svg .guide { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; }
"""


def render(report: Report, title: str, facts: Sequence[tuple[str, str]] = (), evaluation: Evaluation | None = None,
           quality: tuple[Quality, Quality] | None = None, samples: Sequence[tuple[str, str]] = ()) -> str:
    """The page.

    ``facts``: lines of the summary (model, recipe, calibration). ``evaluation``: what `tersor.evaluate` measured, or
    ``quality``: perplexities before and after where only those were. ``samples``: captioned texts.
    """
    body = [f"<h1>{_text(title)}</h1>",
            *(f'<p class="soft">{_text(name)}: {_text(value)}</p>' for name, value in facts),
            _tiles(report, evaluation, quality)]
    body.append("<h2>Bytes by kind of layer, before and after</h2>"
                + svg.bars(_sizes(report), "bytes by kind of layer"))
    errors = _by_kind(report, lambda row: row.relative_error)
    if errors:
        body.append("<h2>Relative error of each layer</h2>"
                    '<p class="soft">|x(W - W&#770;)&#7488;| / |xW&#7488;| on the calibration inputs where the method '
                    "saw them, |W - W&#770;| / |W| where it did not.</p>"
                    + svg.lines(errors, "relative error by layer", "block", "error"))
    seconds = _by_kind(report, lambda row: row.seconds)
    if seconds:
        body.append("<h2>Seconds spent on each layer</h2>" + svg.lines(seconds, "seconds by layer", "block", "seconds"))
    body.append(_rows_table(report))
    if report.kept:
        body.append("<h2>Left alone</h2>" + _table(("name", "why"), [(name, why) for name, why in report.kept.items()]))
    if report.notes:
        body.append("<h2>Notes</h2>" + "".join(f"<p>{_text(note)}</p>" for note in report.notes))
    body += [f"<h2>{_text(caption)}</h2><pre>{_text(text)}</pre>" for caption, text in samples]
    return page(title, body)


def page(title: str, body: Sequence[str]) -> str:
    """A self-contained page around parts that are HTML already."""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body)
            + "\n</body></html>\n")


def write(path: str | os.PathLike, page: str) -> None:
    """Write a page whole or not at all."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError as error:
        raise ValueError(f"report {path}: {error.strerror or error}") from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(page)
        os.fchmod(file.fileno(), 0o644)
    os.replace(beside, path)


def _tiles(report: Report, evaluation: Evaluation | None, quality: tuple[Quality, Quality] | None) -> str:
    tiles = []
    if report.bytes_after:
        tiles += [("size", _size(report.bytes_after), f"was {_size(report.bytes_before)}"),
                  ("smaller", f"{report.bytes_before / report.bytes_after:.2f}x", "all parameters"),
                  ("bits", f"{report.bits:.2f}", "per compressed weight, all counted")]
    tiles.append(("layers", str(len(report.rows)), f"{len(report.kept)} left alone"))
    if evaluation is not None:
        q = evaluation.quality
        was = "" if q.original_perplexity is None else f"was {q.original_perplexity:.3f}"
        tiles.append(("perplexity", f"{q.perplexity:.3f}", was))
        if q.kl is not None:
            tiles += [("KL", f"{q.kl:.4f}", "nats per token"), ("agreement", f"{q.agreement:.1%}", "top token")]
        if evaluation.speed is not None:
            before = evaluation.original_speed
            tiles.append(("decode", f"{evaluation.speed.decode:.1f} tokens/s",
                          "" if before is None else f"was {before.decode:.1f}"))
    elif quality is not None:
        tiles.append(("perplexity", f"{quality[1].perplexity:.3f}", f"was {quality[0].perplexity:.3f}"))
    if report.seconds:
        tiles.append(("time", f"{report.seconds:.1f} s", "to compress"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><small>{_text(name)}</small><b>{_text(value)}</b><small>{_text(note)}</small></div>'
        for name, value, note in tiles) + "</div>"


def _kind(row: Row) -> str:
    return row.name.rsplit(".", 1)[-1]


def _block(row: Row) -> int | None:
    return next((int(part) for part in row.name.split(".") if part.isdigit()), None)


def _sizes(report: Report) -> list[svg.Bar]:
    kinds: dict[str, list[Row]] = {}
    for row in report.rows:
        kinds.setdefault(_kind(row), []).append(row)
    made = []
    for kind, rows in kinds.items():
        before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
        made.append(svg.Bar(f"{kind} ({len(rows)})", before, after, f"{_size(before)} to {_size(after)}"))
    if report.kept_bytes:
        made.append(svg.Bar("left alone", report.kept_bytes, report.kept_bytes, _size(report.kept_bytes)))
    return made


def _by_kind(report: Report, value) -> dict[str, list[tuple[float, float, str]]]:
    """Points of each kind of layer along the blocks."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for i, row in enumerate(report.rows):
        y = value(row)
        if y is not None:
            block = _block(row)
            series.setdefault(_kind(row), []).append((i if block is None else block, y, f"{row.name}: {y:.4g}"))
    return series


def _rows_table(report: Report) -> str:
    header = ("layer", "shape", "format", "method", "bits", "bytes", "error", "seconds", "kernel", "note")
    rows = [(row.name, " x ".join(map(str, row.shape)), row.format, row.method, f"{row.bits:.2f}",
             f"{row.bytes_after:,}", "" if row.relative_error is None else f"{row.relative_error:.4f}",
             "" if row.seconds is None else f"{row.seconds:.2f}", row.kernel, row.note) for row in report.rows]
    classes = ["reference" if reference_kernel(row.kernel) else "" for row in report.rows]
    return "<h2>Layers</h2>" + _table(header, rows, classes, numbers={4, 5, 6, 7})


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (),
           numbers: frozenset[int] | set[int] = frozenset()) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>"]
    for i, row in enumerate(rows):
        cells = "".join(f'<td class="number">{_text(cell)}</td>' if j in numbers else f"<td>{_text(cell)}</td>"
                        for j, cell in enumerate(row))
        name = f' class="{classes[i]}"' if i < len(classes) and classes[i] else ""
        lines.append(f"<tr{name}>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _text(value: object) -> str:
    return html.escape(str(value))
