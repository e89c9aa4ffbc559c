"""SiLU(gate) * up inside the down projection's call.

A gated feed-forward with rounded activations writes the product to memory before it is rounded. `fuse_gates` gives such
modules one call that makes each row, turns it where the layer has an online step, and rounds it.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .layer import Linear, fuse

_fused_types: dict[type, type] = {}


class FusedGate:
    """Mixed into the class of a model's own feed-forward module: the same parameters, the same results to rounding.

    Where gradients are wanted, under a tracing mode, on devices without such kernels, with hooks on the parts that are
    left out, or when a part was exchanged, the model's own code runs.
    """

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj
        if type(down) is not Linear or not down._direct(x) or torch.is_grad_enabled() and x.requires_grad \
                or down._forward_pre_hooks or down._forward_hooks or self.act_fn._forward_hooks \
                or type(self.act_fn) is not self.__dict__["_act_type"]:
            return super().forward(x)
        call, bias = _call(self), down._parameters["bias"]
        if call is None or bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return super().forward(x)
        gate = self.gate_proj(x)
        return down._after(call(gate, [bias if bias is None else bias.to(gate.dtype)], self.up_proj(x))[0])

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_gate"}

    def __reduce_ex__(self, protocol):
        # Copies and pickles name the model's own class: the mixed one is made anew at run time.
        function, arguments, *rest = super().__reduce_ex__(protocol)
        return _restore, (type(self).__mro__[2],), *rest


def _call(module: FusedGate):
    """The bound call of a module's down projection; None where no kernel runs the gate."""
    down = module.down_proj
    bound = down._bind()
    held = bound, *(tensor for step in down.pre or () for tensor in step._buffers.values())
    call, before = module.__dict__.get("_gate", (None, ()))
    if len(held) != len(before) or any(one is not other for one, other in zip(held, before)):
        own = None if bound is None else down.format.producer(down.tensors())
        call = None if own is None else fuse([bound], down.pre, {**own, "silu_mul": True})
        module.__dict__["_gate"] = call, held
    return call


def _restore(kind: type) -> nn.Module:
    return kind.__new__(_fused(kind))


def _fused(kind: type) -> type:
    if kind not in _fused_types:
        _fused_types[kind] = type(kind.__name__, (FusedGate, kind), {})
    return _fused_types[kind]


def fuse_gates(model: nn.Module) -> int:
    """Let each gated feed-forward of ``model`` whose down projection rounds its input run gate and projection in one
    call; returns how many do. What a module computes is tried on stand-ins of its parts, not guessed from its name."""
    count, answers = 0, {}
    for module in model.modules():
        if isinstance(module, FusedGate):
            count += 1
            continue
        parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
        if None in parts or type(parts[2]) is not Linear or len(module._modules) != 4 or module._parameters \
                or parts[2].format.producer(parts[2].tensors()) is None:
            continue
        key = type(module), type(parts[3])
        if key not in answers:
            answers[key] = _is_gate(module)
        if answers[key]:
            module.__class__ = _fused(type(module))
            module.__dict__["_act_type"] = type(parts[3])
            count += 1
    return count


@torch.no_grad()
def _is_gate(module: nn.Module) -> bool:
    """Whether the class's own code is ``down(silu(gate(x)) * up(x))``."""
    gate, up = torch.linspace(-4, 4, 12).view(3, 4), torch.arange(12.0).view(3, 4) - 5
    parts = SimpleNamespace(gate_proj=lambda x: x + gate, up_proj=lambda x: x + up, down_proj=lambda x: 2 * x,
                            act_fn=module.act_fn, config=getattr(module, "config", None), training=False)
    x = torch.ones(3, 4)
    try:
        found = type(module).forward(parts, x)
    except (AttributeError, TypeError, RuntimeError):
        return False
    expected = 2 * torch.nn.functional.silu(x + gate) * (x + up)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5)
