"""compressed-tensors ``pack-quantized`` (and 8-bit ``int-quantized``): tensors, and the configuration of a model.

    weight_packed      int32 [out, ceil(in * bits / 32)]   dense bit stream of q + 2^(bits-1), row by row
    weight_scale       float [out, groups]
    weight_zero_point  int32 [ceil(out * bits / 32), groups]   asymmetric only; the stream runs down the rows
    weight_shape       int64 [2]

Before compressed-tensors 0.18 codes did not cross words: 3, 5, 6 and 7 bits left ``32 mod bits`` bits of each word
unused. Both are read (told apart by their widths, and by the version where those agree), the dense one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Shape, Tensors, TensorSpec
from .errors import CheckpointError, Unsupported
from .layout import (Codes, IntLayout, Layout, Manifest, Site, boolean, integer, module_specs, pattern, refuse_strays,
                     runnable_group)
from .packing import pack_words, unpack_words, words
from .shards import Checkpoint

VERSION = "0.20.0"  # of the configuration that is written
METHOD = "compressed-tensors"


def pack(codes: Tensor, scales: Tensor, zero_points: Tensor | None, num_bits: int) -> Tensors:
    """The tensors of ``pack-quantized`` from codes and zero points as `Codes` has them."""
    tensors = {
        "weight_packed": pack_words(codes, num_bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_points is not None:
        tensors["weight_zero_point"] = pack_words(zero_points.t().contiguous(), num_bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], shape: Shape, num_bits: int, symmetric: bool,
           padded: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """`pack` undone: codes, scales, zero points. ``padded`` says that the older layout of 3, 5, 6 and 7 bits is read
    where the number of words does not tell."""
    codes = _read(tensors["weight_packed"], num_bits, shape[1], padded)
    zero = None
    if not symmetric:
        zero = _read(tensors["weight_zero_point"].t().contiguous(), num_bits, shape[0], padded).t().contiguous()
    return codes, tensors["weight_scale"], zero


def _read(packed: Tensor, num_bits: int, count: int, padded: bool) -> Tensor:
    if not _is_padded(packed.shape[1], num_bits, count, padded):
        return unpack_words(packed, num_bits, count)
    shifts = torch.arange(32 // num_bits, dtype=torch.int32, device=packed.device) * num_bits
    return (packed[..., None] >> shifts & 2**num_bits - 1).to(torch.uint8).flatten(-2)[:, :count].contiguous()


def _is_padded(found: int, num_bits: int, count: int, otherwise: bool) -> bool:
    dense, padded = words(count, num_bits), -(-count // (32 // num_bits))
    return padded == found if padded != dense and found in (padded, dense) else otherwise


def _width(found: int, num_bits: int, count: int, otherwise: bool) -> int:
    """Words that ``count`` codes must take, in the layout that the number found speaks for."""
    return -(-count // (32 // num_bits)) if _is_padded(found, num_bits, count, otherwise) else words(count, num_bits)


@dataclass(frozen=True)
class PackQuantized(IntLayout):
    """``pack-quantized``."""

    padded: bool = False

    scale_name = "weight_scale"

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        out, width = site.shape
        specs = {
            "weight_packed": TensorSpec((out, self._count(found, "weight_packed", 1, width)), torch.int32),
            "weight_scale": TensorSpec((out, self.groups(width)), self.scale_dtype(found)),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if not self.symmetric:
            count = self._count(found, "weight_zero_point", 0, out)
            specs["weight_zero_point"] = TensorSpec((count, self.groups(width)), torch.int32)
        return specs

    def _count(self, found: Mapping[str, TensorSpec], name: str, dim: int, count: int) -> int:
        have = found[name].shape[dim] if name in found and len(found[name].shape) == 2 else 0
        return _width(have, self.num_bits, count, self.padded)

    def codes(self, tensors: Tensors, site: Site) -> Codes:
        shape = tensors["weight_shape"].tolist()
        if shape != list(site.shape):
            raise CheckpointError(f"weight_shape: found {shape}, accepted is {list(site.shape)}")
        return Codes(*unpack(tensors, site.shape, self.num_bits, self.symmetric, self.padded))


@dataclass(frozen=True)
class IntQuantized(IntLayout):
    """``int-quantized``: one int8 per weight, whatever ``num_bits`` says the range is."""

    scale_name = "weight_scale"

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        groups = (site.shape[0], self.groups(site.shape[1]))
        specs = {
            "weight": TensorSpec(tuple(site.shape), torch.int8),
            "weight_scale": TensorSpec(groups, self.scale_dtype(found)),
        }
        if not self.symmetric:
            specs["weight_zero_point"] = TensorSpec(groups, torch.int8)
        return specs

    def codes(self, tensors: Tensors, site: Site) -> Codes:
        zero = None if self.symmetric else self._unsigned(tensors["weight_zero_point"], "weight_zero_point")
        return Codes(self._unsigned(tensors["weight"], "weight"), tensors["weight_scale"], zero)

    def _unsigned(self, values: Tensor, name: str) -> Tensor:
        half = 2 ** (self.num_bits - 1)
        raised = values.to(torch.int16) + half
        if values.numel() and (int(raised.min()) < 0 or int(raised.max()) >= 2 * half):
            raise CheckpointError(f"{name}: found values in [{int(values.min())}, {int(values.max())}], accepted are "
                                  f"[{-half}, {half - 1}] for {self.num_bits} bits")
        return raised.to(torch.uint8)


# -- the configuration ------------------------------------------------------------------------------------------


class CompressedTensors(Manifest):
    """The ``quantization_config`` of a compressed-tensors model."""

    container = METHOD

    def __init__(self, raw: Mapping):
        super().__init__(raw)
        self._refuse_unknown()
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"config_groups: found {groups!r}, accepted is an object of groups")
        self.padded = _version(raw.get("version")) < (0, 18)
        self.schemes: list[tuple[list[str], Layout]] = []
        for name, group in groups.items():
            self.schemes.append(self._group(f"config_groups.{name}", group))
        self.ignore = _targets(raw.get("ignore") or [], "ignore")

    def _refuse_unknown(self) -> None:
        raw = self.raw
        status = raw.get("quantization_status")
        if status != "compressed":
            raise Unsupported(f"quantization_status: found {status!r}, our layers hold 'compressed'")
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config"):
            value = raw.get(key)
            if value and not (key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"):
                raise Unsupported(f"{key}: found {value!r}, our layers hold models without")

    def _group(self, what: str, group: object) -> tuple[list[str], Layout]:
        if not isinstance(group, dict):
            raise CheckpointError(f"{what}: found {type(group).__name__}, accepted is an object")
        targets = _targets(group.get("targets"), f"{what}.targets")
        format = group.get("format") or self.raw.get("format")
        if format not in ("pack-quantized", "int-quantized"):
            raise Unsupported(f"{what}.format: found {format!r}, our layers hold pack-quantized and int-quantized")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise Unsupported(f"{what}.weights: found {weights!r}, our layers hold compressed weights")
        if group.get("output_activations"):
            raise Unsupported(f"{what}.output_activations: our layers hold models without")
        if weights.get("type", "int") != "int":
            raise Unsupported(f"{what}.weights.type: found {weights.get('type')!r}, our layers hold int")
        bits = integer(weights.get("num_bits", 8), f"{what}.weights.num_bits", "2 to 8", 1, 8)
        if bits == 1:
            raise Unsupported(f"{what}.weights.num_bits: found 1, our layers hold 2 to 8")
        symmetric = boolean(weights.get("symmetric", True), f"{what}.weights.symmetric")
        if weights.get("actorder") in ("group", "dynamic", True):
            raise Unsupported(f"{what}.weights.actorder: found {weights['actorder']!r}, our layers hold weight, static "
                              "and none")
        size = self._group_size(f"{what}.weights", weights)
        activation, act_group = _activation(f"{what}.input_activations", group.get("input_activations"))
        kind = PackQuantized if format == "pack-quantized" else IntQuantized
        options = {"padded": True} if kind is PackQuantized and self.padded and 32 % bits else {}
        return targets, kind(bits, size, symmetric, activation, act_group, **options)

    @staticmethod
    def _group_size(what: str, weights: dict) -> int:
        strategy, size = weights.get("strategy"), weights.get("group_size")
        if strategy is None:
            strategy = "channel" if size == -1 else "group" if size else "tensor"
        if strategy == "channel":
            return 0
        if strategy != "group":
            raise Unsupported(f"{what}.strategy: found {strategy!r}, our layers hold group and channel")
        return runnable_group(integer(size, f"{what}.group_size", "a positive number of columns", 1, 1 << 30),
                              f"{what}.group_size")

    def scheme(self, names: tuple[str, ...], classes: tuple[str, ...]) -> Layout | None:
        """The layout that the groups give a module of these names and classes: exact names win over patterns, and
        patterns over classes; None where it is ignored or no target matches."""
        if any(_matches(target, names, classes) for target in self.ignore):
            return None
        for kind in ("name", "pattern", "class"):
            for targets, layout in self.schemes:
                if any(_matches(target, names, classes) == kind for target in targets):
                    return layout
        return None

    def layouts(self, sites: Mapping[str, Site], checkpoint: Checkpoint) -> dict[str, Layout]:
        made: dict[str, Layout] = {}
        specs = module_specs(checkpoint)
        homes = set()
        for name, site in sites.items():
            found = specs.get(site.stored, {})
            homes.add(site.stored)
            layout = self.scheme((name, site.stored), site.classes) if site.kind in ("linear", "embedding") else None
            packed = "weight_packed" in found or "weight_scale" in found and "weight" in found
            if packed and layout is None:
                raise CheckpointError(f"{checkpoint.directory}: module {name!r} is stored compressed, and no group of "
                                      "the configuration covers it")
            if layout is not None and (packed or "weight" not in found):
                made[name] = layout
        refuse_strays(checkpoint, specs, "weight_packed", homes, "Linear or Embedding")
        return made


def _version(value: object) -> tuple[int, ...]:
    """(0, 18) and later store codes densely; an absent version is a current one."""
    if value is None:
        return (1 << 30,)
    if not isinstance(value, str):
        raise CheckpointError(f"version: found {value!r}, accepted is a string such as {VERSION!r}")
    parts = []
    for part in value.split(".")[:2]:
        digits = "".join(char for char in part[:6] if char.isascii() and char.isdigit())
        parts.append(int(digits) if digits else 0)
    return tuple(parts)


def _activation(what: str, scheme: object) -> tuple[int, int]:
    """Bits of activations, and the channels that share a scale."""
    if scheme is None:
        return 16, 32
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{what}: found {type(scheme).__name__}, accepted are an object and null")
    bits, dynamic = scheme.get("num_bits", 8), scheme.get("dynamic", False)
    if scheme.get("type", "int") != "int" or bits not in (4, 8) or dynamic is not True \
            or not scheme.get("symmetric", True) or scheme.get("strategy") not in ("token", "group"):
        shown = {key: scheme.get(key) for key in ("num_bits", "type", "dynamic", "symmetric", "strategy")}
        raise Unsupported(f"{what}: found {shown}, our layers run symmetric int of 8 or 4 bits, dynamic, per token or "
                          "group")
    if scheme["strategy"] == "token":
        return bits, 0
    size = integer(scheme.get("group_size"), f"{what}.group_size", "a positive number of channels", 1, 1 << 30)
    if size % 32:
        raise Unsupported(f"{what}.group_size: found {size}, our layers run multiples of 32")
    return bits, size


def _targets(value: object, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{what}: found {value!r}, accepted is a list of names, classes and 're:' patterns")
    for item in value:
        if item.startswith("re:"):
            pattern(item[3:], what)
    return value


def _matches(target: str, names: tuple[str, ...], classes: tuple[str, ...]) -> str | None:
    if target.startswith("re:"):
        expression = pattern(target[3:], "targets")
        return "pattern" if any(expression.match(name) for name in names) else None
    if target in names:
        return "name"
    return "class" if target in classes else None
