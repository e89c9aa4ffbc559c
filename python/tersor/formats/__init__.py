"""Storage formats. Importing this package fills the registry."""

from .additive import AdditiveCodebook
from .base import Format, Params, Shape, Tensors, TensorSpec
from .bilevel import BilevelInt
from .blockdiagonal import BlockDiagonal
from .byte_scales import ByteScales
from .combine import Sum
from .dense import Dense
from .floating import NVFP4, Float, Microscaling
from .inputs import Inputs
from .integer import Int
from .lowrank import LowRank
from .mixed import MixedInputs
from .presets import PRESETS
from .sparse import Outliers, Sparse24
from .vector import OutputVectors

__all__ = [
    "NVFP4", "PRESETS", "AdditiveCodebook", "BilevelInt", "BlockDiagonal", "ByteScales", "Dense", "Float", "Format",
    "Inputs", "Int", "LowRank", "Microscaling", "MixedInputs", "Outliers", "OutputVectors", "Params", "Shape",
    "Sparse24", "Sum", "TensorSpec", "Tensors",
]
