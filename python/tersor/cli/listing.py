"""``tersor specs`` and ``tersor explain``: what a spec can name, and what runs in a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.text import Text

from .common import console, load_model, megabytes, report_table, table

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def specs(as_json: AsJson = False) -> None:
    """Formats, presets and methods that a spec can name, with the kernel that serves each here."""
    import tersor

    infos = tersor.specs()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(info) for info in infos], indent=1))
        return
    for kind, title in (("method", "Methods: before the colon, chained with +"),
                        ("format", "Formats: after the colon, nested with /, added with +"),
                        ("preset", "compressed-tensors' presets, formats as well")):
        made = table("name", "what it is", "options" if kind == "method" else "kernel on this CPU", title=title)
        for info in infos:
            if info.kind == kind:
                last = Text(options_text(info.name)) if kind == "method" else kernel_text(info.kernel)
                made.add_row(Text(info.name), Text(info.help), last)
        console.print(made)
        console.print()
    console.print("example: awq+gptq:W4A16[group=64,sym=false]", markup=False)


def explain(model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
            as_json: AsJson = False) -> None:
    """What each layer of a checkpoint is stored as, and the kernel that runs it here."""
    import tersor

    loaded, _ = load_model(model)
    report = tersor.explain(loaded)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    if report.rows:
        console.print(report_table(report))
    for name, what in report.kept.items():
        console.print(f"not compressed: {name} ({what})", markup=False)
    line = f"{megabytes(report.bytes_after)} in all"
    if report.rows:
        line = (f"{len(report.rows)} compressed layers, {report.bits:.2f} bits per weight, {len(report.fallbacks)} "
                f"without a kernel; {line}, {megabytes(report.bytes_before)} uncompressed")
    console.print(line)


def options_text(method: str) -> str:
    """A method's options with their defaults, as a spec spells them."""
    from ..registry import METHODS

    return ", ".join(f"{field.name}={str(field.default).lower() if isinstance(field.default, bool) else field.default}"
                     for field in dataclasses.fields(METHODS[method]))


def kernel_text(kernel: str) -> Text:
    """A kernel's name, dimmed where it is the reference."""
    from ..formats.base import reference_kernel

    return Text(kernel, style="yellow" if reference_kernel(kernel) else "green")
