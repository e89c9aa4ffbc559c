"""`accelerate`: the packed modules of a model that another library loaded, onto our layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..formats.base import TensorSpec, reference_kernel
from ..gate import fuse_gates
from ..io.awq import AWQLayout
from ..io.compressed_tensors import METHOD as COMPRESSED_TENSORS
from ..io.compressed_tensors import CompressedTensors
from ..io.errors import CheckpointError, Unsupported
from ..io.gptq import GPTQLayout
from ..io.layout import IntLayout, Site, check_specs, runnable_group
from ..io.plan import Slot
from ..io.write import packed_elsewhere
from ..layer import Embedding, Linear
from ..norm import fuse_norms
from ..patch import link_siblings, replace
from ..report import Report, Row

_HOOK = "ct_decompress_hook"


def accelerate(model: nn.Module, strict: bool = False) -> Report:
    """Put our layers in the place of the packed modules of a loaded compressed-tensors, GPTQ or AWQ model, in place.

    The values are the same; weights stay packed (compressed-tensors' hook that decompresses the model at its first
    forward is removed once nothing is left for it). Returns a report whose ``kept`` names each packed module that was
    left to its own code, and why: those with hooks or submodules of their own among them. ``strict=True`` refuses,
    before anything is changed, when there is one. Attentions stay as they are, and so does what they hold: maps of keys
    that FlatQuant learned serve ``flatquant:`` caches, and are saved in our container.

    ValueError: the model has no packed module, or its tensors are not sound.
    """
    taken: dict[str, nn.Module] = {}
    report = Report()
    dtype = next((p.dtype for name, p in model.named_parameters() if p.is_floating_point()
                  and not name.endswith((".weight_scale", ".scales"))), None)
    for name, module in packed_elsewhere(model):
        try:
            taken[name] = _layer(name, module, dtype)
        except Unsupported as error:
            report.kept[name] = str(error)
    if strict and report.kept:
        name, why = next(iter(report.kept.items()))
        raise ValueError(f"strict: layer {name!r} stays as it is: {why}")
    if not taken and not report.kept:
        raise ValueError("model: found no packed module; accepted are compressed-tensors models that have not run yet, "
                         "and loaded GPTQ and AWQ models")
    replace(model, taken)
    for name, layer in taken.items():
        report.add(Row(name, str(layer.format), "", tuple(layer.shape), 8 * layer.nbytes / layer.shape[0]
                       / layer.shape[1], layer.kernel, bytes_before=layer.nbytes, bytes_after=layer.nbytes,
                       note="reference" if reference_kernel(layer.kernel) else ""))
    if taken and not report.kept:
        _remove_hook(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(module, (Linear, Embedding)) \
                and name not in report.kept:
            report.kept[name] = f"{type(module).__name__}, not compressed"
    _adopt(model, report)
    link_siblings(model)
    fuse_norms(model)
    fuse_gates(model)
    return report


def _held(module: nn.Module) -> dict[str, Tensor]:
    held = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
    return {name: tensor.detach() for name, tensor in held.items()}


def _layer(name: str, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    extra = [kind for kind, found in (("forward hooks", module._forward_hooks or module._forward_pre_hooks),
                                      ("submodules", module._modules)) if found]
    if extra:
        raise Unsupported(f"found {' and '.join(extra)} (online transforms, adapters), accepted are modules of packed "
                          "tensors alone: a layer of ours would not run them")
    held = _held(module)
    bias = held.pop("bias", None)
    if isinstance(module, nn.Embedding):
        held.pop("embed_scale", None)  # a number of the class's own
    layout, shape = _compressed_tensors(name, module, held) if "weight_packed" in held else _gptq_or_awq(module, held)
    device = next(iter(held.values())).device
    scale = held.get("weight_scale", held.get("scales"))
    kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    site = Site(name, kind, shape, dtype or scale.dtype, bias is not None, module=module)
    found = {local: TensorSpec(tuple(tensor.shape), tensor.dtype) for local, tensor in held.items()}
    expected = layout.expected(site, found)
    check_specs(f"layer {name!r}", expected, found)
    extra = [local for local in found if local not in expected]
    if extra and any(bool(held[local].numel()) for local in extra):
        raise Unsupported(f"tensor {extra[0]!r} is no part of the layout")
    slot = Slot(site, layout, expected, None, f"layer {name!r}")
    tensors = {local: held[local].to("cpu") for local in expected}
    return slot.build(slot.decode(tensors), bias, device)


def _compressed_tensors(name: str, module: nn.Module, held: Mapping[str, Tensor]) -> tuple[IntLayout, tuple[int, int]]:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        raise Unsupported("it has no quantization scheme")
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise Unsupported(f"found {type(module).__name__}, accepted are Linear and Embedding")
    group = scheme.model_dump() if hasattr(scheme, "model_dump") else dict(scheme)
    group = {key: getattr(value, "value", value) for key, value in group.items()}
    manifest = CompressedTensors({
        "quant_method": COMPRESSED_TENSORS, "quantization_status": "compressed", "format": "pack-quantized",
        "config_groups": {"group_0": group | {"targets": [name]}},
    })
    shape = held["weight_shape"].tolist() if "weight_shape" in held else []
    if len(shape) != 2:
        raise CheckpointError(f"layer {name!r}: weight_shape: found {shape}, accepted are two sizes")
    return manifest.schemes[0][1], tuple(shape)


def _gptq_or_awq(module: nn.Module, held: Mapping[str, Tensor]) -> tuple[IntLayout, tuple[int, int]]:
    qweight, scales = held["qweight"], held["scales"]
    if qweight.dim() != 2 or scales.dim() != 2 or "qzeros" not in held:
        raise Unsupported("its tensors are not those of GPTQ or AWQ")
    bits = getattr(module, "bits", getattr(module, "w_bit", 4))
    width = getattr(module, "in_features", getattr(module, "infeatures", None))
    if not isinstance(width, int) or type(bits) is not int:
        raise Unsupported(f"found {type(module).__name__} without in_features and bits")
    groups, out = scales.shape
    size = getattr(module, "group_size", None) or -(-width // groups)
    size = 0 if groups == 1 else runnable_group(size, "group_size")
    if tuple(qweight.shape) == (width, out // 8) and bits == 4 and (width, out // 8) != (width // 8, out):
        return AWQLayout(4, size, False), (out, width)
    # GPTQModel's modules say in which format their zero points are at the moment; others keep v1's
    version = module.qzero_format() if callable(getattr(module, "qzero_format", None)) else 1
    return GPTQLayout(bits, size, False, v2=version == 2), (out, width)


def _remove_hook(model: nn.Module) -> None:
    for module in model.modules():
        handle = module.__dict__.get(_HOOK)
        if handle is not None:
            handle.remove()
            delattr(module, _HOOK)


def _adopt(model: nn.Module, report: Report) -> None:
    """Let ``save_pretrained`` write what is now in the model."""
    if report.rows and next(packed_elsewhere(model), None) is None:
        from .transformers import attach

        attach(model)
