"""Rotary position embedding: what a model turns its keys by, and turning them back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..op_checks import fail


@dataclass(frozen=True)
class Rotary:
    """``inv_freq``: radians a position for each pair of channels; the first ``2 * len(inv_freq)`` channels are turned.

    ``interleaved``: channels 2i and 2i + 1 are a pair; otherwise i and i + len(inv_freq).
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False

    @property
    def dim(self) -> int:
        return 2 * len(self.inv_freq)

    def check(self, op: str, key_dim: int) -> None:
        """ValueError that names ``op`` for more pairs than keys have channels, or none."""
        if not 2 <= self.dim <= key_dim:
            fail(op, "inv_freq", f"{len(self.inv_freq)} pairs of channels", f"1 to {key_dim // 2}")

    def turn(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        """``x [..., tokens, dim]`` turned by ``positions [..., tokens]``, or back, in float32 or x's wider dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = positions.unsqueeze(-1).to(torch.float64) * _frequencies(self.inv_freq, positions.device)
        cos, sin = (t.to(x.device, wide) for t in (angles.cos(), angles.sin() * (-1 if back else 1)))
        part = x[..., :self.dim].to(wide)
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = part.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, x[..., self.dim:].to(wide)), -1)


@lru_cache(maxsize=64)
def _frequencies(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(inv_freq, dtype=torch.float64).to(device)


# Attention classes whose rotary embedding pairs neighbours (transformers 5): all others of the kinds below pair halves.
INTERLEAVED = ("Cohere", "Glm", "Helium", "Ernie4_5", "GPTJ", "CodeGen", "Llama4")
KEPT = ("default", "linear", "llama3", "yarn", "longrope_short", "proportional")


def find_rotary(model: nn.Module, layer: int) -> Rotary:
    """The rotary embedding of attention layer ``layer``. ValueError where the model has none that stays the same for
    all lengths, or whose angles cannot be read."""
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "layer_types", None)
    found = []
    for name, module in model.named_modules():
        for key, value in [*module.named_buffers(recurse=False), *vars(module).items()]:
            if key.endswith("inv_freq") and "original" not in key and isinstance(value, Tensor) and value.dim() == 1:
                found.append((f"{name}.{key}", key, module, value))
    if kind:  # models with an embedding for each type of layer name its buffers after the type
        own = [f for f in found if f[1] == f"{kind[layer]}_inv_freq"]
        found = own or [f for f in found if f[1] == "inv_freq"]
    frequencies = {tuple(f[3].tolist()) for f in found}
    if len(frequencies) != 1:
        raise ValueError(f"rotary: layer {layer} of {type(model).__name__}: found {len(frequencies)} sets of rotary "
                         "frequencies, accepted is one (models with rotary position embedding)")
    types = getattr(found[0][2], "rope_type", "default")
    rope = types.get(kind[layer], "default") if isinstance(types, dict) and kind else types
    if rope not in KEPT:
        raise ValueError(f"rotary: layer {layer} of {type(model).__name__}: found rope_type {rope!r}, whose "
                         f"frequencies change with the length, accepted are {', '.join(KEPT[:4])}")
    return Rotary(frequencies.pop(), type(model).__name__.startswith(INTERLEAVED))
