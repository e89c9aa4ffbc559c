"""A few small calls of every CUDA operation, for compute-sanitizer: all bits, tails in every dimension, split sums.

    python bench/small_gpu_calls.py [cpu]        # on the CPU: whether the script itself is right
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tersor
from tersor import ops
from tersor.transforms.steps import Hadamard, Kronecker, Permute

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
FLOATS = ("FP8A16", "MXFP8A16", "MXFP4A16", "NVFP4A16", "W4AFP8", "FP8", "FP8_DYNAMIC", "MXFP4", "MXFP8", "NVFP4")
CACHES = ("K16V16", "K8V8", "K8V8[levels=e4m3]", "K4V4", "K3V3", "K2V2[group=64,levels=nuq,outliers=0.01]",
          "K4V4[keys=token,values=separable]", "gear:K2V2", "zipcache:K4V4", "h2o[budget=64]:K4V4")


def stored(n: int, k: int, bits: int, group: int, experts: int = 0) -> tuple[torch.Tensor, ...]:
    """qweight, scales and zero points of random weights on the GPU."""
    count = max(experts, 1)
    packed = [ops.int_pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits) for _ in range(count)]
    shape = (count, -(-n // 16), -(-k // group) if group else 1, 16)
    scales = torch.rand(shape).to(torch.float16) * 0.1
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    tensors = torch.stack(packed), scales, zeros
    return tuple(t.to(DEVICE).contiguous() if experts else t[0].to(DEVICE).contiguous() for t in tensors)


def layers() -> None:
    """Layers with a step in front of the rounding, and of small floats, against themselves on the CPU."""
    steps = {"none": None, "hadamard": Hadamard.random(192), "permute": Permute(torch.randperm(192)),
             "kronecker": Kronecker(torch.randn(12, 12), torch.randn(16, 16))}
    cases = [(spec, step) for spec in ("W4A8", "W6A6[act_group=64]", "W4A4[act_group=0]") for step in steps]
    for spec, step in cases + [(spec, "none") for spec in FLOATS]:
        linear = nn.Linear(192, 72, dtype=torch.bfloat16)
        layer = tersor.Linear.from_linear(linear, f"rtn:{spec}")
        if steps[step] is not None:
            held = layer
            layer = tersor.Linear.holding(linear, held.format, pre=(steps[step],))
            layer.load_tensors(held.tensors())
        x = torch.randn(9, 192, dtype=torch.bfloat16)
        with torch.no_grad():
            expected = layer(x).float()
            error = float((layer.to(DEVICE)(x.to(DEVICE)).cpu().float() - expected).norm() / expected.norm())
        assert error < 1e-2, (spec, step, error)


def caches() -> None:
    """A tiny model over the cache, prompt and steps, against itself on the CPU."""
    config = LlamaConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=64, vocab_size=64, dtype=torch.bfloat16)
    model, ids = LlamaForCausalLM(config).eval().to(torch.bfloat16), torch.randint(0, 64, (2, 150))
    for spec in CACHES:
        found = []
        for device in ("cpu", DEVICE):
            model.to(device)
            cache = tersor.Cache(model, spec)
            with torch.no_grad():
                for part in ids.to(device).split([130, 1, 17, 1, 1], 1):
                    logits = model(part, past_key_values=cache).logits
            found.append(logits.float().cpu())
        error = float((found[1] - found[0]).norm() / found[0].norm())
        assert error < 5e-2, (spec, error)


def main() -> None:
    torch.manual_seed(0)
    for bits in range(2, 9):
        for m, n, k, group, dtype in ((1, 144, 1056, 32, torch.bfloat16), (17, 80, 200, 128, torch.float16),
                                      (70, 272, 520, 0, torch.bfloat16)):
            qweight, scales, zeros = stored(n, k, bits, group)
            x = torch.randn(m, k, dtype=dtype, device=DEVICE)
            y = ops.int_linear(x, qweight, scales, zeros, None, n, bits, group, 16)
            w = ops.int_dequantize(qweight, scales, zeros, n, k, bits, group, torch.float32)
            error = float((y.float() - x.float() @ w.T).norm() / y.float().norm())
            assert error < 5e-3, (bits, m, n, k, group, error)
            # The same with rounded activations; the CPU kernel on the same tensors is the reference.
            there = tuple(t.cpu() for t in (x, qweight, scales, zeros))
            for act_bits, act_group, act_sym in ((8, 0, True), (6, 64, True), (4, 0, True), (8, 32, False)):
                options = None, n, bits, group, act_bits, act_group, 1.0, act_sym
                y = ops.int_linear(x, qweight, scales, zeros, *options).cpu()
                expected = ops.int_linear(*there, *options)
                error = float((y.float() - expected.float()).norm() / expected.float().norm())
                assert error < 6e-3, (bits, m, n, k, group, act_bits, act_group, act_sym, error)
    qweight, scales, zeros = stored(96, 256, 4, 64, experts=5)
    ends = torch.tensor([0, 3, 3, 12, 13], dtype=torch.int32, device=DEVICE)
    x = torch.randn(14, 256, dtype=torch.bfloat16, device=DEVICE)
    y = ops.int_linear_grouped(x, ends, qweight, scales, zeros, None, 96, 4, 64, 16)
    assert not y[13].any() and bool(torch.isfinite(y).all())
    layers()
    caches()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    print("passed")


if __name__ == "__main__":
    main()
