"""How one compressed weight lies in a container, and how a container says which weights lie how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..formats.base import Format, Shape, Tensors, TensorSpec
from ..formats.integer import Int
from ..transforms.steps import Permute, Step
from .errors import CheckpointError, Unsupported
from .shards import Checkpoint

SCALE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Codes:
    """An integer weight between layouts: ``codes`` uint8 ``[out, in]``, ``scales [out, groups]``, ``zero_points``
    uint8 ``[out, groups]`` or None (symmetric), and ``order [in]``: the input channel that each column stands for,
    None where columns are in the channels' order."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Decoded:
    """A stored weight as a layer takes it: the format, its tensors, and online steps."""

    format: Format
    tensors: Tensors
    pre: tuple[Step, ...] = ()
    post: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Site:
    """A module that may hold a compressed weight, as the model builds it before loading.

    ``kind`` is linear, conv1d, embedding or experts; ``shape`` is ``[out, in]`` of the weight (``[rows, width]`` of an
    embedding); ``dtype`` the model's; ``names`` are the module's name and, first, its name in the checkpoint;
    ``module`` is given where the layout needs more than this (experts).
    """

    name: str
    kind: str
    shape: Shape
    dtype: torch.dtype
    bias: bool = False
    classes: tuple[str, ...] = ()
    stored_name: str = ""
    module: torch.nn.Module | None = field(default=None, compare=False)

    @property
    def stored(self) -> str:
        return self.stored_name or self.name


@dataclass(frozen=True)
class Layout:
    """The tensors of one weight. Instances are data; the methods are pure functions."""

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes that a weight of this shape must have. Where a dtype may vary (scales), the one
        in ``found`` is taken over when it is among the accepted."""
        raise TypeError(f"{type(self).__name__} lists no tensors")

    def decode(self, tensors: Tensors, site: Site) -> Decoded:
        """What a layer holds for these tensors. CheckpointError for values that no writer of the layout produces."""
        raise TypeError(f"{type(self).__name__} cannot be read")


@dataclass(frozen=True)
class IntLayout(Layout):
    """Integers of ``num_bits`` with a scale (and zero point) per ``group_size`` columns, 0 for the whole row."""

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation: int = 16
    act_group: int = 32  # channels of a token that share a scale, 0 for all

    scale_name: ClassVar[str] = "scales"
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = tuple(SCALE_NAMES)  # the usual one first

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size) if self.group_size else 1

    def scale_dtype(self, found: Mapping[str, TensorSpec]) -> torch.dtype:
        spec = found.get(self.scale_name)
        return spec.dtype if spec is not None and spec.dtype in self.scale_dtypes else self.scale_dtypes[0]

    def codes(self, tensors: Tensors, site: Site) -> Codes:
        """The weight between layouts."""
        raise TypeError(f"{type(self).__name__} cannot be read")

    def decode(self, tensors: Tensors, site: Site) -> Decoded:
        held = self.codes(tensors, site)
        if not bool(held.scales.isfinite().all()):
            raise CheckpointError(f"{self.scale_name}: found NaN or infinite values, accepted are finite ones")
        dtype = held.scales.dtype
        format = Int(self.num_bits, self.group_size, held.zero_points is None, self.activation,
                     "model" if dtype == site.dtype else SCALE_NAMES[dtype], self.act_group)
        pre = () if held.order is None else (Permute(held.order),)
        return Decoded(format, format.pack_codes(held.codes, held.scales, held.zero_points), pre)


class Manifest:
    """What a container's configuration says: which modules are compressed, and how each lies in the checkpoint."""

    container: ClassVar[str]

    def __init__(self, raw: Mapping):
        self.raw = dict(raw)

    def layouts(self, sites: Mapping[str, Site], checkpoint: Checkpoint) -> dict[str, Layout]:
        """The layout of every compressed module, by module name, in the sites' order. CheckpointError where the
        configuration and the files disagree, Unsupported where no layer of ours holds what they say."""
        raise TypeError(f"{type(self).__name__} cannot be read")


def check_specs(where: str, accepted: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec],
                optional: Iterable[str] = ()) -> None:
    """CheckpointError where a tensor is missing or has another shape or dtype than the layout says."""
    for name, spec in accepted.items():
        have = found.get(name)
        if have is None:
            if name in optional:
                continue
            raise CheckpointError(f"{where}: tensor {name!r}: not in the checkpoint, accepted is {spec.dtype} "
                                  f"{list(spec.shape)}")
        if tuple(have.shape) != tuple(spec.shape) or have.dtype != spec.dtype:
            raise CheckpointError(f"{where}: tensor {name!r}: found {have.dtype} {list(have.shape)}, accepted is "
                                  f"{spec.dtype} {list(spec.shape)}")


def stored_specs(checkpoint: Checkpoint, module: str) -> dict[str, TensorSpec]:
    """Local names, shapes and dtypes of a module's own tensors in a checkpoint."""
    prefix = module + "."
    return {
        name[len(prefix):]: TensorSpec(entry.shape, entry.dtype)
        for name, entry in checkpoint.entries.items()
        if name.startswith(prefix) and "." not in name[len(prefix):]
    }


def module_specs(checkpoint: Checkpoint) -> dict[str, dict[str, TensorSpec]]:
    """`stored_specs` of all modules at once."""
    made: dict[str, dict[str, TensorSpec]] = {}
    for name, entry in checkpoint.entries.items():
        module, _, local = name.rpartition(".")
        made.setdefault(module, {})[local] = TensorSpec(entry.shape, entry.dtype)
    return made


def refuse_strays(checkpoint: Checkpoint, specs: Mapping[str, Mapping[str, TensorSpec]], packed: str, homes: set[str],
                  kinds: str) -> None:
    """Unsupported where a module that stores a tensor ``packed`` is none of ``homes``, the model's ``kinds``."""
    strays = [name for name, found in specs.items() if packed in found and name not in homes]
    if strays:
        raise Unsupported(f"{checkpoint.directory}: module {strays[0]!r} is stored compressed, and the model has no "
                          f"{kinds} of that name (experts fused by the model, for example)")


def integer(value: object, what: str, accepted: str, low: int, high: int) -> int:
    """``value`` when it is an int within bounds, else CheckpointError."""
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{what}: found {value!r}, accepted is {accepted}")
    return value


def boolean(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{what}: found {value!r}, accepted are true and false")
    return value


def runnable_group(group_size: int, what: str) -> int:
    """``group_size`` when our kernels run it (0 for channel)."""
    if group_size % 32:
        raise Unsupported(f"{what}: found {group_size}, our kernels run multiples of 32 and one group per channel")
    return group_size


def pattern(text: str, what: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{what}: {text!r} is not a regular expression ({error})") from None


def with_symmetry(held: Codes, num_bits: int) -> Codes:
    """``held`` without its zero points where they are all the middle of the range, as symmetric writers store them."""
    zero = held.zero_points
    if zero is not None and bool((zero == 2 ** (num_bits - 1)).all()):
        return replace(held, zero_points=None)
    return held
