"""tersor.Linear as a user calls it, checks and all."""

from __future__ import annotations

from .base import EXACT, INT8, TorchContender, Unavailable, torch_dtype

ABOUT = "tersor.Linear"


def variants(options):
    return [f"tersor {spec}" for spec in options.specs]


def available():
    try:
        import tersor
        from tersor import _C
    except ImportError as error:
        raise Unavailable(f"tersor does not import: {error}") from error
    return {"tersor": tersor.__version__, "kernels": _C.isa(), "threads": _C.threading()}


class Layer(TorchContender):
    def __init__(self, spec, k, n, options):
        import copy

        import tersor
        import torch

        dtype = torch_dtype(options.dtype)
        dense = torch.nn.Linear(k, n, bias=False, device="meta")
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul_(k**-0.5).to(dtype)
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        # Speed does not depend on which codes were chosen, so the search for better scales is left out.
        layer = tersor.Linear.from_linear(dense, spec if ":" in spec.split("[")[0] else f"rtn[search=false]:{spec}")
        kernel = layer.kernel
        if kernel.startswith("reference"):
            raise Unavailable(f"{spec} has no kernel here ({kernel})")
        self.nbytes = layer.nbytes
        self.activations = INT8 if getattr(layer.format, "activation", 16) == 8 else EXACT
        super().__init__(k, n, dtype, [copy.deepcopy(layer) for _ in range(options.copies(self.nbytes))])

    def product(self, x, weight):
        return weight(x)

    def rows(self, count):
        import torch

        layer = self.weights[0]  # in fp32: `.weight` would round to the model's dtype, which the kernel does not
        return layer.format.unpack(layer.tensors(), layer.shape, torch.float32)[:count]


def make(variant, k, n, options):
    return Layer(variant.split(" ", 1)[1], k, n, options)
