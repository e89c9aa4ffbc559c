"""The commands, and how errors reach the user: one red line that names the thing, exit code 2, no traceback."""

from __future__ import annotations

import typer
from rich.text import Text
from typer.core import TyperGroup

from .common import console_err

DEBUG = "--debug"


class _FriendlyGroup(TyperGroup):
    """Shows our own errors and those of files and checkpoints as a line; ``--debug``, anywhere, as a traceback."""

    def parse_args(self, ctx, args):
        ctx.meta[DEBUG] = DEBUG in args
        return super().parse_args(ctx, [arg for arg in args if arg != DEBUG])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console_err.print("[red]interrupted[/]")
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.meta[DEBUG] or not _is_users(error):
                raise
            line = " ".join(str(error).split()) or type(error).__name__
            console_err.print(Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True)
            raise typer.Exit(2) from None


def _is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave: values, files, checkpoints. Bugs keep their trace."""
    from safetensors import SafetensorError

    return isinstance(error, (ValueError, OSError, SafetensorError))


app = typer.Typer(
    cls=_FriendlyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress language models and run them on kernels written for the compressed form. "
         "[dim]--debug shows tracebacks.[/]",
)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"tersor {__version__}")
        raise typer.Exit()


@app.callback()
def _main(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                       help="Print the version.")) -> None:
    pass


def _register() -> None:
    from . import bench, compress, demo, doctor, evaluate, generate, listing

    app.command("compress")(compress.compress)
    app.command("eval")(evaluate.evaluate)
    app.command("generate")(generate.generate)
    app.command("explain")(listing.explain)
    app.command("specs")(listing.specs)
    app.command("bench")(bench.bench)
    app.command("doctor")(doctor.doctor)
    app.command("demo")(demo.demo)


_register()
