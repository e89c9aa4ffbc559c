"""Our own container, for what the standard ones cannot hold: any format, online steps, fused experts.

Its configuration has compressed-tensors' shape (``config_groups`` of ``targets`` and a ``format``), with the spec of
each group beside. Integer weights lie in the ``pack-quantized`` layout; everything else as the format's own tensors,
named by `Format.spec` (dots written as ``__``), and steps as ``pre_<i>_<tensor>`` and ``post_<i>_<tensor>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import blockwise
from ..experts import Experts
from ..formats.base import Format, Tensors, TensorSpec, under
from ..formats.integer import Int
from ..registry import resolve_format
from ..spec import SpecError
from ..transforms.steps import KEY_TRANSFORM, STEPS, Step
from .compressed_tensors import PackQuantized
from .errors import CheckpointError, Unsupported
from .layout import Decoded, Layout, Manifest, Site, integer, module_specs
from .shards import Checkpoint

METHOD = "tersor"
VERSION = 1
PACKED, NATIVE = "pack-quantized", "tersor-native"
_LIMIT = 64  # steps of a layer


@dataclass(frozen=True)
class StepSpec:
    """One online step: its kind, where it is, and how many channels it has."""

    side: str
    index: int
    kind: str

    def names(self, width: int, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        start = f"{self.side}_{self.index}_"
        own = {name.removeprefix(start): spec for name, spec in found.items() if name.startswith(start)}
        return {start + name: spec for name, spec in STEPS[self.kind].spec_of(width, own).items()}

    def make(self, tensors: Tensors, width: int) -> Step:
        start = f"{self.side}_{self.index}_"
        step = STEPS[self.kind].empty(width)
        for name in STEPS[self.kind].spec(width):
            setattr(step, name, tensors[start + name])
        try:
            step.validate()
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.side} step {self.index}: {error}") from None
        return step


@dataclass(frozen=True)
class OwnLayout(Layout):
    """A format named by its spec, and steps."""

    format: Format
    steps: tuple[StepSpec, ...] = ()

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return self._weight(site, found) | self._step_specs(site, found)

    def _step_specs(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        made: dict[str, TensorSpec] = {}
        for step in self.steps:
            made |= step.names(site.shape[1] if step.side == "pre" else site.shape[0], found)
        return made

    def _weight(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        raise TypeError("a layout without tensors")

    def _steps(self, tensors: Tensors, site: Site) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        pre = tuple(step.make(tensors, site.shape[1]) for step in self.steps if step.side == "pre")
        post = tuple(step.make(tensors, site.shape[0]) for step in self.steps if step.side == "post")
        return pre, post


@dataclass(frozen=True)
class Packed(OwnLayout):
    """An integer format in the ``pack-quantized`` layout."""

    @property
    def _standard(self) -> PackQuantized:
        f = self.format
        return PackQuantized(f.num_bits, f.group_size, f.symmetric, f.activation, f.act_group)

    def _weight(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return self._standard.expected(site, found)

    def decode(self, tensors: Tensors, site: Site) -> Decoded:
        decoded = self._standard.decode(tensors, site)
        f = self.format
        format = replace(decoded.format, act_clip=f.act_clip, act_sym=f.act_sym)
        pre, post = self._steps(tensors, site)
        return replace(decoded, format=format, pre=pre, post=post)


@dataclass(frozen=True)
class Native(OwnLayout):
    """The format's own tensors."""

    def _weight(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        first = None
        for dtype in dtypes(site):
            specs = {stored(name): spec for name, spec in self.specs(site, dtype).items()}
            if all(found.get(name) == spec for name, spec in specs.items()):
                return specs
            first = first or specs
        return first

    def specs(self, site: Site, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The format's tensors for a model of ``dtype``."""
        if site.kind == "experts":
            return {name: TensorSpec(tuple(tensor.shape), tensor.dtype)
                    for name, tensor in Experts.holding(site.module, self.format, "meta", dtype).tensors().items()}
        try:
            self.format.check(site.shape)
            return self.format.spec(site.shape, dtype)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"module {site.name!r}: format {self.format} of a {site.shape[0]} x {site.shape[1]} "
                                  f"weight: {error}") from None

    def decode(self, tensors: Tensors, site: Site) -> Decoded:
        names = self.specs(site, site.dtype)
        held = {name: tensors[stored(name)] for name in names}
        for name, tensor in held.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                raise CheckpointError(f"{stored(name)}: found NaN or infinite values, accepted are finite ones")
        if site.kind != "experts":
            self._verify(held, site, tuple(site.shape))
        elif not isinstance(self.format, Int) or self.format.two_level:  # any bytes are sound integer codes
            for projection, shape in Experts.holding(site.module, self.format, "meta").projections.items():
                for expert in range(site.shape[0]):
                    one = {name: tensor[expert] for name, tensor in under(held, projection).items()}
                    self._verify(one, site, shape)
        pre, post = self._steps(tensors, site)
        return Decoded(self.format, held, pre, post)

    def _verify(self, held: Tensors, site: Site, shape: tuple[int, int]) -> None:
        try:
            self.format.verify(held, shape)
        except ValueError as error:
            raise CheckpointError(f"the tensors of {self.format}: {error}") from None
        # Codes may be indices into other tensors: unpacking once finds those that point outside.
        try:
            w = self.format.unpack(held, shape, torch.float32)
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"the tensors of {self.format} do not make a weight ({error})") from None
        if tuple(w.shape) != shape or not bool(w.isfinite().all()):
            raise CheckpointError(f"the tensors of {self.format} make a weight that is not finite")


def dtypes(site: Site) -> tuple[torch.dtype, ...]:
    """Model dtypes for which a weight may have been stored, the loaded model's own first."""
    return tuple(dict.fromkeys((site.dtype, torch.bfloat16, torch.float16, torch.float32)))


def stored(name: str) -> str:
    """The local name, in a checkpoint, of a format's tensor. Fused experts' names lose ``_proj``: transformers would
    split tensors that are named like the parameters."""
    projection, dot, rest = name.partition(".")
    if dot and projection in ("gate_up_proj", "up_proj", "down_proj"):
        name = f"{projection.removesuffix('_proj')}.{rest}"
    return name.replace(".", "__")


# -- the configuration ------------------------------------------------------------------------------------------


class Own(Manifest):
    """The ``quantization_config`` of our own container."""

    container = METHOD

    def __init__(self, raw: Mapping):
        super().__init__(raw)
        version = raw.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise CheckpointError(f"version: found {version!r}, accepted are 1 to {VERSION}; a newer tersor may read "
                                  "it")
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"config_groups: found {groups!r}, accepted is an object of groups")
        self.key_transforms = raw.get("key_transforms", [])
        if not isinstance(self.key_transforms, list) or not all(isinstance(name, str) for name in self.key_transforms):
            raise CheckpointError(f"key_transforms: found {self.key_transforms!r}, accepted is a list of module names")
        self.blockwise = _blockwise(raw.get("blockwise", []))
        self.by_name: dict[str, OwnLayout] = {}
        for key, group in groups.items():
            what = f"config_groups.{key}"
            if not isinstance(group, dict):
                raise CheckpointError(f"{what}: found {type(group).__name__}, accepted is an object")
            targets = group.get("targets")
            if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
                raise CheckpointError(f"{what}.targets: found {targets!r}, accepted is a list of module names")
            layout = _layout(what, group)
            for name in targets:
                if name in self.by_name:
                    raise CheckpointError(f"{what}.targets: module {name!r} is also in another group")
                self.by_name[name] = layout

    def layouts(self, sites: Mapping[str, Site], checkpoint: Checkpoint) -> dict[str, Layout]:
        for name, layout in self.by_name.items():
            site = sites.get(name)
            if site is None:
                raise CheckpointError(f"{checkpoint.directory}: the configuration names module {name!r}, and the model "
                                      "has no such Linear, Conv1D, Embedding or expert module")
            _fits(layout, site)
        specs = module_specs(checkpoint)
        for name, site in sites.items():
            packed = [local for local in specs.get(site.stored, {}) if local not in ("weight", "bias")]
            if packed and name not in self.by_name and site.kind != "experts":
                raise CheckpointError(f"{checkpoint.where(f'{site.stored}.{packed[0]}')}: no group of the "
                                      "configuration covers the module")
        return {name: self.by_name[name] for name in sites if name in self.by_name}


def declare(model: nn.Module, manifest: Manifest) -> None:
    """Give attentions the buffer that the checkpoint has for their maps of keys (FlatQuant), to be filled by a loader,
    and exchange what computes in blocks (`tersor.blockwise`). CheckpointError for modules of other kinds."""
    modules = dict(model.named_modules())
    for name in getattr(manifest, "key_transforms", ()):
        module = modules.get(name)
        size = getattr(module, "head_dim", None)
        if not isinstance(size, int) or not isinstance(getattr(module, "layer_idx", None), int):
            raise CheckpointError(f"key_transforms: found {name!r}, accepted are attentions of the model that have a "
                                  "head_dim")
        dtype = next(module.parameters()).dtype
        module.register_buffer(KEY_TRANSFORM, torch.empty(size, size, dtype=dtype, device="meta"))
    try:
        blockwise.exchange(model, getattr(manifest, "blockwise", {}))
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _fits(layout: OwnLayout, site: Site) -> None:
    if site.kind == "embedding" and (not isinstance(layout.format, Int) or layout.steps):
        raise CheckpointError(f"module {site.name!r}: found {layout.format}, accepted is an integer format without "
                              "steps for an embedding")
    if site.kind == "experts" and (isinstance(layout, Packed) or layout.steps):
        raise CheckpointError(f"module {site.name!r}: accepted is {NATIVE} without steps for fused experts")


def _blockwise(entries: object) -> dict[str, tuple[int, int]]:
    """``(bits, block)`` by module."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"blockwise: found {entries!r}, accepted is a list of objects")
    made = {}
    for i, entry in enumerate(entries):
        bits = integer(entry.get("bits"), f"blockwise.{i}.bits", "4 to 8", 4, 8)
        block = integer(entry.get("block"), f"blockwise.{i}.block", "1 to 65536", 1, 65536)
        names = entry.get("targets")
        if not isinstance(names, list) or not all(isinstance(name, str) and name not in made for name in names):
            raise CheckpointError(f"blockwise.{i}.targets: found {names!r}, accepted is a list of module names, each "
                                  "in one list")
        made |= dict.fromkeys(names, (bits, block))
    return made


def blockwise_entries(settings: Mapping[str, tuple[int, int]]) -> list[dict]:
    """``blockwise`` of the configuration: modules by what they share."""
    made: dict[tuple[int, int], list[str]] = {}
    for name, setting in settings.items():
        made.setdefault(setting, []).append(name)
    return [{"bits": bits, "block": block, "targets": names} for (bits, block), names in made.items()]


def _layout(what: str, group: Mapping) -> OwnLayout:
    spec, kind = group.get("spec"), group.get("format")
    if not isinstance(spec, str):
        raise CheckpointError(f"{what}.spec: found {spec!r}, accepted is a format spec such as 'W4A16'")
    try:
        format = resolve_format(spec)
    except SpecError as error:
        raise CheckpointError(f"{what}.spec: {error}") from None
    steps = _steps(what, "pre", group.get("pre", [])) + _steps(what, "post", group.get("post", []))
    if kind == PACKED and isinstance(format, Int) and format.standard:
        return Packed(format, steps)
    if kind != NATIVE:
        raise CheckpointError(f"{what}.format: found {kind!r} for {spec}, accepted are {PACKED!r} (integer formats) "
                              f"and {NATIVE!r}")
    return Native(format, steps)


def _steps(what: str, side: str, kinds: object) -> tuple[StepSpec, ...]:
    if not isinstance(kinds, list) or len(kinds) > _LIMIT or not all(kind in STEPS for kind in kinds
                                                                    if isinstance(kind, str)) \
            or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"{what}.{side}: found {kinds!r}, accepted is a list of {', '.join(STEPS)}")
    return tuple(StepSpec(side, i, kind) for i, kind in enumerate(kinds))


def layout_of(layer: nn.Module) -> OwnLayout:
    """How a layer of ours is stored here. Unsupported when its format has no name in the spec grammar."""
    format = layer.format
    try:
        text = format.text()
        named = resolve_format(text) == format
    except (SpecError, TypeError) as error:
        raise Unsupported(f"format {type(format).__name__}: {error}") from None
    if not named:
        raise Unsupported(f"format {format!r}: its name {text!r} stands for another format")
    steps = _held(getattr(layer, "pre", None), "pre") + _held(getattr(layer, "post", None), "post")
    packed = isinstance(format, Int) and format.standard and not isinstance(layer, Experts)
    return (Packed if packed else Native)(format, steps)


def _held(steps: Iterable[Step] | None, side: str) -> tuple[StepSpec, ...]:
    for step in steps or ():
        if STEPS.get(getattr(step, "kind", None)) is not type(step):
            raise Unsupported(f"{side} step {type(step).__name__}: it is not registered under a kind")
    return tuple(StepSpec(side, i, step.kind) for i, step in enumerate(steps or ()))


def encode_steps(layer: nn.Module) -> Tensors:
    """The tensors of a layer's steps, under their stored names."""
    made: Tensors = {}
    for side in ("pre", "post"):
        for i, step in enumerate(getattr(layer, side, None) or ()):
            for name in STEPS[step.kind].spec(1):
                made[f"{side}_{i}_{name}"] = getattr(step, name)
    return made


def groups(layouts: Mapping[str, tuple[OwnLayout, Sequence[str]]]) -> dict:
    """``config_groups`` of modules by the layout and the methods that they share."""
    made: dict[tuple, dict] = {}
    for name, (layout, method) in layouts.items():
        key = (layout, method)
        if key not in made:
            made[key] = {
                "format": PACKED if isinstance(layout, Packed) else NATIVE,
                "spec": layout.format.text(),
                "method": method,
                "pre": [step.kind for step in layout.steps if step.side == "pre"],
                "post": [step.kind for step in layout.steps if step.side == "post"],
                "targets": [],
            }
        made[key]["targets"].append(name)
    return {f"group_{i}": group for i, group in enumerate(made.values())}
