"""The machine's own limits, measured: bytes read per second and operations per second."""

from __future__ import annotations

import time


def floors(threads: int, seconds: float) -> dict:
    """``read_gbs``, ``fp32_gflops``, ``bf16_gflops``, ``int8_gops`` (0 where there is no such instruction) and
    ``by``: tersor's loops, or an estimate with torch where tersor is missing (which finds less than there is)."""
    try:
        from tersor import _C

        return {**_C.machine_floors(threads, seconds), "by": f"tersor {_C.isa()}"}
    except ImportError:
        return _torch_floors(threads, seconds)


def _rate(function, work: float, seconds: float) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return work / best * 1e-9


def _torch_floors(threads: int, seconds: float) -> dict:
    import torch

    torch.set_num_threads(threads)
    words = torch.ones(1 << 26, dtype=torch.int64)
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    fp32 = _rate(lambda: torch.mm(a, b, out=out), 2.0 * size**3, seconds)
    a16, b16 = a.bfloat16(), b.bfloat16()
    bf16 = _rate(lambda: torch.mm(a16, b16), 2.0 * size**3, seconds)
    return {
        "read_gbs": _rate(words.sum, words.numel() * 8.0, seconds),
        "fp32_gflops": fp32,
        "bf16_gflops": bf16 if bf16 > fp32 else 0.0,
        "int8_gops": 0.0,
        "by": f"torch {torch.__version__}",
    }
