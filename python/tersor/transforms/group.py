"""A group of linear layers that share an input, as transforms see it: weights, statistics, a scale to fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graph import Producer, divide, matrix, output_tensor, per_row, turn_bias, turn_rows, value_rows
from .steps import ChannelScale, Step

if TYPE_CHECKING:
    from ..formats.base import Format, Params
    from ..methods.base import Statistics


class Weights:
    """Weights ``[out, in]`` of a block's layers while they are rewritten, in float32 (float64 for such models).

    The modules hold them rounded to the model's dtype; what is compressed later is the unrounded value.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self._held: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        w = matrix(self.block.get_submodule(name)).detach()
        return w if w.dtype is torch.float64 else w.float()

    def put(self, name: str, w: Tensor) -> None:
        self._held[name] = w
        matrix(self.block.get_submodule(name)).copy_(w)

    def drop(self, name: str) -> None:
        """Forget a layer that was compressed."""
        self._held.pop(name, None)


class Group:
    """Layers of a block with one input of ``in_features`` channels.

    ``formats``: of the layers that will be compressed, which a transform may exchange; ``names`` has the others too,
    which a fold must rewrite as well. `fold` keeps the block's function. ``producer`` is None where no earlier
    operation can take a scale over, and ``why`` says why.
    """

    def __init__(self, names: Sequence[str], formats: Mapping[str, Format], stats: Statistics, weights: Weights,
                 producer: Producer | None = None, why: str = "", dtype: torch.dtype | None = None,
                 runs: Sequence[Callable[[], Tensor]] = ()):
        self.names, self.formats, self.stats, self.weights = tuple(names), dict(formats), stats, weights
        self.producer, self.why, self.dtype = producer, why, dtype
        self.runs = list(runs)
        self.inserted: list[Step] = []
        self.params: dict[str, Params] = {}  # where a transform has fitted all of a format's parameters
        self.stored: dict[str, dict] = {}  # what it adds to the parameters of others, for the format to store
        self._expected: list[Tensor] | None = None

    @property
    def in_features(self) -> int:
        return self.weight(self.names[0]).shape[1]

    def weight(self, name: str) -> Tensor:
        """Current weight ``[out, in]`` in float32 or float64."""
        return self.weights.get(name)

    def set_weight(self, name: str, w: Tensor) -> None:
        self.weights.put(name, w)

    def tie(self, values: Tensor) -> Tensor:
        """``values [in]`` averaged over channels that come from one output of the producer (as in grouped-query
        attention), since they can only be scaled together."""
        if self.producer is None or self.producer.rows is None:
            return values
        rows = self.producer.rows.to(values.device)
        size = int(rows.max()) + 1
        total = values.new_zeros(size).index_add_(0, rows, values)
        return (total / torch.bincount(rows, minlength=size).clamp(min=1))[rows]

    def fold(self, s: Tensor) -> None:
        """Multiply the columns of all weights by ``s [in] > 0`` and divide the producer's channels.

        A norm's gain is stored in the model's dtype, so the factors used are the ones that its rounded gain really
        takes over: the function is kept up to the rounding of the weights.
        """
        if self.producer is None:
            raise ValueError(f"layers {', '.join(self.names)}: a scale cannot be folded: {self.why}")
        if not bool((torch.isfinite(s) & (s > 0)).all()):
            raise ValueError(f"layers {', '.join(self.names)}: found a scale that is not finite and positive")
        s = self._take_over(s)
        for name in self.names:
            self.weights.put(name, self.weight(name) * s)
        self.stats = self.stats.scaled(s)
        self.runs, self._expected = [], None  # they were captured for the input before

    def turn_heads(self, turn: Tensor) -> None:
        """Multiply each head of the values that the producer puts out by ``turn [head, head]`` from the right, and undo
        it in the columns of all weights. ValueError where the producer is not that of attention's values."""
        if self.producer is None or not self.producer.head:
            raise ValueError(f"layers {', '.join(self.names)}: heads cannot be turned: "
                             f"{self.why or 'what comes before is not a layer of values'}")
        heads, name = value_rows(self.producer), self.producer.name
        self.weights.put(name, turn_rows(self.weight(name), heads, turn))
        turn_bias(self.weights.block.get_submodule(name), heads, turn)
        back = torch.linalg.inv(turn.double()).T
        for name in self.names:
            w = self.weight(name)
            self.weights.put(name, (w.unflatten(1, (-1, len(turn))) @ back.to(w)).flatten(1))
        self.stats, self.runs, self._expected = None, [], None

    def insert(self, step: Step) -> None:
        """Let the layers run ``step`` on their input from now on, with weights that make up for it.

        ``stats`` are those of the input before, and gone: whatever is needed afterwards is collected anew.
        """
        for name in self.names:
            self.weights.put(name, step.absorb(self.weight(name)))
        self.inserted.append(step)
        self.stats, self.runs, self._expected = None, [], None

    def _take_over(self, s: Tensor) -> Tensor:
        source = self.weights.block.get_submodule(self.producer.name)
        wide = torch.float64 if next(source.parameters()).dtype is torch.float64 else torch.float32
        s = s.to(wide)
        if self.producer.kind == "norm":
            before = source.weight.data.to(wide) + self.producer.offset
            after = ((before / s) - self.producer.offset).to(source.weight.dtype).to(wide) + self.producer.offset
            s = torch.where((before != 0) & (after != 0) & ((before > 0) == (after > 0)), before / after, 1.0)
            divide(source, self.producer, s)
            return s
        name = self.producer.name
        divisor = per_row(self.producer, s, self.weight(name).shape[0])
        self.weights.put(name, self.weight(name) / divisor[:, None])
        bias = source._parameters.get("bias")
        if bias is not None:
            bias.data = (bias.data / divisor).to(bias.dtype)
        return s

    def loss(self, trial: Mapping[str, Tensor]) -> float:
        """Mean squared change of the output when the layers hold the ``trial`` weights ``[out, in]``: the output of
        the module around them where it can be run on captured inputs, otherwise of the layers themselves."""
        if not self.runs:
            x = self.stats.inputs
            total = sum(float(F.linear(x.to(w), self.weight(name) - w).square().sum(dtype=torch.float64))
                        for name, w in trial.items())
            return total / (x.shape[0] * sum(w.shape[0] for w in trial.values()))
        if self._expected is None:
            self._expected = [run() for run in self.runs]
        modules = {name: self.weights.block.get_submodule(name) for name in trial}
        saved = {name: module.weight.data for name, module in modules.items()}
        total, count = 0.0, 0
        try:
            for name, module in modules.items():
                module.weight.data = torch.empty_like(saved[name])
                matrix(module).copy_(trial[name])
            for run, expected in zip(self.runs, self._expected):
                total += float((run().float() - expected.float()).square().sum(dtype=torch.float64))
                count += expected.numel()
        finally:
            for name, module in modules.items():
                module.weight.data = saved[name]
        return total / count


@dataclass
class BlockView:
    """A block whose groups are to be transformed together: ``run(b)`` is the block's output ``[1, length, width]`` on
    calibration batch ``b`` of ``batches``, with what its layers hold and run by then."""

    module: nn.Module
    groups: list[Group]
    run: Callable[[int], Tensor]
    batches: int


class _Held:
    """`Weights` of a single layer outside any model."""

    def __init__(self, name: str, w: Tensor):
        self.held = {name: w}

    def get(self, name: str) -> Tensor:
        return self.held[name]

    def put(self, name: str, w: Tensor) -> None:
        self.held[name] = w


class Lone(Group):
    """A single layer: what would be folded becomes an online step before it (``steps``)."""

    def __init__(self, w: Tensor, fmt: Format, stats: Statistics, dtype: torch.dtype | None = None):
        super().__init__(("weight",), {"weight": fmt}, stats, _Held("weight", w), Producer("step", "step"), dtype=dtype)

    def _take_over(self, s: Tensor) -> Tensor:
        inverse = (1 / s).float()
        self.inserted.append(ChannelScale(inverse))
        return (1 / inverse).to(self.weight("weight"))

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the layer must run on its input, in this order."""
        return tuple(self.inserted)


class Online:
    """A pre-hook that runs steps on the input of several layers, once for each input."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = tuple(steps)
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            y = x
            for step in self.steps:
                y = step(y)
            self._last = x, x._version, y
        return (self._last[2], *args[1:])


def run_on(module: nn.Module, args: Sequence, kwargs: Mapping) -> Callable[[], Tensor]:
    """A call of ``module`` on captured arguments that returns its output tensor."""
    return lambda: output_tensor(module(*args, **kwargs))
