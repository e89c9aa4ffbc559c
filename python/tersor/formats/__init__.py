"""Storage formats. Importing this package fills the registry."""

from .base import Format, Params, Shape, Tensors, TensorSpec
from .integer import Int

__all__ = ["Format", "Int", "Params", "Shape", "TensorSpec", "Tensors"]
