"""FlexQ: six bits for weights and activations, eight for the inputs that six would cost too much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats.integer import Int, quantize_activations
from ..methods.base import Method
from ..registry import register_method
from .group import Group


@register_method("flexq")
@dataclass(frozen=True)
class FlexQ(Method):
    """Layers whose output suffers most from inputs of six bits get eight (arXiv 2508.04405).

    On sampled inputs, a group of layers with one input is sensitive where rounding it to the format's bits changes
    their output by more than ``limit`` (relative, root mean square). The paper's study finds the down projections and
    its code names them; here each group decides by its own data, and the report says what it found. Meant for
    ``flexq:W6A6[act_group=128]``; the paper's scales are of 128 channels, for weights too.

    ValueError for formats without 4- or 6-bit activations.
    """

    limit: float = 0.05

    needs = frozenset({"inputs"})
    transforms = True
    chooses = False

    def __post_init__(self):
        if not self.limit > 0:
            raise ValueError(f"option 'limit': found {self.limit}, accepted are positive relative errors")

    def transform(self, group: Group) -> str:
        for name, fmt in group.formats.items():
            if not isinstance(fmt, Int) or fmt.activation not in (4, 6):
                raise ValueError(f"flexq: layer {name!r}: found format {fmt}, accepted are integer formats with 4 or 6 "
                                 "bits for activations, such as W6A6")
        formats = set(group.formats.values())
        bits, error = min(fmt.activation for fmt in formats), max(self.loss(group, fmt) for fmt in formats)
        if error <= self.limit:
            return f"flexq: {bits} bits cost {error:.1%} of the output"
        for name, fmt in group.formats.items():
            group.formats[name] = dataclasses.replace(fmt, activation=8)
        return f"flexq: 8 bits for the input, {bits} would cost {error:.1%} of the output"

    def loss(self, group: Group, fmt: Int) -> float:
        """Relative error of the layers' outputs when their input alone is rounded as ``fmt`` says."""
        x = self.require(group.stats, "inputs").inputs.float()
        change = quantize_activations(x, fmt.activation, fmt.act_group, fmt.act_clip, fmt.act_sym) - x
        w = torch.cat([group.weight(name).float() for name in group.formats])
        return float(F.linear(change, w).norm() / F.linear(x, w).norm().clamp_min(1e-30))
