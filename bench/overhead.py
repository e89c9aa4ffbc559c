"""What a call of tersor.Linear costs beside one of nn.Linear, where there is next to nothing to compute.

    python bench/overhead.py                     # 64 x 64, one token, W4A16

Blocks of calls take turns; a figure is the smallest over rounds of the median block, in microseconds a call.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time

import torch

import common
import tersor
from tersor import _C

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODE = {torch.float32: 0, torch.bfloat16: 1}
BLOCKS = 5  # of a round; their median counts


def block(call, count: int) -> float:
    """Seconds a call."""
    turns = range(count)
    start = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - start) / count


def calls(size: int, spec: str, dtype: torch.dtype, threads: int):
    """The ways to reach the product: nn.Linear, the layer, the registered operation, the bare kernel."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(size, size, bias=False, dtype=dtype)
    layer = tersor.Linear.from_linear(copy.deepcopy(dense), spec)
    fmt, held = layer.format, layer.tensors()
    x, y = torch.randn(1, size).to(dtype), torch.empty(1, size, dtype=dtype)
    zero = held.get("zero_points")
    operation = torch.ops.tersor.int_linear.default
    arguments = (x, held["qweight"], held["scales"], zero, None, size, fmt.num_bits, fmt.group_size, fmt.activation)
    raw = (x.data_ptr(), CODE[dtype], 1, size, size, held["qweight"].data_ptr(), held["scales"].data_ptr(),
           CODE[held["scales"].dtype], zero.data_ptr() if zero is not None else 0, 0, y.data_ptr(), size, size,
           fmt.num_bits, fmt.group_size, fmt.activation, threads)
    kept = x, y, held  # the kernel is given addresses alone
    return {
        "nn_linear": lambda: dense(x),
        "tersor": lambda: layer(x),
        "dispatcher": lambda: operation(*arguments),
        "kernel": lambda: _C.int_linear(*raw),
    }, kept


def measure(ways: dict, rounds: int, count: int) -> dict[str, float]:
    """Microseconds a call of each."""
    best = {name: float("inf") for name in ways}
    for call in ways.values():
        block(call, count)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            blocks = {name: [] for name in ways}
            for _ in range(BLOCKS):
                for name, call in ways.items():
                    blocks[name].append(block(call, count))
            for name, seconds in blocks.items():
                best[name] = min(best[name], common.median(seconds))
    finally:
        gc.enable()
    return {name: seconds * 1e6 for name, seconds in best.items()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="width of input and output (default 64)")
    parser.add_argument("--spec", default="rtn:W4A16", help="an integer spec (default rtn:W4A16)")
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, common.cores()}))))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200, help="calls of a block")
    parser.add_argument("--out", default=common.RESULTS / "overhead.json")
    arguments = parser.parse_args(argv)
    result = common.header("overhead", {
        "in_features": arguments.size, "out_features": arguments.size, "m": 1, "spec": arguments.spec,
        "rounds": arguments.rounds, "blocks": BLOCKS, "calls": arguments.calls, "kernels": _C.isa(),
    })
    records = result["records"] = []
    for threads in common.integers(arguments.threads):
        torch.set_num_threads(threads)
        for name, dtype in DTYPES.items():
            ways, _kept = calls(arguments.size, arguments.spec, dtype, threads)
            for mode, entered in MODES.items():
                with entered():
                    found = measure(ways, arguments.rounds, arguments.calls)
                records.append({
                    "mode": mode, "dtype": name, "threads": threads,
                    **{f"{way}_us": round(value, 3) for way, value in found.items()},
                    "overhead_us": round(found["tersor"] - found["nn_linear"], 3),
                    "overhead_without_kernel_us": round(found["tersor"] - found["kernel"], 3),
                })
                last = records[-1]
                print(f"{mode:15} {name} threads {threads}: nn.Linear {last['nn_linear_us']:6.2f} us, tersor.Linear "
                      f"{last['tersor_us']:6.2f} ({last['overhead_us']:+.2f}), operation {last['dispatcher_us']:6.2f}, "
                      f"kernel alone {last['kernel_us']:6.2f}", flush=True)
    worst = max(record["overhead_us"] for record in records)
    print(f"tersor.Linear over nn.Linear, {arguments.size} x {arguments.size}, M = 1: at most {worst:.2f} us a call")
    common.write_json(arguments.out, result)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
