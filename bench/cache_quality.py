"""What each cache costs in quality and bytes: one table over specs and methods.

    python bench/cache_quality.py                      # the reference model, all specs of the list below, some minutes
    python bench/cache_quality.py --specs K4V4,K2V2 --model Qwen/Qwen3-0.6B --text book.txt

Teacher-forced: a prompt is read at once, the rest follows in steps of a few tokens through the cache, so that all that
is predicted depends on what the cache holds, in float32, so that rounding elsewhere does not blur it. `bytes` are the
cache's own at the end of a sequence, of a token, in the model of 16 bits; `ratio` is that of 16 bits over it; `agree`
how often the most likely token is that of the plain cache; `kl` the mean divergence
from it in nats. What has to learn from data learns from another part of the text. Results go to
bench/results/cache_quality.json, with the table in Markdown beside the numbers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import common
import table
import tersor
from tersor.kv import calibrate
from tersor.kv.plan import read_plan

MODEL = common.BENCH.parent / "examples" / "models" / "stdlib-llama"
SPECS = """K16V16 K8V8 K8V8[levels=e4m3] K4V4 K4V4[hadamard=true] K4V4[keys=token] smoothattention:K4V4[keys=token]
fireq:K4V4[keys=token] K3V3 K2V2 K2V2[group=64] K2V2[group=64,levels=nuq,outliers=0.01]
K2V2[group=64,levels=nuq,outliers=0.01,rope=pre] kvquant:K2V2[group=64,outliers=0.01]
kvquant:K3V3[group=64,outliers=0.01]
gear:K2V2 gear:K4V4 zipcache:K4V4 matryoshka[budget=0.5]:K16V16 matryoshka[budget=0.5]:K4V4 cskv:K4V4 xkv:K16V16
share_heads:K16V16 streaming[window=128]:K16V16 h2o[budget=128]:K16V16 ems[budget=128]:K16V16
razor[window=64,tokens=63]:K16V16""".split()


def through(model, ids, cache, prompt: int, step: int):
    """Log-probabilities ``[sequences, tokens, vocabulary]`` of what follows the prompt, read through ``cache``."""
    parts = []
    with torch.no_grad():
        logits = model(ids[:, :prompt], past_key_values=cache).logits[:, -1:]
        for at in range(prompt, ids.shape[1], step):
            parts.append(logits[:, -1:])
            logits = model(ids[:, at:at + step], past_key_values=cache).logits
            parts.append(logits[:, :-1])
    return torch.cat(parts, 1).float().log_softmax(-1)


def measure(model, ids, cache, truth, prompt: int, step: int) -> dict:
    found = through(model, ids, cache, prompt, step)
    targets = ids[:, prompt:]
    base = truth if truth is not None else found
    return {
        "perplexity": torch.nn.functional.nll_loss(found.flatten(0, 1), targets.flatten()).exp().item(),
        "agree": (found.argmax(-1) == base.argmax(-1)).float().mean().item(),
        "kl": (base.exp() * (base - found)).sum(-1).mean().item(),
    }, found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", default=None, help="a text file; the model's own heldout.txt without it")
    parser.add_argument("--specs", default=None, help="separated by spaces or semicolons")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--threads", type=int, default=common.cores())
    parser.add_argument("--out", default=str(common.RESULTS / "cache_quality.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text or Path(args.model) / "heldout.txt").read_text()
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    needed = args.sequences * args.length
    if len(tokens) < needed + 4096:
        parser.error(f"text: found {len(tokens)} tokens, accepted are {needed + 4096} or more")
    ids, data = tokens[:needed].view(args.sequences, args.length), tokens[needed:needed + 16 * 512]
    half = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    plain, truth = measure(model, ids, DynamicCache(config=model.config), None, args.prompt, args.step)
    layers = model.config.num_hidden_layers
    dense = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * layers
    rows = [{"spec": "plain cache", "bytes": float(dense), "ratio": 1.0, "perplexity_ratio": 1.0, **plain}]
    for spec in (args.specs.replace(";", " ").split() if args.specs else SPECS):
        start = time.perf_counter()
        learns = any(method.calibrated for method in read_plan(spec, {}).methods)
        plan = calibrate(model, spec, [data], length=512) if learns else spec
        learned = time.perf_counter() - start
        figures, _ = measure(model, ids, tersor.Cache(model, plan), truth, args.prompt, args.step)
        small = tersor.Cache(half, plan)
        through(half, ids[:1], small, args.prompt, args.step)
        rows.append({"spec": spec, "bytes": small.report().bytes_per_token, **figures,
                     "perplexity_ratio": figures["perplexity"] / plain["perplexity"], "learned_seconds": learned})
        rows[-1]["ratio"] = dense / rows[-1]["bytes"]
        print(f"{spec}: {rows[-1]['bytes']:.0f} bytes a token, perplexity {rows[-1]['perplexity_ratio'] - 1:+.2%}",
              flush=True)
    settings = {name: getattr(args, name) for name in ("sequences", "length", "prompt", "step", "threads")}
    settings["model"] = Path(args.model).name
    result = common.header("cache_quality", settings) | {"results": rows}
    common.write_json(args.out, result)
    print(table.cache_quality_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
