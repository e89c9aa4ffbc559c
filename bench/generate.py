"""Decode speed of whole models in plain ``generate``, batch 1: torch in bf16 and fp32 against recipes.

    python bench/generate.py --threads 1,2
    python bench/generate.py --models qwen3-0.6b --rounds 1 --new-tokens 12     # a quick look

``qwen3-0.6b`` is a random-weight model of that shape; ``stdlib-llama`` is the reference model of examples/models, which
is small enough to be all overhead. All contenders are held in memory and measured in turns, so that drift of the
machine hits them alike; a figure is the median over rounds of ``tersor.evaluate.decode_speed``. Writes
bench/results/generate.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path

import torch
from common import RESULTS, header, integers

import tersor
from tersor.cli.common import load_model
from tersor.cli.shapes import qwen3_0_6b
from tersor.evaluate import decode_speed, model_bytes, prefill_speed

ROOT = Path(__file__).resolve().parent.parent
FAST = "rtn[search=false]"  # speed does not depend on how values were chosen
RECIPES = {
    "W4A16": {"*": f"{FAST}:W4A16"},
    "W4A16, head W8A16": {"*": f"{FAST}:W4A16", "lm_head": f"{FAST}:W8A16"},
    "W4A16, head W4A16": {"*": f"{FAST}:W4A16", "lm_head": f"{FAST}:W4A16"},
    "W4A8, head W8A8": {"*": f"{FAST}:W4A8", "lm_head": f"{FAST}:W8A8"},
}
CACHES = {f"{recipe}, cache {spec}": (recipe, spec) for recipe in ("W4A16, head W8A16", "W4A16, head W4A16")
          for spec in ("K16V16", "K8V8")}
MODELS = {
    "qwen3-0.6b": qwen3_0_6b,
    "stdlib-llama": lambda: load_model(str(ROOT / "examples" / "models" / "stdlib-llama"))[0],
}


def contenders(make, fp32: bool) -> dict[str, torch.nn.Module]:
    """The model in bf16 and fp32, and compressed by each recipe."""
    made = {"torch bf16": make()}
    if fp32:
        made["torch fp32"] = make().float()
    for name, recipe in RECIPES.items():
        model = make()
        tersor.compress(model, recipe)
        made[name] = model
    gc.collect()
    return made


def speed(models: dict[str, torch.nn.Module], contender: str, new_tokens: int) -> float:
    recipe, spec = CACHES.get(contender, (contender, None))
    cache = tersor.Cache(models[recipe], spec) if spec else None
    return decode_speed(models[recipe], new_tokens, cache=cache)


def measure(name: str, threads: list[int], rounds: int, new_tokens: int, prefill: int, fp32: bool) -> list[dict]:
    """One record per contender and thread count."""
    models = contenders(MODELS[name], fp32)
    records = []
    for count in threads:
        torch.set_num_threads(count)
        decode: dict[str, list[float]] = {contender: [] for contender in [*models, *CACHES]}
        for _ in range(rounds):
            for contender in decode:
                decode[contender].append(speed(models, contender, new_tokens))
        base = statistics.median(decode["torch bf16"])
        for contender in decode:
            model, found = models[CACHES.get(contender, (contender,))[0]], statistics.median(decode[contender])
            record = dict(model=name, contender=contender, threads=count, decode_tokens_per_second=found,
                          ratio_to_torch_bf16=found / base, rounds=decode[contender], bytes=model_bytes(model))
            if prefill:
                record["prefill_tokens_per_second"] = prefill_speed(model, prefill, repeats=1)
            records.append(record)
            print(f"{name:14s} {contender:32s} threads {count}  {found:8.2f} tokens/s  {found / base:5.2f}x torch bf16"
                  f"  {record['bytes'] / 1e6:8.1f} MB", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of this many tokens")
    parser.add_argument("--fp32", action="store_true", help="also time torch in fp32")
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        sys.exit(f"--models: found {unknown[0]!r}, accepted are {', '.join(MODELS)}")
    threads = integers(args.threads)
    records = []
    for name in args.models.split(","):
        records += measure(name, threads, args.rounds, args.new_tokens, args.prefill, args.fp32)
        gc.collect()
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = header("generate", settings) | {"records": records}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
