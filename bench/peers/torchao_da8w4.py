"""torchao's int4 product with dynamic int8 activations, the quantization of activations included."""

from __future__ import annotations

from .base import INT8, TorchContender, Unavailable, tensor_bytes

ABOUT = "torch.ops.torchao.da8w4_linear_cpu, group 128, activations quantized in eager torch as torchao does"
GROUP = 128


def variants(options):
    return ["torchao da8w4"]


def available():
    try:
        import torch
        import torchao
    except Exception as error:  # a torchao built against another torch may fail in many ways
        raise Unavailable(f"torchao does not import with this torch: {error!r}") from error
    for name in ("da8w4_linear_prepack_cpu", "da8w4_linear_cpu"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchao::{name}", "CPU"):
            raise Unavailable(f"torchao {torchao.__version__} has no CPU kernel for {name} in this build")
    return {"torchao": torchao.__version__, "torch": torch.__version__}


class DA8W4(TorchContender):
    activations = INT8

    def __init__(self, k, n, options):
        import torch
        import torchao  # noqa: F401  (registers its operations)

        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
        scales = torch.rand(n, k // GROUP, generator=generator).mul_(0.01).add_(0.001)
        zeros = torch.full((n, k // GROUP), 8, dtype=torch.int8)
        packed = torch.ops.torchao.da8w4_linear_prepack_cpu(codes, scales, zeros)
        self._rows = (codes[:64].double() - 8) * scales[:64].double().repeat_interleave(GROUP, 1)
        self.nbytes = tensor_bytes(packed)
        super().__init__(k, n, torch.float32, [tuple(tensor.clone() for tensor in packed)
                                               for _ in range(options.copies(self.nbytes))])
        self._multiply = torch.ops.torchao.da8w4_linear_cpu

    def product(self, x, weight):
        import torch

        low = x.amin(1, keepdim=True).clamp_(max=0)
        scale = x.amax(1, keepdim=True).clamp_(min=0).sub_(low).div_(255).clamp_(min=1e-12)
        zero = low.neg_().div_(scale).round_()
        codes = (x / scale).add_(zero).round_().clamp_(0, 255).to(torch.uint8)
        return self._multiply(codes, scale.flatten(), zero.flatten().to(torch.int32), *weight, None, torch.float32)

    def rows(self, count):
        return self._rows[:count]


def make(variant, k, n, options):
    return DA8W4(k, n, options)
