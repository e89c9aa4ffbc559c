"""BilevelInt(b): integers whose small groups have low-bit scales and zero points of their own, the base of SpQR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_format
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bits import half, pack_bits, packed_bytes, rounded, unpack_bits
from .floating import fit_columns


@dataclass(frozen=True)
class BilevelInt(Format):
    """``w = (q - zero) * scale``: ``q`` of ``num_bits``, a ``scale`` and a ``zero`` per row and ``group_size`` inputs.

    Scales and zeros are integers of ``scale_bits`` themselves, ``(code + origin) * step`` with a 16-bit ``step`` and
    ``origin`` for every ``rows`` rows of a group: SpQR's two levels (arXiv 2306.03078), 3.625 bits for 3-bit weights
    with the defaults. Zeros need not be whole numbers. Stored as ``codes``, ``scale_codes``, ``zero_codes`` (uint8,
    dense) and ``second`` ``[ceil(out / rows), groups, 4]`` (step and origin of scales, then of zeros).
    """

    num_bits: int = 3
    group_size: int = 16
    scale_bits: int = 3
    rows: int = 16

    def __post_init__(self):
        accepted = (("num_bits", 2, 8), ("group_size", 1, 4096), ("scale_bits", 1, 8), ("rows", 1, 4096))
        for name, low, high in accepted:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"found {name}={getattr(self, name)}, accepted are {low} to {high}")

    @property
    def group_columns(self) -> int:
        return self.group_size

    @property
    def levels(self) -> int:
        return 2**self.num_bits - 1

    def groups(self, columns: int) -> int:
        """Groups that cover ``columns`` inputs."""
        return math.ceil(columns / self.group_size)

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        groups = self.groups(w.shape[1])
        params = Params(dtype=half(dtype or w.dtype))
        for name in ("scale", "zero"):
            params[name] = w.new_zeros(w.shape[0], groups)
            params[name + "_codes"] = torch.zeros(w.shape[0], groups, dtype=torch.uint8, device=w.device)
        params["second"] = w.new_zeros(math.ceil(w.shape[0] / self.rows), groups, 4)
        self.refit(params, w, 0)
        return params

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        groups = F.pad(w[:, None], (0, -w.shape[1] % self.group_size), mode="replicate")[:, 0]
        groups = groups.unflatten(1, (-1, self.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
        self.set_range(params, low, high, lo // self.group_size)

    def set_range(self, params: Params, low: Tensor, high: Tensor, first: int) -> None:
        """Scales and zeros of the groups from ``first`` on, for ranges ``[low, high] [out, groups]``."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / self.levels).clamp_min(torch.finfo(params["dtype"]).smallest_normal)
        columns = slice(first, first + low.shape[1])
        scale = self._second_level(params, "scale", scale, columns)
        self._second_level(params, "zero", -low / scale, columns)

    def _second_level(self, params, name, values, columns):
        """Quantize scales or zeros over `rows` rows; returns what is stored, and notes it."""
        out, top = values.shape[0], 2**self.scale_bits - 1
        tiles = F.pad(values.T[None], (0, -out % self.rows), mode="replicate")[0].T.unflatten(0, (-1, self.rows))
        low, high = tiles.amin(1), tiles.amax(1)  # [tiles, groups]
        store = params["dtype"]
        # equal values must not make the step vanish, or the origin would overflow
        step = torch.maximum((high - low) / top, high * 2.0**-10).clamp_min(torch.finfo(store).smallest_normal)
        step = rounded(step, store)
        origin = rounded(low / step, store)
        if name == "scale":
            origin = origin.clamp_min(2.0**-6)  # a scale of zero would lose its group
        codes = (tiles / step[:, None] - origin[:, None]).round().clamp(0, top)
        stored = ((codes + origin[:, None]) * step[:, None]).flatten(0, 1)[:out]
        at = 0 if name == "scale" else 2
        params["second"][:, columns, at], params["second"][:, columns, at + 1] = step, origin
        params[name + "_codes"][:, columns] = codes.flatten(0, 1)[:out].to(torch.uint8)
        params[name][:, columns] = stored
        return stored

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        scale, zero = (fit_columns(params[name], lo, w.shape[1], self.group_size) for name in ("scale", "zero"))
        return (self._codes(w, scale, zero) - zero) * scale

    def _codes(self, w, scale, zero):
        return (w / scale + zero).round().clamp(0, self.levels)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        scale, zero = (fit_columns(params[name], 0, w_hat.shape[1], self.group_size) for name in ("scale", "zero"))
        return {
            "codes": pack_bits(self._codes(w_hat, scale, zero), self.num_bits),
            "scale_codes": pack_bits(params["scale_codes"], self.scale_bits),
            "zero_codes": pack_bits(params["zero_codes"], self.scale_bits),
            "second": params["second"].to(params["dtype"]).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        groups = self.groups(shape[1])
        second = tensors["second"].to(wide).repeat_interleave(self.rows, 0)[: shape[0]]
        found = []
        for at, name in ((0, "scale_codes"), (2, "zero_codes")):
            codes = unpack_bits(tensors[name], self.scale_bits, groups).to(wide)
            found.append(fit_columns((codes + second[..., at + 1]) * second[..., at], 0, shape[1], self.group_size))
        q = unpack_bits(tensors["codes"], self.num_bits, shape[1]).to(wide)
        return ((q - found[1]) * found[0]).to(dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        groups = self.groups(shape[1])
        return {
            "codes": TensorSpec((shape[0], packed_bytes(shape[1], self.num_bits)), torch.uint8),
            "scale_codes": TensorSpec((shape[0], packed_bytes(groups, self.scale_bits)), torch.uint8),
            "zero_codes": TensorSpec((shape[0], packed_bytes(groups, self.scale_bits)), torch.uint8),
            "second": TensorSpec((math.ceil(shape[0] / self.rows), groups, 4), half(dtype)),
        }

    def text(self) -> str:
        defaults = (("group", self.group_size, 16), ("scale", self.scale_bits, 3), ("rows", self.rows, 16))
        shown = [f"{key}={value}" for key, value, default in defaults if value != default]
        return f"bilevel{self.num_bits}" + (f"[{','.join(shown)}]" if shown else "")


@register_format(r"bilevel(\d)", "bilevel3", "SpQR's base: integers with quantized scales and zeros in groups of 16")
def _bilevel(match, inner, *, group: int = 16, scale: int = 3, rows: int = 16):
    if inner is not None:
        raise ValueError(f"an integer format holds values and nothing nests in it, found {inner}")
    return BilevelInt(int(match[1]), group, scale, rows)
