"""Weights of small floats for the CUDA kernels' tests: the host-compiled kernels as functions of tensors."""

import ctypes
import functools

import torch
from emulation import build

from tersor.formats import NVFP4, Float, Microscaling

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = [Float("e4m3", "tensor"), Float("e4m3", "channel"), Float("e4m3", "block"), Microscaling("e4m3"),
           Microscaling("e2m1"), NVFP4(), Microscaling("e2m3")]
COMMON = ["cpp/common/status.cpp"]


def kind_of(fmt) -> int:
    """The translation unit (TERSOR_FLOAT) that holds a format."""
    return 2 if isinstance(fmt, NVFP4) else {"e4m3": 0, "e2m1": 1, "e2m3": 3}[fmt.element]


@functools.cache
def library(kind, sanitize=False, edits=()):
    return build(["cuda/kernels/sm80_float_linear.cu", "cuda/dispatch/float_linear.cu", *COMMON],
                 {"TERSOR_FLOAT": kind}, sanitize=sanitize, edits=edits)


class Stored:
    """A weight [n, k] in a format, packed, beside its values in float64."""

    def __init__(self, fmt, n, k, seed=0, dtype=torch.bfloat16):
        torch.manual_seed(seed)
        w = torch.randn(n, k) * torch.rand(n, 1) ** 4
        w.view(-1)[::13] *= 20  # subnormal elements beside them
        w.view(-1)[::29] = 0
        self.fmt, self.n, self.k = fmt, n, k
        params = fmt.fit(w, dtype=dtype)
        self.tensors = fmt.pack(fmt.project(w, params), params)
        self.truth = fmt.unpack(self.tensors, (n, k), torch.float64)
        codes, scales, self.one, self.scale_rows, self.group = fmt._operands(self.tensors, (n, k))
        self.codes = codes.view(torch.uint8)
        kinds = {torch.uint8: 3, torch.float8_e4m3fn: 4}
        self.scale_kind = kinds.get(scales.dtype, CODE.get(scales.dtype))
        self.scales = scales.view(torch.uint8) if self.scale_kind == 4 else scales
        self.element = {"e4m3": 0, "e2m1": 1, "e2m3": 2}[fmt.element]


def inputs(m, n, k, dtype, biased, seed=0):
    """x [m, k] whose rows are 16-byte aligned and padded with NaN, and a bias."""
    random = torch.Generator().manual_seed(seed)
    x = torch.full((m, -(-k // 8) * 8), float("nan"), dtype=dtype)[:, :k]
    x.copy_(torch.randn(m, k, generator=random))
    return x, torch.randn(n, generator=random).to(dtype) if biased else None


def units(n, k):
    return -(-n // 128) * -(-k // 128)


def workspace(m, n, ranges):
    tokens = next((t for t in (8, 16, 32) if m <= t), 64)
    blocks = -(-m // tokens)
    if ranges == 1:
        return torch.empty(0), torch.empty(0, dtype=torch.int32)
    return torch.full((blocks * ranges * 2 * 128 * tokens,), float("nan")), \
        torch.zeros(blocks * -(-n // 128), dtype=torch.int32)


def call(native, name, before, after, m, n, dtype, ranges, named, seeds, count, pad=5):
    """Runs launcher `name`: arguments `before`, then bias, y, n, ldy, ranges and scratch memory; y [m, n] and counters.
    The columns behind y's rows must stay as they were."""
    out = torch.full((m, n + pad), float("nan"), dtype=dtype)
    partials, counters = workspace(m, n, ranges)
    named = {**named, "y": out, "partials": partials, "counters": counters}
    scratch = {id(partials), id(counters)} if ranges == 1 else set()
    result = native.call(
        name, *before, out, n, out.stride(0), ranges, None if scratch else partials, None if scratch else counters,
        *after, None, names=[key for key, tensor in named.items() if tensor is not None and id(tensor) not in scratch],
        outputs=[out] if scratch else [out, partials, counters], seeds=seeds, count=count)
    assert not counters.any(), "the counters are not zero again"
    assert torch.isnan(out[:, n:]).all(), "wrote past the row"
    return out[:, :n], result


def multiply(native, weight, x, bias=None, ranges=1, seeds=(0,), count=False, pad=5):
    """y [m, n] of the emulated float_linear, and its counters."""
    before = (x, CODE[x.dtype], x.shape[0], weight.k, x.stride(0), weight.codes, ctypes.c_int(weight.element),
              weight.scales, ctypes.c_int(weight.scale_kind), weight.scale_rows, weight.group, weight.one, bias)
    named = {"x": x, "codes": weight.codes, "scales": weight.scales, "global": weight.one, "bias": bias}
    return call(native, "tersor_cuda_float_linear", before, (), x.shape[0], weight.n, x.dtype, ranges, named, seeds,
                count, pad)
