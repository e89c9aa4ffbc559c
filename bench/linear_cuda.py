"""The GPU's part of bench/linear.py: one linear layer on CUDA against cuBLAS bf16 and torch's own 4-bit product.

Weights come in as many copies as it takes to leave the L2 cache between uses; a time is the median of CUDA-event times
of whole passes over the copies, captured in a graph, divided by their number; contenders take turns. Beside the ratios
stand two floors: stored bytes over the measured bandwidth of a copy, and operations over the measured rate of a large
bf16 product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import common
import torch

import tersor

SHAPES, TOKENS = "28672x8192,4096x4096", "1,4,8,16,32,64,128,256,512,2048"
ROUNDS, LEAST_BYTES = 7, 512 << 20


def timed(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of ``call`` on the GPU, the median of ``repeats``."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def floors() -> dict[str, float]:
    """Bytes a millisecond that a copy moves (read and written), and operations a millisecond of a bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        target.copy_(source)
        a @ a
    return {"copy_bytes_per_ms": 2 * source.numel() / timed(lambda: target.copy_(source), 9),
            "bf16_operations_per_ms": 2 * 8192**3 / timed(lambda: a @ a, 9)}


def captured(once: Callable[[], object]) -> Callable[[], object]:
    """``once`` as a CUDA graph, so that what is timed is the GPU's work and not its launching."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    return graph.replay


class Contender:
    """Something that multiplies ``[m, k]`` by its weight; ``calls`` holds one callable for each copy."""

    def __init__(self, name: str, nbytes: int, calls: list[Callable]):
        self.name, self.nbytes, self.calls = name, nbytes, calls


def copies(nbytes: int) -> int:
    return max(2, -(-LEAST_BYTES // nbytes))


def contenders(n: int, k: int, specs) -> list[Contender]:
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    made = []
    dense = [w.clone() for _ in range(copies(w.nbytes))]
    made.append(Contender("torch bf16", w.nbytes, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense]))
    for spec in specs:
        linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta")
        linear.weight = torch.nn.Parameter(w.cpu(), requires_grad=False)
        layer = tersor.Linear.from_linear(linear, f"rtn[search=false]:{spec}")
        tensors = {name: tensor.cuda() for name, tensor in layer.tensors().items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        sets = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(copies(size))]
        made.append(Contender(f"tersor {spec}", size, [
            lambda x, t=t: layer.format.linear(x, t, None, (n, k)) for t in sets]))
    made += tinygemm(w, n, k)
    return made


def tinygemm(w: torch.Tensor, n: int, k: int, group: int = 128) -> list[Contender]:
    """torch's own ``_weight_int4pack_mm``, asymmetric groups of 128 in bf16."""
    groups = w.float().view(n, k // group, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_(min=1e-6) / 15
    codes = ((groups - low) / scale).round_().clamp_(0, 15).to(torch.int32).view(n, k)
    zeros = low + scale * 8
    try:
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(bytes_.contiguous(), 8)
        scales = torch.cat((scale, zeros), -1).transpose(0, 1).contiguous().bfloat16()
        size = packed.nbytes + scales.nbytes
        sets = [(packed.clone(), scales.clone()) for _ in range(copies(size))]
        calls = [lambda x, s=s: torch._weight_int4pack_mm(x, s[0], group, s[1]) for s in sets]
        calls[0](torch.zeros(1, k, device="cuda", dtype=torch.bfloat16))
    except (RuntimeError, AttributeError) as error:
        print(f"torch _weight_int4pack_mm: takes no part: {str(error).splitlines()[0]}", flush=True)
        return []
    return [Contender("torch _weight_int4pack_mm", size, calls)]


def launch_microseconds(layer_call: Callable, x: torch.Tensor, count: int = 300) -> float:
    """Time on the host of one eager call, the GPU left behind."""
    for _ in range(20):
        layer_call(x)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        layer_call(x)
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / count * 1e6


def run(arguments) -> dict:
    shapes = [tuple(reversed(pair)) for pair in common.shapes(arguments.shapes or SHAPES)]
    tokens = common.integers(arguments.m or TOKENS)
    specs = list(arguments.specs)
    properties = torch.cuda.get_device_properties(0)
    result = common.header("linear-cuda", {"shapes_NxK": [f"{n}x{k}" for n, k in shapes], "m": tokens, "specs": specs,
                                           "bytes_per_contender": LEAST_BYTES, "rounds": ROUNDS})
    result |= {"device": {"name": properties.name, "multiprocessors": properties.multi_processor_count,
                          "capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda},
               "floors": floors(), "records": [], "complete": False}
    copy, rate = result["floors"]["copy_bytes_per_ms"], result["floors"]["bf16_operations_per_ms"]
    for n, k in shapes:
        group = contenders(n, k, specs)
        small = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        launches = {c.name: launch_microseconds(c.calls[0], small) for c in group}
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            times: dict[str, list[float]] = {c.name: [] for c in group}
            passes = {c.name: captured(lambda c=c: [call(x) for call in c.calls]) for c in group}
            for turn in range(ROUNDS):
                for c in group[:: 1 if turn % 2 == 0 else -1]:
                    times[c.name].append(timed(passes[c.name], 1) / len(c.calls))
            base = statistics.median(times["torch bf16"])
            for c in group:
                ms = statistics.median(times[c.name])
                floor = max((c.nbytes + 2 * m * (n + k)) / copy, 2 * m * n * k / rate)
                result["records"].append({
                    "N": n, "K": k, "M": m, "contender": c.name, "ms": ms, "rounds_ms": times[c.name],
                    "ratio_to_torch_bf16": base / ms, "share_of_copy_bandwidth": c.nbytes / ms / copy,
                    "share_of_floor": floor / ms, "nbytes": c.nbytes, "copies": len(c.calls),
                    "launch_us_m1": launches[c.name]})
                print(f"N={n} K={k} M={m:5d} {c.name:28s} {ms * 1e3:9.1f} us  {base / ms:5.2f}x cuBLAS bf16  "
                      f"{c.nbytes / ms / copy:6.1%} of copy bandwidth  {floor / ms:6.1%} of the floor", flush=True)
            common.write_json(arguments.out, result)
        del group
        torch.cuda.empty_cache()
    result["complete"] = True
    common.write_json(arguments.out, result)
    return result
