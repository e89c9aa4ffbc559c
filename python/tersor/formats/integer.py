"""Int(b): integers of 2 to 8 bits with scales per group or per channel, the format most checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..registry import register_format
from . import two_level
from .base import Format, Params, Shape, Tensors, TensorSpec

TILE_ROWS = 16  # rows that a kernel tile interleaves
BLOCK_COLUMNS = 32  # columns of one block of a tile

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATION_BITS = (4, 6, 8, 16)
_EXACT_INPUT = (BLOCK_COLUMNS, 1.0, True, False)
SEARCH_STEPS = 80  # ranges tried: the full one down to a fifth of it, a hundredth at a time


@dataclass(frozen=True)
class Int(Format):
    """``w = (q - zero_point) * scale`` with ``q`` in ``0 .. 2^bits - 1``.

    Symmetric weights fix the zero point at ``2^(bits-1)``. ``group_size`` columns of a row share a scale; 0 means the
    whole row. ``scale_dtype`` is ``model`` (the weight's own dtype), ``fp32``, ``bf16``, ``fp16``, or ``int8``: an
    integer for each group below a float32 for each row (`two_level`), for rounded activations and up to 6 bits.

    ``activation`` is the input's precision inside the kernel: 16 leaves it exact; 8, 6 and 4 round it to integers, as
    `quantize_activations` defines. ``act_group`` channels of a token share a scale (multiples of 32; 0: all of them),
    which covers ``act_clip`` times their largest size (0 < act_clip <= 1; what lies beyond saturates), or without
    ``act_sym`` their range, with a zero point. ``act_scale`` says where the scale comes from: ``dynamic``, each call's
    input, or ``static``, the stored float32 ``input_scale [groups]`` (steps, from calibration).
    """

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation: int = 16
    scale_dtype: str = "model"
    act_group: int = BLOCK_COLUMNS
    act_clip: float = 1.0
    act_scale: str = "dynamic"
    act_sym: bool = True

    def __post_init__(self):
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"found {self.num_bits} weight bits, accepted are 2 to 8")
        if self.activation not in ACTIVATION_BITS:
            raise ValueError(f"found {self.activation} activation bits, accepted are 4, 6, 8 and 16")
        if self.group_size < 0 or self.group_size % BLOCK_COLUMNS:
            raise ValueError(f"found group={self.group_size}, accepted are multiples of {BLOCK_COLUMNS} "
                             "(32, 64, 128 are usual) and 0 for one scale per channel")
        if self.scale_dtype not in ("model", "int8", *_DTYPES):
            raise ValueError(f"found scale={self.scale_dtype!r}, accepted are model, {', '.join(_DTYPES)}, int8, "
                             "and for ByteScales (specs such as W4A16) e4m3")
        if self.two_level and (self.num_bits not in two_level.BITS or self.activation == 16 or not self.group_size):
            raise ValueError(f"found scale=int8 with W{self.num_bits}A{self.activation} and group={self.group_size}, "
                             "accepted are 2 to 6 weight bits in groups, with activations of 4, 6 or 8 bits: integer "
                             "group scales belong to integer products")
        self._check_activations()

    def _check_activations(self) -> None:
        if self.act_group < 0 or self.act_group % BLOCK_COLUMNS:
            raise ValueError(f"found act_group={self.act_group}, accepted are multiples of {BLOCK_COLUMNS} and 0 for "
                             "one scale per token")
        if not 0 < self.act_clip <= 1:
            raise ValueError(f"found act_clip={self.act_clip}, accepted are factors above 0 up to 1")
        if self.act_scale not in ("dynamic", "static"):
            raise ValueError(f"found act_scale={self.act_scale!r}, accepted are dynamic and static")
        if self.act_scale == "static" and not self.act_sym:
            raise ValueError("found act_scale=static with act_sym=false, accepted are static scales of symmetric codes")
        if self.activation == 16 and self.input_options != _EXACT_INPUT:
            raise ValueError("found options of quantized activations with 16 bits, accepted are act_group, act_clip, "
                             "act_scale and act_sym with 4, 6 or 8 bits")

    @property
    def input_options(self) -> tuple[int, float, bool, bool]:
        """``(act_group, act_clip, act_sym, static)``."""
        return self.act_group, self.act_clip, self.act_sym, self.act_scale == "static"

    @property
    def two_level(self) -> bool:
        """Whether groups have integer scales below those of their rows."""
        return self.scale_dtype == "int8"

    # -- parameters and projection ------------------------------------------------------------------------------

    @property
    def group_columns(self) -> int:
        return self.group_size

    @property
    def levels(self) -> int:
        return 2**self.num_bits - 1

    def _scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.two_level:
            return torch.uint8
        if self.scale_dtype == "model":
            return dtype if dtype in _DTYPES.values() else torch.float32
        return _DTYPES[self.scale_dtype]

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        """Scales and zero points ``[out, groups]`` from min and max, or from a grid of clipped ranges (``search``).

        Scales are rounded to the dtype they will be stored in (``dtype``: of the model, where the format says so),
        so that what a method sees is what is stored.
        """
        params = Params(dtype=self._scale_dtype(dtype or w.dtype))
        if self.two_level:
            scales, zeros = self._fit_groups(w, torch.float32, search, importance)
            channel = two_level.channel_scales(scales, 2 ** (self.num_bits - 1) if zeros is None else zeros,
                                               self.num_bits)
            groups, zeros = two_level.fit_groups(w, channel, scales, zeros, self.num_bits, self.group_size, search,
                                                 importance)
            params |= {"group_scales": groups, "channel_scales": channel}
            scales = groups * channel
        else:
            scales, zeros = self._fit_groups(w, params["dtype"], search, importance)
        params["scales"] = scales
        if zeros is not None:
            params["zero_points"] = zeros
        return params

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        if not self.group_size:
            return
        first = lo // self.group_size
        if self.two_level:  # below the channel scales that there are
            channel = params["channel_scales"]
            scales, zeros = self._fit_groups(w, torch.float32, search, None)
            groups, zeros = two_level.fit_groups(w, channel, scales, zeros, self.num_bits, self.group_size, search)
            params["group_scales"][:, first : first + groups.shape[1]] = groups
            scales = groups * channel
        else:
            scales, zeros = self._fit_groups(w, params["dtype"], search, None)
        params["scales"][:, first : first + scales.shape[1]] = scales
        if zeros is not None:
            params["zero_points"][:, first : first + zeros.shape[1]] = zeros

    def _fit_groups(self, w, dtype, search, importance):
        steps = SEARCH_STEPS if search else 1
        if w.dtype == torch.float32 and w.is_cpu:
            weight = None if importance is None else importance.float().contiguous()
            fitted = ops.int_fit(w, weight, self.num_bits, self.group_size, self.symmetric, steps, dtype)
        else:
            fitted = fit_groups(w, self.num_bits, self.group_size, self.symmetric, steps, dtype, importance)
        return fitted[0], None if self.symmetric else fitted[1]

    def _columns(self, params: Params, lo: int, count: int):
        """Scales and zero points of columns ``[lo, lo + count)``, broadcastable to ``[out, count]``."""
        zero = params.get("zero_points")
        half = 2 ** (self.num_bits - 1)
        if not self.group_size:
            return params["scales"], half if zero is None else zero
        if lo // self.group_size == (lo + count - 1) // self.group_size:
            one = slice(lo // self.group_size, lo // self.group_size + 1)
            return params["scales"][:, one], half if zero is None else zero[:, one]
        index = torch.arange(lo, lo + count, device=params["scales"].device) // self.group_size
        return params["scales"][:, index], half if zero is None else zero[:, index]

    def codes(self, w: Tensor, params: Params, lo: int = 0) -> Tensor:
        """Unsigned integer codes, still in ``w``'s dtype."""
        scales, zero = self._columns(params, lo, w.shape[1])
        return self._coded(w, scales, zero, params, lo)

    def _coded(self, w: Tensor, scales: Tensor, zero: Tensor | int, params: Params, lo: int) -> Tensor:
        codes = torch.div(w, scales).round_().add_(zero).clamp_(0, self.levels)
        if self.two_level and not self.symmetric:
            index = torch.arange(lo, lo + w.shape[1], device=w.device) // self.group_size
            limit = two_level.reach(params["group_scales"][:, index])
            codes = torch.minimum(torch.maximum(codes, zero - limit), zero + limit)
        return codes

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        scales, zero = self._columns(params, lo, w.shape[1])
        return self._coded(w, scales, zero, params, lo).sub_(zero).mul_(scales)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"abs_max"}) if self.act_scale == "static" else frozenset()

    def calibrate(self, params: Params, stats) -> None:
        if self.act_scale == "static":
            params["input_scale"] = self.input_scale(stats.abs_max)

    @property
    def standard(self) -> bool:
        """Whether the usual checkpoint layouts say all of its tensors."""
        return self.act_scale == "dynamic" and not self.two_level

    # -- storage ------------------------------------------------------------------------------------------------

    def groups(self, in_features: int) -> int:
        return math.ceil(in_features / self.group_size) if self.group_size else 1

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        codes = self.codes(w_hat, params).to(torch.uint8)
        scales = two_level.store(params["group_scales"], params["channel_scales"]) if self.two_level \
            else tile_rows(params["scales"].to(params["dtype"]))
        return self._tensors(codes, scales, params.get("zero_points"), params.get("input_scale"))

    def pack_codes(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None,
                   input_scale: Tensor | None = None) -> Tensors:
        """Stored tensors from ``codes`` uint8 ``[out, in]``, ``scales`` ``[out, groups]`` in their final dtype and
        ``zero_points`` ``[out, groups]`` (None where symmetric). The standard checkpoint layouts come in here."""
        if self.two_level:
            raise ValueError(f"{self}: found scales [out, groups], accepted are those of `fit`, in two levels")
        return self._tensors(codes, tile_rows(scales), zero_points, input_scale)

    def _tensors(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None,
                 input_scale: Tensor | None) -> Tensors:
        tensors = {"qweight": ops.int_pack(codes.contiguous(), self.num_bits), "scales": scales}
        if not self.symmetric:
            tensors["zero_points"] = tile_rows(zero_points.to(torch.uint8))
        if self.act_scale == "static":
            accepted = f"finite steps above 0, [{self.input_groups(codes.shape[1])}], from calibration"
            if input_scale is None:
                raise ValueError(f"{self}: found no input_scale, accepted are {accepted}")
            input_scale = input_scale.to(torch.float32).reshape(-1)
            if len(input_scale) != self.input_groups(codes.shape[1]) \
                    or not bool((input_scale.isfinite() & (input_scale > 0)).all()):
                raise ValueError(f"{self}: found input_scale {list(input_scale.shape)} from {input_scale.min():g} to "
                                 f"{input_scale.max():g}, accepted are {accepted}")
            tensors["input_scale"] = input_scale.contiguous()
        return tensors

    def input_groups(self, in_features: int) -> int:
        """Activation scales of a token."""
        return math.ceil(in_features / self.act_group) if self.act_group else 1

    def input_scale(self, largest: Tensor) -> Tensor:
        """The static ``input_scale [groups]`` for ``largest [in]``, the largest size of each channel that calibration
        saw. A group without any gets the least normal step."""
        group = self.act_group or largest.numel()
        padded = torch.nn.functional.pad(largest.float(), (0, -largest.numel() % group))
        top = 2 ** (self.activation - 1) - 1
        steps = padded.unflatten(0, (-1, group)).amax(-1) * self.act_clip / top
        return steps.clamp_min(torch.finfo(torch.float32).smallest_normal)

    def unpack_codes(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(codes, scales, zero_points)`` in row-major order, as `pack_codes` takes them; scales in two levels as
        their products, float32."""
        zero, scales = tensors.get("zero_points"), tensors["scales"]
        return (
            ops.int_unpack(tensors["qweight"], *shape, self.num_bits),
            untile_rows(two_level.expanded(scales) if self.two_level else scales, shape[0]),
            None if zero is None else untile_rows(zero, shape[0]),
        )

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype not in _DTYPES.values():  # float64 and the like: by the definition
            codes, scales, zero = self.unpack_codes(tensors, shape)
            half = 2 ** (self.num_bits - 1)
            q = codes.to(dtype)
            index = torch.arange(shape[1], device=q.device) // (self.group_size or shape[1])
            return (q - (half if zero is None else zero.to(dtype)[:, index])) * scales.to(dtype)[:, index]
        return ops.int_dequantize(tensors["qweight"], tensors["scales"], tensors.get("zero_points"), *shape,
                                  self.num_bits, self.group_size, dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        rows, blocks = math.ceil(shape[0] / TILE_ROWS), math.ceil(shape[1] / BLOCK_COLUMNS)
        groups = self.groups(shape[1])
        spec = {
            "qweight": TensorSpec((rows, blocks, 64 * self.num_bits), torch.uint8),
            "scales": TensorSpec((rows, groups + two_level.CHANNEL_ROWS * self.two_level, TILE_ROWS),
                                 self._scale_dtype(dtype)),
        }
        if not self.symmetric:
            spec["zero_points"] = TensorSpec((rows, groups, TILE_ROWS), torch.uint8)
        if self.act_scale == "static":
            spec["input_scale"] = TensorSpec((self.input_groups(shape[1]),), torch.float32)
        return spec

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        if self.two_level:
            two_level.verify(tensors, shape[0], self.num_bits, self.group_size)

    # -- running ------------------------------------------------------------------------------------------------

    def quantize_input(self, x: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the kernel sees of ``x [..., in]``; ``tensors`` hold the scale where it is static."""
        if self.activation == 16:
            return x
        scale = None if self.act_scale == "dynamic" else tensors["input_scale"]
        return quantize_activations(x, self.activation, self.act_group, self.act_clip, self.act_sym, scale)

    def _input_arguments(self, tensors: Mapping[str, Tensor]) -> tuple:
        """The arguments of the operations from ``act_bits`` on; none that say the usual."""
        if self.input_options == _EXACT_INPUT:
            return (self.activation,)
        return self.activation, self.act_group, self.act_clip, self.act_sym, tensors.get("input_scale")

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        return ops.int_linear(x, tensors["qweight"], tensors["scales"], tensors.get("zero_points"), bias,
                              shape[0], self.num_bits, self.group_size, *self._input_arguments(tensors))

    def linear_grouped(self, x: Tensor, ends: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None,
                       shape: Shape) -> Tensor:
        return ops.int_linear_grouped(x, ends, tensors["qweight"], tensors["scales"], tensors.get("zero_points"), bias,
                                      shape[0], self.num_bits, self.group_size, *self._input_arguments(tensors))

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape):
        device = tensors["qweight"].device
        arguments = (tensors["qweight"], tensors["scales"], tensors.get("zero_points"), shape, self.num_bits,
                     self.group_size, *self._input_arguments(tensors))
        if device.type == "cpu":
            return ops.BoundIntLinear(*arguments)
        if device.type != "cuda" or self.activation == 16 or self.kernel(shape, device).startswith("reference"):
            return None
        from ..ops_fused import BoundLowbitCuda

        return BoundLowbitCuda(*arguments)

    def bind_grouped(self, tensors: Mapping[str, Tensor], shape: Shape):
        """On a GPU, whose kernel for experts knows scales of one level: over those, multiplied out once."""
        if not self.two_level or tensors["qweight"].device.type == "cpu":
            return None
        one_level = {**tensors, "scales": two_level.expanded(tensors["scales"])}
        return lambda x, ends, bias: self.linear_grouped(x, ends, one_level, bias, shape)

    def producer(self, tensors: Mapping[str, Tensor]) -> dict | None:
        return {} if self.activation < 16 else None

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        kernel = ops.int_linear.kernel(torch.device(device))
        if self.activation == 16 or torch.device(device).type != "cuda" or kernel.startswith("reference"):
            return kernel
        from ..ops_lowbit_gemm_cuda import refusal

        why = refusal(shape[1], not self.symmetric and not self.two_level, self.activation, self.act_sym)
        return f"reference: {why}, torch rounds them for int_linear cuda" if why else \
            f"quantize_rows cuda, {'two_level' if self.two_level else 'lowbit'}_linear cuda"

    def kernel_grouped(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        kernel = ops.int_linear_grouped.kernel(torch.device(device))
        if self.activation == 16 or torch.device(device).type != "cuda" or kernel.startswith("reference"):
            return kernel
        if self.act_scale == "static":
            return ("reference: no CUDA kernel for static activation scales of experts, torch rounds them for "
                    "int_linear_grouped cuda")
        from ..ops_lowbit_gemm_cuda import refusal

        if why := refusal(shape[1], not self.symmetric, self.activation, self.act_sym):
            return f"reference: {why}, torch rounds them for int_linear_grouped cuda"
        levels = " on scales of one level, made once" if self.two_level else ""
        return f"quantize_rows cuda, lowbit_linear_grouped cuda{levels}"

    def text(self) -> str:
        shown = []
        if self.group_size != default_group(self.num_bits, self.activation):
            shown.append(f"group={self.group_size}")
        if not self.symmetric:
            shown.append("sym=false")
        if self.scale_dtype != "model":
            shown.append(f"scale={self.scale_dtype}")
        if self.act_group != BLOCK_COLUMNS:
            shown.append(f"act_group={self.act_group}")
        if self.act_clip != 1:
            shown.append(f"act_clip={self.act_clip}")
        if self.act_scale != "dynamic":
            shown.append(f"act_scale={self.act_scale}")
        if not self.act_sym:
            shown.append("act_sym=false")
        return f"W{self.num_bits}A{self.activation}" + (f"[{','.join(shown)}]" if shown else "")


def fit_groups(w: Tensor, bits: int, group_size: int, symmetric: bool, steps: int, dtype: torch.dtype,
               importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``[out, groups]`` of ``w [out, in]``: the definition that `ops.int_fit` is tested against.

    The range of a group, times ``1 - step / 100`` for each of ``steps``; the first with the least squared error
    (weighted by ``importance [in]``) wins. Scales are rounded to ``dtype``.
    """
    g, levels = group_size or w.shape[1], 2**bits - 1
    padding = -w.shape[1] % g
    grouped = torch.nn.functional.pad(w, (0, padding)).unflatten(1, (-1, g))
    inside = torch.arange(w.shape[1] + padding, device=w.device).view(1, -1, g) < w.shape[1]
    low = grouped.masked_fill(~inside, float("inf")).amin(-1)
    high = grouped.masked_fill(~inside, float("-inf")).amax(-1)
    if not symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
    weight = inside.to(w)
    if importance is not None:
        weight = weight * torch.nn.functional.pad(importance.to(w), (0, padding)).view(1, -1, g)
    limits, best = torch.finfo(dtype), None
    for step in range(steps):
        lo, hi = low * (1 - step / 100), high * (1 - step / 100)
        scale = torch.maximum(-lo, hi) * (2 / levels) if symmetric else (hi - lo) / levels
        scale = scale.clamp(limits.smallest_normal, limits.max).to(dtype).to(w)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-lo / scale).round().clamp(0, levels)
        if steps == 1:
            return scale, zero
        s, z = scale[..., None], zero[..., None]
        error = (((grouped / s).round() + z).clamp(0, levels).sub(z).mul(s).sub(grouped).square() * weight).sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best))
    return best[1], best[2]


def default_group(num_bits: int, activation: int) -> int:
    """Group size of the compressed-tensors preset of this name: 128, and per channel for W8A8."""
    return 0 if (num_bits, activation) == (8, 8) else 128


def quantize_activations(x: Tensor, bits: int, group: int = BLOCK_COLUMNS, clip: float = 1.0, symmetric: bool = True,
                         scale: Tensor | None = None, block_bits: Tensor | None = None) -> Tensor:
    """What the low-bit kernels see of ``x [..., in]``: the integers of `activation_codes` times their scales, in the
    dtype of ``x`` (float32 arithmetic inside). A group with NaN or Inf gives NaN."""
    values, scales = activation_codes(x, bits, group, clip, symmetric, scale, block_bits)
    return (values * scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def activation_codes(x: Tensor, bits: int, group: int = BLOCK_COLUMNS, clip: float = 1.0, symmetric: bool = True,
                     scale: Tensor | None = None, block_bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers ``[..., groups, group]`` and scales ``[..., groups, 1]``, float32, of ``x [..., in]`` (padded with 0).

    ``group`` channels share a scale; 0: all. Symmetric: ``scale = clip * max|x| / top``, ``top = 2^(bits-1) - 1``,
    integers from -top to top. Not symmetric: ``scale`` covers ``clip * min(x, 0)`` to ``clip * max(x, 0)`` in
    2^bits - 1 steps, and the integer is code - zero point, codes from 0. ``scale [groups]`` replaces the dynamic one.
    ``block_bits`` uint8 ``[ceil(in / 128)]``, 4 or 8 for each 128 channels, replaces ``bits`` (COMET); groups are then
    32, 64 or 128. Codes are rounded to nearest even. A group whose scale is 0 gives zeros.
    """
    group = group or max(x.shape[-1], 1)
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    wide = groups.new_tensor(float(bits))
    if block_bits is not None:
        wide = block_bits.to(groups).repeat_interleave(128 // group)[: groups.shape[-2], None]
    if symmetric:
        high = 2 ** (wide - 1) - 1
        low = -high
        largest = groups.abs().amax(-1, keepdim=True)
        found = largest * clip / high
        if scale is not None:
            found = torch.where(largest.isfinite(), scale.to(groups)[..., None], float("nan"))
    else:
        high = groups.amax(-1, keepdim=True).clamp_min(0) * clip
        low = groups.amin(-1, keepdim=True).clamp_max(0) * clip
        levels = 2**wide - 1
        found = high / levels - low / levels
        zero = torch.where(found > 0, (-low / found).round(), 0.0).clamp(min=0)
        zero = torch.minimum(zero, levels)
        low, high = -zero, levels - zero
    codes = torch.where(found > 0, (groups / found).round(), 0.0)
    return torch.minimum(torch.maximum(codes, low), high), found


def tile_rows(values: Tensor) -> Tensor:
    """``[out, groups]`` to ``[tiles, groups, 16]``, rows padded with zeros."""
    padding = -values.shape[0] % TILE_ROWS
    if padding:
        values = torch.cat([values, values.new_zeros(padding, values.shape[1])])
    return values.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2).contiguous()


def untile_rows(values: Tensor, rows: int) -> Tensor:
    """`tile_rows` undone."""
    return values.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


@register_format(r"W(\d+)A(\d+)(_ASYM)?", "W4A16", "integer weights of 2 to 8 bits, activations of 16, 8, 6 or 4 bits")
def _integer(match, inner, *, group: int | None = None, sym: bool | None = None, scale: str = "model",
             act_group: int = BLOCK_COLUMNS, act_clip: float = 1.0, act_scale: str = "dynamic", act_sym: bool = True):
    if inner is not None:
        raise ValueError(f"an integer format holds values and nothing nests in it, found {inner}")
    bits, activation = int(match[1]), int(match[2])
    if group is None:
        group = default_group(bits, activation)
    if group == -1:
        group = 0
    symmetric = match[3] is None if sym is None else sym
    act_group = 0 if act_group == -1 else act_group
    if scale == "e4m3":  # the codes of a format with float32 scales
        from .byte_scales import ByteScales

        return ByteScales(Int(bits, group, symmetric, activation, "fp32", act_group, float(act_clip), act_scale,
                              act_sym))
    return Int(bits, group, symmetric, activation, scale, act_group, float(act_clip), act_scale, act_sym)
