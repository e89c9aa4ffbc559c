"""torch's own weight-only int4 product for CPUs, exact activations."""

from __future__ import annotations

from .base import TorchContender, Unavailable, tensor_bytes, torch_dtype

ABOUT = "torch.ops.aten._weight_int4pack_mm_for_cpu, group 128"
GROUP = 128


def variants(options):
    dtypes = dict.fromkeys((options.dtype,) if options.quick else (options.dtype, "fp32"))
    return [f"torch int4pack {dtype}" for dtype in dtypes]


def available():
    import torch

    for name in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"):
        if not hasattr(torch.ops.aten, name):
            raise Unavailable(f"torch {torch.__version__} has no {name}")
    return {"torch": torch.__version__}


class Int4Pack(TorchContender):
    def __init__(self, k, n, dtype, options):
        import torch

        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
        self._codes = codes[:64].clone()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        scales_zeros = torch.rand(k // GROUP, n, 2, generator=generator).mul_(0.01).add_(0.001).to(dtype)
        self.nbytes = tensor_bytes((packed, scales_zeros))
        super().__init__(k, n, dtype, [(packed.clone(), scales_zeros.clone())
                                       for _ in range(options.copies(self.nbytes))])
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def product(self, x, weight):
        return self._multiply(x, weight[0], GROUP, weight[1])

    def rows(self, count):
        # w = (code - 8) * scale + zero: the zero is a weight, not a code.
        scales, zeros = self.weights[0][1][:, :count].double().repeat_interleave(GROUP, 0).unbind(-1)
        return (self._codes[:count].double() - 8) * scales.T + zeros.T


def make(variant, k, n, options):
    return Int4Pack(k, n, torch_dtype(variant.rsplit(" ", 1)[1]), options)
