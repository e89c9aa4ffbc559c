"""What a compressed model's checkpoint says and holds, in each container; and which containers can hold it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import __version__, blockwise
from ..experts import Experts
from ..formats.base import Tensors
from ..formats.integer import Int, untile_rows
from ..layer import Embedding, Linear
from ..patch import is_conv1d
from ..transforms.steps import KEY_TRANSFORM, Permute
from . import awq, compressed_tensors, gptq, own
from .errors import Unsupported

Layer = Linear | Embedding | Experts
CONTAINERS = (compressed_tensors.METHOD, gptq.METHOD, awq.METHOD, own.METHOD)  # the most standard first


@dataclass(frozen=True)
class Written:
    """A model as a container holds it: the configuration, and the function from a layer to its stored tensors."""

    container: str
    config: dict
    encode: Callable[[Layer], Tensors]


def compressed_layers(model: nn.Module) -> dict[str, Layer]:
    """The compressed modules of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (Linear, Embedding, Experts))}


def packed_elsewhere(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold the packed tensors of compressed-tensors, GPTQ or AWQ, and are not ours."""
    for name, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        if not isinstance(module, (Linear, Embedding, Experts)) \
                and (held.get("weight_packed") is not None or {"qweight", "scales"} <= set(held)):
            yield name, module


def choose(model: nn.Module, as_: str = "auto") -> Written:
    """How to store a model. ``as_`` is ``auto`` (the most standard container that holds every layer) or a container.

    ValueError for another ``as_`` or a model without compressed layers; Unsupported when the container cannot hold a
    layer, which it names.
    """
    if as_ not in ("auto", *CONTAINERS):
        raise ValueError(f"as_: found {as_!r}, accepted are auto, {', '.join(CONTAINERS)}")
    layers = compressed_layers(model)
    if not layers:
        raise ValueError("model: found no compressed layer; compress it first, or use its own save_pretrained")
    foreign = next(packed_elsewhere(model), None)
    if foreign is not None:
        raise ValueError(f"layer {foreign[0]!r}: found {type(foreign[1]).__name__} with packed tensors of another "
                         "library, accepted are models that `accelerate` has taken over whole")
    plain = Surroundings.of(model, layers)
    ours = [(name, f"has a {KEY_TRANSFORM}") for name in plain.key_transforms] \
        + [(name, "computes in blocks") for name in plain.blockwise]
    if ours and as_ not in ("auto", own.METHOD):
        raise _refuse(as_, ours[0][0], f"it {ours[0][1]}, which {own.METHOD} holds")
    if as_ != "auto" or ours:
        return _WRITERS[own.METHOD if ours else as_](layers, plain)
    for container in CONTAINERS[:-1]:
        try:
            return _WRITERS[container](layers, plain)
        except Unsupported:
            continue
    return _WRITERS[own.METHOD](layers, plain)


@dataclass(frozen=True)
class Surroundings:
    """What a container's configuration says beside the compressed layers.

    ``kept``: names of the modules left alone that a reader might take for compressed ones; ``experts``: fused expert
    modules among them; ``conv1d``: compressed modules that the model builds as Conv1D; ``head``: the name of the
    output head; ``stored``: a module's name in the checkpoint; ``key_transforms``: attentions with a map of keys;
    ``blockwise``: bits and blocks of the modules that `tersor.blockwise` has exchanged.
    """

    kept: tuple[str, ...]
    experts: tuple[str, ...]
    conv1d: frozenset[str]
    head: str | None
    stored: Callable[[str], str]
    key_transforms: tuple[str, ...] = ()
    blockwise: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, Layer]) -> "Surroundings":
        kept, experts = [], []
        for name, module in model.named_modules():
            if name in layers:
                continue
            if isinstance(module, nn.Linear) or is_conv1d(module) or _router(module):
                kept.append(name)
            elif any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
                experts.append(name)
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        head = next((name for name, module in model.named_modules() if module is output), None)
        return cls(tuple(kept), tuple(experts), _conv1d_names(model) & set(layers), head, _stored_names(model),
                   tuple(name for name, module in model.named_modules() if KEY_TRANSFORM in module._buffers),
                   blockwise.settings(model))

    def both(self, names) -> list[str]:
        """Names as the model and as the checkpoint has them: readers of either kind find theirs."""
        return list(dict.fromkeys(variant for name in names for variant in (name, self.stored(name))))


def _router(module: nn.Module) -> bool:
    kind = type(module).__name__
    return (("Router" in kind or "Gating" in kind or re.search(r"Gate(?![a-z])", kind) is not None)
            and isinstance(module._parameters.get("weight"), nn.Parameter))


def _conv1d_names(model: nn.Module) -> set[str]:
    """Modules that the model's class builds as Conv1D (ours do not remember it)."""
    source = sys.modules.get(type(model).__module__)
    if not hasattr(source, "Conv1D") or not hasattr(model, "config"):
        return set()
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, module in fresh.named_modules() if is_conv1d(module)}


def _stored_names(model: nn.Module) -> Callable[[str], str]:
    conversions = _conversions(model)
    inverted = [conversion.reverse_transform() for conversion in reversed(conversions)]

    def stored(name: str) -> str:
        renamed = name + ".weight"
        for conversion in inverted:
            renamed = conversion.rename_source_key(renamed)[0]
        return renamed.removesuffix(".weight")

    return stored


def _conversions(model: nn.Module) -> list:
    """The renamings that ``save_pretrained`` undoes: those the model was loaded with, or its class's own."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None and hasattr(model, "all_tied_weights_keys"):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        conversions = [conversion for conversion in get_model_conversion_mapping(model, add_legacy=False)
                       if not isinstance(conversion, PrefixChange)]
    return conversions or []


def _refuse(container: str, name: str, why: str) -> Unsupported:
    return Unsupported(f"{container} cannot hold layer {name!r}: {why}")


def integer_parts(layer: Linear | Embedding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of an integer layer, row by row."""
    return layer.format.unpack_codes(layer.tensors(), layer.shape)


def _scales(layer: Linear | Embedding) -> Tensor:
    return untile_rows(layer.tensors()["scales"], layer.shape[0])


def _exact(values: Tensor, dtype: torch.dtype) -> bool:
    return values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values)


# -- compressed-tensors -----------------------------------------------------------------------------------------


def _write_compressed_tensors(layers: Mapping[str, Layer], plain: Surroundings) -> Written:
    container = compressed_tensors.METHOD
    schemes: dict[Int, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, Experts):
            raise _refuse(container, name, "it is a fused expert module")
        if name in plain.conv1d:
            raise _refuse(container, name, "it is a Conv1D")
        if not isinstance(layer.format, Int):
            raise _refuse(container, name, f"found format {layer.format}, accepted are integer formats")
        if _steps(layer):
            raise _refuse(container, name, f"it has online steps ({_steps(layer)})")
        if layer.format.two_level:
            raise _refuse(container, name, f"found format {layer.format}, accepted are scales in one level")
        f = layer.format
        if f.activation == 6 or f.input_options[1:] != (1.0, True, False):
            raise _refuse(container, name, f"found activations of {f}, accepted are dynamic symmetric ones of 4 or 8 "
                                           "bits")
        if layer.format.group_size and layer.shape[1] % layer.format.group_size:
            raise _refuse(container, name, f"{layer.shape[1]} columns are not whole groups of "
                                           f"{layer.format.group_size}")
        if not _exact(_scales(layer), layer.weight_dtype):
            raise _refuse(container, name, f"its {_scales(layer).dtype} scales are not exact in the model's "
                                           f"{layer.weight_dtype}")
        schemes.setdefault((_ct_scheme(layer), _ct_format(layer)), []).append(name)
    linear = {key for key, names in schemes.items() if any(isinstance(layers[name], Linear) for name in names)}
    groups = {}
    for i, ((format, stored), names) in enumerate(schemes.items()):
        # A class name covers everything only where one group holds all of the class: servers look at class names
        # before they look into the matrices that they fuse.
        named = [name for name in names if len(linear) > 1 or not isinstance(layers[name], Linear)]
        targets = ["Linear"] * (len(named) < len(names)) + plain.both(named)
        groups[f"group_{i}"] = {
            "format": stored,
            "input_activations": _ct_args(format.activation, True, "group" if format.act_group else "token",
                                          format.act_group or None, True) if format.activation < 16 else None,
            "output_activations": None,
            "targets": targets,
            "weights": _ct_args(format.num_bits, format.symmetric, "group" if format.group_size else "channel",
                                format.group_size or None, False),
        }
    formats = {group["format"] for group in groups.values()}
    config = {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": plain.both(plain.kept) + [f"re:{re.escape(name)}($|\\.)" for name in plain.both(plain.experts)],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": container,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": compressed_tensors.VERSION,
    }
    return Written(container, config, _encode_compressed_tensors)


def _ct_scheme(layer: Linear | Embedding) -> Int:
    f = layer.format  # rows that are looked up meet no activation
    inputs = {} if isinstance(layer, Embedding) else {"activation": f.activation, "act_group": f.act_group}
    return Int(f.num_bits, f.group_size, f.symmetric, **inputs)


def _ct_format(layer: Linear | Embedding) -> str:
    """What compressed-tensors itself takes for 8-bit weights with 8-bit activations, and for 8-bit embeddings what
    transformers loads (it looks for a ``weight`` in every embedding)."""
    whole = layer.format.num_bits == 8 and (isinstance(layer, Embedding) or layer.format.activation < 16)
    return "int-quantized" if whole else "pack-quantized"


def _ct_args(bits: int, symmetric: bool, strategy: str, group_size: int | None, dynamic: bool) -> dict:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group_size, "strategy": strategy,
            "dynamic": dynamic}


def _encode_compressed_tensors(layer: Linear | Embedding) -> Tensors:
    codes, scales, zero = integer_parts(layer)
    scales, bits = scales.to(layer.weight_dtype), layer.format.num_bits
    if _ct_format(layer) == "pack-quantized":
        return compressed_tensors.pack(codes, scales, zero, bits)
    tensors = {"weight": _signed(codes, bits), "weight_scale": scales.contiguous()}
    if zero is not None:
        tensors["weight_zero_point"] = _signed(zero, bits)
    return tensors


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


# -- GPTQ and AWQ -----------------------------------------------------------------------------------------------


def _steps(layer: Layer) -> str:
    return ", ".join(step.kind for side in ("pre", "post") for step in getattr(layer, side, None) or ())


def _uniform(container: str, layers: Mapping[str, Layer]) -> Int:
    """The one integer format of all layers, symmetric where all are. A row of one group fits every size that covers
    it."""
    bits, size, symmetric = None, None, True
    for name, layer in layers.items():
        if not isinstance(layer, Linear):
            raise _refuse(container, name, f"found {type(layer).__name__}, accepted are linear layers")
        f = layer.format
        if not isinstance(f, Int) or f.activation != 16:
            raise _refuse(container, name, f"found format {f}, accepted are integer formats with exact activations")
        several = f.groups(layer.shape[1]) > 1
        bits = bits or f.num_bits
        size = f.group_size if several and size is None else size
        if f.num_bits != bits or several and f.group_size != size:
            shown = f"groups of {size}" if size else "one group per row"
            raise _refuse(container, name, f"found format {f}, accepted is one width and group size in the whole "
                                           f"model, here {bits} bits and {shown}")
        if not _exact(_scales(layer), torch.float16):
            raise _refuse(container, name, f"its {_scales(layer).dtype} scales are not exact in float16")
        symmetric &= f.symmetric
    for name, layer in layers.items():
        if size and layer.format.groups(layer.shape[1]) == 1 and layer.shape[1] > size:
            raise _refuse(container, name, f"found one group per row of {layer.shape[1]}, accepted are groups of "
                                           f"{size} as in the rest of the model")
    return Int(bits, size or 0, symmetric)


def _write_gptq(layers: Mapping[str, Layer], plain: Surroundings) -> Written:
    container = gptq.METHOD
    format = _uniform(container, layers)
    if format.num_bits not in gptq.BITS:
        raise _refuse(container, next(iter(layers)), f"found {format.num_bits} bits, accepted are 2, 3, 4 and 8")
    ordered, least = False, 1
    for name, layer in layers.items():
        out, width = layer.shape
        if width * format.num_bits % 32 or out * format.num_bits % 32:
            raise _refuse(container, name, f"{out} x {width} codes of {format.num_bits} bits do not fill whole words")
        if layer.post or layer.pre and not (len(layer.pre) == 1 and isinstance(layer.pre[0], Permute)):
            raise _refuse(container, name, f"it has online steps ({_steps(layer)})")
        ordered |= bool(layer.pre)
        if not layer.format.symmetric:
            least = min(least, int(untile_rows(layer.tensors()["zero_points"], out).min()))
    # v1 stores zero points minus one, and readers disagree on its three-bit words
    v2 = format.num_bits == 3 or least < 1
    config = {
        "bits": format.num_bits,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "desc_act": ordered,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in plain.both(plain.kept) if name != plain.head} or None,
        "group_size": format.group_size or -1,
        "lm_head": plain.head in layers,
        "meta": {"quantizer": [f"tersor:{__version__}"]},
        "pack_dtype": "int32",
        "quant_method": container,
        "static_groups": False,
        "sym": format.symmetric,
        "true_sequential": False,
    }

    def encode(layer: Linear) -> Tensors:
        codes, scales, zero = integer_parts(layer)
        order = layer.pre[0].index if layer.pre else None
        return gptq.pack(codes, scales.to(torch.float16), zero, format.num_bits, format.group_size, order, v2)

    return Written(container, config, encode)


def _write_awq(layers: Mapping[str, Layer], plain: Surroundings) -> Written:
    container = awq.METHOD
    format = _uniform(container, layers)
    if format.num_bits != 4:
        raise _refuse(container, next(iter(layers)), f"found {format.num_bits} bits, accepted are 4")
    for name, layer in layers.items():
        out, width = layer.shape
        if name in plain.conv1d:
            raise _refuse(container, name, "it is a Conv1D")
        if out % 8 or width % (format.group_size or width):
            raise _refuse(container, name, f"{out} x {width} is not whole groups of {format.group_size} columns and "
                                           "a multiple of 8 rows")
        if _steps(layer):
            raise _refuse(container, name, f"it has online steps ({_steps(layer)})")
    config = {
        "bits": 4,
        "group_size": format.group_size or -1,
        "modules_to_not_convert": plain.both(plain.kept) or None,
        "quant_method": container,
        "version": "gemm",
        "zero_point": not format.symmetric,
    }

    def encode(layer: Linear) -> Tensors:
        codes, scales, zero = integer_parts(layer)
        return awq.pack(codes, scales.to(torch.float16), zero)

    return Written(container, config, encode)


# -- ours -------------------------------------------------------------------------------------------------------


def _write_own(layers: Mapping[str, Layer], plain: Surroundings) -> Written:
    layouts = {}
    for name, layer in layers.items():
        try:
            layouts[name] = (own.layout_of(layer), getattr(layer, "method", ""))
        except Unsupported as error:
            raise _refuse(own.METHOD, name, str(error)) from None
    config = {
        "config_groups": own.groups(layouts),
        "format": "tersor",
        "ignore": list(plain.kept) + list(plain.experts),
        "quant_method": own.METHOD,
        "quantization_status": "compressed",
        "version": own.VERSION,
        "written_by": f"tersor {__version__}",
    }
    if plain.key_transforms:
        config["key_transforms"] = list(plain.key_transforms)
    if plain.blockwise:
        config["blockwise"] = own.blockwise_entries(plain.blockwise)
    return Written(own.METHOD, config, _encode_own)


def _encode_own(layer: Layer) -> Tensors:
    if isinstance(own.layout_of(layer), own.Packed):
        codes, scales, zero = integer_parts(layer)
        tensors = compressed_tensors.pack(codes, scales, zero, layer.format.num_bits)
    else:
        tensors = {own.stored(name): tensor for name, tensor in layer.tensors().items()}
    return tensors | own.encode_steps(layer)


_WRITERS = {
    compressed_tensors.METHOD: _write_compressed_tensors,
    gptq.METHOD: _write_gptq,
    awq.METHOD: _write_awq,
    own.METHOD: _write_own,
}


def state_dict(model: nn.Module, written: Written) -> dict[str, Tensor]:
    """A model's state dict with each compressed layer's tensors under their stored names."""
    layers = compressed_layers(model)
    inner = {f"{owner}.{local}" for owner, layer in layers.items() for local in _inner(layer)}
    made: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if name not in inner}
    for name, layer in layers.items():
        for local, tensor in written.encode(layer).items():
            made[f"{name}.{local}"] = tensor.detach()
    return made


def _inner(layer: Layer):
    """Names, in the layer's own state, of what is stored in another way."""
    yield from (name.replace(".", "__") for name in layer.tensors())
    for side in ("pre", "post"):
        steps = getattr(layer, side, None)
        if isinstance(steps, nn.ModuleList):
            yield from (f"{side}.{name}" for name in steps.state_dict())
