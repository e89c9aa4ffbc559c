"""Turning a decoder's residual stream: what every block reads and writes, in another orthogonal basis.

RMS normalisation without gains commutes with rotations, so once the gains are folded into the layers behind them, the
embedding, all that writes to the stream and all that reads from it can be turned, and the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .graph import Call, is_linear, trace

# Of the logits, relative; a wrong turn is off by about 1. Norms compute in float32 also in models of float64; 16 bits
# round all weights.
_TOLERANCE, _LOOSE = 1e-3, 0.1


@torch.no_grad()
def rotate_residual(model: nn.Module, ids: Tensor, turn: Callable[[Tensor], Tensor]) -> None:
    """Fold the gains of the norms and turn the residual stream of a causal language model, in place.

    ``turn`` maps rows ``[..., width]`` by an orthogonal matrix, in their dtype. ``ids [1, length]``: some tokens; which
    layers read a norm's output is traced on them, and whether the logits stay the same is tried. A tied output head
    becomes a layer of its own. ValueError, and the model untouched, where the architecture has something that does not
    turn: norms with a mean or a bias, norms on what is written to the stream, position embeddings, layers that are not
    ``nn.Linear``.
    """
    embedding, changed = _plan(model, ids)
    before = _logits(model, ids)
    made: dict[tuple[nn.Module, str], Tensor] = {}
    for (module, name), rewrite in changed.items():
        value = module._parameters[name]  # of 16 bits: float32 leaves nothing to round twice
        wide = value.double() if value.dtype.itemsize >= 4 else value.float()
        made[module, name] = rewrite(wide, turn).to(value.dtype)
    old = {}
    for (module, name), value in made.items():
        parameter = module._parameters[name]
        old[module, name] = parameter
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    after = _logits(model, ids)
    error = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not error < (_TOLERANCE if embedding.weight.dtype.itemsize >= 4 else _LOOSE):
        for (module, name), parameter in old.items():
            module._parameters[name] = parameter
        raise ValueError(f"rotation: the logits of {type(model).__name__} change by {error:.2g} of their size when its "
                         "residual stream is turned; accepted are decoders of RMS norms and nn.Linear layers")
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


Rewrite = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def _plan(model: nn.Module, ids: Tensor) -> tuple[nn.Module, dict[tuple[nn.Module, str], Rewrite]]:
    """The input embedding, and how each parameter (of a module, by name) is rewritten."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"rotation: found {type(model).__name__}, accepted are causal language models of transformers")
    width = embedding.weight.shape[1]
    calls = trace(model, (), {"input_ids": ids.to(embedding.weight.device), "use_cache": False})
    changed: dict[tuple[nn.Module, str], Rewrite] = {(embedding, "weight"): lambda w, turn: turn(w)}
    readers: set[nn.Module] = set()
    for call in calls:
        own = call.module._parameters
        weight = own.get("weight")
        if weight is None or weight.dim() != 1 or weight.numel() != width or own.get("bias") is not None:
            continue
        reading = [c for c in calls if c.reads == call.writes and is_linear(c.module)]
        others = [c for c in calls if c.reads == call.writes and c.writes != call.writes and not is_linear(c.module)
                  and next(c.module.parameters(False), None) is not None]
        if not reading or others:
            what = f"{others[0].name}, which reads it" if others else "no linear layer that reads it"
            raise ValueError(f"rotation: norm {call.name!r}: found {what}; accepted are norms before nn.Linear layers")
        offset = _offset(call)
        gain = (weight.double() if weight.dtype.itemsize >= 4 else weight.float()) + offset
        changed[call.module, "weight"] = lambda w, turn, offset=offset: torch.ones_like(w) - offset
        for c in reading:
            readers.add(c.module)
            changed[c.module, "weight"] = lambda w, turn, gain=gain: turn(w * gain)
    for call in calls:
        if isinstance(call.module, nn.Linear) and call.module.out_features == width and call.module not in readers:
            changed[call.module, "weight"] = lambda w, turn: turn(w.T).T.contiguous()
            if call.module.bias is not None:
                changed[call.module, "bias"] = lambda b, turn: turn(b)
    return embedding, changed


def _offset(call: Call) -> float:
    """What a norm adds to its weight to get the gain: 0, or 1 in models that store the difference from one."""
    weight = call.module._parameters["weight"]
    zero = {"weight": torch.zeros_like(weight)}
    x = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    return 0.0 if not bool(torch.func.functional_call(call.module, zero, (x,)).any()) else 1.0


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.double()
