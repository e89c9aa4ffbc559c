"""`CachePlan`: a cache spec with what its methods learned from data; made by `calibrate`, kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..spec import CacheSpec, SpecError, parse_cache
from .geometry import geometry_of
from .methods import CacheMethod, make_method, method_atom
from .settings import Settings

FORMAT = "tersor-cache-plan"


@dataclass(frozen=True, eq=False)
class CachePlan:
    """``settings`` of the pages, ``methods`` outermost first, ``tensors[method][layer]`` for those that learned, and
    ``geometry``: the numbers of the model that it was made for."""

    settings: Settings
    spec: CacheSpec
    methods: tuple[CacheMethod, ...] = ()
    tensors: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    geometry: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether keys and values come out as they went in."""
        return not self.methods and not self.settings.packs

    @property
    def needs_rotary(self) -> bool:
        return self.settings.rope == "pre" or any(method.rotary for method in self.methods)

    def layer(self, index: int) -> tuple[Settings, tuple[tuple[CacheMethod, dict[str, Tensor]], ...]]:
        return self.settings, tuple((m, self.tensors.get(m.name, {}).get(index, {})) for m in self.methods)

    def report(self) -> str:
        """What the methods learned, in words: the heads that RazorAttention keeps whole, for instance."""
        texts = [(method.name, method.describe(self.tensors.get(method.name, {}))) for method in self.methods]
        return "\n".join([f"cache plan {self.spec}", *(f"{name}: {line}" for name, text in texts
                                                       for line in text.splitlines())])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        flat = {f"{method}.{layer}.{name}": tensor.contiguous() for method, layers in self.tensors.items()
                for layer, tensors in layers.items() for name, tensor in tensors.items()}
        about = {"format": FORMAT, "version": "1", "spec": str(self.spec), "geometry": json.dumps(self.geometry)}
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        save_file(flat, str(part), about)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CachePlan":
        """Read what `save` wrote. ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                flat = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: found no safetensors file ({error}), accepted is what CachePlan.save "
                             "wrote") from error
        if about.get("format") != FORMAT or about.get("version") != "1":
            raise ValueError(f"{path}: found format {about.get('format')!r} version {about.get('version')!r}, accepted "
                             f"is {FORMAT!r} version '1'")
        tensors: dict = {}
        for name, tensor in flat.items():
            method, layer, key = name.split(".", 2)
            tensors.setdefault(method, {}).setdefault(int(layer), {})[key] = tensor
        spec = parse_cache(about["spec"])
        return cls(Settings.of(spec), spec, tuple(map(make_method, spec.methods)), tensors,
                   json.loads(about["geometry"]))


def read_plan(spec: str, options: dict) -> CachePlan:
    """A spec's plan before any calibration."""
    parsed = parse_cache(spec)
    settings = Settings.of(parsed, options)
    given = tuple((dict(parsed.options) | options).items())
    methods = tuple(make_method(atom) for atom in parsed.methods)
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"cache spec {spec!r}: found method {name!r} twice, accepted is once")
    for method in methods[:-1]:
        if method.innermost:
            raise SpecError(f"cache spec {spec!r}: found {method.name!r} before "
                            f"{names[names.index(method.name) + 1]!r}, accepted is {method.name!r} as the last method: "
                            "it packs pages itself")
    for i, method in enumerate(methods):
        inside = [other.name for other in methods[i + 1:] if other.calibrated or other.rotary]
        if method.given and inside:
            raise SpecError(f"cache spec {spec!r}: found {inside[0]!r} inside {method.name!r}, accepted are methods "
                            "that know nothing of the model's own keys")
    if methods and methods[-1].innermost and settings.hadamard:
        raise SpecError(f"cache spec {spec!r}: found hadamard=true with {names[-1]!r}, which packs pages itself; "
                        "accepted is hadamard=false")
    atoms = tuple(map(method_atom, methods))
    return CachePlan(settings, CacheSpec(settings.key_bits, settings.value_bits, given, atoms), methods)


def plan_for(model: nn.Module, spec: str | CachePlan, options: dict) -> CachePlan:
    """The plan that a cache of ``model`` runs. ValueError where it does not fit the model, or lacks calibration."""
    if isinstance(spec, CachePlan):
        if options:
            raise ValueError(f"cache: found options {', '.join(options)} beside a plan, accepted is the plan alone")
        found = geometry_of(model)
        if spec.geometry and spec.geometry != found:
            raise ValueError(f"cache plan {str(spec.spec)!r}: found a model of {found}, accepted is {spec.geometry}")
        plan = spec
    else:
        plan = read_plan(spec, options)
    for method in plan.methods:
        if method.calibrated and method.name not in plan.tensors:
            raise ValueError(f"cache spec {str(plan.spec)!r}: method {method.name!r} learns from data first; accepted "
                             f"is the plan of tersor.kv.calibrate(model, {str(plan.spec)!r}, ...)")
        method.check(model, plan.settings)
    given = {method.name: method.find(model) for method in plan.methods if method.given}
    return replace(plan, tensors={**plan.tensors, **given}) if given else plan


def calibrate(model: nn.Module, spec: str, calibration: Sequence | None = None, tokenizer=None, *, length: int = 512,
              sequences: int = 16, progress: Callable[[str], None] | None = None, **options) -> CachePlan:
    """Let the methods of a cache spec learn from data; the result goes to `tersor.Cache` in place of the spec.

    ``calibration``: texts (with ``tokenizer``), or token ids (tensors ``[length]`` or ``[sequences, length]``); at most
    ``sequences`` of ``length`` tokens are used; None where no method needs data (razor). The model is left as it was.
    Raises ValueError for a method that the model's layers cannot take, no data, or data shorter than 32 tokens.
    """
    plan = read_plan(spec, options)
    for method in plan.methods:
        method.check(model, plan.settings)
    learners = [method for method in plan.methods if method.calibrated]
    tensors: dict[str, dict[int, dict[str, Tensor]]] = {}
    if learners:
        needed = any(method.data for method in learners)
        batches = token_batches(calibration, tokenizer, length, sequences) if needed else []
        was_training = model.training
        model.eval()
        try:
            for method in learners:
                tensors[method.name] = {layer: {name: t.detach().cpu().contiguous() for name, t in found.items()}
                                        for layer, found in method.learn(model, batches, plan.settings,
                                                                         progress or (lambda text: None)).items()}
        finally:
            model.train(was_training)
    return CachePlan(plan.settings, plan.spec, plan.methods, tensors, geometry_of(model))


def token_batches(calibration, tokenizer, length: int, sequences: int) -> list[Tensor]:
    """Token ids ``[1, length]``, as many as there are, up to ``sequences``; a shorter last one of 32 or more counts."""
    if calibration is None or isinstance(calibration, str):
        found = "nothing" if calibration is None else "one string"
        raise ValueError(f"calibration: found {found}, accepted is a list of texts or of token ids")
    pieces, rest = [], []
    for item in calibration:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("calibration: found texts without a tokenizer, accepted are both, or token ids")
            rest.extend(tokenizer(item)["input_ids"])
        else:
            rows = torch.as_tensor(item)
            if rows.is_floating_point():
                raise ValueError(f"calibration: found {rows.dtype}, accepted are token ids or texts")
            for row in rows.reshape(-1, rows.shape[-1]):
                pieces.extend(row.split(length))
        while len(rest) >= length:
            pieces.append(torch.tensor(rest[:length]))
            rest = rest[length:]
        if len(pieces) >= sequences:
            break
    if rest:
        pieces.append(torch.tensor(rest))
    pieces = [piece.view(1, -1).long() for piece in pieces if len(piece) >= 32][:sequences]
    if not pieces:
        raise ValueError("calibration: found no sequence of 32 tokens, accepted is text of that length or more")
    return pieces
