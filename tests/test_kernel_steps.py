"""The steps of docs/kernels.md: each is right, and its row in the document's table is what the emulated run counts."""

import functools
import re
from pathlib import Path

import torch
from cuda_int_weights import SOURCES, Weight, inputs, library, multiply, relative_error
from emulation import build

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
TILE, SWIZZLE = "cuda/tile/int_tile.h", "cuda/tile/swizzle.h"
M, N, K, GROUP = 16, 256, 1024, 128
COLUMNS = ("step", "codes", "pieces of 16", "activations", "partial sums", "mma", "bank conflicts")

# The final kernel with both exclusive ors taken out, and the proof that they are needed.
UNSWIZZLED = [
    (TILE, "bits == 8 ? piece ^ (piece >> 3 & 3) << 1 : "
     "bits >= 4 && piece < 16 ? piece ^ (piece >> 3 & 1) << 1 : piece", "piece"),
    (SWIZZLE, "return piece ^ (token & 1) << 2;", "return piece;"),
    (SWIZZLE, "if (asked[word % 32] != 0 && asked[word % 32] != word + 1) return false;", ""),
]


@functools.cache
def problem():
    weight = Weight(N, K, 4, GROUP, True, torch.float16)
    return weight, *inputs(M, weight, torch.float16, False)


def row(name, counters):
    memory = counters["total"]["global"]
    codes, shared = memory["qweight"], counters["total"]["shared"]
    partials = memory.get("partials", {"loaded": 0, "stored": 0})
    return {
        "step": name,
        "codes": f"{codes['loaded'] / problem()[0].qweight.numel():g} x",
        "pieces of 16": f"{100 * codes['load_widths']['16'] / codes['loaded']:.0f} %",
        "activations": f"{memory['x']['loaded'] / (2 * M * K):g} x",
        "partial sums": f"{partials['loaded'] + partials['stored']} B",
        "mma": str(sum(counters["total"]["mma"].values())),
        "bank conflicts": f"{shared['extra_cycles']} of {shared['cycles']}",
    }


def simple(name):
    weight, x, _ = problem()
    y = torch.full((M, N), float("nan"), dtype=torch.float16)
    counters = build(["int_linear_steps.cu"]).call(
        name, x, weight.qweight, weight.scales, y, M, N, K, GROUP, names=["x", "qweight", "scales", "y"], outputs=[y],
        seeds=(0, 1))
    assert relative_error(y, x, weight) < 1e-3
    return counters


def final(native, ranges):
    weight, x, _ = problem()
    y, counters = multiply(native, weight, x, None, ranges, seeds=(0, 1), count=True)
    assert relative_error(y, x, weight) < 1e-3
    return counters


def rows():
    unswizzled = build(SOURCES, {"TERSOR_BITS": 4}, edits=UNSWIZZLED)
    return [
        row("1 arithmetic", simple("step_naive")),
        row("2 fragments", simple("step_fragments")),
        row("3 shared memory", final(unswizzled, 2)),
        row("4 exclusive or", final(library(4), 2)),
        row("5 stream-K, 8 ranges", final(library(4), 8)),
    ]


def table(rows):
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows])


def test_the_documents_counters_are_those_of_the_kernels():
    found = re.search(r"<!-- steps -->\n(.*?)\n<!-- end -->", DOCUMENT.read_text(encoding="utf-8"), re.S).group(1)
    assert found == table(rows())
