"""torch's int4 product with activations quantized on the fly to int8."""

from __future__ import annotations

from .base import INT8, TorchContender, Unavailable

ABOUT = "torch.ops.aten._dyn_quant_matmul_4bit, group 32 and per channel, fp32 inputs"


def variants(options):
    return ["torch dyn4 channel"] if options.quick else ["torch dyn4 g32", "torch dyn4 channel"]


def available():
    import torch

    for name in ("_dyn_quant_pack_4bit_weight", "_dyn_quant_matmul_4bit"):
        if not hasattr(torch.ops.aten, name):
            raise Unavailable(f"torch {torch.__version__} has no {name}")
    return {"torch": torch.__version__}


class Dyn4(TorchContender):
    activations = INT8

    def __init__(self, k, n, group, options):
        import torch

        generator = torch.Generator().manual_seed(0)
        self.group = group
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.rand(n, k // group, generator=generator).mul_(0.01).add_(0.001)
        if group == k:
            stored = scales
        else:
            stored = scales.to(torch.bfloat16)
            scales = stored.float()
            stored = stored.flatten()
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(codes, stored, None, group, k, n)
        self._rows = self._dequantize(codes[:64], scales[:64])
        self.nbytes = packed.numel() * packed.element_size()
        super().__init__(k, n, torch.float32, [packed.clone() for _ in range(options.copies(self.nbytes))])
        self._multiply = torch.ops.aten._dyn_quant_matmul_4bit

    def _dequantize(self, codes, scales):
        import torch

        # Of two columns in a byte the even one is in the high half; codes are offset by 8.
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).double() - 8
        return nibbles * scales.double().repeat_interleave(self.group, 1)

    def product(self, x, weight):
        return self._multiply(x, weight, self.group, self.k, self.n)

    def rows(self, count):
        return self._rows[:count]


def make(variant, k, n, options):
    return Dyn4(k, n, 32 if variant.endswith("g32") else k, options)
