"""Low-bit activations for the CUDA GEMM's tests: what a producer would store, its float64 truth, and the host-compiled
kernel as a function of tensors."""

import ctypes
import functools
from types import SimpleNamespace

import torch
from cuda_int_weights import CODE, Weight
from emulation import build

from tersor import act_codes, ops_cuda, ops_lowbit_cuda, ops_lowbit_gemm_cuda
from tersor.formats.integer import activation_codes
from tersor.ops_lowbit_cuda import QuantizedInput

__all__ = ["Activations", "Launchers", "Weight", "library", "multiply", "plan", "rounded", "stage_starts", "units",
           "BYTES", "NIBBLES", "MIXED"]

BYTES, NIBBLES, MIXED = 0, 1, 2  # enum LowbitWidth
SOURCES = [
    "cuda/kernels/sm80_lowbit_linear.cu", "cuda/dispatch/lowbit_linear.cu", "cpp/common/status.cpp",
    "cpp/common/parallel.cpp", "cpp/cpu/int_layout.cpp",
]
NIBBLE_SOURCES = [*SOURCES, "cuda/kernels/sm80_lowbit_linear_s4.cu"]
EXPERT_SOURCES = ["cuda/kernels/sm80_lowbit_linear_experts.cu", *SOURCES[1:]]


@functools.cache
def library(bits, nibbles=False, sanitize=False):
    return build(NIBBLE_SOURCES if nibbles else SOURCES, {"TERSOR_BITS": bits}, sanitize=sanitize)


def stage_starts(block_bits):
    """The table of the mixed kernel: 64-byte units before each 128 channels, and their cost."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), (block_bits.long() // 4).cumsum(0)])
    return torch.stack([ends, ends]).to(torch.int32)


class Activations:
    """Random (or given) integers of ``bits`` as stored, with scales; ``zeros``: 8-bit codes that are not symmetric.

    ``truth`` is what they stand for, float64 ``[m, k]``.
    """

    def __init__(self, m, k, bits, group=0, width=BYTES, zeros=False, static=False, block_bits=None, values=None,
                 unit=False, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.m, self.k, self.group, self.width, self.block_bits = m, k, group, width, block_bits
        size = group if 0 < group < k else k
        groups = self.groups = -(-k // size)
        index = torch.arange(k) // size
        top = torch.tensor(2 ** (bits - 1) - 1).expand(k)
        if block_bits is not None:
            top = (2 ** (block_bits.long() - 1) - 1).repeat_interleave(128)[:k]
        if values is None:
            values = (torch.rand(m, k, generator=random) * (2 * top + 1)).floor().long() - top
            if zeros:
                values = torch.randint(-128, 128, (m, k), generator=random)
        self.values = values
        self.scales = torch.rand(1 if static else m, groups, generator=random) * 0.02 + 0.01
        if unit:
            self.scales.fill_(1.0)
        self.zeros = torch.randint(-128, 128, (m, groups), generator=random).to(torch.int16) if zeros else None
        offset = 0 if self.zeros is None else self.zeros.long()[:, index]
        self.integers = values - offset
        self.truth = self.integers.double() * self.scales.double()[:, index]
        self.codes = act_codes.pack_codes(values, 4 if width == NIBBLES else 8, block_bits)
        self.sums = act_codes.code_sums(values)
        self.starts = None if block_bits is None else stage_starts(block_bits)


def units(weight):
    return -(-weight.n // 128) * -(-weight.k // 128)


def plan(library, x, weight, multiprocessors=2, shared=100 * 1024):
    """(ranges, bytes of partials, bytes of counters)"""
    found = [ctypes.c_int64() for _ in range(3)]
    status = library.library.tersor_cuda_lowbit_linear_plan(
        *(ctypes.c_int64(v) for v in (x.m, weight.n, weight.k, weight.bits, weight.group, CODE[weight.scale_dtype],
                                      weight.zeros is not None, x.group, x.zeros is not None, x.width,
                                      multiprocessors, shared)), *map(ctypes.byref, found))
    assert status == 0
    return tuple(value.value for value in found)


def multiply(library, x, weight, bias=None, residual=None, dtype=torch.float32, ranges=1, seeds=(0,), count=False,
             pad=4):
    """y [m, n] of the emulated kernel, and its counters. What lies behind y's rows must stay as it was."""
    m, n = x.m, weight.n
    out = torch.full((m, n + pad), float("nan"), dtype=dtype)
    tokens = 128 * -(-m // 8) * 8
    blocks = -(-m // 8) if m else 1
    partials = torch.full((blocks * max(ranges, 1) * 2 * tokens,) if ranges > 1 else (0,), 0x7fc00000,
                          dtype=torch.int32)
    counters = torch.zeros(blocks * -(-n // 128) if ranges > 1 else 0, dtype=torch.int32)
    tensors = {"codes": x.codes, "act_scales": x.scales, "sums": x.sums if weight.zeros is not None else None,
               "act_zero_points": x.zeros, "stage_starts": x.starts, "qweight": weight.qweight,
               "scales": weight.scales, "zero_points": weight.zeros, "bias": bias, "residual": residual, "y": out,
               "partials": partials, "counters": counters}
    t = tensors
    found = library.call(
        "tersor_cuda_lowbit_linear", x.codes, x.width, x.codes.stride(0) if m else 16 * -(-x.k // 16), x.scales,
        0 if x.scales.shape[0] == 1 and m != 1 else x.groups, t["sums"], x.zeros, x.starts,
        0 if x.starts is None else int(x.starts[1, -1]), x.group, m, x.k, weight.qweight, weight.scales,
        CODE[weight.scale_dtype], weight.zeros, bias, residual, 0 if residual is None else residual.stride(0), out,
        CODE[dtype], n, n + pad, weight.bits, weight.group, ranges, partials, counters, None,
        names=[name for name, tensor in tensors.items() if tensor is not None], outputs=[out, partials, counters],
        seeds=seeds, count=count)
    assert not counters.any(), "the counters are not zero again"
    assert torch.isnan(out[:, n:]).all(), "wrote past the row"
    return out[:, :n], found


def rounded(x, bits, act_group=32, act_clip=1.0, act_sym=True, input_scale=None, block_bits=None, width=8, sums=True):
    """`ops_lowbit_cuda.quantize_input` by the definition, in torch."""
    rows = x.reshape(-1, x.shape[-1])
    m, k = rows.shape
    values, scales = activation_codes(rows, bits, act_group, act_clip, act_sym, input_scale, block_bits)
    values = values.flatten(1)[:, :k].nan_to_num(0.0).long()
    zeros = None
    if not act_sym and bits == 8:
        # Integers are code - zero point; stored are code - 128, and the zero point less 128.
        size = act_group or k
        grouped = torch.nn.functional.pad(rows.float(), (0, -k % size)).unflatten(-1, (-1, size))
        lowest = grouped.amin(-1, keepdim=True).clamp_max(0) * act_clip
        found = torch.where(scales > 0, (-lowest / scales).round(), 0.0)
        zeros = (found.clamp(0, 255) - 128).squeeze(-1)
        values = values + zeros.long().repeat_interleave(act_group or k, 1)[:, :k]
        zeros = zeros.to(torch.int16).contiguous()
    mixed = block_bits if width == 4 else None
    codes = act_codes.pack_codes(values, width, mixed)
    scales = scales.squeeze(-1).expand(m, -1).contiguous()
    return QuantizedInput(codes, 0 if mixed is not None else width, scales, scales.shape[1],
                          act_codes.code_sums(values) if sums else None, zeros, mixed, m, k, act_group, bits)


class Launchers:
    """`_C`'s functions of the low-bit product on the emulated library, with every buffer registered at its size."""

    def __init__(self, nibbles=True, bits=4, native=None):
        self.native, self.calls = (native or library(bits, nibbles)).library, 0

    def plan(self, *arguments):
        found = [ctypes.c_int64() for _ in range(3)]
        assert self.native.tersor_cuda_lowbit_linear_plan(
            *(ctypes.c_int64(int(a)) for a in arguments), *map(ctypes.byref, found)) == 0
        return tuple(value.value for value in found)

    def linear(self, *arguments):
        names = ("codes width row_bytes act_scales act_scale_stride sums act_zero_points stage_starts row_cost "
                 "act_group m k qweight scales scale_dtype zero_points bias residual ldr y y_dtype n ldy bits "
                 "group_size ranges partials counters stream").split()
        a = dict(zip(names, arguments, strict=True))
        m, n, k, group, act_group = (a[name] for name in ("m", "n", "k", "group_size", "act_group"))
        tiles, blocks, stages = -(-n // 16), -(-k // 32), -(-k // 128)
        groups = tiles * 16 * (-(-k // group) if group else 1)
        act_groups = -(-k // act_group) if act_group else 1
        size = 4 if a["y_dtype"] == 0 else 2
        made = self.plan(m, n, k, a["bits"], group, a["scale_dtype"], bool(a["zero_points"]), act_group,
                         bool(a["act_zero_points"]), a["width"], *ops_cuda._device(None))
        assert made[0] == a["ranges"]
        sizes = {"codes": m * a["row_bytes"], "act_scales": 4 * ((m - 1) * a["act_scale_stride"] + act_groups),
                 "sums": 8 * m * stages, "act_zero_points": 2 * m * act_groups, "stage_starts": 8 * (stages + 1),
                 "qweight": tiles * blocks * 64 * a["bits"],
                 "scales": {0: 4 * groups, 3: groups + 64 * tiles}.get(a["scale_dtype"], 2 * groups),
                 "zero_points": groups, "bias": size * n, "residual": size * ((m - 1) * a["ldr"] + n),
                 "y": size * ((m - 1) * a["ldy"] + n), "partials": made[1], "counters": made[2]}
        self.native.emulation_clear()
        for name, bytes_ in sizes.items():
            if a[name] and bytes_:
                self.native.emulation_register(a[name], bytes_, name.encode(), name in ("y", "partials", "counters"))
        status = self.native.tersor_cuda_lowbit_linear(*(ctypes.c_int64(value) for value in arguments))
        assert status == 0, self.native.emulation_error().decode() or status
        self.calls += 1

    def grouped_plan(self, *arguments):
        found = [ctypes.c_int64() for _ in range(3)]
        assert self.experts.tersor_cuda_lowbit_linear_grouped_plan(
            *(ctypes.c_int64(int(a)) for a in arguments), *map(ctypes.byref, found)) == 0
        return tuple(value.value for value in found)

    def grouped(self, *arguments):
        names = ("codes row_bytes act_scales act_scale_stride sums act_zero_points act_group rows k ends experts "
                 "qweight scales scale_dtype zero_points bias y y_dtype n ldy bits group_size ranges partials counters "
                 "stream")
        a = dict(zip(names.split(), arguments, strict=True))
        m, n, k, group, act_group, count = (a[x] for x in ("rows", "n", "k", "group_size", "act_group", "experts"))
        tiles, blocks, stages = -(-n // 16), -(-k // 32), -(-k // 128)
        groups = count * tiles * 16 * (-(-k // group) if group else 1)
        act_groups, size = -(-k // act_group) if act_group else 1, 4 if a["y_dtype"] == 0 else 2
        made = self.grouped_plan(m, n, k, a["bits"], group, a["scale_dtype"], bool(a["zero_points"]), act_group,
                                 bool(a["act_zero_points"]), count, *ops_cuda._device(None))
        assert made[0] == a["ranges"]
        sizes = {"codes": m * a["row_bytes"], "act_scales": 4 * m * act_groups, "sums": 8 * m * stages,
                 "act_zero_points": 2 * m * act_groups, "ends": 4 * count,
                 "qweight": count * tiles * blocks * 64 * a["bits"],
                 "scales": groups * (4 if a["scale_dtype"] == 0 else 2), "zero_points": groups,
                 "bias": size * n * count, "y": size * m * n, "partials": made[1], "counters": made[2]}
        self.experts.emulation_clear()
        for name, bytes_ in sizes.items():
            if a[name] and bytes_:
                self.experts.emulation_register(a[name], bytes_, name.encode(), name in ("y", "partials", "counters"))
        status = self.experts.tersor_cuda_lowbit_linear_grouped(*(ctypes.c_int64(value) for value in arguments))
        assert status == 0, self.experts.emulation_error().decode() or status
        self.calls += 1

    @functools.cached_property
    def experts(self):
        return build(EXPERT_SOURCES, {"TERSOR_BITS": 4}).library

    def install(self, monkeypatch, capability=(8, 0)):
        """Makes `ops_cuda` and `ops_lowbit_gemm_cuda` run here."""
        monkeypatch.setattr(ops_lowbit_gemm_cuda, "_C", SimpleNamespace(
            cuda_lowbit_linear_plan=self.plan, cuda_lowbit_linear=self.linear,
            cuda_lowbit_linear_grouped_plan=self.grouped_plan, cuda_lowbit_linear_grouped=self.grouped))
        monkeypatch.setattr(ops_lowbit_cuda, "quantize_input", rounded)
        monkeypatch.setattr(ops_cuda, "capability", lambda index: capability)
        monkeypatch.setattr(ops_cuda, "_device", lambda index: (3, 100 * 1024))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        ops_lowbit_gemm_cuda._plan.cache_clear()
        ops_lowbit_gemm_cuda._grouped_plan.cache_clear()
