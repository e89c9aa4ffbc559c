"""The verbs of the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .formats.base import reference_kernel
from .gate import fuse_gates
from .integrations import attach
from .layer import Embedding, Linear
from .norm import fuse_norms
from .patch import link_siblings
from .recipe import Plan, Recipe, make_plan
from .registry import FORMATS, METHODS, preset_names, resolve
from .report import Report, Row

Progress = Callable[[str, int, int], None]
Calibration = Iterable[str] | Iterable[Tensor] | Tensor

_SAMPLES, _LENGTH = 128, 512
_COMPARED = 8  # batches on which a report compares with the original


def _silent(task: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def compress(model: nn.Module, recipe: Recipe, calibration: Calibration | None = None, tokenizer=None,
             original: nn.Module | None = None, strict: bool = False, **options) -> Report:
    """Compress a model in place and report what was done.

    ``recipe``: a spec (``gptq:W4A16``), a mapping of name patterns to specs, or the path of a YAML file (see
    `tersor.recipe`). ``calibration``: texts (with ``tokenizer``) or token tensors ``[length]`` or ``[n, length]``, for
    methods that look at data. ``original``: an uncompressed twin; the report then says how far the compressed model's
    next-token distributions are from its, on up to 8 calibration batches (`tersor.evaluate.compare`). ``strict``
    refuses formats that no kernel serves here.

    Options: ``samples`` (128) and ``length`` (512 tokens) bound the calibration data, ``progress(task, done, total)``
    is called along the way, ``tie=False`` lets fused projections differ; other options go to the methods that have a
    field of that name (``damp=0.05``).

    Raises ValueError for recipes that name no layer, unknown specs, weights or calibration that are not finite, empty
    or missing calibration: naming the layer, what was found and what is accepted. The model is untouched then, but
    for errors that only show while a layer is being compressed: the message says which layers were done.
    """
    from .calibration import compress_blocks, compress_weights

    started = time.perf_counter()
    if original is model:
        raise ValueError("original: found the model itself, which is compressed in place; accepted is a copy of it")
    if original is not None and calibration is None:
        raise ValueError("original: found no calibration to compare on; accepted are texts or token tensors")
    progress = options.pop("progress", None) or _silent
    samples, length = options.pop("samples", _SAMPLES), options.pop("length", _LENGTH)
    plan = _with_options(make_plan(model, recipe, options.pop("tie", True)), options)
    _check_strict(model, plan, strict)
    report = Report(kept=dict(plan.kept), kept_bytes=plan.kept_bytes)
    batches = None if calibration is None else token_batches(calibration, tokenizer, samples, length)
    if plan.needs:
        needy = sorted({str(entry.format) if entry.format.needs else entry.method_text
                        for entry in plan.entries.values() if entry.needs})
        if batches is None:
            raise ValueError(f"calibration: {', '.join(needy)} looks at data and found none; accepted are texts with a "
                             "tokenizer, or token tensors")
        compress_blocks(model, plan, batches, report, progress)
    else:
        if batches is not None and original is None:
            report.notes.append("calibration data was given and not used: no method of the recipe looks at data")
        compress_weights(model, plan, report, progress)
    link_siblings(model)
    fuse_norms(model)
    fuse_gates(model)
    attach(model)
    if original is not None:
        from .evaluate import compare

        rows = [row for row in batches if row.shape == batches[0].shape][:_COMPARED]
        report.quality = compare(model, original, torch.cat(rows), progress)
    report.seconds = time.perf_counter() - started
    return report


def token_batches(calibration: Calibration, tokenizer, samples: int = _SAMPLES, length: int = _LENGTH) -> list[Tensor]:
    """Token tensors ``[1, length]`` from texts or token tensors; short texts are joined, the rest is cut.

    ValueError when nothing is left, texts come without a tokenizer, or tokens are not integers.
    """
    if isinstance(calibration, str):
        calibration = [calibration]
    if isinstance(calibration, Tensor):
        calibration = [calibration] if calibration.dim() == 1 else list(calibration)
    batches: list[Tensor] = []
    pending: list[int] = []
    for item in calibration:
        if len(batches) >= samples:
            break
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("calibration: found texts without a tokenizer, accepted are texts with one, or token "
                                 "tensors")
            pending += tokenizer(item, add_special_tokens=False)["input_ids"]
            while len(pending) >= length and len(batches) < samples:
                batches.append(torch.tensor(pending[:length])[None])
                pending = pending[length:]
        elif isinstance(item, Tensor) and not item.is_floating_point() and item.dim() in (1, 2) and item.numel():
            batches += [row[None] for row in item.long().view(-1, item.shape[-1])]
        else:
            found = f"{item.dtype} {list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            raise ValueError(f"calibration: found {found}, accepted are texts and integer token tensors [length] or "
                             "[n, length]")
    if not batches and len(pending) > 1:
        batches.append(torch.tensor(pending)[None])
    if not batches:
        raise ValueError("calibration: found no tokens, accepted is at least one text or token tensor")
    return batches[:samples]


def _with_options(plan: Plan, options: dict) -> Plan:
    """Give remaining options to the methods that have a field of that name."""
    import dataclasses

    from .registry import Resolved

    used = set()
    for name, entry in plan.entries.items():
        changed = []
        for method in entry.methods:
            own = {key: value for key, value in options.items()
                   if key in {field.name for field in dataclasses.fields(method)}}
            used.update(own)
            changed.append(dataclasses.replace(method, **own) if own else method)
        plan.entries[name] = Resolved(tuple(changed), entry.format, entry.text)
    for key in options:
        if key not in used:
            raise ValueError(f"option {key!r}: no method of the recipe has it; accepted are samples, length, progress, "
                             "tie and the fields of its methods")
    return plan


def _check_strict(model: nn.Module, plan: Plan, strict: bool) -> None:
    if not strict:
        return
    for name, entry in plan.entries.items():
        parameter = next(model.get_submodule(name).parameters())
        kernel = entry.format.kernel(tuple(parameter.shape[-2:]), parameter.device)
        if reference_kernel(kernel):
            raise ValueError(f"strict: layer {name!r} in format {entry.format} would run on the {kernel}; accepted are "
                             "formats with a kernel (tersor.specs() lists them)")


def explain(model: nn.Module) -> Report:
    """What runs in a model now: format, stored bits and kernel of each compressed layer, and what is not compressed."""
    from .experts import Experts

    report = Report()
    held = set()
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding, Experts)):
            shape = tuple(module.shape)
            numel = module.shape.numel() if isinstance(module.shape, torch.Size) else _product(shape)
            report.add(Row(name, str(module.format), module.method, shape, 8 * module.nbytes / numel, module.kernel,
                           bytes_before=numel * module.weight_dtype.itemsize, bytes_after=module.nbytes))
            held.update(id(parameter) for parameter in module.parameters())
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            report.kept[name] = f"{type(module).__name__} {list(module.weight.shape)} {module.weight.dtype}"
    report.kept_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return report


def _product(shape) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@dataclass(frozen=True)
class SpecInfo:
    """One name of the spec grammar: ``kind`` is format, preset or method; ``kernel`` what serves it on the CPU."""

    name: str
    kind: str
    help: str
    kernel: str = ""


def specs() -> list[SpecInfo]:
    """Every format, preset and method that a spec can name, and the kernel that serves it (or ``reference: why``)."""
    infos = []
    shape = (4096, 4096)
    for entry in FORMATS or _filled():
        format = resolve(entry.example).format
        infos.append(SpecInfo(entry.example, "format", entry.help, format.kernel(shape)))
    for name in preset_names():
        if name != "UNQUANTIZED":
            format = resolve(name).format
            infos.append(SpecInfo(name, "preset", f"compressed-tensors preset, {format}", format.kernel(shape)))
    for name, method in METHODS.items():
        doc = (method.__doc__ or "").strip().split("\n")[0]
        infos.append(SpecInfo(name, "method", doc))
    return infos


def _filled():
    resolve("rtn:W4A16")
    return FORMATS
