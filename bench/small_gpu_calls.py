"""A few small calls of every CUDA operation, for compute-sanitizer: all bits, tails in every dimension, split sums."""

from __future__ import annotations

import torch

from tersor import ops


def stored(n: int, k: int, bits: int, group: int, experts: int = 0) -> tuple[torch.Tensor, ...]:
    """qweight, scales and zero points of random weights on the GPU."""
    count = max(experts, 1)
    packed = [ops.int_pack(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits) for _ in range(count)]
    shape = (count, -(-n // 16), -(-k // group) if group else 1, 16)
    scales = torch.rand(shape).to(torch.float16) * 0.1
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    tensors = torch.stack(packed), scales, zeros
    return tuple(t.cuda().contiguous() if experts else t[0].cuda().contiguous() for t in tensors)


def main() -> None:
    torch.manual_seed(0)
    for bits in range(2, 9):
        for m, n, k, group, dtype in ((1, 144, 1056, 32, torch.bfloat16), (17, 80, 200, 128, torch.float16),
                                      (70, 272, 520, 0, torch.bfloat16)):
            qweight, scales, zeros = stored(n, k, bits, group)
            x = torch.randn(m, k, dtype=dtype, device="cuda")
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
    ends = torch.tensor([0, 3, 3, 12, 13], dtype=torch.int32, device="cuda")
    x = torch.randn(14, 256, dtype=torch.bfloat16, device="cuda")
    y = ops.int_linear_grouped(x, ends, qweight, scales, zeros, None, 96, 4, 64, 16)
    assert not y[13].any() and bool(torch.isfinite(y).all())
    torch.cuda.synchronize()
    print("passed")


if __name__ == "__main__":
    main()
