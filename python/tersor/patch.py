"""`patch`: the only place where modules of a model are exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .formats.base import Format
from .layer import Embedding, Linear, Siblings, lookup_scale
from .transforms.steps import Step

# Projections of one input that servers fuse into one matrix. They share a format, and one kernel call.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


@dataclass(frozen=True)
class LayerSpec:
    """What a module becomes: a format and online steps."""

    format: Format
    pre: Sequence[Step] = ()
    post: Sequence[Step] = ()


def patch(model: nn.Module, layers: Mapping[str, LayerSpec | Format], device=None) -> dict[str, nn.Module]:
    """Put compressed layers in the place of the named modules, and return them by name.

    Their tensors are uninitialised (on ``device``, or where the old weight was; ``meta`` serves loading) and wait for
    `load_tensors`. Linear, Conv1D, Embedding and fused expert modules are accepted; ValueError names others.
    """
    made: dict[str, nn.Module] = {}
    for name, spec in layers.items():
        if isinstance(spec, Format):
            spec = LayerSpec(spec)
        made[name] = _layer(name, _find(model, name), spec, device)
    replace(model, made)
    return made


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Exchange modules by name, each wherever the model uses it, and undo the tying of input and output embeddings
    where it would overwrite them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    config = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", False)
    ends = [end() for end in (getattr(model, "get_output_embeddings", None),
                              getattr(model, "get_input_embeddings", None)) if tied and end is not None]
    found = {name: _find(model, name) for name in modules}
    for name, module in modules.items():
        if found[name] is model:
            raise ValueError(f"layer {name!r}: found the model itself, accepted are modules of it")
        if isinstance(module, (Linear, Embedding)) and any(found[name] is end for end in ends):
            config.tie_word_embeddings = False
        for parent, key in places[id(found[name])]:
            setattr(parent, key, module)


def link_siblings(model: nn.Module) -> int:
    """Let compressed q/k/v and gate/up projections of a module share one call; returns how many groups do."""
    groups = 0
    for parent in model.modules():
        for names in FUSED:
            layers = [parent._modules.get(name) for name in names]
            if all(isinstance(layer, Linear) for layer in layers) and Siblings.fit_together(layers):
                Siblings(layers)
                groups += 1
    return groups


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"layer {name!r}: the model has no such module") from None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def as_linear(module: nn.Module) -> nn.Linear:
    """The ``nn.Linear`` that a Conv1D stands for (weights transposed); a Linear as it is."""
    if not is_conv1d(module):
        return module
    with torch.device("meta"):
        linear = nn.Linear(module.weight.shape[0], module.weight.shape[1], bias=False)
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    if module.bias is not None:
        linear.bias = module.bias
    return linear.train(module.training)


def _layer(name: str, module: nn.Module, spec: LayerSpec, device) -> nn.Module:
    from .experts import Experts, is_experts

    if isinstance(module, nn.Linear) or is_conv1d(module):
        return Linear.holding(as_linear(module), spec.format, device, spec.pre, spec.post)
    if spec.pre or spec.post:
        raise ValueError(f"layer {name!r}: online steps are for linear layers, found {type(module).__name__}")
    if isinstance(module, nn.Embedding):
        target = module.weight.device if device is None else device
        try:
            scale = lookup_scale(module)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        return Embedding(module.num_embeddings, module.embedding_dim, spec.format, module.padding_idx,
                         module.weight.dtype, target, scale)
    if is_experts(module):
        return Experts.holding(module, spec.format, device)
    raise ValueError(f"layer {name!r}: found {type(module).__name__}, accepted are Linear, Conv1D, Embedding and "
                     "expert modules with 3-D parameters")
