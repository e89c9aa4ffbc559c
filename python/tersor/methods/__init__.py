"""Methods: ways to choose a point of a format. Importing this package fills the registry."""

from .base import Choice, Method, Statistics
from .awq import AWQ
from .bct import BCT
from .gptq import GPTQ
from .rtn import RTN
from .statistics import Collector
from .single import compress_weight  # isort: skip
# They register themselves.
from ..transforms import comet, fireq, flatquant, flexq, quarot, smoothquant  # noqa: F401  isort: skip

__all__ = ["AWQ", "BCT", "GPTQ", "RTN", "Choice", "Collector", "Method", "Statistics", "compress_weight"]
