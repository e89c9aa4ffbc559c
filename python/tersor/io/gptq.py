"""GPTQ checkpoints, v1 and v2, of 2, 3, 4 and 8 bits.

    qweight  int32 [in * bits / 32, out]      dense bit stream down the rows
    qzeros   int32 [groups, out * bits / 32]  dense bit stream along the rows; v1 stores each zero point minus one
    scales   fp16  [groups, out]
    g_idx    int32 [in]                       the group of each input channel

``w = (q - z) * s``. The historic 3-bit layout (32 codes in 3 words, two of them split) is the same dense stream. Where
channels were ordered by activation (``desc_act``), ours puts the columns of a group side by side and permutes the
input instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Tensors, TensorSpec
from .errors import CheckpointError, Unsupported
from .layout import (Codes, IntLayout, Layout, Manifest, Site, boolean, integer, module_specs, pattern, refuse_strays,
                     runnable_group, with_symmetry)
from .packing import pack_words, unpack_words, words
from .shards import Checkpoint

METHOD = "gptq"
BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")

# What v1 subtracted from the words of the stored zero points: one from each code. With 3 bits codes cross words, so it
# is done code by code; but GPTQModel subtracts these words, and its files say so in `meta.quantizer`.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_GPTQMODEL_3 = (0x24924924, 0x92492492, 0x49249249)


def pack(codes: Tensor, scales: Tensor, zero_points: Tensor | None, num_bits: int, group_size: int,
         order: Tensor | None = None, v2: bool = False) -> Tensors:
    """GPTQ tensors of ``codes`` uint8 ``[out, in]`` (in the columns' order), ``scales`` and ``zero_points``
    ``[out, groups]`` (None: the middle of the range) and ``order`` as `Codes` has it. ``out`` and ``in`` fill whole
    words."""
    groups, width = scales.shape[1], codes.shape[1]
    if zero_points is None:
        zero_points = torch.full(scales.shape, 2 ** (num_bits - 1), dtype=torch.uint8, device=codes.device)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    group = torch.arange(width, device=codes.device) // (group_size or width)
    if order is not None:
        group = torch.empty_like(group).index_copy_(0, order, group)
    if not v2 and num_bits == 3:
        zero_points = zero_points - 1 & 7
    zeros = pack_words(zero_points.t().contiguous(), num_bits)
    return {
        "qweight": pack_words(codes, num_bits).t().contiguous(),
        "qzeros": zeros if v2 or num_bits == 3 else _add(zeros, -1, _ONES[num_bits]),
        "scales": scales.t().contiguous().view(groups, -1),
        "g_idx": group.to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], num_bits: int, v2: bool, symmetric: bool = False,
           gptqmodel: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]`` in the channels' order, scales and zero points ``[out, groups]``.

    ``symmetric`` and ``gptqmodel`` tell how v1's 3-bit zero points were stored, of which there are two ways.
    """
    scales = tensors["scales"].t().contiguous()
    out = scales.shape[0]
    codes = unpack_words(tensors["qweight"].t().contiguous(), num_bits, tensors["qweight"].shape[0] * 32 // num_bits)

    def zeros(stored: Tensor) -> Tensor:
        return unpack_words(stored, num_bits, out).t().contiguous()

    stored = tensors["qzeros"]
    if v2:
        return codes, scales, zeros(stored)
    if num_bits != 3:
        return codes, scales, zeros(_add(stored, 1, _ONES[num_bits]))
    by_code, by_word = zeros(stored) + 1 & 7, zeros(_add(stored, 1, _GPTQMODEL_3))
    if symmetric:  # whichever gives what a symmetric file must hold
        gptqmodel = bool((by_word == 4).all())
    return codes, scales, by_word if gptqmodel else by_code


def _add(packed: Tensor, sign: int, ones: tuple[int, ...]) -> Tensor:
    """Whole words at a time and modulo 2^32, as v1 files are written and read: borrows are paid back exactly."""
    addend = torch.tensor(ones, dtype=torch.int64, device=packed.device)
    total = packed.long() + sign * addend.repeat(-(-packed.shape[1] // len(addend)))[: packed.shape[1]]
    return ((total + 2**31 & 0xFFFFFFFF) - 2**31).to(torch.int32)


def column_order(g_idx: Tensor, groups: int, group_size: int) -> Tensor | None:
    """The channels in the order of their groups, None where they are in it already.

    CheckpointError for groups out of range or of uneven size.
    """
    width = g_idx.numel()
    group = g_idx.long()
    size = group_size or width
    if bool(((group < 0) | (group >= groups)).any()):
        raise CheckpointError(f"g_idx: found groups in [{int(group.min())}, {int(group.max())}], accepted are "
                              f"[0, {groups - 1}]")
    natural = torch.arange(width, device=group.device) // size
    if torch.equal(group, natural):
        return None
    order = group.argsort(stable=True)
    if not torch.equal(group[order], natural):
        raise CheckpointError(f"g_idx: found groups of {torch.bincount(group, minlength=groups).tolist()[:8]} ... "
                              f"channels, accepted are {size} in each but the last")
    return order


@dataclass(frozen=True)
class GPTQLayout(IntLayout):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of one weight. ``symmetric`` is what the configuration says;
    the stored zero points decide."""

    v2: bool = False
    gptqmodel: bool = False

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        out, width = site.shape
        if width * self.num_bits % 32 or out * self.num_bits % 32:
            raise CheckpointError(f"module {site.name!r}: found a {out} x {width} weight, accepted are sizes that fill "
                                  f"whole words of 32 bits with {self.num_bits}-bit codes")
        groups = self.groups(width)
        specs = {
            "qweight": TensorSpec((words(width, self.num_bits), out), torch.int32),
            "qzeros": TensorSpec((groups, words(out, self.num_bits)), torch.int32),
            "scales": TensorSpec((groups, out), self.scale_dtype(found)),
        }
        if "g_idx" in found:  # some writers leave it out where it says nothing
            specs["g_idx"] = TensorSpec((width,), torch.int32)
        return specs

    def codes(self, tensors: Tensors, site: Site) -> Codes:
        codes, scales, zero = unpack(tensors, self.num_bits, self.v2, self.symmetric, self.gptqmodel)
        order = None
        if "g_idx" in tensors:
            order = column_order(tensors["g_idx"], scales.shape[1], self.group_size)
        if order is not None:
            codes = codes.index_select(1, order)
        return with_symmetry(Codes(codes, scales, zero, order), self.num_bits)


class GPTQ(Manifest):
    """The ``quantization_config`` of a GPTQ model."""

    container = METHOD

    def __init__(self, raw: Mapping):
        super().__init__(raw)
        version = raw.get("checkpoint_format") or raw.get("format") or "gptq"
        if version not in VERSIONS:
            raise Unsupported(f"checkpoint_format: found {version!r}, our layers hold {' and '.join(VERSIONS)}")
        if raw.get("pack_dtype", "int32") != "int32":
            raise Unsupported(f"pack_dtype: found {raw['pack_dtype']!r}, our layers hold int32")
        meta = raw.get("meta")
        quantizer = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
        self._shared = {"v2": version == "gptq_v2", "gptqmodel": "gptqmodel" in quantizer}
        self.base = self._layout({}, "")
        self.overrides: list[tuple[bool, object, Layout | None]] = []
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise CheckpointError(f"dynamic: found {type(dynamic).__name__}, accepted is an object")
        for key, value in dynamic.items():
            if not isinstance(value, dict):
                raise CheckpointError(f"dynamic.{key}: found {type(value).__name__}, accepted is an object")
            keep = key.startswith("-:")
            expression = pattern(key[2:] if key[:2] in ("-:", "+:") else key, "dynamic")
            self.overrides.append((keep, expression, None if keep else self._layout(value, f"dynamic.{key}.")))

    def _layout(self, override: Mapping, what: str) -> GPTQLayout:
        def take(key, default=None):
            return override.get(key, self.raw.get(key, default))

        bits = integer(take("bits"), f"{what}bits", "one of 2, 3, 4, 8", 2, 8)
        if bits not in BITS:
            raise Unsupported(f"{what}bits: found {bits}, accepted are 2, 3, 4 and 8")
        size = integer(take("group_size", -1), f"{what}group_size", "a positive number of columns, or -1", -1, 1 << 30)
        if size == 0:
            raise CheckpointError(f"{what}group_size: found 0, accepted is a positive number of columns, or -1")
        size = 0 if size == -1 else runnable_group(size, f"{what}group_size")
        symmetric = boolean(take("sym", True), f"{what}sym")
        return GPTQLayout(bits, size, symmetric, **self._shared)

    def layouts(self, sites: Mapping[str, Site], checkpoint: Checkpoint) -> dict[str, Layout]:
        return by_presence(sites, checkpoint, self._for)

    def _for(self, site: Site) -> Layout | None:
        for keep, expression, layout in self.overrides:
            if expression.match(site.stored) or expression.match(site.name):
                return None if keep else layout
        return self.base


def by_presence(sites: Mapping[str, Site], checkpoint: Checkpoint, layout_of) -> dict[str, Layout]:
    """The layouts of the modules that are stored with a ``qweight``: these containers do not list them reliably."""
    specs = module_specs(checkpoint)
    made: dict[str, Layout] = {}
    homes = set()
    for name, site in sites.items():
        if site.kind not in ("linear", "conv1d"):
            continue
        homes.add(site.stored)
        if "qweight" in specs.get(site.stored, {}):
            layout = layout_of(site)
            if layout is None:
                raise CheckpointError(f"{checkpoint.directory}: module {name!r} is stored compressed, and the "
                                      "configuration says that it is not")
            made[name] = layout
    refuse_strays(checkpoint, specs, "qweight", homes, "Linear")
    return made
