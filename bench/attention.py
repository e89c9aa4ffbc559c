"""How fast is a decode step of one attention layer: append a token to the cache, and attend to all of it.

    python bench/attention.py                    # about a minute; nothing else should run meanwhile
    python bench/attention.py --tokens 32768 --specs K4V4,K2V2 --shapes llama-3-8b

Ways: `dynamic` is what transformers does by default (DynamicCache, then SDPA); `sdpa` and `bmm` are attention alone
over tensors that lie ready, by scaled_dot_product_attention and by two products and a softmax; `quantized` is
transformers' QuantizedCache with 4 bits, where a backend for it is installed; specs are layers of tersor.Cache, called
as models call them. Layers take turns, as in a model, so that a cache that fits the last level does not sit there. A
figure is the median step in microseconds; `ratio` is the time of `dynamic` over it, `ratio_fastest` that of the fastest
torch way; `append` of a spec is what writing one token costs, packing its page included when that is due (a mean over
whole pages), and `append_share` that over the step; `other_cores` is what everything else on the machine used
meanwhile. Where that is much, the row says
`disturbed`: its figures tell nothing but that the machine was busy.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import common
from tersor import _C
from tersor.kv.attention import attention
from tersor.kv.layer import PackedLayer
from tersor.kv.settings import Settings

SHAPES = {"qwen3-0.6b": (16, 8, 128), "llama-3-8b": (32, 8, 128)}  # query heads, key heads, head dimension
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DISTURBED = 0.6  # cores used by others, from which on a row is no measurement
LAYER_BYTES = 96 << 20  # of 16-bit cache, all layers together


class Module(SimpleNamespace):
    """What the attention function asks of a model's module."""


def torch_way(name, module, q, scale):
    if name == "dynamic":
        def step(layer, k, v):
            keys, values = layer.update(k, v)
            return sdpa_attention_forward(module, q, keys, values, None, scaling=scale)
    elif name == "sdpa":
        def step(layer, k, v):
            return sdpa_attention_forward(module, q, layer.keys, layer.values, None, scaling=scale)
    else:
        def step(layer, k, v):
            packed = q.reshape(q.shape[0], layer.keys.shape[1], -1, q.shape[3])
            scores = (packed @ layer.keys.transpose(-1, -2) * scale).softmax(-1, dtype=torch.float32).to(q.dtype)
            return scores @ layer.values
    return step


def quantized_layer():
    """A layer of transformers' QuantizedCache, or None without a backend."""
    for kind in (QuantoQuantizedLayer, HQQQuantizedLayer):
        try:
            return kind(nbits=4, axis_key=0, axis_value=0, q_group_size=64, residual_length=128)
        except (ImportError, ValueError):
            continue
    return None


def measure(step, layers, k, v, seconds: float) -> tuple[float, int]:
    """Median microseconds a step, and steps measured."""
    for layer in layers:
        step(layer, k, v)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 * len(layers) or time.perf_counter() < end:
        layer = layers[len(times) % len(layers)]
        start = time.perf_counter()
        step(layer, k, v)
        times.append(time.perf_counter() - start)
        if len(times) >= 3 and time.perf_counter() > end + 4 * seconds:
            break
    return common.median(times) * 1e6, len(times)


def append_cost(layer, k, v) -> float:
    """Microseconds for each token that is written, over two pages."""
    pages, tokens = layer.store.pages, 2 * layer.store.pages.layout.page_tokens
    for _ in range(-pages.tokens % (tokens // 2)):
        pages.append(k, v)
    start = time.perf_counter()
    for _ in range(tokens):
        pages.append(k, v)
    return (time.perf_counter() - start) / tokens * 1e6


def contender(name: str, count: int, keys, values, module, q, scale):
    """Layers that hold the keys and values, the step over one of them, and the bytes of one."""
    if name in ("dynamic", "sdpa", "bmm"):
        layers = [DynamicLayer() for _ in range(count)]
        for layer in layers:
            layer.update(keys.clone(), values.clone())
        return layers, torch_way(name, module, q, scale), keys.nbytes + values.nbytes
    if name == "quantized":
        layers = [quantized_layer() for _ in range(count)]
        for layer in layers:
            layer.update(keys, values)
        return layers, torch_way("dynamic", module, q, scale), None
    layers = [PackedLayer(Settings.of(name, {}), i) for i in range(count)]
    for layer in layers:
        layer.update(keys, values)
        layer.flush()

    def step(layer, k, v):
        key, value = layer.update(k, v)
        return attention(module, q, key, value, None, scaling=scale)
    return layers, step, layers[0].store.nbytes


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="64,512,4096,16384")
    parser.add_argument("--specs", default="K16V16,K8V8,K4V4,K2V2")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=common.cores())
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--out", default=str(common.RESULTS / "attention.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    ways = ["dynamic", "sdpa", "bmm", *(["quantized"] if quantized_layer() else []), *common.names(args.specs)]
    results = []
    with torch.inference_mode():
        for shape in common.names(args.shapes):
            heads, kv_heads, dim = SHAPES[shape]
            module = Module(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
            for dtype_name in common.names(args.dtypes):
                dtype = DTYPES[dtype_name]
                for tokens in common.integers(args.tokens):
                    torch.manual_seed(0)
                    keys, values = (torch.randn(args.batch, kv_heads, tokens, dim).to(dtype) for _ in range(2))
                    k, v = keys[:, :, :1].clone(), values[:, :, :1].clone()
                    q = torch.randn(args.batch, heads, 1, dim).to(dtype)
                    count = max(1, min(16, LAYER_BYTES // (2 * keys.nbytes)))
                    row = {"shape": shape, "dtype": dtype_name, "tokens": tokens, "batch": args.batch, "layers": count,
                           "ways": {}}
                    for name in ways:
                        layers, step, nbytes = contender(name, count, keys, values, module, q, dim**-0.5)
                        watch, start = common.Watch(os.getpid()), time.perf_counter()
                        microseconds, steps = measure(step, layers, k, v, args.seconds)
                        other = watch.stop(time.perf_counter() - start)[1]
                        row["ways"][name] = {"microseconds": microseconds, "steps": steps, "bytes": nbytes,
                                             "other_cores": round(other, 2)}
                        if name not in ("dynamic", "sdpa", "bmm", "quantized"):
                            cost = append_cost(layers[0], k, v)
                            row["ways"][name] |= {"append": cost, "append_share": cost / microseconds}
                        del layers, step
                        common.release_memory()
                    found = row["ways"]
                    fastest = min(found[name]["microseconds"] for name in ("dynamic", "sdpa", "bmm"))
                    for figures in found.values():
                        figures["ratio"] = found["dynamic"]["microseconds"] / figures["microseconds"]
                        figures["ratio_fastest"] = fastest / figures["microseconds"]
                    others = max(figures["other_cores"] for figures in found.values())
                    row["disturbed"] = others >= DISTURBED
                    results.append(row)
                    print(f"{shape} {dtype_name} {tokens:6d} tokens: " + ", ".join(
                        f"{name} {f['microseconds']:.0f} us (x{f['ratio']:.2f}, x{f['ratio_fastest']:.2f}"
                        + (f", append {f['append_share']:.1%})" if "append" in f else ")")
                        for name, f in found.items()) + f"; others used up to {others} cores"
                          + ": disturbed" * row["disturbed"], flush=True)
    settings = {"threads": args.threads, "isa": _C.isa(), "seconds": args.seconds}
    common.write_json(args.out, common.header("attention", settings) | {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
