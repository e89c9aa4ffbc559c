"""Reading and writing checkpoints: compressed-tensors, GPTQ, AWQ, and our own container."""

from ..integrations.accelerate import accelerate
from .errors import CheckpointError
from .load import load
from .save import save

__all__ = ["CheckpointError", "accelerate", "load", "save"]
