"""`ops_lowbit_cuda` on CPU tensors: its launchers are the kernels compiled for the host."""

import contextlib
import ctypes
import functools
from types import SimpleNamespace

import torch
from emulation import Violation, build

from tersor import ops_lowbit_cuda
from tersor.act_codes import padded_channels, row_bytes

KERNELS = ["cuda/kernels/quantize_rows.cu", "cuda/kernels/producer_rows.cu", "cuda/kernels/producer_products.cu"]
SOURCES = [*KERNELS, "cuda/dispatch/quantize_rows.cu", "cpp/common/status.cpp"]
ROW_FIELDS = ("x", "dtype", "m", "k", "ldx", "norm_weight", "other", "ldother", "index", "signs", "rows", "columns",
              "left", "left_parts", "right", "butterflies")
CODE_FIELDS = ("codes", "row_bytes", "scales", "sums", "zero_points", "bits", "width", "group", "asymmetric",
               "static_scales", "block_bits")


@functools.cache
def library():
    return build(SOURCES)


class Launchers:
    """`_C`'s functions on a compiled library: every buffer is registered at the size it must have."""

    def __init__(self, compiled=None, seeds=(0,), most_shared=227 * 1024):
        self.compiled, self.seeds, self.room = compiled or library(), seeds, most_shared
        self.counters, self.calls = None, 0

    def cuda_devices(self):
        return [{"shared_memory_per_block": self.room}]

    def cuda_round_rows_shared(self, rows, codes):
        function = self.compiled.library.tersor_cuda_round_rows_shared
        function.restype = ctypes.c_int64
        return function((ctypes.c_int64 * len(rows))(*rows), (ctypes.c_int64 * len(codes))(*codes))

    def cuda_round_rows(self, rows, codes, clip, epsilon, factor, most_shared, stream):
        native = self.compiled.library
        native.tersor_last_error.restype = ctypes.c_char_p
        r, c = dict(zip(ROW_FIELDS, rows, strict=True)), dict(zip(CODE_FIELDS, codes, strict=True))
        m, k, size = r["m"], r["k"], 4 if r["dtype"] == 0 else 2
        tiles, wide = -(-r["rows"] // 16), -(-r["columns"] // 16)
        groups = -(-k // c["group"]) if c["group"] else 1
        buffers = {"x": size * ((m - 1) * r["ldx"] + k), "norm_weight": size * k,
                   "other": size * ((m - 1) * r["ldother"] + k), "index": 4 * k, "signs": 4 * k,
                   "left": 512 * tiles * tiles * r["left_parts"], "right": 1024 * wide * wide,
                   "static_scales": 4 * groups, "block_bits": -(-k // 128)}
        outputs = {"codes": m * c["row_bytes"], "scales": 4 * m * groups, "sums": 2 * m * padded_channels(k) // 32,
                   "zero_points": 2 * m * groups}
        first = None
        for seed in self.seeds:
            native.emulation_clear()
            native.emulation_seed(seed)
            for name, count in {**buffers, **outputs}.items():
                if at := {**r, **c}[name]:
                    if name in outputs:
                        ctypes.memset(at, 0x5a, count)
                    native.emulation_register(at, count, name.encode(), int(name in outputs))
            status = native.tersor_cuda_round_rows(
                (ctypes.c_int64 * len(rows))(*rows), (ctypes.c_int64 * len(codes))(*codes), ctypes.c_float(clip),
                ctypes.c_float(epsilon), ctypes.c_float(factor), ctypes.c_int64(most_shared), None)
            error = native.emulation_error().decode()
            if error:
                raise Violation(self.compiled._name_kernel(error))
            if status:
                raise ValueError(native.tersor_last_error().decode())
            made = [ctypes.string_at(c[name], count) for name, count in outputs.items() if c[name]]
            if first not in (None, made):
                raise Violation("seeds disagree: the result depends on the order of threads")
            first = made
        self.counters, self.calls = self.compiled.counters(), self.calls + 1


@contextlib.contextmanager
def emulated(launchers):
    """`ops_lowbit_cuda` on these launchers while it lasts."""
    kept = ops_lowbit_cuda._C, torch.cuda.device, getattr(torch._C, "_cuda_getCurrentRawStream", None)
    ops_lowbit_cuda._C = launchers
    ops_lowbit_cuda._most_shared.cache_clear()
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    most = ops_lowbit_cuda._most_shared
    ops_lowbit_cuda._most_shared = lambda index: launchers.room
    try:
        yield launchers
    finally:
        ops_lowbit_cuda._C, torch.cuda.device = kept[:2]
        ops_lowbit_cuda._most_shared = most
        if kept[2] is None:
            del torch._C._cuda_getCurrentRawStream
        else:
            torch._C._cuda_getCurrentRawStream = kept[2]
