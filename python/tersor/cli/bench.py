"""``tersor bench``: compressed linear layers against torch and against what this machine can do, in a minute."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .common import Threads, console, progress_bar, set_threads, table

_SWEPT = 1 << 28  # bytes of weights in rotation: far past any last-level cache
_MOST_COPIES = 512  # reaches that for layers from half a megabyte


@dataclass(frozen=True)
class Cell:
    """One layer at one batch: seconds a call, beside those of torch in bf16."""

    spec: str
    in_features: int
    out_features: int
    tokens: int
    seconds: float
    torch_seconds: float
    stored_bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.in_features * self.out_features

    @property
    def ratio(self) -> float:
        """How many times faster than torch."""
        return self.torch_seconds / self.seconds


def bench(
    specs: Annotated[str, typer.Option(help="Formats, separated by commas.")] = "W4A16,W4A8",
    shapes: Annotated[str, typer.Option(help="in x out, separated by commas.")] = "4096x4096,4096x14336",
    tokens: Annotated[str, typer.Option("--tokens", "-m", help="Rows of the input.")] = "1,16",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on each figure.")] = 0.5,
    html: Annotated[Path | None, typer.Option(help="Write a roofline picture to this page.")] = None,
    threads: Threads = None,
) -> None:
    """Time compressed layers: ratio to torch bf16, and share of the memory speed and arithmetic measured here.

    A quick look; bench/linear.py of the repository has all shapes and the peers.
    """
    import torch

    from .. import _C

    set_threads(threads)
    names = [name.strip() for name in specs.split(",")]
    sizes = [parse_shape(text) for text in shapes.split(",")]
    rows = [parse_count(text) for text in tokens.split(",")]
    before = _C.machine_floors(torch.get_num_threads(), 0.3)
    cells: list[Cell] = []
    with progress_bar() as progress:
        total = len(sizes) * len(rows)
        for done, (shape, m) in enumerate(itertools.product(sizes, rows)):
            progress("layers", done, total)
            cells += measure(names, shape, m, seconds)
        progress("layers", total, total)
    after = _C.machine_floors(torch.get_num_threads(), 0.3)
    floors = {name: max(before[name], after[name]) for name in before}  # the less disturbed of the two
    console.print(f"{torch.get_num_threads()} threads, {_C.isa()}: reads {floors['read_gbs']:.1f} GB/s, "
                  f"{floors['fp32_gflops']:.0f} GFLOP/s fp32, {floors['int8_gops']:.0f} Gop/s int8")
    made = table("format", "in x out", ">tokens", ">torch bf16, ms", ">ours, ms", ">ratio", ">GB/s", ">of memory",
                 ">GFLOP/s", ">of arithmetic")
    for cell in cells:
        speed, rate = cell.stored_bytes / cell.seconds / 1e9, cell.flops / cell.seconds / 1e9
        made.add_row(cell.spec, f"{cell.in_features} x {cell.out_features}", str(cell.tokens),
                     f"{cell.torch_seconds * 1e3:.3f}", f"{cell.seconds * 1e3:.3f}", f"{cell.ratio:.2f}x",
                     f"{speed:.1f}", f"{speed / floors['read_gbs']:.0%}", f"{rate:.0f}",
                     f"{rate / roof(cell.spec, floors):.0%}")
    console.print(made)
    if html is not None:
        from ..htmlreport import page, write

        write(html, page("Roofline", roofline(cells, floors, torch.get_num_threads())))
        console.print(f"roofline: {html}")


def measure(specs: list[str], shape: tuple[int, int], m: int, seconds: float) -> list[Cell]:
    """Median seconds of each spec and of torch bf16 on ``[m, in] x [in, out]``, taken in turns in one run."""
    import torch
    from torch import nn

    from .. import Linear

    k, n = shape
    source = nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    calls = {"": _rotating([source.weight.detach().clone() for _ in range(_copies(source.weight.nbytes))],
                           lambda weight: nn.functional.linear(x, weight))}
    stored = {}
    for spec in specs:
        layer = Linear.from_linear(source, spec if ":" in spec else f"rtn[search=false]:{spec}")
        stored[spec] = layer.nbytes
        copies = [{name: tensor.clone() for name, tensor in layer.tensors().items()}
                  for _ in range(_copies(layer.nbytes))]
        calls[spec] = _rotating(copies, lambda tensors, fmt=layer.format: fmt.linear(x, tensors, None, (n, k)))
    times: dict[str, list[float]] = {spec: [] for spec in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds * len(calls) or len(times[""]) < 3:
            for spec, call in calls.items():
                for _ in range(3):  # a few in a row: the threads are awake, as they are inside a model
                    begun = time.perf_counter()
                    call()
                    times[spec].append(time.perf_counter() - begun)
    medians = {spec: statistics.median(values) for spec, values in times.items()}
    return [Cell(spec, k, n, m, medians[spec], medians[""], stored[spec]) for spec in specs]


def _copies(nbytes: int) -> int:
    return min(_MOST_COPIES, max(2, -(-_SWEPT // nbytes)))


def _rotating(weights: list, call: Callable) -> Callable[[], object]:
    turn = itertools.cycle(weights)
    return lambda: call(next(turn))


def roof(spec: str, floors: dict[str, float]) -> float:
    """Operations per second, in 1e9, of the fastest unit that the spec's arithmetic can use here."""
    from ..registry import resolve

    if getattr(resolve(spec).format, "activation", 16) == 8:
        return floors["int8_gops"]
    return max(floors["bf16_gflops"], floors["fp32_gflops"])


def roofline(cells: list[Cell], floors: dict[str, float], threads: int) -> list[str]:
    """The page's parts: rate against operations per stored byte, under the roofs measured here."""
    from .. import svg

    series: dict[str, list[tuple[float, float, str]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.flops / cell.stored_bytes):
        name = f"{cell.spec} {cell.in_features} x {cell.out_features}"
        rate = cell.flops / cell.seconds / 1e9
        shown = f"{name}, {cell.tokens} tokens: {rate:.1f} GFLOP/s, {cell.ratio:.2f}x torch"
        series.setdefault(name, []).append((cell.flops / cell.stored_bytes, rate, shown))
    tops = {"int8": floors["int8_gops"], "bf16": floors["bf16_gflops"], "fp32": floors["fp32_gflops"]}
    guides = {name: lambda x, top=top: min(top, floors["read_gbs"] * x) for name, top in tops.items() if top}
    return ["<h1>Roofline</h1>", f'<p class="soft">{threads} threads; dashed: memory speed and arithmetic measured on '
            "this machine</p>", svg.lines(series, "roofline", "operations per stored byte", "GFLOP/s", log=True,
                                          guides=guides)]


def parse_shape(text: str) -> tuple[int, int]:
    """``in x out`` such as 4096x14336."""
    parts = text.strip().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"shapes: found {text!r}, accepted are sizes such as 4096x14336")
    return int(parts[0]), int(parts[1])


def parse_count(text: str) -> int:
    """A positive number of tokens."""
    if not text.strip().isdigit() or not int(text):
        raise ValueError(f"tokens: found {text!r}, accepted are positive numbers such as 1,16")
    return int(text)
