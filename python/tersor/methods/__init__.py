"""Methods: ways to choose a point of a format. Importing this package fills the registry."""

from .base import Choice, Method, Statistics
from .gptq import GPTQ
from .rtn import RTN
from .statistics import Collector

__all__ = ["GPTQ", "RTN", "Choice", "Collector", "Method", "Statistics"]
