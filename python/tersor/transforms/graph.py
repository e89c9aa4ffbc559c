"""Which layers of a block share an input, and which earlier operation can absorb a scale of that input.

Nothing here knows an architecture. One traced forward tells which linear layers read the same tensor and which norm
or linear layer came before; whether ``earlier / s`` and ``later * s`` really cancel is then tried out on a float64
copy of the block. A candidate that changes the block's output is refused, with the reason kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..patch import is_conv1d

_TOLERANCE = 1e-3  # of the change that the scale makes where nothing compensates it


@dataclass(frozen=True)
class Producer:
    """An earlier operation of the block that takes ``1 / s`` over.

    ``kind`` norm: a one-dimensional gain ``weight + offset``. ``kind`` rows: output rows of a linear layer;
    ``rows[c]`` is the one that channel ``c`` comes from (several channels may share one: grouped-query attention).
    ``head``: so many neighbouring channels, a head of attention's values, can be turned by any matrix there; 0: none.
    """

    name: str
    kind: str
    offset: float = 0.0
    rows: Tensor | None = None
    head: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Call:
    """One traced call of a module: what it read and wrote, in order of completion."""

    name: str
    module: nn.Module
    reads: tuple | None
    writes: tuple | None


@dataclass
class Shared:
    """Linear layers that read one tensor; ``producer`` absorbs a scale of it, or ``why`` says why none does."""

    names: tuple[str, ...]
    in_features: int
    inspected: str  # the smallest module around them: its output shows what an error in them does
    producer: Producer | None = None
    why: str = ""
    others: tuple[str, ...] = field(default=())


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear`` or a Conv1D that still holds its own weight."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and "weight" in module._parameters


def matrix(module: nn.Module) -> Tensor:
    """The weight ``[out, in]`` of a Linear or Conv1D: a view, so it can be written to."""
    weight = module.weight.data
    return weight.t() if is_conv1d(module) else weight


def first_tensor(args, kwargs) -> Tensor | None:
    """The input of a module: its first tensor argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def output_tensor(output) -> Tensor | None:
    """The tensor of a module's output; the first one of a tuple."""
    if isinstance(output, (tuple, list)):
        output = next((value for value in output if isinstance(value, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def identity(x: Tensor) -> tuple:
    """Equal for tensors over the same memory, whatever their shape."""
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.numel()


def trace(block: nn.Module, args: Sequence, kwargs: Mapping) -> list[Call]:
    """Calls of the modules of a block in one forward."""
    calls: list[Call] = []
    alive = []  # so that no memory is used twice and identities stay unique

    def record(name):
        def hook(module, args, kwargs, output):
            x, y = first_tensor(args, kwargs), output_tensor(output)
            alive.extend((x, y))
            calls.append(Call(name, module, None if x is None else identity(x), None if y is None else identity(y)))

        return hook

    hooks = [module.register_forward_hook(record(name), with_kwargs=True)
             for name, module in block.named_modules() if name]
    try:
        block(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def shared_inputs(block: nn.Module, args: Sequence, kwargs: Mapping, folds: bool = False) -> list[Shared]:
    """Groups of linear layers by input, in order of execution; layers that the trace did not reach (experts without
    a token) or that ran more than once come last, each alone. ``folds`` also looks for producers."""
    calls = trace(block, args, kwargs)
    count: dict[str, int] = {}
    for call in calls:
        count[call.name] = count.get(call.name, 0) + 1
    by_input: dict[tuple, list[str]] = {}
    for call in calls:
        if is_linear(call.module) and count[call.name] == 1 and call.reads is not None:
            by_input.setdefault(call.reads, []).append(call.name)
    finder = _Finder(block, args, kwargs, calls) if folds else None
    groups = []
    for reads, names in by_input.items():
        width = matrix(block.get_submodule(names[0])).shape[1]
        group = Shared(tuple(names), width, common_parent(names) if len(names) > 1 else names[0])
        if finder is not None:
            group.producer, group.why = finder.find(group, reads)
        groups.append(group)
    grouped = {name for group in groups for name in group.names}
    for name, module in block.named_modules():
        if is_linear(module) and name not in grouped:
            groups.append(Shared((name,), matrix(module).shape[1], name, why="it did not run once in the trace"))
    return groups


def common_parent(names: Sequence[str]) -> str:
    """Longest dotted prefix of module names ('' is the block itself)."""
    prefix = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")[:-1]
        same = next((i for i, (a, b) in enumerate(zip(prefix, parts)) if a != b), min(len(prefix), len(parts)))
        prefix = prefix[:same]
    return ".".join(prefix)


class _Finder:
    """Tries candidates on a float64 copy of the block."""

    def __init__(self, block: nn.Module, args: Sequence, kwargs: Mapping, calls: list[Call]):
        self.calls = calls
        self.block = copy.deepcopy(block).double().eval()
        for module in self.block.modules():  # transformers' grouped products of experts know no float64
            if hasattr(module, "has_gate") and hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"
        self.args, self.kwargs = _double(args), _double(kwargs)
        self.before = self._run()

    def _run(self) -> Tensor:
        return output_tensor(self.block(*self.args, **self.kwargs)).double()

    def find(self, group: Shared, reads: tuple) -> tuple[Producer | None, str]:
        first = next(i for i, call in enumerate(self.calls) if call.name == group.names[0])
        readers = [call.name for call in self.calls
                   if call.reads == reads and not is_linear(call.module) and next(call.module.parameters(False), None)
                   is not None and call.writes != reads]
        tried = []
        for candidate in self._candidates(group, reads, first):
            if self._cancels(candidate, group):
                return self._with_heads(candidate, group), ""
            if candidate.name not in tried:
                tried.append(candidate.name)
        if readers:
            return None, f"{readers[0]} reads the same input and is not a linear layer"
        if tried:
            return None, f"scaling {' or '.join(tried[:3])} changes the block's output"
        return None, "no earlier norm or linear layer has the same channels"

    def _candidates(self, group: Shared, reads: tuple, first: int):
        width = group.in_features
        for call in reversed(self.calls[:first]):
            gain = call.module._parameters.get("weight")
            if call.writes == reads and gain is not None and gain.dim() == 1 and gain.numel() == width:
                yield Producer(call.name, "norm")
                yield Producer(call.name, "norm", 1.0)
        for call in reversed(self.calls[:first]):
            if is_linear(call.module) and call.reads != reads:
                for rows in _row_maps(self.block, call.name, matrix(call.module).shape[0], width):
                    yield Producer(call.name, "rows", rows=rows)

    def _cancels(self, producer: Producer, group: Shared) -> bool:
        generator = torch.Generator().manual_seed(0)
        s = torch.exp2(2 * torch.rand(group.in_features, generator=generator, dtype=torch.float64) - 1)
        if producer.rows is not None:
            s = torch.exp2(2 * torch.rand(int(producer.rows.max()) + 1, generator=generator, dtype=torch.float64)
                           - 1)[producer.rows]
        source = self.block.get_submodule(producer.name)
        s = s.to(next(source.parameters()).device)
        return self._undone(group, source, lambda: divide(source, producer, s), lambda w: w * s)

    def _with_heads(self, producer: Producer, group: Shared) -> Producer:
        """The producer with its ``head``, where turning heads there and back in the group changes nothing."""
        head = _head_dim(self.block, producer.name)
        if producer.kind != "rows" or not head or group.in_features % head:
            return producer
        heads = producer.rows.view(-1, head)
        if not torch.equal(heads, heads[:, :1] + torch.arange(head)):
            return producer
        source = self.block.get_submodule(producer.name)
        generator = torch.Generator().manual_seed(1)
        turn = torch.linalg.qr(torch.randn(head, head, generator=generator, dtype=torch.float64))[0]
        turn = turn.to(next(source.parameters()).device)
        producer = replace(producer, head=head)
        undone = self._undone(group, source, lambda: turn_source(source, producer, turn),
                              lambda w: (w.unflatten(1, (-1, head)) @ turn).flatten(1))
        return producer if undone else replace(producer, head=0)

    def _undone(self, group: Shared, source: nn.Module, change, undo) -> bool:
        """Whether ``undo(weight)`` of the group's layers makes up for ``change()`` of the source."""
        modules = [source] + [self.block.get_submodule(name) for name in group.names]
        saved = [[p.data.clone() for p in module.parameters(False)] for module in modules]
        try:
            change()
            alone = self._run()
            for module in modules[1:]:
                matrix(module).copy_(undo(matrix(module)))
            both = self._run()
        finally:
            for module, values in zip(modules, saved):
                for parameter, value in zip(module.parameters(False), values):
                    parameter.data = value
        effect, rest = (alone - self.before).norm(), (both - self.before).norm()
        return bool(effect > 0) and bool(rest <= _TOLERANCE * effect)


def _double(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    return value


def _row_maps(block: nn.Module, name: str, rows: int, width: int):
    """Ways in which ``width`` channels can come from the ``rows`` outputs of an earlier linear layer."""
    if rows >= width:  # all of them, or the last part of a fused projection
        yield torch.arange(rows - width, rows)
    head = _head_dim(block, name)
    if not head or width % head:
        return
    for part in (rows, (rows - width) // 2 if rows > width else 0):  # keys and values have fewer heads
        if 0 < part < width and part % head == 0 and width % part == 0 and rows >= part:
            channel = torch.arange(width)
            yield rows - part + channel // head // (width // part) * head + channel % head


def _head_dim(block: nn.Module, name: str) -> int:
    parts = name.split(".")[:-1]
    for i in range(len(parts), -1, -1):
        value = getattr(block.get_submodule(".".join(parts[:i])), "head_dim", None)
        if isinstance(value, int):
            return value
    return 0


def divide(source: nn.Module, producer: Producer, s: Tensor) -> None:
    """Divide the producer's channels by ``s [channels]``, in place."""
    if producer.kind == "norm":
        source.weight.data = ((source.weight.data + producer.offset) / s - producer.offset).to(source.weight.dtype)
        divisor = s
    else:
        divisor = per_row(producer, s, matrix(source).shape[0])
        matrix(source).div_(divisor[:, None])
    bias = source._parameters.get("bias")
    if bias is not None:
        bias.data = (bias.data / divisor).to(bias.dtype)


def per_row(producer: Producer, s: Tensor, rows: int) -> Tensor:
    """``s`` of the channels as factors of the producer's output rows; 1 for rows that feed none."""
    return s.new_ones(rows).index_copy_(0, producer.rows.to(s.device), s)


def value_rows(producer: Producer) -> Tensor:
    """The producer's output rows by heads, ``[kv_heads, head]``, each once."""
    return torch.unique(producer.rows.view(-1, producer.head), dim=0)


def turn_rows(values: Tensor, heads: Tensor, turn: Tensor) -> Tensor:
    """``values [rows, ...]`` with the rows of each of ``heads [kv_heads, head]`` turned: what a layer of these rows
    puts out for a head, ``v``, becomes ``v @ turn``. Differentiable."""
    heads = heads.to(values.device)
    part = values[heads].flatten(2) if values.dim() > 1 else values[heads][..., None]
    turned = (turn.to(values).T @ part).reshape(-1, *values.shape[1:])
    return values.index_copy(0, heads.flatten(), turned)


def turn_source(source: nn.Module, producer: Producer, turn: Tensor) -> None:
    """`turn_rows` of a plain layer's weight and bias, in place."""
    heads = value_rows(producer)
    matrix(source).copy_(turn_rows(matrix(source), heads, turn))
    turn_bias(source, heads, turn)


def turn_bias(source: nn.Module, heads: Tensor, turn: Tensor) -> None:
    bias = source._parameters.get("bias")
    if bias is not None:
        wide = bias.data if bias.dtype is torch.float64 else bias.data.float()
        bias.data = turn_rows(wide, heads, turn).to(bias.dtype)
