"""RMSNorm in one call on the CPU.

A decode step of a small model spends more time between the linear layers than in them, and a third of it in RMSNorm:
nine operations on a few thousand values each. `fuse_norms` gives the norms of a model `ops.rms_norm`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .op_checks import CODE
from .ops import plain, rms_norm

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_fused_types: dict[type, type] = {}


class FusedRMSNorm:
    """Mixed into the class of a model's own norm: the same parameters, the same results, one call in inference.

    Where gradients are wanted, under a tracing mode, on other devices and for other dtypes the model's own code runs.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not plain(x) or x.dtype not in CODE or x.dtype is not weight.dtype or not weight.is_cpu \
                or torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return super().forward(x)
        return rms_norm.cpu(x, weight, getattr(self, self._epsilon))

    def __reduce_ex__(self, protocol):
        # Copies and pickles name the model's own class: the mixed one is made anew at run time.
        function, arguments, *rest = super().__reduce_ex__(protocol)
        return _restore, (type(self).__mro__[2], self._epsilon), *rest


def _restore(kind: type, epsilon: str) -> nn.Module:
    return kind.__new__(_fused(kind, epsilon))


def _fused(kind: type, epsilon: str) -> type:
    if kind not in _fused_types:
        _fused_types[kind] = type(kind.__name__, (FusedRMSNorm, kind), {"_epsilon": epsilon})
    return _fused_types[kind]


def fuse_norms(model: nn.Module) -> int:
    """Let each RMSNorm of ``model`` that computes what `ops.rms_norm` does run as one call; returns how many do.

    What a module computes is tried, not guessed from its name: variants (weights that are offsets from one, other
    orders of rounding) keep their own code. State dicts, parameters and ``isinstance`` stay as they are.
    """
    answers: dict[tuple, bool] = {}
    count = 0
    for module in model.modules():
        if isinstance(module, FusedRMSNorm):
            count += 1
            continue
        epsilon = next((name for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
        weight = module._parameters.get("weight")
        if epsilon is None or "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 \
                or len(module._parameters) != 1 or module._buffers or module._modules:
            continue
        key = (type(module), epsilon)
        if key not in answers:
            answers[key] = _same(module, epsilon)
        if answers[key]:
            module.__class__ = _fused(type(module), epsilon)
            count += 1
    return count


@torch.no_grad()
def _same(module: nn.Module, epsilon: str) -> bool:
    """Whether the module's own code gives what `ops.rms_norm` gives, in float32 and, to an ulp or so, in bfloat16."""
    generator = torch.Generator("cpu").manual_seed(0)
    twin = copy.copy(module)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        weight = (torch.rand(96, generator=generator, device="cpu") + 0.5).to(dtype)
        twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        x = torch.randn(3, 96, generator=generator, device="cpu").to(dtype)
        x[1] *= 1e-3  # epsilon shows
        try:
            theirs = twin.forward(x)  # not called: hooks are not to see made-up data
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        ours = rms_norm.cpu(x, weight, getattr(twin, epsilon))
        if theirs.dtype is not dtype or theirs.shape != ours.shape \
                or not torch.allclose(theirs.float(), ours.float(), rtol=tolerance, atol=tolerance):
            return False
    return True
