"""Fused expert modules: 3-D parameters ``[experts, out, in]``."""

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as 3-D parameters named like transformers does."""
    parameters = dict(module.named_parameters(recurse=False))
    return {"gate_up_proj", "down_proj"} <= set(parameters) and parameters["down_proj"].dim() == 3
