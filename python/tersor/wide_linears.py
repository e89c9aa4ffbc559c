"""Plain linear layers of 16 bits computed in float32, on CPUs whose 16-bit products are several times slower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PROBES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def slow(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` on this CPU without instructions for it."""
    probe = getattr(torch.ops.mkldnn, _PROBES[dtype], None) if dtype in _PROBES else None
    return probe is not None and not probe()


@contextlib.contextmanager
def widened(block: nn.Module) -> Iterator[None]:
    """While it lasts, the ``nn.Linear`` layers of a block on the CPU multiply in float32, without gradients, where
    their own dtype is slow. Inputs and outputs stay in that dtype; sums are rounded once. A float32 copy of each weight
    is held meanwhile: weights must not change.
    """
    changed = []
    try:
        for module in block.modules():
            if type(module) is nn.Linear and "forward" not in vars(module) and module.weight.is_cpu \
                    and slow(module.weight.dtype):
                module.forward = _forward(module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own again


def _forward(module: nn.Linear):
    held: list[Tensor | None] = []

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype is not module.weight.dtype:
            return nn.Linear.forward(module, x)
        if not held:
            bias = module.bias
            held.extend((module.weight.detach().float(), None if bias is None else bias.detach().float()))
        return F.linear(x.float(), *held).to(x.dtype)

    return forward
