"""Low-bit layers on a GPU: tersor's, of integers and small floats, against cuBLAS bf16, _int_mm, _scaled_mm.

    python bench/lowbit_cuda.py --out bench/results/lowbit-cuda.json

Each contender's result is checked first: tersor's against the rounded input times the unpacked weight, the others'
against the product of their own operands, in float32. Times are those of bench/linear_cuda.py (graphs of passes over
copies that leave the L2 cache, in turns): of the whole layer, rounding included, and of the product alone. Beside them
stand two floors: stored bytes over the measured bandwidth of a copy, and operations over the measured rate of a large
product of the same kind (bf16, int8). It needs a GPU and has not run on one yet: it comes without figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import common
import linear_cuda
import torch
from linear_cuda import Contender, captured, copies, timed

import tersor
from tersor.formats import Int

SPECS = ("W8A8[act_group=-1]", "W6A8[group=-1,act_group=-1]", "W4A8[group=-1,act_group=-1]", "W4A8[act_group=-1]",
         "W4A8[scale=int8,act_group=-1]", "W4A8", "W4A4[group=-1,act_group=-1]", "W4A4[act_group=-1]", "W4AFP8",
         "AFP8/W4A16[scale=e4m3]", "FP8_DYNAMIC", "MXFP8", "MXFP6A8", "AMXFP8/MXFP4A16", "MXFP4", "NVFP4", "MXFP6A16")
SHAPES, TOKENS = "28672x8192,4096x4096", "1,16,64,512,4096"
ROUNDS = 7
BF16, INT8 = "bf16_operations_per_ms", "int8_operations_per_ms"


def fail(text: str) -> None:
    sys.exit(f"lowbit_cuda: {text}")


def check(name: str, y: torch.Tensor, expected: torch.Tensor, limit: float) -> float:
    """Relative error of a result; ends the run where it is not the expected one."""
    error = float((y.float() - expected.float()).norm() / expected.float().norm())
    if not error < limit:
        fail(f"{name}: the relative error of its result is {error:.3g}, accepted is below {limit}")
    return error


class Layer(Contender):
    """A contender that knows what its result must be and which operations it runs."""

    def __init__(self, name, nbytes, calls, expected, limit, kind, usable=lambda m: True, prepare=lambda x: x):
        super().__init__(name, nbytes, calls)
        self.expected, self.limit, self.kind, self.usable, self.prepare = expected, limit, kind, usable, prepare


def tersor_layers(w: torch.Tensor, spec: str) -> list[Layer]:
    """The layer as a model runs it, and, of integers, its product alone on codes that were made before."""
    from tersor import ops_cuda

    n, k = w.shape
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta")
    linear.weight = torch.nn.Parameter(w.cpu(), requires_grad=False)
    layer = tersor.Linear.from_linear(linear, f"rtn[search=false]:{spec}")
    chosen = layer.format
    if chosen.kernel((n, k), "cuda").startswith("reference"):
        fail(f"{spec}: {chosen.kernel((n, k), 'cuda')}")
    tensors = {name: tensor.cuda() for name, tensor in layer.tensors().items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    sets = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(copies(size))]
    unpacked = chosen.unpack(tensors, (n, k), torch.float32)

    whole = [lambda x, t=t: chosen.linear(x, t, None, (n, k)) for t in sets]
    if not isinstance(chosen, Int):
        seen = chosen.quantize_input  # of floats what a kernel sees does not depend on the weight
        return [Layer(f"tersor {spec}", size, whole, lambda x: seen(x.float()) @ unpacked.T, 6e-3, BF16)]

    def expected(x):
        return chosen.quantize_input(x.float(), tensors) @ unpacked.T

    def rounded(x):
        options = chosen.activation, chosen.act_group, chosen.act_clip, chosen.act_sym, None
        return x, ops_cuda.quantized(x, *options, chosen.num_bits, chosen.group_size, not chosen.symmetric)

    product = [lambda pair, t=t: ops_cuda.multiplied(
        *pair, t["qweight"], t["scales"], t.get("zero_points"), None, n, chosen.num_bits, chosen.group_size)
        for t in sets]
    return [Layer(f"tersor {spec}", size, whole, expected, 6e-3, INT8),
            Layer(f"tersor {spec}, product", size, product, expected, 6e-3, INT8, prepare=rounded)]


def peers(w: torch.Tensor) -> list[Layer]:
    n, k = w.shape
    dense = [w.clone() for _ in range(copies(w.nbytes))]
    found = [Layer("torch bf16", w.nbytes, [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense],
                   lambda x: x.float() @ w.float().T, 6e-3, BF16)]
    top = w.abs().amax(1, keepdim=True).float() / 127
    codes = (w.float() / top).round().to(torch.int8)
    eights = [codes.clone() for _ in range(copies(codes.nbytes))]

    def to_int8(x):
        return (x.float() * (127 / x.float().abs().amax(1, keepdim=True))).round().to(torch.int8)

    # Without any scale: what comes out is int32.
    found.append(Layer("torch._int_mm", codes.nbytes, [lambda x, w=w: torch._int_mm(x, w.t()) for w in eights],
                       lambda x: x.double() @ codes.double().T, 1e-6, INT8, lambda m: m > 16, to_int8))
    if torch.cuda.get_device_capability() >= (8, 9):
        fp8 = (w.float() / top * (127 / 448)).to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        eights8 = [fp8.clone() for _ in range(copies(fp8.nbytes))]
        found.append(Layer(
            "torch._scaled_mm e4m3", fp8.nbytes,
            [lambda x, w=w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16) for w in eights8],
            lambda x: x.float() @ fp8.float().T, 2e-2, "fp8_operations_per_ms", lambda m: m % 16 == 0,
            lambda x: (x / x.abs().amax()).to(torch.float8_e4m3fn)))
    return found


def rates(floors: dict) -> dict:
    """Operations a millisecond of large products in int8 and, where there are any, FP8."""
    a = torch.randint(-128, 128, (8192, 8192), dtype=torch.int8, device="cuda")
    calls = {INT8: lambda: torch._int_mm(a, a.t())}
    if torch.cuda.get_device_capability() >= (8, 9):
        b, one = torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        calls["fp8_operations_per_ms"] = lambda: torch._scaled_mm(b, b.t(), one, one, out_dtype=torch.bfloat16)
    for name, call in calls.items():
        for _ in range(3):
            call()
        floors[name] = 2 * 8192**3 / timed(call, 9)
    return floors


def measure(layers: list[Layer], n: int, k: int, m: int, floors: dict) -> list[dict]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    present, passes, errors, times = [], {}, {}, {}
    for layer in layers:
        if not layer.usable(m):
            continue
        given = layer.prepare(x)
        shown = x if layer.name.startswith("tersor") else given
        errors[layer.name] = check(f"{layer.name}, N={n} K={k} M={m}", layer.calls[0](given), layer.expected(shown),
                                   layer.limit)
        passes[layer.name] = captured(lambda layer=layer, given=given: [call(given) for call in layer.calls])
        times[layer.name] = []
        present.append(layer)
    for turn in range(ROUNDS):
        for layer in present[:: 1 if turn % 2 == 0 else -1]:
            times[layer.name].append(timed(passes[layer.name], 1) / len(layer.calls))
    base, found = statistics.median(times["torch bf16"]), []
    for layer in present:
        ms = statistics.median(times[layer.name])
        of_bytes = (layer.nbytes + 2 * m * (n + k)) / floors["copy_bytes_per_ms"]
        of_operations = 2 * m * n * k / floors[layer.kind]
        found.append({
            "N": n, "K": k, "M": m, "contender": layer.name, "ms": ms, "rounds_ms": times[layer.name],
            "ratio_to_torch_bf16": base / ms, "relative_error": errors[layer.name], "nbytes": layer.nbytes,
            "copies": len(layer.calls), "floor_bytes_ms": of_bytes, "floor_operations_ms": of_operations,
            "share_of_copy_bandwidth": layer.nbytes / ms / floors["copy_bytes_per_ms"]})
        print(f"N={n} K={k} M={m:5d} {layer.name:42s} {ms * 1e3:9.1f} us  {base / ms:5.2f}x cuBLAS bf16  floors "
              f"{of_bytes * 1e3:8.1f} us of bytes, {of_operations * 1e3:8.1f} us of operations  error "
              f"{errors[layer.name]:.1e}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="out x in")
    parser.add_argument("--m", default=TOKENS)
    parser.add_argument("--specs", nargs="+", default=SPECS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/lowbit-cuda.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        fail("no CUDA device is visible to torch; this measurement needs one")
    if not tersor._C.has_cuda_build:
        fail("tersor was built without CUDA (tersor doctor says why)")
    properties = torch.cuda.get_device_properties(0)
    shapes, tokens = [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")], common.integers(args.m)
    result = common.header("lowbit-cuda", {"shapes_NxK": args.shapes, "m": tokens, "specs": list(args.specs),
                                           "rounds": ROUNDS})
    result |= {"device": {"name": properties.name, "multiprocessors": properties.multi_processor_count,
                          "capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda},
               "floors": rates(linear_cuda.floors()), "records": [], "complete": False}
    for n, k in shapes:
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        base = peers(w)
        for m in tokens:
            result["records"] += measure(base, n, k, m, result["floors"])
        for spec in args.specs:  # one at a time beside cuBLAS: the copies of all would not fit
            layers = [base[0], *tersor_layers(w, spec)]
            for m in tokens:
                result["records"] += measure(layers, n, k, m, result["floors"])[1:]
            common.write_json(args.out, result)
            del layers
            torch.cuda.empty_cache()
    result["complete"] = True
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
