"""The calibration runner: compresses a model block by block on what each layer really sees.

Every block of the decoder is run on all batches twice: once to collect statistics of its layers' inputs, once more,
compressed, to make the inputs of the next. Kept in memory: the hidden states once in the model's dtype, and the
statistics of one block (of one group of layers with ``sequential``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Chain, capture, evaluating, finish_forward, find_chain
from .experts import expert_inputs, is_experts, matrices
from .formats.base import Params
from .layer import Embedding, lookup_scale
from .methods.base import Method, Statistics, choose, transforms
from .methods.single import check_finite
from .methods.statistics import Collector
from .patch import LayerSpec, patch
from .recipe import Plan
from .registry import Resolved
from .report import Report, Row
from .transforms.graph import Shared, first_tensor, identity, is_linear, matrix, shared_inputs
from .transforms.group import BlockView, Group, Online, Weights, run_on
from .transforms.steps import Step
from .wide_linears import widened

Progress = Callable[[str, int, int], None]

_SAMPLE = 1024  # tokens of each input that are kept to measure errors on
_EXPERT_BYTES = 4 << 30  # Hessians of experts that are collected in one pass


def compress_weights(model: nn.Module, plan: Plan, report: Report, progress: Progress) -> None:
    """Compress layers one by one with methods that look at no data. ValueError names the layer at fault."""
    _check_plan(model, plan)
    done: list[str] = []
    with torch.no_grad(), _naming_done(done):
        for i, (name, entry) in enumerate(plan.entries.items()):
            progress("compress", i, len(plan.entries))
            _compress(model, name, entry, _weight_of(model.get_submodule(name)), None, report)
            done.append(name)
    progress("compress", len(plan.entries), len(plan.entries))


def compress_blocks(model: nn.Module, plan: Plan, batches: Sequence[Tensor], report: Report,
                    progress: Progress) -> None:
    """Compress block by block on ``batches``, token ids ``[1, length]`` each.

    Each block sees what the compressed blocks before it put out. Layers outside the blocks come last, on what the
    compressed model shows them. ValueError: no batches, token ids the model does not know, weights or hidden states
    that are not finite (the layer or block is named), a decoder whose blocks are not a chain. Hooks and the model's
    mode are restored on errors, and the error says which layers are compressed by then.
    """
    if not batches:
        raise ValueError("calibration: found no batches, accepted is at least one")
    _check_plan(model, plan)
    _check_shared(model, plan)
    _check_tokens(model, batches)
    done: list[str] = []
    total = len(plan.entries)
    with torch.no_grad(), evaluating(model), _naming_done(done):
        _prepare(model, plan, batches[0][:, :16])
        chain = find_chain(model, batches[0][:, :16])
        inside = {name: i for i, block in enumerate(chain.names) for name in plan.entries
                  if name.startswith(block + ".")}
        if inside:
            progress("capture", 0, len(batches))
            capture(model, chain, batches, progress)
            last = max(inside.values())
            outside = [name for name in plan.entries if name not in inside]
            for i, block in enumerate(chain.names[: len(chain.names) if outside else last + 1]):
                entries = {name[len(block) + 1 :]: plan.entries[name] for name in plan.entries if inside.get(name) == i}
                _check_hidden(chain, block)
                if entries:
                    runner = _Block(model, chain, i, entries, report, lambda: progress("compress", len(done), total))
                    runner.run(done)
                if i < last or outside:
                    _advance(chain, i)
                progress("compress", len(done), total)
        outside = {name: entry for name, entry in plan.entries.items() if name not in inside}
        if outside:
            _compress_outside(model, chain if inside else None, outside, batches, report, done)
    progress("compress", total, total)


def _prepare(model: nn.Module, plan: Plan, ids: Tensor) -> None:
    """What methods do to the model as a whole, each once."""
    given: dict[Method, dict[str, Resolved]] = {}
    for name, entry in plan.entries.items():
        for method in transforms(entry.methods):
            given.setdefault(method, {})[name] = entry
    for method, entries in given.items():
        method.prepare(model, entries, ids)


# -- one block --------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """A group of layers with one input, and what is collected of it."""

    shared: Shared
    planned: list[str]
    collector: Collector
    runs: list = field(default_factory=list)
    run_tokens: int = 0
    stats: Statistics | None = None


class _Block:
    """Compresses the layers of block ``index``; ``entries`` has their names inside the block."""

    def __init__(self, model, chain: Chain, index: int, entries: dict[str, Resolved], report: Report, tick):
        self.model, self.chain, self.index, self.entries, self.report, self.tick = (
            model, chain, index, entries, report, tick)
        self.block, self.prefix = chain.blocks[index], chain.names[index]
        self.weights = Weights(self.block)
        self.notes: dict[str, list[str]] = {name: [] for name in entries}
        self.steps: dict[str, tuple[Step, ...]] = {}
        self.params: dict[str, Params] = {}
        self.stored: dict[str, dict] = {}

    def run(self, done: list[str]) -> None:
        folds = any(transforms(entry.methods) for entry in self.entries.values())
        groups = shared_inputs(self.block, *self.chain.probes[self.index], folds=folds)
        jobs = [self._job(shared) for shared in groups if any(name in self.entries for name in shared.names)]
        if folds:
            wanted = [job for job in jobs if self._transforms(job)]
            self._collect(wanted, "transform")
            self._transform(wanted)
            jobs = [self._job(job.shared) for job in jobs]
        experts = [name for name in self.entries if is_experts(self.block.get_submodule(name))]
        sequential = any(getattr(method, "sequential", False)
                         for entry in self.entries.values() for method in entry.methods)
        if not sequential:
            self._collect(jobs, "choose")
        for job in jobs:
            if sequential:
                self._collect([job], "choose")
            for name in job.planned:
                self._finish(name, job.stats, done)
            job.stats = None
        for name in experts:
            self._experts(name, done)

    def _job(self, shared: Shared) -> _Job:
        planned = [name for name in shared.names if name in self.entries]
        device = matrix(self.block.get_submodule(planned[0])).device
        needs = frozenset({"inputs"}).union(*(self.entries[name].needs for name in planned))
        return _Job(shared, planned, Collector(shared.in_features, needs, _SAMPLE, device))

    def _transforms(self, job: _Job) -> tuple:
        """The transforms that all planned layers of a group share; a note where they differ."""
        chains = {transforms(self.entries[name].methods) for name in job.planned}
        if len(chains) == 1:
            return chains.pop()
        for name in job.planned:
            self.notes[name].append("not transformed, layers with the same input name other transforms")
        return ()

    def _collect(self, jobs: list[_Job], phase: str) -> None:
        """Run the block on all batches and fill the jobs' statistics."""
        if not jobs:
            return
        seen: dict[str, tuple] = {}
        hooks = []

        def watch(job: _Job, name: str, leads: bool):
            def hook(module, args, kwargs):
                x = first_tensor(args, kwargs)
                if not leads:
                    if seen.get(job.shared.names[0]) != identity(x):
                        raise ValueError(f"layer {self._full(name)!r}: found another input than "
                                         f"{job.shared.names[0]!r}, which it shared in the traced forward")
                    return
                seen[name] = identity(x)
                try:
                    job.collector.add(x)
                except ValueError as error:
                    raise ValueError(f"layer {self._full(name)!r}: {error}") from None

            return hook

        def record(job: _Job, most: int):
            def hook(module, args, kwargs):
                if job.run_tokens < most:
                    x = first_tensor(args, kwargs)
                    job.run_tokens += x.numel() // x.shape[-1]
                    job.runs.append(run_on(module, args, kwargs))

            return hook

        try:
            for job in jobs:
                for i, name in enumerate(job.shared.names):
                    module = self.block.get_submodule(name)
                    hooks.append(module.register_forward_pre_hook(watch(job, name, i == 0), with_kwargs=True))
                most = self._inspected_tokens(job) if phase == "transform" else 0
                if most:
                    module = self.block.get_submodule(job.shared.inspected)
                    hooks.append(module.register_forward_pre_hook(record(job, most), with_kwargs=True))
            with widened(self.block):
                for b in range(len(self.chain.hidden)):
                    self.chain.call(self.index, b)
        finally:
            for hook in hooks:
                hook.remove()
        for job in jobs:
            job.stats = job.collector.finish() if job.collector.tokens else None

    def _inspected_tokens(self, job: _Job) -> int:
        if len(job.shared.names) == 1:
            return 0  # the layer itself: its sampled inputs serve
        return max((getattr(m, "tokens", 0) for name in job.planned for m in transforms(self.entries[name].methods)
                    if "block" in m.needs), default=0)

    def _transform(self, jobs: list[_Job]) -> None:
        """All transforms, one after another: those of whole blocks, then of groups."""
        groups = [(self._group(job), self._transforms(job)) for job in jobs if job.stats is not None]
        for method in dict.fromkeys(method for _, methods in groups for method in methods):
            own = [group for group, methods in groups if method in methods]
            method.transform_block(BlockView(self.block, own, lambda b: self.chain.call(self.index, b),
                                             len(self.chain.hidden)))
            for group in own:
                note = method.transform(group)
                for name in group.formats:
                    if note:
                        self.notes[name].append(note)
        for group, _ in groups:
            self._insert(group)
            self.params.update(group.params)
            self.stored.update(group.stored)
            for name, fmt in group.formats.items():
                if fmt is not self.entries[name].format:
                    self.entries[name] = dataclasses.replace(self.entries[name], format=fmt)

    def _group(self, job: _Job) -> Group:
        formats = {name: self.entries[name].format for name in job.planned}
        dtype = self.block.get_submodule(job.planned[0]).weight.dtype
        return Group(job.shared.names, formats, job.stats, self.weights, job.shared.producer, job.shared.why, dtype,
                     job.runs)

    def _insert(self, group: Group) -> None:
        """Run what a transform put before a group's layers, also while they are still plain ones. Errors leave it
        there: without it the weights would be wrong."""
        if not group.inserted:
            return
        outside = [name for name in group.names if name not in self.entries]
        if outside:
            raise ValueError(f"layers {', '.join(map(self._full, group.names))}: found an input that is transformed "
                             f"online, and {', '.join(outside)} outside the recipe; accepted are all that share it")
        online = Online(group.inserted)
        for name in group.names:
            self.block.get_submodule(name).register_forward_pre_hook(online)
            self.steps[name] = tuple(group.inserted)

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}"

    def _finish(self, name: str, stats: Statistics | None, done: list[str]) -> None:
        entry, note = self.entries[name], self.notes[name]
        if stats is None:
            entry = _without_data(entry)
            note = [*note, "no calibration token reached it: rounded to nearest"] if entry is not self.entries[name] \
                else note
        _compress(self.model, self._full(name), entry, self.weights.get(name), stats, self.report,
                  "; ".join(note), self.steps.get(name, ()), self.params.get(name), self.stored.get(name, {}))
        self.weights.drop(name)
        done.append(self._full(name))
        self.tick()

    # -- fused experts

    def _experts(self, name: str, done: list[str]) -> None:
        module, entry = self.block.get_submodule(name), self.entries[name]
        started = time.perf_counter()
        weights = matrices(module)
        count = len(weights["down_proj"])
        needs = entry.needs | {"inputs"}
        each = sum(4 * w.shape[2] ** 2 for w in weights.values()) if "hessian" in needs else 1
        step = max(1, min(count, _EXPERT_BYTES // each))
        packed: list[tuple[str, int, dict]] = []
        errors, unseen = [], 0
        for lo in range(0, count, step):
            experts = range(lo, min(lo + step, count))
            collectors = self._expert_statistics(module, name, weights, needs, experts)
            for expert in experts:
                for projection, w in weights.items():
                    collector = collectors.pop((expert, projection))
                    stats = collector.finish() if collector.tokens else None
                    unseen += stats is None and projection == "down_proj"
                    used = entry if stats is not None else _without_data(entry)
                    title = f"{self._full(name)}.{expert}.{projection}"
                    tensors, squares = _choose_expert(title, used, w[expert], stats)
                    packed.append((projection, expert, tensors))
                    errors.append(squares)
        layer = patch(self.model, {self._full(name): LayerSpec(entry.format)})[self._full(name)]
        for projection, expert, tensors in packed:
            layer.load_expert(projection, expert, tensors)
        notes = list(self.notes[name])
        if transforms(entry.methods):
            notes.append("experts are not scaled")
        if unseen and _without_data(entry) is not entry:
            notes.append(f"{unseen} of {count} experts received no calibration token: rounded to nearest")
        _report_experts(self._full(name), entry, layer, weights, errors, "weights" if unseen == count else "inputs",
                        started, notes, self.report)
        done.append(self._full(name))
        self.tick()

    def _expert_statistics(self, module, name, weights, needs, experts) -> dict[tuple[int, str], Collector]:
        collectors = {(e, p): Collector(w.shape[2], needs, 64, w.device) for e in experts for p, w in weights.items()}

        def hook(module, args, kwargs):
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            index = values[1] if len(values) > 1 else torch.arange(
                len(weights["down_proj"]), device=values[0].device).repeat_interleave(
                    values[0].shape[0] // len(weights["down_proj"]))[:, None]
            for expert, inputs in expert_inputs(module, values[0], index):
                for projection, x in inputs.items():
                    if (expert, projection) in collectors:
                        collectors[expert, projection].add(x)

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for b in range(len(self.chain.hidden)):
                self.chain.call(self.index, b)
        except ValueError as error:
            raise ValueError(f"layer {self._full(name)!r}: {error}") from None
        finally:
            handle.remove()
        return collectors


def _advance(chain: Chain, index: int) -> None:
    with widened(chain.blocks[index]):
        for b in range(len(chain.hidden)):
            chain.hidden[b] = chain.call(index, b)


def _check_hidden(chain: Chain, block: str) -> None:
    for b, hidden in enumerate(chain.hidden):
        if not bool(torch.isfinite(hidden).all()):
            raise ValueError(f"block {block!r}: the hidden states of calibration batch {b} that enter it have NaN or "
                             "Inf, accepted are finite values")


# -- layers outside the blocks ------------------------------------------------------------------------------------


def _compress_outside(model, chain: Chain | None, entries: dict[str, Resolved], batches, report: Report,
                      done: list[str]) -> None:
    """Layers before, after or without blocks, each on its own input in the model as it is by then."""
    collectors: dict[str, Collector] = {}
    hooks = []
    waiting: set[str] = set()

    def watch(name):
        def hook(module, args, kwargs):
            x = first_tensor(args, kwargs)
            try:
                collectors[name].add(x)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            waiting.discard(name)

        return hook

    try:
        for name, entry in entries.items():
            module = model.get_submodule(name)
            if is_linear(module):
                needs = entry.needs | {"inputs"}
                collectors[name] = Collector(matrix(module).shape[1], needs, _SAMPLE, matrix(module).device)
                hooks.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
        if collectors:
            for b, batch in enumerate(batches):
                waiting.update(collectors)
                finish_forward(model, chain, b, batch, lambda: not waiting)
    finally:
        for hook in hooks:
            hook.remove()
    for name, entry in entries.items():
        module = model.get_submodule(name)
        collector = collectors.pop(name, None)
        stats = collector.finish() if collector is not None and collector.tokens else None
        notes = ["not scaled: it is outside the blocks"] if any(transforms(entry.methods)) else []
        if stats is None and not isinstance(module, nn.Embedding):
            changed = _without_data(entry)
            if changed is not entry:
                notes.append("no calibration token reached it: rounded to nearest")
            entry = changed
        _compress(model, name, entry, _weight_of(module), stats, report, "; ".join(notes))
        done.append(name)


# -- one layer ----------------------------------------------------------------------------------------------------


def _weight_of(module: nn.Module) -> Tensor | None:
    """The weight ``[out, in]`` in float32 (float64 where it is so); None for experts."""
    if is_experts(module):
        return None
    w = module.weight.detach() if isinstance(module, nn.Embedding) else matrix(module).detach()
    return w if w.dtype is torch.float64 else w.float()


def _compress(model, name, entry: Resolved, w: Tensor | None, stats, report: Report, note: str = "",
              steps: tuple[Step, ...] = (), params: Params | None = None,
              stored: Mapping = MappingProxyType({})) -> None:
    """Choose, store and report one layer, which will run ``steps`` on its input. ``params`` are fitted already;
    ``stored`` goes to the parameters of whoever fits them."""
    started = time.perf_counter()
    old = model.get_submodule(name)
    if w is None:
        _compress_experts_without_data(model, name, entry, report, [note] if note else [])
        return
    dtype = old.weight.dtype
    try:
        choice = choose(entry.methods, w, entry.format, stats, dtype, name, params)
        if stats is not None:
            entry.format.calibrate(choice.params, stats)
        choice.params.update(stored)
        tensors = entry.format.pack(choice.w_hat, choice.params)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    # A copy of the steps: checkpoints refuse tensors that several modules share.
    layer = patch(model, {name: LayerSpec(entry.format, copy.deepcopy(steps))})[name]
    layer.load_tensors(tensors)
    layer.method = entry.method_text
    before, after = w.numel() * dtype.itemsize, layer.nbytes
    report.add(Row(name, str(entry.format), entry.method_text, tuple(w.shape), 8 * after / w.numel(), layer.kernel,
                   _ratio([_squares(w, choice.w_hat, stats)]), "weights" if stats is None else "inputs",
                   time.perf_counter() - started, before, after, note))


def _compress_experts_without_data(model, name, entry: Resolved, report: Report, notes=()) -> None:
    started = time.perf_counter()
    weights = matrices(model.get_submodule(name))
    layer = patch(model, {name: LayerSpec(entry.format)})[name]
    errors = []
    for projection, stack in weights.items():
        for expert, w in enumerate(stack):
            tensors, squares = _choose_expert(f"{name}.{expert}.{projection}", entry, w, None)
            layer.load_expert(projection, expert, tensors)
            errors.append(squares)
    _report_experts(name, entry, layer, weights, errors, "weights", started, notes, report)


def _choose_expert(title: str, entry: Resolved, w: Tensor, stats) -> tuple[dict, tuple[float, float]]:
    """Stored tensors of one matrix ``[out, in]``, and its squared error and norm."""
    wide = w if w.dtype is torch.float64 else w.float()
    try:
        choice = choose(entry.methods, wide, entry.format, stats, w.dtype, title)
        if stats is not None:
            entry.format.calibrate(choice.params, stats)
        return entry.format.pack(choice.w_hat, choice.params), _squares(wide, choice.w_hat, stats)
    except ValueError as error:
        raise ValueError(f"layer {title!r}: {error}") from error


def _report_experts(name, entry: Resolved, layer, weights, errors, measured_on, started, notes, report: Report) -> None:
    layer.method = entry.method_text
    numel = sum(w.numel() for w in weights.values())
    before = sum(w.numel() * w.element_size() for w in weights.values())
    report.add(Row(name, str(entry.format), entry.method_text, tuple(layer.shape), 8 * layer.nbytes / numel,
                   layer.kernel, _ratio(errors), measured_on, time.perf_counter() - started, before, layer.nbytes,
                   "; ".join(notes)))


def _squares(w: Tensor, w_hat: Tensor, stats: Statistics | None) -> tuple[float, float]:
    """Squared error and squared norm of the output on sampled inputs, or of the weight without any."""
    if stats is None or stats.inputs is None:
        return float((w - w_hat).square().sum()), float(w.square().sum())
    x = stats.inputs.to(w)
    return float(F.linear(x, w - w_hat).square().sum()), float(F.linear(x, w).square().sum())


def _ratio(squares: list[tuple[float, float]]) -> float:
    error, norm = (sum(values) for values in zip(*squares))
    return (error / norm) ** 0.5 if norm else 0.0


def _without_data(entry: Resolved) -> Resolved:
    """The entry with the methods that look at data left out."""
    kept = tuple(method for method in entry.methods if not method.needs)
    return entry if len(kept) == len(entry.methods) else Resolved(kept, entry.format, entry.text)


# -- checks ---------------------------------------------------------------------------------------------------------


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """Everything about weights and formats that can be known before the first layer is touched."""
    for name, entry in plan.entries.items():
        module = model.get_submodule(name)
        if isinstance(module, Embedding) or not (is_experts(module) or "weight" in module._parameters):
            raise ValueError(f"layer {name!r}: found {type(module).__name__}, accepted are uncompressed layers")
        if isinstance(module, nn.Embedding):
            if any(method.needs for method in entry.methods):
                raise ValueError(f"layer {name!r}: found {entry.method_text}, accepted for embeddings are methods that "
                                 "look at no data, such as rtn")
            try:
                lookup_scale(module)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}; a mapping leaves it out with 'keep'") from None
        stacks = matrices(module) if is_experts(module) else {"": module.weight if isinstance(module, nn.Embedding)
                                                              else matrix(module)}
        for part, w in stacks.items():
            title = f"layer {name!r}" + (f" ({part})" if part else "")
            check_finite(w, title)
            try:
                entry.format.check(tuple(w.shape[-2:]))
            except ValueError as error:
                raise ValueError(f"{title}: {error}") from None


def _check_shared(model: nn.Module, plan: Plan) -> None:
    """ValueError where a method would rewrite a weight that the model uses in several places: what is right in one of
    them is not in the others. Embeddings and the output head may be tied; methods leave them alone."""
    rewritten = [(name, entry) for name, entry in plan.entries.items() if transforms(entry.methods)]
    if not rewritten:
        return
    ends = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")
            if hasattr(model, name)]
    users: dict[int, dict[tuple, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Embedding) and not any(module is end for end in ends):
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(id(parameter), {}).setdefault(_place(name), name)
    for names in (list(found.values()) for found in users.values() if len(found) > 1):
        blocks = {_place(name)[:1] for name in names}
        for name, entry in rewritten:
            if _place(name)[:1] in blocks:
                raise ValueError(
                    f"layers {names[0]!r} and {names[1]!r}: found one weight for both, accepted by {entry.method_text} "
                    "are weights of their own (module.weight = nn.Parameter(module.weight.clone())), since it rewrites "
                    "what comes before a layer as well; rtn and gptq take shared ones")


def _place(name: str) -> tuple[str, ...]:
    """A module's name from the number of its block on: containers may be known by several names."""
    parts = name.split(".")
    return tuple(parts[next((i for i, part in enumerate(parts) if part.isdigit()), 0):])


def _check_tokens(model: nn.Module, batches: Sequence[Tensor]) -> None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    known = getattr(embedding, "num_embeddings", None)
    for b, batch in enumerate(batches):
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point() or not batch.numel():
            found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"calibration: batch {b}: found {found}, accepted are integer tokens [1, length]")
        low, high = int(batch.min()), int(batch.max())
        if low < 0 or known is not None and high >= known:
            raise ValueError(f"calibration: batch {b}: found token ids {low} to {high}, accepted are 0 to "
                             f"{known - 1 if known is not None else 'the vocabulary size'}")


@contextlib.contextmanager
def _naming_done(done: list[str]) -> Iterator[None]:
    """Errors say which layers were compressed by then."""
    try:
        yield
    except ValueError as error:
        if not done:
            raise
        raise ValueError(f"{error}; already compressed: {_some(done)}") from error
    except BaseException as error:
        if done:
            error.add_note(f"already compressed: {_some(done)}")
        raise


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
