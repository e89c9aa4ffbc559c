"""The chain of decoder blocks of a model, found by running it, and the inputs of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .transforms.graph import first_tensor, output_tensor


class _Stop(Exception):
    """Ends a forward whose rest is of no interest."""


@dataclass
class Chain:
    """Blocks that run one after another, with what they are called on.

    ``probes[i]``: arguments of block ``i`` in a short forward of the uncompressed model. ``hidden[b]``: hidden states
    ``[1, length, width]`` of batch ``b`` that enter the current block; ``arguments[b][i]``: its other arguments, which
    differ between kinds of blocks.
    """

    names: list[str] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    probes: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[object] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    arguments: list[list[tuple[tuple, dict]]] = field(default_factory=list)

    def call(self, index: int, batch: int) -> Tensor:
        """The hidden states that block ``index`` makes of batch ``batch``."""
        args, kwargs = _with_hidden(*self.arguments[batch][index], self.hidden[batch])
        return output_tensor(self.blocks[index](*args, **kwargs))

    def wrap(self, index: int, hidden: Tensor):
        """``hidden`` in the form in which block ``index`` returns it."""
        output = self.outputs[index]
        if isinstance(output, Tensor):
            return hidden
        place = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
        return tuple(hidden if i == place else value for i, value in enumerate(output))


class _Hole:
    """Marks where the hidden states go among captured arguments."""


_HOLE = _Hole()


def _without_hidden(args: tuple, kwargs: Mapping) -> tuple[tuple, dict]:
    hidden = first_tensor(args, kwargs)
    return (tuple(_HOLE if value is hidden else value for value in args),
            {key: _HOLE if value is hidden else value for key, value in kwargs.items()})


def _with_hidden(args: tuple, kwargs: Mapping, hidden: Tensor) -> tuple[tuple, dict]:
    return (tuple(hidden if value is _HOLE else value for value in args),
            {key: hidden if value is _HOLE else value for key, value in kwargs.items()})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again at the end."""
    modes = {module: module.training for module in model.modules()}
    new = model.training  # of modules put in meanwhile
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, new)


def forward(model: nn.Module, ids: Tensor):
    """The model on token ids ``[1, length]``, caching nothing."""
    parameter = next(model.parameters(), None)
    ids = ids if parameter is None else ids.to(parameter.device)
    return model(input_ids=ids, use_cache=False) if hasattr(model, "config") else model(ids)


def find_chain(model: nn.Module, ids: Tensor) -> Chain:
    """Run the model on a few tokens and find its blocks: the longest ModuleList whose members ran one after another,
    each exactly once. Empty where there is none.

    ValueError when something happens to the hidden states between two blocks, or when a block's other arguments
    depend on them: such a decoder cannot be run block by block.
    """
    lists = {name: module for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)}
    members = {member: (name, i) for name, module in lists.items() for i, member in enumerate(module)}
    order: dict[str, list[int]] = {name: [] for name in lists}
    seen: dict[nn.Module, tuple[tuple, dict, object, Tensor]] = {}

    def hook(module, args, kwargs, output):
        name, i = members[module]
        order[name].append(i)
        y = output_tensor(output)
        seen[module] = (args, kwargs, output, None if y is None else y.clone())

    before: dict[nn.Module, Tensor] = {}

    def enter(module, args, kwargs):
        x = first_tensor(args, kwargs)
        if x is not None:
            before[module] = x.clone()

    hooks = [member.register_forward_hook(hook, with_kwargs=True) for member in members]
    hooks += [member.register_forward_pre_hook(enter, with_kwargs=True) for member in members]
    try:
        forward(model, ids)
    finally:
        for handle in hooks:
            handle.remove()
    candidates = [name for name in lists if order[name] == list(range(len(lists[name])))
                  and all(seen[m][3] is not None and m in before and seen[m][3].shape == before[m].shape
                          for m in lists[name])]
    candidates = [name for name in candidates if not any(name.startswith(other + ".") for other in candidates)]
    if not candidates:
        return Chain()
    name = max(candidates, key=lambda candidate: len(lists[candidate]))
    blocks = list(lists[name])
    chain = Chain([f"{name}.{i}" if name else str(i) for i in range(len(blocks))], blocks,
                  [(seen[block][0], dict(seen[block][1])) for block in blocks], [seen[block][2] for block in blocks])
    for i, block in enumerate(blocks):
        if not bool(torch.isfinite(seen[block][3]).all()):
            raise ValueError(f"block {chain.names[i]!r}: the hidden states it puts out for the first calibration "
                             "tokens have NaN or Inf, accepted are finite values")
    for i, block in enumerate(blocks[1:]):
        if not torch.equal(before[block], seen[blocks[i]][3]):
            raise ValueError(f"blocks {chain.names[i]!r} and {chain.names[i + 1]!r}: the second does not read what the "
                             "first writes, accepted are decoders whose blocks form a chain")
    real = [_without_hidden(*probe) for probe in chain.probes]
    trial = Chain(chain.names, blocks, chain.probes, chain.outputs)
    capture(model, trial, [ids], None)
    for i, (arguments, expected) in enumerate(zip(trial.arguments[0], real)):
        if not _same(arguments, expected):
            raise ValueError(f"block {chain.names[i]!r}: its arguments depend on the blocks before it, accepted are "
                             "decoders whose blocks share nothing but the hidden states")
    return chain


def capture(model: nn.Module, chain: Chain, batches: Sequence[Tensor], progress: Callable | None) -> None:
    """Fill ``chain.hidden`` with what enters block 0 and ``chain.arguments`` with each block's other arguments."""
    known: dict[tuple, list[Tensor]] = {}
    chain.hidden, chain.arguments = [], []
    for b, batch in enumerate(batches):
        recorded: list[tuple[tuple, dict]] = []

        def stand_in(index: int):
            def forward_(*args, **kwargs):
                hidden = first_tensor(args, kwargs)
                if index == 0:
                    chain.hidden.append(hidden)
                recorded.append(_intern(_without_hidden(args, kwargs), known))
                if index == len(chain.blocks) - 1:
                    raise _Stop
                return chain.wrap(index, hidden)

            return forward_

        with replaced_forwards(chain.blocks, stand_in), contextlib.suppress(_Stop):
            forward(model, batch)
        chain.arguments.append(recorded)
        if progress is not None:
            progress("capture", b + 1, len(batches))


def finish_forward(model: nn.Module, chain: Chain | None, b: int, batch: Tensor, enough: Callable[[], bool]) -> None:
    """Run what is outside the blocks on batch ``b``, whose last hidden states are ``chain.hidden[b]``, until
    ``enough``; the whole model without a chain."""

    def stop(module, args):
        if enough():
            raise _Stop

    def after(module, args, output):
        if enough():
            raise _Stop

    def stand_in(index: int):
        return lambda *args, **kwargs: chain.wrap(index, chain.hidden[b])

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if not next(module.children(), None):
                stack.callback(module.register_forward_pre_hook(stop).remove)
                stack.callback(module.register_forward_hook(after).remove)
        if chain is not None:
            stack.enter_context(replaced_forwards(chain.blocks, stand_in))
        with contextlib.suppress(_Stop):
            forward(model, batch)


@contextlib.contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], stand_in: Callable[[int], Callable]) -> Iterator[None]:
    """Blocks whose ``forward`` is ``stand_in(index)`` for a while."""
    own = [block.__dict__.get("forward") for block in blocks]
    for i, block in enumerate(blocks):
        block.__dict__["forward"] = stand_in(i)
    try:
        yield
    finally:
        for block, before in zip(blocks, own):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


def _intern(value, known: dict[tuple, list[Tensor]]):
    """The same nest with equal tensors shared: masks and position embeddings repeat from batch to batch."""
    if isinstance(value, Tensor):
        alike = known.setdefault((tuple(value.shape), value.dtype), [])
        for other in alike:
            if other is value or torch.equal(other, value):
                return other
        if len(alike) < 8:
            alike.append(value)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_intern(item, known) for item in value)
    if type(value) is dict:
        return {key: _intern(item, known) for key, item in value.items()}
    return value


def _same(a, b) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return True  # flags and objects: the traced forward has shown that they do
