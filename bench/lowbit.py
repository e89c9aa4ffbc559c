"""Linear layers in low bits: tersor's W?A8, W?A6, W?A4, their transforms, and small floats, against torch and peers.

    python bench/lowbit.py                         # all shapes, about 15 minutes on 2 cores; nothing else should run
    python bench/lowbit.py --shapes 4096x4096 --m 1,64 --peers none --seconds 0.1

Every time includes rounding the activations. Contenders of this process take turns, in copies of the weight that no
cache holds; `ms` is the median call. `ratio_bf16` and `ratio_fp32` are the times of torch's dense products over it.
`+hadamard` and `+kronecker` transform while they round (one Hadamard matrix of the whole width; two square factors);
`added` is what they take over the same layer without, the median of pairs of calls one right after the other.
`of_read` and `of_int8` compare with this machine's own limits: bytes of the stored weight, and products, a second. ONNX
Runtime and OpenVINO run in processes of their own (bench/contenders.py). `disturbed`: something else used the machine
meanwhile, and the row tells nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import common
from contenders import Gone, gather
from peers.base import Options
from tersor import _C
from tersor.formats import Format, Int
from tersor.ops_fused import BoundIntLinearFused, Producer
from tersor.registry import resolve_format

# K x N: Llama-3-8B's, then Qwen3-0.6B's
SHAPES = "4096x4096,4096x14336,14336x4096,1024x2048,1024x3072,3072x1024"
SPECS = ("W8A8,W6A8,W6A6,W4A8,W4A8[act_group=0],W4A8[scale=int8,act_group=0],W4A4,W4AFP8,FP8A16,MXFP4A16,"
         "NVFP4A16")
FUSED = ("W4A4", "W4A4[act_group=0]")  # what transforms are measured on
DISTURBED = 0.6  # cores used by others, from which on a row is no measurement
COPIES = 128 << 20  # bytes of all copies of a weight, at least two


@dataclass
class Way:
    """One contender of a shape: how it multiplies, its copies, and what was seen."""

    call: Callable  # (x, copy) -> y
    copies: list
    dtype: torch.dtype
    nbytes: int = 0
    only: int | None = None  # the one M that it is for
    times: list[float] = field(default_factory=list)
    over: bool = False
    base: str = ""  # the way that it is without its transform
    pairs: list[float] = field(default_factory=list)  # its time over that of its base, call by call


def copies(nbytes: int, make: Callable) -> list:
    return [make() for _ in range(max(2, math.ceil(COPIES / max(1, nbytes))))]


def dense(k: int, n: int, dtype: torch.dtype) -> Way:
    weight = torch.randn(n, k).to(dtype)
    return Way(F.linear, copies(weight.nbytes, weight.clone), dtype, weight.nbytes)


def linear_dynamic(k: int, n: int) -> Way:
    """torch's own dynamically quantized layer: int8 weights per channel, fp32 in and out. RuntimeError where its result
    is wrong."""
    scales, zeros = torch.full((n,), 0.001), torch.zeros(n, dtype=torch.int64)
    weight = torch.quantize_per_channel(torch.randn(n, k) * 0.02, scales, zeros, 0, torch.qint8)
    x, packed = torch.randn(2, k), torch.ops.quantized.linear_prepack(weight, None)
    wanted = x @ weight.dequantize().T
    error = (torch.ops.quantized.linear_dynamic(x, packed) - wanted).norm() / wanted.norm()
    if not error < 0.1:
        raise RuntimeError(f"its result is off by {error:.2g}")
    packed = copies(n * k, lambda: torch.ops.quantized.linear_prepack(weight, None))
    return Way(torch.ops.quantized.linear_dynamic, packed, torch.float32, n * k)


def int_mm(k: int, n: int) -> Way:
    """torch._int_mm, with the rounding and the scales in torch."""
    codes, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)

    def call(x, weight):
        step = x.abs().amax(1, keepdim=True) / 127
        q = (x / step).round().to(torch.int8)
        return (torch._int_mm(q, weight.t()).float() * step * scales).to(x.dtype)

    return Way(call, copies(n * k, codes.clone), torch.bfloat16, n * k)


def layer(fmt: Format, k: int, n: int):
    """Copies of a layer's multiplication ``(x, bias) -> y``, and bytes of one."""
    if isinstance(fmt, Int) and not fmt.two_level:
        codes = torch.randint(0, 2**fmt.num_bits, (n, k), dtype=torch.uint8)
        tensors = fmt.pack_codes(codes, torch.rand(n, fmt.groups(k)).to(torch.bfloat16) * 0.02 + 0.001, None)
    else:
        w = torch.randn(n, k)
        params = fmt.fit(w, dtype=torch.bfloat16)
        tensors = fmt.pack(fmt.project(w, params), params)

    def make():
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        return fmt.bind(own, (n, k)) or (lambda x, bias: fmt.linear(x, own, bias, (n, k)))

    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return copies(nbytes, make), nbytes


def ours(specs: list[str], k: int, n: int, transformed: int) -> dict[str, Way]:
    made = {}
    left = 1 << (k.bit_length() - 1) // 2
    while k % left:
        left //= 2
    producers = {
        "hadamard": Producer(hadamard=0),
        "kronecker": Producer(left=torch.randn(left, left) / left**0.5,
                              right=torch.randn(k // left, k // left) / (k // left) ** 0.5),
    }
    for spec in dict.fromkeys([*specs, *FUSED]):
        bound, nbytes = layer(resolve_format(spec), k, n)
        made[spec] = Way(lambda x, one: one(x, None), bound, torch.bfloat16, nbytes)
        if spec not in FUSED:
            continue
        for name, producer in producers.items():
            fused = [BoundIntLinearFused([one], producer) for one in bound]
            made[f"{spec} +{name}"] = Way(lambda x, one: one(x, [None])[0], fused, torch.bfloat16, nbytes, transformed,
                                          base=spec)
    return made


def shape_ways(specs: list[str], k: int, n: int, transformed: int) -> tuple[dict[str, Way], dict[str, str]]:
    """All that runs in this process, and why others do not."""
    torch.manual_seed(0)
    ways, missing = {"torch bf16": dense(k, n, torch.bfloat16), "torch fp32": dense(k, n, torch.float32)}, {}
    for name, make in (("torch linear_dynamic", linear_dynamic), ("torch _int_mm", int_mm)):
        try:
            way = make(k, n)
            way.call(torch.randn(32, k).to(way.dtype), way.copies[0])
            ways[name] = way
        except (RuntimeError, AttributeError) as error:
            missing[name] = str(error).splitlines()[0][:200]
    return ways | ours(specs, k, n, transformed), missing


def measure(ways: dict[str, Way], inputs: dict[torch.dtype, torch.Tensor], seconds: float, rounds: int) -> None:
    for way in ways.values():
        way.times, way.over, way.pairs = [], False, []
    for index in range(rounds):
        for way in list(ways.values())[:: 1 if index % 2 == 0 else -1]:
            if way.over:
                continue
            x = inputs[way.dtype]
            if index == 0:
                start = time.perf_counter()
                way.call(x, way.copies[0])
                first = time.perf_counter() - start
                if first > seconds:  # one call more is enough of it
                    way.over = True
            end, count = time.perf_counter() + seconds, 0
            while count < (1 if way.over else 3) or time.perf_counter() < end and not way.over:
                start = time.perf_counter()
                way.call(x, way.copies[count % len(way.copies)])
                way.times.append(time.perf_counter() - start)
                count += 1
            if way.base:
                pair(way, ways[way.base], x, seconds)


def pair(way: Way, base: Way, x: torch.Tensor, seconds: float) -> None:
    """Calls of both in turns, the first one changing: what the machine's drift does to one it does to the other."""
    end, count = time.perf_counter() + 2 * seconds, 0
    while count < 4 or time.perf_counter() < end:
        spent = {}
        for one in (way, base) if count % 2 else (base, way):
            start = time.perf_counter()
            one.call(x, one.copies[count % len(one.copies)])
            spent[one is way] = time.perf_counter() - start
        way.pairs.append(spent[True] / spent[False])
        count += 1


def row_of(k: int, n: int, m: int, ways: dict[str, Way], floors: dict, other: float) -> dict:
    medians = {name: common.median(way.times) for name, way in ways.items()}
    found = {}
    for name, seconds in medians.items():
        found[name] = {
            "ms": seconds * 1e3, "calls": len(ways[name].times), "nbytes": ways[name].nbytes,
            "ratio_bf16": medians["torch bf16"] / seconds, "ratio_fp32": medians["torch fp32"] / seconds,
            "of_read": ways[name].nbytes / seconds / (floors["read_gbs"] * 1e9),
        }
        if floors["int8_gops"]:
            found[name]["of_int8"] = 2.0 * k * n * m / seconds / (floors["int8_gops"] * 1e9)
        if ways[name].base:
            found[name]["added"] = common.median(ways[name].pairs) - 1
    return {"K": k, "N": n, "M": m, "ways": found, "other_cores": round(other, 2), "disturbed": other >= DISTURBED}


def with_peers(row: dict, proxies: list, seconds: float, threads: int) -> None:
    """The peers' times of the same product, each in its own process."""
    for proxy in proxies:
        if not proxy.alive:
            continue
        try:
            proxy.ask("bind", m=row["M"], threads=threads)
            first = proxy.ask("probe")["seconds"]
            times = proxy.ask("run", seconds=seconds if first < seconds else 0, warm=1, least=1)["seconds"]
        except Gone:
            continue
        spent = common.median(times)
        row["ways"][proxy.name] = {"ms": spent * 1e3, "calls": len(times), "nbytes": proxy.nbytes} | {
            f"ratio_{name}": row["ways"][f"torch {name}"]["ms"] / spent / 1e3 for name in ("bf16", "fp32")}


def start_peers(arguments) -> list:
    """Those that round activations to int8, started."""
    options = Options("fp32", COPIES, ("W4A8",), True)
    proxies = [proxy for proxy in gather(options, arguments.peers, sys.executable, arguments.peer_python)
               if proxy.role == "peer" and ("acc4" in proxy.name or "dq" in proxy.name or "torchao" in proxy.name)]
    for proxy in proxies:
        proxy.start()
        try:
            proxy.ask("hello", 120)
        except Gone as error:
            print(f"{proxy.name}: {error}", flush=True)
    return proxies


def told(row: dict) -> str:
    parts = [f"{name} {f['ms']:.3g} ms x{f['ratio_bf16']:.2f} x{f['ratio_fp32']:.2f}"
             + (f" added {f['added']:+.1%}" if "added" in f else "") for name, f in row["ways"].items()]
    return f"{row['K']}x{row['N']} M={row['M']}: " + ", ".join(parts) + \
        (f"; disturbed by {row['other_cores']} cores" if row["disturbed"] else "")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="KxN, input and output width")
    parser.add_argument("--m", default="1,16,64,512")
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--transformed", type=int, default=64, help="the M at which transforms are measured")
    parser.add_argument("--threads", type=int, default=common.cores())
    parser.add_argument("--seconds", type=float, default=0.25, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="auto", help="auto, none, or of the files in bench/peers")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has ONNX Runtime and OpenVINO")
    parser.add_argument("--out", default=str(common.RESULTS / "lowbit.json"))
    parser.add_argument("--keep", action="store_true", help="what the file has of other shapes stays in it")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    specs, results, proxies = common.names(arguments.specs), [], []
    floors = _C.machine_floors(arguments.threads, 0.3)
    settings = {"threads": arguments.threads, "isa": _C.isa(), "seconds": arguments.seconds, "rounds": arguments.rounds,
                "copies_bytes": COPIES, "x_dtype": "bf16 (linear_dynamic and peers fp32)"}
    head = common.header("lowbit", settings) | {"floors": floors}

    def together(result: dict) -> dict:
        return common.keeping(result, arguments.out, "results", ("K", "N", "M")) if arguments.keep else result

    try:
        if arguments.peers != "none":
            proxies = start_peers(arguments)
        for k, n in common.shapes(arguments.shapes):
            ways, missing = shape_ways(specs, k, n, arguments.transformed)
            for proxy in proxies:
                try:
                    if proxy.alive:
                        answer = proxy.ask("make", k=k, n=n)
                        proxy.nbytes, proxy.activations = answer["nbytes"], answer["activations"]
                except Gone as error:
                    missing[proxy.name] = str(error)
            with torch.inference_mode():
                for m in common.integers(arguments.m):
                    x = torch.randn(m, k)
                    taking = {name: way for name, way in ways.items() if way.only in (None, m)
                              and (name != "torch _int_mm" or m > 16)}  # torch wants more than 16 rows
                    watch, start = common.Watch(os.getpid()), time.perf_counter()
                    measure(taking, {torch.float32: x, torch.bfloat16: x.bfloat16()}, arguments.seconds,
                            arguments.rounds)
                    other = watch.stop(time.perf_counter() - start)[1]
                    row = row_of(k, n, m, taking, floors, other)
                    with_peers(row, proxies, arguments.seconds, arguments.threads)
                    results.append(row | {"missing": missing})
                    print(told(row), flush=True)
                    common.write_json(arguments.out, together(head | {"results": results}))
            del ways
            common.release_memory()
    finally:
        for proxy in proxies:
            proxy.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
