"""The exact integer kernels against this machine's floors and torch, without any Python layer between.

Weights rotate past the last-level cache. Prints one line per case: microseconds, GB/s of stored bytes and
share of the read floor, GFLOP/s and share of the fp32 floor, ratio to torch's F.linear in float32.

    python bench/native/int_linear.py --n 4096 --k 4096 --bits 4 --m 1 6 64 --threads 1
"""

import argparse
import time

import torch

from tersor import _C

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def best(call, seconds):
    """Shortest time of one call, in seconds, over about `seconds` of calls."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--isa", default=_C.isa(), choices=_C.isas())
    parser.add_argument("--megabytes", type=int, default=128, help="weights in rotation")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--no-torch", action="store_true")
    a = parser.parse_args()
    _C.set_isa(a.isa)
    torch.set_num_threads(a.threads)
    floors = _C.machine_floors(a.threads, 0.3)
    print(f"{a.isa}, {a.threads} threads: {floors}")
    dense = None if a.no_torch else torch.randn(a.n, a.k)
    for bits in a.bits:
        tiles, groups = -(-a.n // 16), -(-a.k // a.group)
        size = tiles * -(-a.k // 32) * 64 * bits
        copies = max(1, a.megabytes * 2**20 // size)
        qweight = torch.randint(0, 256, (copies, size), dtype=torch.uint8)
        scales = torch.full((copies, tiles * groups * 16), 0.01, dtype=torch.float16)
        for m in a.m:
            x = torch.randn(m, a.k).to(getattr(torch, a.dtype))
            y = torch.empty(m, a.n, dtype=x.dtype)
            turn = 0

            def call():
                nonlocal turn
                turn = (turn + 1) % copies
                _C.int_linear(
                    x.data_ptr(), DTYPES[a.dtype], m, a.k, a.k, qweight[turn].data_ptr(), scales[turn].data_ptr(), 2,
                    0, 0, y.data_ptr(), a.n, a.n, bits, a.group, 16, a.threads,
                )  # fmt: skip

            spent = best(call, a.seconds)
            rate = (size + scales[0].numel() * 2) / spent * 1e-9
            flops = 2 * m * a.n * a.k / spent * 1e-9
            line = f"bits {bits} m {m:4d}: {spent * 1e6:9.1f} us  {rate:6.2f} GB/s ({rate / floors['read_gbs']:4.0%})"
            line += f"  {flops:7.1f} GFLOP/s ({flops / floors['fp32_gflops']:4.0%})"
            if dense is not None:
                with torch.inference_mode():
                    xf = x.float()
                    reference = best(lambda: torch.nn.functional.linear(xf, dense), a.seconds)
                line += f"  {reference / spent:5.2f} x torch fp32"
            print(line, flush=True)


if __name__ == "__main__":
    main()
