"""AWQ checkpoints in the GEMM order, 4 bits.

    qweight  int32 [in, out / 8]      eight outputs a word, nibble i holds output ORDER[i]
    qzeros   int32 [groups, out / 8]  the same order, true zero points
    scales   fp16  [groups, out]

``w = (q - z) * s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.base import Tensors, TensorSpec
from .errors import CheckpointError, Unsupported
from .gptq import by_presence
from .layout import Codes, IntLayout, Layout, Manifest, Site, boolean, integer, runnable_group, with_symmetry
from .packing import pack_words, unpack_words
from .shards import Checkpoint

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(8))


def pack(codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensors:
    """AWQ tensors of 4-bit ``codes`` uint8 ``[out, in]``, ``scales`` and ``zero_points`` ``[out, groups]`` (None: 8).
    ``out`` is a multiple of 8."""
    if zero_points is None:
        zero_points = torch.full(scales.shape, 8, dtype=torch.uint8, device=codes.device)
    return {
        "qweight": _pack(codes),
        "qzeros": _pack(zero_points),
        "scales": scales.t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`pack` undone: codes, scales, zero points."""
    return _unpack(tensors["qweight"]), tensors["scales"].t().contiguous(), _unpack(tensors["qzeros"])


def _pack(values: Tensor) -> Tensor:
    rows = values.t().reshape(values.shape[1], -1, 8)[..., list(ORDER)]
    return pack_words(rows.flatten(1), 4)


def _unpack(packed: Tensor) -> Tensor:
    values = unpack_words(packed, 4, packed.shape[1] * 8).view(packed.shape[0], -1, 8)
    return values[..., list(_INVERSE)].flatten(1).t().contiguous()


@dataclass(frozen=True)
class AWQLayout(IntLayout):
    """``qweight``, ``qzeros`` and ``scales`` of one weight; the stored zero points decide whether it is symmetric."""

    def expected(self, site: Site, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        out, width = site.shape
        if out % 8 or self.group_size and width % self.group_size:
            raise CheckpointError(f"module {site.name!r}: found a {out} x {width} weight, accepted are whole groups of "
                                  f"{self.group_size or width} columns and multiples of 8 rows")
        groups = self.groups(width)
        return {
            "qweight": TensorSpec((width, out // 8), torch.int32),
            "qzeros": TensorSpec((groups, out // 8), torch.int32),
            "scales": TensorSpec((groups, out), self.scale_dtype(found)),
        }

    def codes(self, tensors: Tensors, site: Site) -> Codes:
        return with_symmetry(Codes(*unpack(tensors)), 4)


class AWQ(Manifest):
    """The ``quantization_config`` of an AWQ model."""

    container = METHOD

    def __init__(self, raw: Mapping):
        super().__init__(raw)
        version = raw.get("version", raw.get("format", "gemm"))
        if not isinstance(version, str) or version.lower() != "gemm":
            raise Unsupported(f"version: found {version!r}, our layers hold gemm")
        bits = integer(raw.get("bits", raw.get("w_bit", 4)), "bits", "4", 1, 8)
        if bits != 4:
            raise Unsupported(f"bits: found {bits}, our layers hold 4")
        size = integer(raw.get("group_size", raw.get("q_group_size", 128)), "group_size",
                       "a positive number of columns, or -1", -1, 1 << 30)
        if size == 0:
            raise CheckpointError("group_size: found 0, accepted is a positive number of columns, or -1")
        size = 0 if size == -1 else runnable_group(size, "group_size")
        self.base = AWQLayout(4, size, not boolean(raw.get("zero_point", True), "zero_point"))

    def layouts(self, sites: Mapping[str, Site], checkpoint: Checkpoint) -> dict[str, Layout]:
        scaled = [name for name in checkpoint.entries if name.endswith(("act.scales", "activation.scales"))]
        if scaled:
            raise Unsupported(f"{checkpoint.where(scaled[0])}: scaled activation functions are not held by our layers")
        return by_presence(sites, checkpoint, lambda site: self.base)
