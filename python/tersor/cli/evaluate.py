"""``tersor eval``: what a compressed model lost, and what it gained."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Threads, console, held_out_text, load_model, megabytes, progress_bar, ratio, set_threads, table


class Arithmetic(str, enum.Enum):
    """Dtypes that the quality part can be computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def evaluate(
    model: Annotated[str, typer.Argument(help="The compressed model's folder.")],
    against: Annotated[str | None, typer.Option(help="The original: a folder or a name on the hub.")] = None,
    text: Annotated[Path | None, typer.Option(
        help="Text to measure on (default: heldout.txt beside a model, else held-out standard library).")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows at most.")] = 100,
    dtype: Annotated[Arithmetic, typer.Option(
        help="Arithmetic of the quality part; auto is the model's own, or float32 where the CPU has no bf16.",
    )] = Arithmetic.auto,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second as well.")] = True,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode for the speed.")] = 48,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    threads: Threads = None,
) -> None:
    """Perplexity, KL divergence and agreement with the original, bytes and tokens per second."""
    import torch

    from .. import evaluate as measure

    set_threads(threads)
    content, source = held_out_text(text, model, against)
    loaded, tokenizer = load_model(model)
    original = None if against is None else load_model(against)[0]
    ids = measure.windows(measure.token_ids(tokenizer, content), window, windows)
    with progress_bar() as progress:
        result = measure.evaluate(loaded, ids, original, speed=speed, new_tokens=new_tokens, progress=progress,
                                  dtype=None if dtype is Arithmetic.auto else getattr(torch, dtype.value))
    console.print(f"text: {source}; {result.windows} windows of {result.window} tokens, {result.dtype} arithmetic, "
                  f"{torch.get_num_threads()} threads")
    console.print(comparison(result))
    if json_path is not None:
        record = result.to_dict() | {"model": model, "against": against, "text": source,
                                     "threads": torch.get_num_threads()}
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def comparison(result):
    """The figures of an `Evaluation` as a table, the original beside the compressed model where there is one."""
    quality, speed, before = result.quality, result.speed, result.original_speed
    if quality.original_perplexity is None:
        made = table("", ">value")
        made.add_row("size", megabytes(result.bytes))
        made.add_row("perplexity", f"{quality.perplexity:.3f}")
        if speed:
            made.add_row("prefill, tokens/s", f"{speed.prefill:.0f}")
            made.add_row("decode, tokens/s", f"{speed.decode:.1f}")
        return made
    made = table("", ">original", ">compressed", ">change")
    change = f"{quality.perplexity / quality.original_perplexity - 1:+.2%}"
    made.add_row("size", megabytes(result.original_bytes), megabytes(result.bytes),
                 ratio(result.bytes, result.original_bytes))
    made.add_row("perplexity", f"{quality.original_perplexity:.3f}", f"{quality.perplexity:.3f}", change)
    made.add_row("KL, nats per token", "", f"{quality.kl:.4f}", "")
    made.add_row("same top token", "", f"{quality.agreement:.1%}", "")
    if speed and before:
        made.add_row("prefill, tokens/s", f"{before.prefill:.0f}", f"{speed.prefill:.0f}",
                     ratio(speed.prefill, before.prefill))
        made.add_row("decode, tokens/s", f"{before.decode:.1f}", f"{speed.decode:.1f}",
                     ratio(speed.decode, before.decode))
    return made
