"""A decode step of one attention layer over a long cache on a GPU: packed pages against SDPA on bf16.

    python bench/attention_cuda.py                       # batch 8, 32768 tokens, 32 query heads on 8 of keys, 128
    python bench/attention_cuda.py --batch 1 --tokens 131072 --specs K4V4

Three ways for each spec: attention alone, the whole step of a `tersor.StaticCache` layer (count, append, attend, pack),
and the same of a `tersor.Cache` layer, which is launched from Python and therefore not captured.

Each way has as many layers' caches as it takes to leave the L2 cache between uses (`linear_cuda.LEAST_BYTES`), which
take turns in a captured graph; a time is the median of rounds. Beside it stand two floors: stored bytes over the
measured bandwidth of a copy, and the products that attention asks for over the measured rate of a bf16 product.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import linear_cuda
from tersor import ops_kv_cuda
from tersor.kv import cuda_layout as layout
from tersor.kv.settings import Settings
from tersor.kv.store import Shape, Step, base_store

FILL = 16  # pages that are really packed; the rest are copies of them


def packed_layer(batch: int, kv_heads: int, dim: int, tokens: int, key_bits: int, value_bits: int):
    """(bytes, table, entries in use, memory) of one layer whose pages are all packed but the last."""
    device, raw_bits = torch.device("cuda"), 16
    numbers = torch.randn(2, FILL, kv_heads, layout.TOKENS, dim).bfloat16()
    raw = layout.encode(*numbers.unbind(), raw_bits, raw_bits).to(device)
    pages = raw if key_bits == value_bits == 16 else ops_kv_cuda.kv_pack(list(raw), dim, key_bits, value_bits,
                                                                        torch.bfloat16)
    full = -(-tokens // layout.TOKENS) - 1
    copies = pages.repeat(-(-batch * full // FILL), 1, 1)[: batch * full].contiguous()
    last = raw[:1].repeat(batch, 1, 1).contiguous()
    rows = []
    for b in range(batch):
        row = [(copies[b * full + p].data_ptr(), p * layout.TOKENS, layout.TOKENS, key_bits, value_bits)
               for p in range(full)]
        row.append((last[b].data_ptr(), full * layout.TOKENS, tokens - full * layout.TOKENS, 16, 16))
        rows.append(row)
    table, used = ops_kv_cuda.page_table(rows, device)
    return copies.nbytes + last.nbytes, table, used, (copies, last)


def filled_store(spec: str, query: torch.Tensor, kv_heads: int, tokens: int, max_tokens: int):
    """A layer's store of ``tokens``, and the step that adds one; ``max_tokens`` 0: one that grows."""
    batch, _, _, dim = query.shape
    store = base_store(Shape(0, batch, kv_heads, dim, dim, query.dtype, Settings.of(spec), device=query.device,
                             max_tokens=max_tokens))

    def fresh(count: int):
        return (torch.randn(batch, kv_heads, count, dim, device=query.device, dtype=query.dtype) for _ in range(2))

    store.prompt(Step(query[:, :, :0], *fresh(tokens), dim**-0.5))
    return store, Step(query, *fresh(1), dim**-0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", default="32,8", help="query heads, heads of keys")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--specs", default="K16V16,K8V8,K4V4,K2V2")
    parser.add_argument("--rounds", type=int, default=linear_cuda.ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/attention-cuda.json"))
    args = parser.parse_args()
    heads, kv_heads = map(int, args.heads.split(","))
    scale = args.dim**-0.5
    query = torch.randn(args.batch, heads, 1, args.dim, device="cuda", dtype=torch.bfloat16)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = common.header("attention-cuda", settings) | {
        "device": torch.cuda.get_device_name(), "floors": linear_cuda.floors(), "records": [], "complete": False}
    copy, rate = result["floors"]["copy_bytes_per_ms"], result["floors"]["bf16_operations_per_ms"]

    passes = {}
    size = 4 * args.batch * kv_heads * args.tokens * args.dim
    dense = [torch.randn(2, args.batch, kv_heads, args.tokens, args.dim, device="cuda", dtype=torch.bfloat16)
             for _ in range(linear_cuda.copies(size))]
    passes["torch SDPA bf16"] = size, len(dense), linear_cuda.captured(lambda: [
        F.scaled_dot_product_attention(query, *layer.unbind(), scale=scale, enable_gqa=True) for layer in dense])
    for spec in args.specs.split(","):
        key_bits, value_bits = map(int, re.fullmatch(r"K(\d+)V(\d+)", spec).groups())
        first = packed_layer(args.batch, kv_heads, args.dim, args.tokens, key_bits, value_bits)
        layers = [first] + [packed_layer(args.batch, kv_heads, args.dim, args.tokens, key_bits, value_bits)
                            for _ in range(linear_cuda.copies(first[0]) - 1)]
        passes[f"tersor {spec}"] = first[0], len(layers), linear_cuda.captured(lambda layers=layers: [
            ops_kv_cuda.kv_attention(query, table, used, kv_heads, scale) for _, table, used, _ in layers])
        # A page's group is 64 tokens on CUDA.
        own = spec if spec == "K16V16" else f"{spec}[group=64]"
        room = args.tokens + 2 * args.rounds + 64
        for name, most in ((f"tersor {spec} step, graph", room), (f"tersor {spec} step, Python", 0)):
            pairs = [filled_store(own, query, kv_heads, args.tokens, most) for _ in layers]

            def once(pairs=pairs):
                for store, step in pairs:
                    store.attend(step)

            passes[name] = pairs[0][0].nbytes, len(pairs), linear_cuda.captured(once) if most else once
        del layers
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(args.rounds):
        for name in list(passes)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(linear_cuda.timed(passes[name][2], 1) / passes[name][1])
    base = statistics.median(times["torch SDPA bf16"])
    products = 4 * args.batch * heads * args.tokens * args.dim / rate
    for name, (nbytes, layers, _) in passes.items():
        ms = statistics.median(times[name])
        result["records"].append({
            "contender": name, "ms": ms, "rounds_ms": times[name], "ratio_to_sdpa": base / ms, "nbytes": nbytes,
            "layers": layers, "share_of_copy_bandwidth": nbytes / ms / copy, "floor_bytes_ms": nbytes / copy,
            "floor_products_ms": products})
        print(f"{name:28s} {ms * 1e3:9.1f} us  {base / ms:5.2f}x SDPA  {nbytes / ms / copy:6.1%} of copy bandwidth, "
              f"floors {nbytes / copy * 1e3:.1f} us of bytes, {products * 1e3:.1f} us of products", flush=True)
    result["complete"] = True
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
