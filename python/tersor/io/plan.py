"""A checkpoint read against a model: which module takes which tensors, verified before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..experts import Experts, is_experts, matrices
from ..formats.base import TensorSpec
from ..layer import Embedding, Linear, LookupScale, lookup_scale
from ..patch import is_conv1d, replace
from .awq import AWQ
from .compressed_tensors import CompressedTensors
from .errors import CheckpointError, Unsupported
from .gptq import GPTQ
from .layout import Decoded, Layout, Manifest, Site, check_specs, module_specs
from .own import Native, Own, dtypes
from .shards import Checkpoint

MANIFESTS: dict[str, type[Manifest]] = {kind.container: kind for kind in (CompressedTensors, GPTQ, AWQ, Own)}


def read_manifest(raw: object, where: str = "quantization_config") -> Manifest:
    """The manifest of a ``quantization_config``. CheckpointError names the field, what was found and is accepted;
    Unsupported says the same of sound configurations that our layers do not hold."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{where}: found {type(raw).__name__}, accepted is an object")
    method = raw.get("quant_method")
    if method not in MANIFESTS if isinstance(method, str) else True:
        raise Unsupported(f"{where}.quant_method: found {method!r}, accepted are {', '.join(MANIFESTS)}")
    try:
        return MANIFESTS[method](raw)
    except CheckpointError as error:
        raise type(error)(f"{where}.{error}") from None


@dataclass(frozen=True)
class Slot:
    """One compressed module of a checkpoint: where it goes, how it lies, and the tensors it takes."""

    site: Site
    layout: Layout
    specs: Mapping[str, TensorSpec]
    bias: TensorSpec | None
    where: str = ""

    def __post_init__(self):
        """Unsupported for embeddings with lookups of their own."""
        self._lookup_scale()

    def _lookup_scale(self) -> LookupScale | None:
        if self.site.kind != "embedding" or self.site.module is None:
            return None
        try:
            return lookup_scale(self.site.module)
        except ValueError as error:
            raise Unsupported(f"{self.where}: {error}") from None

    def decode(self, tensors: Mapping[str, Tensor]) -> Decoded:
        """What the layer holds. CheckpointError names the module."""
        try:
            return self.layout.decode(dict(tensors), self.site)
        except CheckpointError as error:
            raise type(error)(f"{self.where}: {error}") from None
        except (ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def build(self, decoded: Decoded, bias: Tensor | None = None, device=None) -> nn.Module:
        """The layer of ours that holds a decoded weight, on ``device`` (default: where the tensors are)."""
        site, format = self.site, decoded.format
        tensors = {name: tensor if device is None else tensor.to(device) for name, tensor in decoded.tensors.items()}
        dtype = self._stored_dtype(decoded)
        if site.kind == "experts":
            layer = Experts.holding(site.module, format, "meta", dtype)
        elif site.kind == "embedding":
            layer = Embedding(*site.shape, format, site.module.padding_idx if site.module is not None else None,
                              dtype, "meta", self._lookup_scale())
        else:
            layer = Linear(site.shape[1], site.shape[0], format, False, dtype, "meta",
                           [step.to(device) for step in decoded.pre], [step.to(device) for step in decoded.post])
            if bias is not None:
                layer.bias = nn.Parameter(bias if device is None else bias.to(device), requires_grad=False)
        layer.load_tensors(tensors)
        layer.weight_dtype = site.dtype
        layer.train(False)
        return layer

    def _stored_dtype(self, decoded: Decoded) -> torch.dtype:
        """The model dtype for which the format lists exactly these tensors."""
        for dtype in dtypes(self.site):
            specs = Native(decoded.format).specs(self.site, dtype)
            if all(decoded.tensors[name].dtype == spec.dtype for name, spec in specs.items()):
                return dtype
        return self.site.dtype


@dataclass
class LoadPlan:
    """What loading a checkpoint into a model does: `slots` by module name; `missing` parameters that no tensor of
    the checkpoint gives."""

    slots: dict[str, Slot]
    missing: list[str] = field(default_factory=list)


class Names:
    """Checkpoint names of a model's tensors, as transformers renames them while loading."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.renamings, self.converters, self.prefix = [], [], getattr(model, "base_model_prefix", None)
        self.state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        if hasattr(model, "all_tied_weights_keys"):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            mapping = get_model_conversion_mapping(model)
            self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def model_name(self, stored: str) -> str | None:
        """The model's name for a stored tensor; None where several stored tensors are merged into one."""
        if not hasattr(self.model, "all_tied_weights_keys"):
            return stored
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and stored in self.state:
            name, converted = stored, None
        return name if converted is None else None


def describe(model: nn.Module, names: Names | None = None, checkpoint: Checkpoint | None = None) -> dict[str, Site]:
    """Every module of a model that can hold a compressed weight, by name."""
    stored: dict[str, str] = {}
    if checkpoint is not None and names is not None:
        for module in module_specs(checkpoint):
            name = names.model_name(f"{module}.weight")
            if name is not None and name.endswith(".weight"):
                stored[name.removesuffix(".weight")] = module
    sites: dict[str, Site] = {}
    for name, module in model.named_modules():
        kind, shape = _kind(module)
        if kind is None:
            continue
        parameter = next(module.parameters(recurse=False))
        classes = tuple(cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module))
        sites[name] = Site(name, kind, shape, parameter.dtype, getattr(module, "bias", None) is not None, classes,
                           stored.get(name, name), module)
    return sites


def _kind(module: nn.Module):
    if isinstance(module, (Linear, Embedding)):
        return None, ()
    if is_conv1d(module):
        return "conv1d", (module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, nn.Linear):
        return "linear", tuple(module.weight.shape)
    if isinstance(module, nn.Embedding):
        return "embedding", tuple(module.weight.shape)
    if is_experts(module):
        return "experts", tuple(module.down_proj.shape)
    return None, ()


def plan_load(model: nn.Module, checkpoint: Checkpoint, manifest: Manifest, names: Names | None = None) -> LoadPlan:
    """Match a checkpoint with a model (which may be on ``meta``). Nothing is changed or read beyond headers.
    ``names`` spares working out the model's names again.

    CheckpointError: tensors are missing, or have other shapes or dtypes than the model and the configuration say.
    """
    names = names or Names(model)
    sites = describe(model, names, checkpoint)
    layouts = manifest.layouts(sites, checkpoint)
    specs = module_specs(checkpoint)
    slots: dict[str, Slot] = {}
    for name, layout in layouts.items():
        site = sites[name]
        found = specs.get(site.stored, {})
        where = f"{checkpoint.directory}: module {site.stored!r}"
        try:
            expected = layout.expected(site, found)
        except CheckpointError as error:
            raise type(error)(f"{checkpoint.directory}: {error}") from None
        check_specs(where, expected, found)
        bias = _bias(where, site, found)
        own = site.module._parameters if site.kind == "experts" else ("bias",)
        extra = [local for local in found if local not in expected and local not in own]
        if extra:
            raise Unsupported(f"{where}: tensor {extra[0]!r}: no part of the layout that the configuration names")
        slots[name] = Slot(site, layout, expected, bias, where)
    return LoadPlan(slots, _check_dense(model, names, checkpoint, slots))


def _bias(where: str, site: Site, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
    spec = found.get("bias")
    if site.kind == "experts":
        return None
    if spec is None:
        if site.bias:
            raise CheckpointError(f"{where}: tensor 'bias': not in the checkpoint, and the model has one")
        return None
    if site.kind not in ("linear", "conv1d") or spec.shape != (site.shape[0],) or not spec.dtype.is_floating_point:
        raise CheckpointError(f"{where}: tensor 'bias': found {spec.dtype} {list(spec.shape)}, accepted is a float "
                              f"[{site.shape[0]}]")
    return spec


def _check_dense(model: nn.Module, names: Names, checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> list[str]:
    """Shapes and kinds of the tensors that stay as they are; the parameters that no tensor gives."""
    taken = {f"{slot.site.stored}.{local}" for slot in slots.values() for local in (*slot.specs, "bias")}
    given = set()
    for stored, entry in checkpoint.entries.items():
        if stored in taken:
            continue
        name = names.model_name(stored)
        if name not in names.state:
            continue
        given.add(name)
        want = names.state[name]
        if tuple(want.shape) != entry.shape or want.is_floating_point() != entry.dtype.is_floating_point:
            raise CheckpointError(f"{checkpoint.where(stored)}: found {entry}, accepted is {want.dtype} "
                                  f"{list(want.shape)}")
    merged = [pattern for converter in names.converters for pattern in converter.target_patterns]
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    replaced = {f"{name}.{projection}" for name, slot in slots.items() if slot.site.kind == "experts"
                for projection in matrices(slot.site.module)}
    missing = []
    for name in names.state:
        module = name.rpartition(".")[0]
        if name in given or module in slots and (slots[module].site.kind != "experts" or name in replaced):
            continue
        if name in tied and tied[name] in given:
            continue
        if any(re.search(pattern, name) for pattern in ignored):
            continue
        if any(pattern.replace("$", "").replace("^", "") in name for pattern in merged):
            continue
        missing.append(name)
    return missing


# -- a module while it is loaded --------------------------------------------------------------------------------


class Loading(nn.Module):
    """Stands in a model for one compressed module while a loader fills its stored tensors, under their own names."""

    def __init__(self, slot: Slot):
        super().__init__()
        self.slot = slot
        self._is_hf_initialized = True  # complete by `plan_load`: nothing here is ever initialised at random
        for name, spec in slot.specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        if "weight" not in slot.specs:  # models' own initialisers look at it, and leave what is flagged alone
            weight = torch.empty(slot.site.shape, dtype=slot.site.dtype, device="meta")
            weight._is_hf_initialized = True
            self.__dict__["weight"] = weight
        if slot.site.kind == "experts":  # biases and the like load beside the matrices
            kept = slot.site.module
            for name, parameter in kept._parameters.items():
                if name not in matrices(kept):
                    self.register_parameter(name, parameter)
            for name, child in kept._modules.items():
                self.add_module(name, child)
        if slot.bias is not None:
            bias = torch.empty(slot.bias.shape, dtype=slot.site.dtype, device="meta")
            self.register_parameter("bias", nn.Parameter(bias, requires_grad=False))

    def finish(self) -> nn.Module:
        """The layer of ours, once the tensors are there. CheckpointError when they are not, or are not sound."""
        unfilled = [name for name, tensor in self.state_dict().items() if tensor.device.type == "meta"]
        if unfilled:
            raise CheckpointError(f"{self.slot.where}: tensor {unfilled[0]!r}: was not loaded")
        tensors = {name: getattr(self, name).to("cpu", spec.dtype) for name, spec in self.slot.specs.items()}
        device = getattr(self, next(iter(tensors))).device
        bias = None
        if self.slot.bias is not None:
            bias = self.bias.detach()
            if not bool(bias.isfinite().all()):
                raise CheckpointError(f"{self.slot.where}: bias: found NaN or infinite values, accepted are finite "
                                      "ones")
            if not self.slot.site.bias and not bool(bias.any()):
                bias = None  # some writers give every layer a bias of zeros
        if self.slot.site.kind == "experts":
            self.slot.site.module._parameters.update(self._parameters)
        layer = self.slot.build(self.slot.decode(tensors), bias, device)
        layer._is_hf_initialized = True
        return layer


def begin(model: nn.Module, plan: LoadPlan) -> None:
    """Put a `Loading` in the place of each compressed module."""
    replace(model, {name: Loading(slot) for name, slot in plan.slots.items()})
    untie(model, plan.slots)


def finish(model: nn.Module) -> None:
    """Put the layers in the place of the `Loading` modules."""
    loading = {name: module for name, module in model.named_modules() if isinstance(module, Loading)}
    layers = {name: module.finish() for name, module in loading.items()}
    replace(model, layers)
    for name, module in loading.items():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layers[name], hook)


def untie(model: nn.Module, names) -> None:
    """Make the model forget tied parameters that a compressed module has taken the place of."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if not tied:
        return
    gone = {f"{name}.weight" for name in names}
    if any(key in gone or value in gone for key, value in tied.items()):
        model.all_tied_weights_keys = {key: value for key, value in tied.items()
                                       if key not in gone and value not in gone}
        if hasattr(model.config, "tie_word_embeddings"):
            model.config.tie_word_embeddings = False


def read_layers(model: nn.Module, checkpoint: Checkpoint, manifest: Manifest,
                names: Names | None = None) -> dict[str, nn.Module]:
    """Every compressed layer of a checkpoint, read and decoded for ``model`` (which is left as it is)."""
    plan = plan_load(model, checkpoint, manifest, names)
    if plan.missing:
        raise CheckpointError(f"{checkpoint.directory}: tensor {plan.missing[0]!r}: not in the checkpoint, and the "
                              "model has it")
    made = {}
    for name, slot in plan.slots.items():
        tensors = {local: checkpoint.read(f"{slot.site.stored}.{local}") for local in slot.specs}
        bias = None if slot.bias is None else checkpoint.read(f"{slot.site.stored}.bias").to(slot.site.dtype)
        made[name] = slot.build(slot.decode(tensors), bias)
    return made
