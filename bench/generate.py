"""Decode speed of whole models in plain ``generate``, batch 1: torch in bf16 and fp32 against recipes.

    python bench/generate.py --threads 1,2
    python bench/generate.py --models qwen3-0.6b --rounds 1 --new-tokens 12     # a quick look
    python bench/generate.py --recipes lowbit --models qwen3-0.6b,llama-3-8b --threads 2 --prefill 128 --fp32

``qwen3-0.6b`` and ``llama-3-8b`` are random-weight models of those shapes (of the latter four layers are stored, and
the others use theirs, each far larger than any cache); ``stdlib-llama`` is the reference model of examples/models,
which is small enough to be all overhead. All contenders are held in memory and measured in turns, so that drift of the
machine hits them alike; a figure is the median over rounds of ``tersor.evaluate.decode_speed``. Writes
bench/results/generate.json, or generate-lowbit.json.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from pathlib import Path

import torch
from common import RESULTS, header, integers, keeping, write_json

import tersor
from tersor.cli.common import load_model
from tersor.cli.shapes import llama_3_8b, qwen3_0_6b
from tersor.evaluate import decode_speed, model_bytes, prefill_speed

ROOT = Path(__file__).resolve().parent.parent
FAST = "rtn[search=false]"  # speed does not depend on how values were chosen
RECIPES = {
    "W4A16": {"*": f"{FAST}:W4A16"},
    "W4A16, head W8A16": {"*": f"{FAST}:W4A16", "lm_head": f"{FAST}:W8A16"},
    "W4A16, head W4A16": {"*": f"{FAST}:W4A16", "lm_head": f"{FAST}:W4A16"},
    "W4A8, head W8A8": {"*": f"{FAST}:W4A8", "lm_head": f"{FAST}:W8A8"},
}
# What `--recipes lowbit` measures: activations rounded too, the transforms that go with four bits included. The output
# matrix has eight bits in all of them.
LOWBIT = {name: {"*": spec, "lm_head": f"{FAST}:W8A8"} for name, spec in {
    "W8A8": f"{FAST}:W8A8",
    "W6A8": f"{FAST}:W6A8",
    "W4A8": f"{FAST}:W4A8",
    "W4A4": f"{FAST}:W4A4",
    "W4AFP8": f"{FAST}:W4AFP8",
    "quarot W4A4": f"quarot+{FAST}:W4A4",
    "flatquant W4A4": f"flatquant[steps=0]+{FAST}:W4A4",
    "comet W4Ax": f"comet+{FAST}:W4Ax",
}.items()}


def with_outliers(model: torch.nn.Module) -> torch.nn.Module:
    """A random model with a few large channels in front of its layers, as trained ones have: what COMET does at run
    time depends on them."""
    for name, norm in model.named_modules():
        if name.endswith("layernorm"):
            norm.weight.data[::100] *= 20
    return model


SHARED = {"llama-3-8b"}  # layers share weights there, which transforms of neighbours would have to agree on
CACHES = {f"{recipe}, cache {spec}": (recipe, spec) for recipe in ("W4A16, head W8A16", "W4A16, head W4A16")
          for spec in ("K16V16", "K8V8")}
MODELS = {
    "qwen3-0.6b": lambda: with_outliers(qwen3_0_6b()),
    "llama-3-8b": lambda: with_outliers(llama_3_8b(stored=4)),
    "stdlib-llama": lambda: load_model(str(ROOT / "examples" / "models" / "stdlib-llama"))[0],
}


def contenders(make, recipes: dict, fp32: bool) -> dict[str, torch.nn.Module]:
    """The model in bf16 and fp32, and compressed by each recipe."""
    made = {"torch bf16": make()}
    if fp32:
        made["torch fp32"] = make().float()
    for name, recipe in recipes.items():
        model = make()
        ids = torch.randint(0, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
        tersor.compress(model, recipe, **({"calibration": ids} if "+" in recipe["*"] else {}))
        made[name] = model
    gc.collect()
    return made


def speed(models: dict[str, torch.nn.Module], caches: dict, contender: str, new_tokens: int) -> float:
    recipe, spec = caches.get(contender, (contender, None))
    cache = tersor.Cache(models[recipe], spec) if spec else None
    return decode_speed(models[recipe], new_tokens, cache=cache)


def measure(name: str, recipes: dict, caches: dict, threads: list[int], rounds: int, new_tokens: int, prefill: int,
            fp32: bool) -> list[dict]:
    """One record per contender and thread count."""
    if name in SHARED:
        recipes = {key: recipe for key, recipe in recipes.items() if "+" not in recipe["*"]}
    models = contenders(MODELS[name], recipes, fp32 and name not in SHARED)
    records = []
    for count in threads:
        torch.set_num_threads(count)
        decode: dict[str, list[float]] = {contender: [] for contender in [*models, *caches]}
        for _ in range(rounds):
            for contender in decode:
                decode[contender].append(speed(models, caches, contender, new_tokens))
        base, prompt_base = statistics.median(decode["torch bf16"]), 0.0
        for contender in decode:
            model, found = models[caches.get(contender, (contender,))[0]], statistics.median(decode[contender])
            record = dict(model=name, contender=contender, threads=count, decode_tokens_per_second=found,
                          ratio_to_torch_bf16=found / base, rounds=decode[contender], bytes=model_bytes(model))
            if prefill:
                prompt = prefill_speed(model, prefill, repeats=1)
                prompt_base = prompt if contender == "torch bf16" else prompt_base
                record |= dict(prefill_tokens_per_second=prompt, prefill_ratio_to_torch_bf16=prompt / prompt_base)
            records.append(record)
            print(f"{name:14s} {contender:32s} threads {count}  {found:8.2f} tokens/s  {found / base:5.2f}x torch bf16"
                  f"  {record['bytes'] / 1e6:8.1f} MB"
                  + (f"  prompt {record['prefill_ratio_to_torch_bf16']:5.2f}x" if prefill else ""), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen3-0.6b,stdlib-llama", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of this many tokens")
    parser.add_argument("--fp32", action="store_true", help="also time torch in fp32 (models below a billion)")
    parser.add_argument("--recipes", choices=("weights", "lowbit"), default="weights", help="16-bit inputs, or fewer")
    parser.add_argument("--only", help="some of the recipes, separated by commas")
    parser.add_argument("--out", type=Path, help="default: generate.json, generate-lowbit.json in bench/results")
    parser.add_argument("--keep", action="store_true", help="what the file has of other models and recipes stays in it")
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        sys.exit(f"--models: found {unknown[0]!r}, accepted are {', '.join(MODELS)}")
    threads = integers(args.threads)
    recipes, caches = (LOWBIT, {}) if args.recipes == "lowbit" else (RECIPES, CACHES)
    if args.only:
        chosen = args.only.split(",")
        if missing := [name for name in chosen if name not in recipes]:
            sys.exit(f"--only: found {missing[0]!r}, accepted are {', '.join(recipes)}")
        recipes, caches = {name: recipes[name] for name in chosen}, {}
    out = args.out or RESULTS / ("generate-lowbit.json" if args.recipes == "lowbit" else "generate.json")
    records = []
    for name in args.models.split(","):
        records += measure(name, recipes, caches, threads, args.rounds, args.new_tokens, args.prefill, args.fp32)
        gc.collect()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "keep")}
    result = header("generate", settings) | {"records": records}
    write_json(out, keeping(result, out, "records", ("model", "contender", "threads")) if args.keep else result)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
