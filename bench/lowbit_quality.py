"""What low-bit weights and activations cost in quality: one table over methods, on a model with outliers.

    python bench/lowbit_quality.py                     # the reference model with outliers (tests/outliers.py)
    python bench/lowbit_quality.py --plain --specs "quarot:W4A4[act_group=0]"

The model is the reference model turned so that a few channels hold most of the energy: the same function, hard to
quantize as large models are. Perplexity is on `--tokens` of held-out text in windows of 256, calibration on another
part of it. `change` is over 16 bits, `of weights` over the same stored weights and online steps with inputs as they
are: what rounding the inputs costs. Results go to
bench/results/lowbit_quality.json, with the table in Markdown beside the numbers.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import common
import table
import tersor

sys.path.insert(0, str(common.BENCH.parent / "tests"))
from outliers import MODEL, text_tokens, with_outliers  # noqa: E402

LENGTH = 256
SPECS = """rtn:W8A8 rtn:W6A8 smoothquant:W6A8 rtn:W6A6[act_group=128] flexq:W6A6[act_group=128] rtn:W4A8
rtn:W4A8[scale=int8,act_group=0] rtn:W4A4[act_group=0] smoothquant:W4A4[act_group=0] quarot:W4A4[act_group=0]
quarot+gptq:W4A4[act_group=0,act_clip=0.9] flatquant[steps=0]:W4A4[act_group=0] flatquant:W4A4[act_group=0]
flatquant+gptq:W4A4[act_group=0] rtn:W4A4 quarot:W4A4 flatquant:W4A4 rtn:W4Ax comet:W4Ax comet[limit=0.05]:W4Ax
rtn:W4AFP8 fireq:W4AFP8""".split()


def perplexity(model, ids) -> float:
    losses = []
    with torch.no_grad():
        for rows in ids.split(4):
            found = model(rows).logits[:, :-1].flatten(0, 1).float()
            losses.append(F.cross_entropy(found, rows[:, 1:].flatten(), reduction="sum").item())
    return float(torch.tensor(sum(losses) / (ids.shape[0] * (LENGTH - 1)), dtype=torch.float64).exp())


class Unrounded(nn.Module):
    """A compressed layer's weight and steps, its input as it is."""

    def __init__(self, layer: tersor.Linear):
        super().__init__()
        self.layer, self.matrix = layer, layer.dequantize()

    def forward(self, x):
        for step in self.layer.pre or ():
            x = step(x)
        return self.layer._after(F.linear(x, self.matrix, self.layer.bias))


def unrounded(model):
    """A copy of a compressed model whose inputs nothing rounds."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, tersor.Linear):
            twin.set_submodule(name, Unrounded(layer))
    return twin


def four_bits(model) -> float | None:
    """The share of multiplications whose inputs have four bits, where blocks of channels have four or eight."""
    total = narrow = 0
    for layer in model.modules():
        if isinstance(layer, tersor.Linear) and "block_bits" in layer.tensors():
            bits = layer.tensors()["block_bits"]
            total, narrow = total + layer.out_features * len(bits), narrow + layer.out_features * int((bits == 4).sum())
    return narrow / total if total else None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default=None, help="separated by spaces or semicolons")
    parser.add_argument("--plain", action="store_true", help="the reference model as it is")
    parser.add_argument("--tokens", type=int, default=16384, help="that perplexity is measured on")
    parser.add_argument("--calibration", type=int, default=4096, help="tokens")
    parser.add_argument("--threads", type=int, default=common.cores())
    parser.add_argument("--out", default=str(common.RESULTS / "lowbit_quality.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.plain:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    else:
        model = with_outliers()
    ids = text_tokens(args.tokens).view(-1, LENGTH)
    data = text_tokens(args.calibration, 60_000).view(-1, LENGTH)
    whole = perplexity(model, ids)
    rows = []
    for spec in args.specs.replace(";", " ").split() if args.specs else SPECS:
        start = time.perf_counter()
        twin = copy.deepcopy(model)
        report = tersor.compress(twin, spec, data)
        seconds = time.perf_counter() - start
        found = perplexity(twin, ids)
        same = perplexity(unrounded(twin), ids)
        rows.append({"spec": spec, "perplexity": found, "change": found / whole - 1, "seconds": seconds,
                     "of_weights": found / same - 1, "four_bits": four_bits(twin),
                     "kernels": sorted({row.kernel for row in report.rows})})
        print(f"{spec}: {found:.2f}, {rows[-1]['change']:+.1%}, over the same weights {rows[-1]['of_weights']:+.1%}",
              flush=True)
    settings = {"model": f"{MODEL.name}{'' if args.plain else ' with outliers'}", "tokens": args.tokens,
                "calibration": args.calibration, "threads": args.threads}
    result = common.header("lowbit_quality", settings) | {"perplexity": whole, "results": rows}
    common.write_json(args.out, result)
    print(table.lowbit_quality_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
