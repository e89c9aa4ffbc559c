"""GPTQ of one layer, Hessian included: tersor, llm-compressor's own functions, and plain torch.

    python bench/gptq.py [--threads 2] [--quick] [--peer FOLDER] [--dtype bf16 fp32]

One 4096 x 4096 weight, 128 sequences of 512 tokens, 4 bits in groups of 128. Times are the least of ``--rounds``
rounds in which every contender runs once after the other, so that a busy machine is unfair to all alike; CPU time of
all threads is given as well; ratios are
to llm-compressor where it can be imported and to plain torch. ``--peer`` names a folder that holds llm-compressor
where it cannot share an environment (``pip install --no-deps --target FOLDER llmcompressor``). Results go to
``bench/results/gptq.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import common
from tersor.formats import Int
from tersor.methods import GPTQ, Collector

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP, BITS, BLOCK, DAMP = 128, 4, 128, 0.01
_DISTINCT = 16  # sequences that are really different; together they exceed any cache


def make_inputs(width: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Correlated inputs with a few large channels, ``[1, length, width]`` each."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width // 8, width, generator=generator) / (width / 8) ** 0.5
    scale = torch.rand(width, generator=generator).mul(2).exp()
    made = []
    for _ in range(_DISTINCT):
        x = torch.randn(length, width // 8, generator=generator) @ mix + 0.3 * torch.randn(length, width,
                                                                                           generator=generator)
        made.append((x * scale).to(dtype)[None])
    return made


# -- contenders: each takes the weight and the sequences and yields (stage, result) ----------------------------


def ours(**options) -> Callable:
    def run(w: Tensor, sequences: list[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        method, fmt = GPTQ(damp=DAMP, block=BLOCK, **options), Int(BITS, GROUP)
        collector = Collector(w.shape[1], method.needs)
        for x in sequences:
            collector.add(x)
        stats = collector.finish()
        yield "hessian", None
        yield "weight", method.choose(w.float(), fmt, stats, dtype=w.dtype).w_hat

    return run


def plain_torch(w: Tensor, sequences: list[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """The published procedure in torch calls: full Gram matrix, two factorizations and an inverse, lazy updates."""
    n = w.shape[1]
    h = torch.zeros(n, n)
    for x in sequences:
        x = x.flatten(0, 1).float()
        h.addmm_(x.t(), x)
    h.mul_(2 / sum(x.shape[1] for x in sequences))
    yield "hessian", None
    h.diagonal().add_(DAMP * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, w_hat = w.float().clone(), torch.empty(w.shape)
    for lo in range(0, n, BLOCK):
        hi = min(lo + BLOCK, n)
        columns = w[:, lo:hi].t().contiguous()
        scale = columns.abs().amax(0) * (2 / (2**BITS - 1))
        errors = torch.empty_like(columns)
        for i in range(hi - lo):
            q = (columns[i] / scale).round_().clamp_(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1).mul_(scale)
            w_hat[:, lo + i] = q
            errors[i] = (columns[i] - q) / u[lo + i, lo + i]
            columns[i:].addr_(u[lo + i, lo + i : hi], errors[i], alpha=-1)
        w[:, hi:].addmm_(errors.t(), u[lo:hi, hi:], alpha=-1)
    yield "weight", w_hat


def llm_compressor() -> tuple[Callable | None, str]:
    """A contender from llm-compressor's functions and its version, or None and why not."""
    try:
        import llmcompressor
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
        from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian, prepare_batch
    except ImportError as error:
        return None, f"not importable: {error}"
    arguments = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP)

    def run(w: Tensor, sequences: list[Tensor]) -> Iterator[tuple[str, Tensor | None]]:
        module = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        module.weight.data = w.clone()
        hessian, count = make_empty_hessian(module), torch.zeros(())
        for x in sequences:
            hessian, count = accumulate_hessian(x, module, hessian, count)
        yield "hessian", None
        groups = w.float().unflatten(1, (-1, GROUP))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        found = [{"scale": scale, "zero_point": zero_point, "global_scale": None}]
        weights, hessians, scales, zero_points, global_scales = prepare_batch(
            [module], found, {module: hessian}, {module: count})
        w_hat, _, _ = quantize_weight(weights, hessians, scales, zero_points, global_scales, arguments, BLOCK, DAMP)
        yield "weight", w_hat[0]

    return run, getattr(llmcompressor, "__version__", "unknown")


# -- measuring -------------------------------------------------------------------------------------------------


def measure(contender: Callable, w: Tensor, sequences: list[Tensor]) -> tuple[dict[str, float], Tensor]:
    """Seconds of each stage, and the chosen weight."""
    seconds, last, cpu = {}, time.perf_counter(), time.process_time()
    with torch.no_grad():
        for stage, result in contender(w, sequences):
            now = time.perf_counter()
            seconds[stage], last = now - last, now
    return seconds | {"total": sum(seconds.values()), "cpu": time.process_time() - cpu}, result


def compare(dtype: str, width: int, count: int, length: int, rounds: int, peer: Callable | None) -> dict[str, dict]:
    """Rows by contender: least seconds per stage over the rounds, and the relative error of the layer's output."""
    distinct = make_inputs(width, length, DTYPES[dtype])
    sequences = [distinct[i % len(distinct)] for i in range(count)]
    w = (torch.randn(width, width, generator=torch.Generator().manual_seed(1)) * 0.02).to(DTYPES[dtype])
    contenders = {
        "tersor": ours(),
        "tersor, as the others (min-max, left to right)": ours(search=False, order="none"),
        "torch": plain_torch,
    }
    if peer is not None:
        contenders["llm-compressor"] = peer
    rows: dict[str, dict] = {}
    sample = torch.cat(distinct[:2]).flatten(0, 1).float()
    expected = sample @ w.float().t()
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds, w_hat = measure(contender, w, sequences)
            error = float((sample @ w_hat.float().t() - expected).norm() / expected.norm())
            before = rows.get(name, {"seconds": seconds})["seconds"]
            rows[name] = {"seconds": {stage: min(before[stage], seconds[stage]) for stage in seconds},
                          "relative_error": error}
    for row in rows.values():
        for other in ("llm-compressor", "torch"):
            if other in rows:
                row[f"times_faster_than_{other}"] = rows[other]["seconds"]["total"] / row["seconds"]["total"]
    return rows


def show(dtype: str, rows: dict[str, dict]) -> None:
    columns = ("Hessian", "weight", "total s", "CPU s", "x llm-c.", "x torch", "error")
    print(f"\n{dtype} inputs\n{'':48s}" + "".join(f"{column:>9s}" for column in columns))
    for name, row in rows.items():
        seconds = row["seconds"]
        ratios = [row.get(f"times_faster_than_{other}") for other in ("llm-compressor", "torch")]
        print(f"{name:48s}{seconds['hessian']:9.2f}{seconds['weight']:9.2f}{seconds['total']:9.2f}"
              + f"{seconds['cpu']:9.2f}"
              + "".join(f"{ratio:9.2f}" if ratio else f"{'-':>9s}" for ratio in ratios)
              + f"{row['relative_error']:9.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="1024 x 1024 and 16 sequences")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peer", help="folder that llm-compressor is imported from")
    parser.add_argument("--out", help="file of the results (default: bench/results/gptq.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peer:
        sys.path.append(options.peer)
    width, count, length = (1024, 16, 512) if options.quick else (4096, 128, 512)
    peer, version = llm_compressor()
    print(f"{width} x {width}, {count} x {length} tokens, {BITS} bits, groups of {GROUP}, {options.threads} threads; "
          f"llm-compressor: {version}")
    results = {}
    for dtype in options.dtype:
        results[dtype] = compare(dtype, width, count, length, options.rounds, peer)
        show(dtype, results[dtype])
    settings = {"width": width, "sequences": count, "length": length, "bits": BITS, "group_size": GROUP,
                "threads": options.threads, "rounds": options.rounds, "llm_compressor": version}
    path = common.RESULTS / f"gptq{'-quick' if options.quick else ''}.json"
    common.write_json(options.out or path, common.header("gptq", settings) | {"results": results})


if __name__ == "__main__":
    main()
