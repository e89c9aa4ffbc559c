"""The baseline: torch's F.linear on dense weights."""

from __future__ import annotations

from .base import TorchContender, torch_dtype

ABOUT = "torch.nn.functional.linear"


def variants(options):
    return ["torch bf16", "torch fp32"] + (["torch fp16"] if options.dtype == "fp16" else [])


def available():
    import torch

    return {"torch": torch.__version__}


class Dense(TorchContender):
    def __init__(self, k, n, dtype, options):
        import torch

        first = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul_(k**-0.5).to(dtype)
        self.nbytes = first.numel() * first.element_size()
        super().__init__(k, n, dtype, [first.clone() for _ in range(options.copies(self.nbytes))])
        self._linear = torch.nn.functional.linear

    def product(self, x, weight):
        return self._linear(x, weight)

    def rows(self, count):
        return self.weights[0][:count]


def make(variant, k, n, options):
    return Dense(k, n, torch_dtype(variant.split()[1]), options)
