"""``tersor demo``: a language model from 16 bits to 4 and back to text, with figures taken on this machine."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .common import Threads, console, held_out_text, load_model, megabytes, progress_bar, ratio, set_threads, table
from .compress import default_calibration
from .evaluate import comparison
from .generate import sampling

REFERENCE = Path("examples") / "models" / "stdlib-llama"
PROMPT = "def copy_file(source, target):\n    with open("


def demo(
    model: Annotated[Path | None, typer.Option(
        help="A model folder (default: examples/models/stdlib-llama of the repository).")] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What to compress to.")] = "gptq:W4A16",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the compressed checkpoint here.")] = None,
    prompt: Annotated[str, typer.Option(help="What both models continue.")] = PROMPT,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences of 512 tokens.")] = 64,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 512 tokens.")] = 40,
    large: Annotated[bool, typer.Option(help="Also time a random-weight model of Qwen3-0.6B's shape.")] = True,
    threads: Threads = None,
) -> None:
    """Compress the reference model, compare it with the original, and time a model of realistic size."""
    import torch

    import tersor

    from .. import evaluate as measure

    set_threads(threads)
    folder = str(find_reference(model))
    original, tokenizer = load_model(folder)
    parameters = sum(parameter.numel() for parameter in original.parameters())
    texts, source = default_calibration(folder, original, recipe)
    heading("1", f"Compress {Path(folder).name}: {parameters / 1e6:.1f} million parameters, {recipe}")
    if source:
        console.print(f"calibration: {samples} x 512 tokens of this Python's standard library, held-out files left out")
    with contextlib.ExitStack() as stack:
        target = out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "compressed"
        with progress_bar() as progress:
            compressed = copy.deepcopy(original)
            report = tersor.compress(compressed, recipe, calibration=texts, tokenizer=tokenizer, progress=progress,
                                     **({"samples": samples, "length": 512} if texts else {}))
            tersor.save(compressed, target, tokenizer=tokenizer)
            compressed = tersor.load(target).eval()
        console.print(f"{len(report.rows)} layers in {report.seconds:.1f} s: {report.bits:.2f} bits per weight, kernel "
                      f"{', '.join(sorted({row.kernel for row in report.rows}))}; saved and loaded again")

        heading("2", "Before and after, on text that neither training nor calibration saw")
        content, _ = held_out_text(None, folder)
        ids = measure.windows(measure.token_ids(tokenizer, content), 512, windows)
        with progress_bar() as progress:
            result = measure.evaluate(compressed, ids, original, prefill=256, new_tokens=32, progress=progress)
        console.print(comparison(result))
        console.print(f"{windows} windows of 512 tokens, {torch.get_num_threads()} threads. A model this small is "
                      "mostly overhead outside its matrices: see 4 for speed.", style="dim")

        heading("3", "Text of both, from the same prompt and seed")
        sides = Table.grid(expand=True, padding=(0, 1))
        sides.add_row(*(Panel(Text(continuation(one, tokenizer, prompt)), title=title, title_align="left")
                        for one, title in ((original, "original"), (compressed, recipe))))
        console.print(sides)
    if large:
        del original, compressed
        heading("4", "Speed at a realistic size: random weights in Qwen3-0.6B's shape, plain generate, batch 1")
        console.print(large_decode())


def large_decode(new_tokens: int = 24):
    """Table of decode speed of a Qwen3-0.6B-shaped model in bf16 and compressed."""
    import tersor

    from .. import evaluate as measure
    from .shapes import QWEN3_RECIPE, qwen3_0_6b

    with progress_bar() as progress:
        progress("torch bf16", 0, 1)
        model = qwen3_0_6b()
        bytes_before = measure.model_bytes(model)
        before = measure.decode_speed(model, new_tokens)
        progress("torch bf16", 1, 1)
        tersor.compress(model, QWEN3_RECIPE, progress=progress)
        after = measure.decode_speed(model, new_tokens)
    made = table("", ">torch bf16", ">W4A16, head W8A16", ">change")
    bytes_after = measure.model_bytes(model)
    made.add_row("size", megabytes(bytes_before), megabytes(bytes_after), ratio(bytes_after, bytes_before))
    made.add_row("decode, tokens/s", f"{before:.1f}", f"{after:.1f}", ratio(after, before))
    return made


def continuation(model, tokenizer, prompt: str, new_tokens: int = 80) -> str:
    """The prompt and a continuation, sampled from the same seed at every call."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=new_tokens,
                         **sampling(model, tokenizer, temperature=0.7, top_p=0.95))
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def find_reference(model: Path | None) -> Path:
    """The reference model's folder: the one given, that of the working directory, or that of a source checkout."""
    if model is not None:
        return model
    for root in (Path.cwd(), *Path(__file__).resolve().parents[3:5]):
        if (root / REFERENCE / "config.json").is_file():
            return root / REFERENCE
    raise ValueError(f"demo: found no {REFERENCE} here; run it in a checkout of the repository, or give --model with a "
                     "model folder")


def heading(number: str, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]")
