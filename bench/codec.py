"""The codec of contexts: how fast, how small, at what cost in quality.

    python bench/codec.py                              # the reference model, under a minute

`numbers/s` are keys and values, in millions a second: decoded to float32 and to bfloat16 (entropy decoding,
dequantizing and rotary embedding together), and encoded. Peers get the same quantized numbers as int8, channel by
channel (the order that suits them best), and are timed to their int8 alone; `dequantize` is torch multiplying int8 by a
scale, which any cache of 8 bits pays too. Perplexity is teacher-forced: a prompt through the codec, then the rest on
top of it.
`ratio` counts all that a context file holds, against 8 bits a number.
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import sys
import time
import zlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import common
from tersor.kv import LEVELS, quantized
from tersor.kv.codec import decode_streams, encode_streams, steps
from tersor.kv.contexts import encode_context, geometry_of, read_cache

MODEL = common.BENCH.parent / "examples" / "models" / "stdlib-llama"
SPEED_TOKENS = 256


def rate(call, numbers: int, seconds: float) -> dict:
    """Millions of numbers a second: the median and the best of calls for ``seconds``, and what else the machine did."""
    call()
    watch, start, times = common.Watch(os.getpid()), time.perf_counter(), []
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    _, other = watch.stop(time.perf_counter() - start)
    return {"median": numbers / common.median(times) / 1e6, "best": numbers / min(times) / 1e6, "calls": len(times),
            "other_cores": round(other, 2)}


def speeds(model, ids, level: str, threads: list[int], seconds: float) -> dict:
    """Of all streams of some contexts of `SPEED_TOKENS` tokens, as chunks hold them."""
    contexts = []
    for row in ids:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(row[None, :SPEED_TOKENS], past_key_values=cache, logits_to_keep=1)
        contexts.append(read_cache(cache)[0])
    parts, geometry = contexts[0], geometry_of(contexts[0], torch.float32, model)
    inputs = []
    for parts in contexts:
        for i, ((keys, values), shape) in enumerate(zip(parts, geometry.layers)):
            keys = shape.rotary.turn(keys, torch.arange(SPEED_TOKENS), back=True).contiguous()
            bins = LEVELS[level].bins(i, len(parts))
            inputs += [(x.float().contiguous(), steps(x, b)) for x, b in zip((keys, values), bins)]
    wide = type(geometry)(geometry.layers * len(contexts), torch.float32)
    streams = [stream for x, step in inputs for stream in encode_streams(x, step, 1)]
    data, sizes = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8), [len(s) for s in streams]
    numbers = sum(x.numel() for x, _ in inputs)
    levels: list[torch.Tensor] = []
    decode_streams(data, sizes, wide, 0, SPEED_TOKENS, levels=levels)
    codes = torch.cat([(x.float() / 8).round().clamp(-128, 127).to(torch.int8).flatten() for x in levels])
    counts = torch.stack([torch.bincount(row.long() + 128, minlength=256) for x in levels
                          for row in (x.float() / 8).round().clamp(-128, 127).flatten(0, 1)])
    share = counts / SPEED_TOKENS
    entropy = -(share * share.clamp_min(1e-9).log2()).sum(1).mean().item()
    rows = {"tersor": {"bits": 8 * len(data) / numbers}}
    for count in threads:
        torch.set_num_threads(count)
        rows["tersor"] |= {
            f"decode_float32_{count}t": rate(
                lambda: decode_streams(data, sizes, wide, 0, SPEED_TOKENS), numbers, seconds),
            f"decode_bfloat16_{count}t": rate(
                lambda: decode_streams(data, sizes, wide, 0, SPEED_TOKENS, torch.bfloat16), numbers, seconds),
            f"encode_{count}t": rate(lambda: [encode_streams(*pair) for pair in inputs], numbers, seconds),
        }
        scale, out = torch.tensor(0.1), torch.empty(len(codes))
        rows.setdefault("dequantize", {"bits": 8.0})[f"decode_float32_{count}t"] = rate(
            lambda: torch.mul(codes, scale, out=out), numbers, seconds / 2)
    torch.set_num_threads(1)
    raw = codes.numpy().tobytes()
    for name, (pack, unpack) in peers().items():
        start = time.perf_counter()
        packed = pack(raw)
        rows[name] = {"bits": 8 * len(packed) / numbers, "encode_1t": numbers / (time.perf_counter() - start) / 1e6,
                      "decode_int8_1t": rate(lambda: unpack(packed), numbers, seconds / 2)}
    return {"numbers": numbers, "streams": len(streams), "level": level,
            "entropy_of_channels": entropy, "rows": rows}


def peers() -> dict:
    found = {"zlib 6": (lambda raw: zlib.compress(raw, 6), zlib.decompress),
             "lzma 1": (lambda raw: lzma.compress(raw, preset=1), lzma.decompress)}
    try:
        import zstandard
    except ImportError:
        print("zstandard is not installed: no row for it", file=sys.stderr)
        return found
    for level in (3, 19):
        pack = zstandard.ZstdCompressor(level=level)
        found[f"zstd {level}"] = (pack.compress, zstandard.ZstdDecompressor().decompress)
    return found


def quality(model, ids, prompt: int) -> dict:
    """Bits and relative perplexity of each level."""
    losses, bits = {}, {name: [] for name in LEVELS}
    for row in ids:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(row[None, :prompt], past_key_values=cache, logits_to_keep=1)
            held = {"exact": cache} | {name: quantized(cache, model, name) for name in LEVELS}
            for name in LEVELS:
                bits[name].append(encode_context(cache, model, [name])[0].bits())
            for name, past in held.items():
                logits = model(row[None, prompt:], past_key_values=past).logits[0, :-1]
                losses.setdefault(name, []).append(torch.nn.functional.cross_entropy(logits, row[prompt + 1:]).item())
    exact = sum(losses["exact"]) / len(ids)
    return {"perplexity": math.exp(exact), "sequences": len(ids), "prompt": prompt, "length": ids.shape[1]} | {
        name: {"bits": sum(bits[name]) / len(ids), "ratio_to_int8": 8 * len(ids) / sum(bits[name]),
               "perplexity_ratio": math.exp(sum(losses[name]) / len(ids) - exact)} for name in LEVELS}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", default=str(MODEL / "heldout.txt"))
    parser.add_argument("--level", default="medium", choices=LEVELS, help="that is timed")
    parser.add_argument("--threads", default=f"1,{common.cores()}")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure of speed")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--length", type=int, default=448)
    parser.add_argument("--out", default=str(common.BENCH / "results" / "codec.json"))
    options = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = Path(options.text).read_text()[:20 * options.sequences * options.length]
    ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]
    count = min(options.sequences, len(ids) // options.length)
    ids = ids[:count * options.length].view(count, options.length)
    settings = vars(options) | {"model": Path(options.model).name, "text": Path(options.text).name}
    result = common.header("codec", {name: value for name, value in settings.items() if name != "out"})
    result["speed"] = speeds(model, ids[:4], options.level, sorted(set(common.integers(options.threads))),
                             options.seconds)
    torch.set_num_threads(common.cores())
    result["quality"] = quality(model, ids, options.prompt)
    common.write_json(options.out, result)
    for name, row in result["speed"]["rows"].items():
        shown = [f"{key} {value['median'] if isinstance(value, dict) else value:.0f}" for key, value in row.items()
                 if key != "bits"]
        print(f"{name:12s} {row['bits']:6.3f} bits   {'   '.join(shown)}   (million numbers/s)")
    for name in LEVELS:
        q = result["quality"][name]
        print(f"{name:12s} {q['bits']:6.3f} bits   {q['ratio_to_int8']:.2f} times smaller than int8   perplexity "
              f"{q['perplexity_ratio']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
