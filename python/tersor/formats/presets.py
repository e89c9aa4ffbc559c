"""compressed-tensors' preset names (0.20) and the formats they stand for."""

from __future__ import annotations

import re

from ..registry import register_format
from .base import Format
from .floating import NVFP4, Float, Microscaling
from .inputs import Inputs
from .integer import Int, default_group

_MXFP4, _MXFP6, _MXFP8 = Microscaling("e2m1"), Microscaling("e2m3"), Microscaling("e4m3")

# None leaves the layer alone
PRESETS: dict[str, Format | None] = {
    "UNQUANTIZED": None,
    "W4A16_ASYM": Int(4, 128, False),
    "W8A8": Int(8, 0, activation=8),
    "INT8": Int(8, 0, activation=8),
    "W4AFP8": Inputs(Int(4), "fp8", "token"),
    "FP8": Inputs(Float("e4m3", "tensor"), "fp8", "tensor"),
    "FP8_DYNAMIC": Inputs(Float("e4m3", "channel"), "fp8", "token"),
    "FP8_BLOCK": Inputs(Float("e4m3", "block"), "fp8", "group"),
    "NVFP4A16": NVFP4(),
    "NVFP4": Inputs(NVFP4(), "nvfp4"),
    "MXFP4A16": _MXFP4,
    "MXFP4": Inputs(_MXFP4, "mxfp4"),
    "MXFP4XFP8": Inputs(_MXFP4, "fp8", "group"),
    "MXFP6A16": _MXFP6,
    "MXFP6A8": Inputs(_MXFP6, "mxfp8"),
    "MXFP8A16": _MXFP8,
    "MXFP8": Inputs(_MXFP8, "mxfp8"),
}
PRESETS.update({
    f"W{bits}A{activation}": Int(bits, default_group(bits, activation), activation=activation)
    for bits in range(2, 9)
    for activation in (4, 8, 16)
    if bits < activation or bits == activation == 4
})


@register_format("|".join(re.escape(name) for name, format in PRESETS.items() if not isinstance(format, Int))
                 + "|INT8", "FP8_DYNAMIC", "compressed-tensors' presets with float weights or activations")
def _preset(match, inner):
    if inner is not None:
        raise ValueError(f"a preset names a whole format and nothing nests in it, found {inner}")
    if PRESETS[match[0]] is None:
        raise ValueError("it leaves a layer alone; write it, or 'keep', as a value of a mapping recipe")
    return PRESETS[match[0]]
