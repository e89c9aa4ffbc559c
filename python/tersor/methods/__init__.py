"""Methods: ways to choose a point of a format. Importing this package fills the registry."""

from .base import Choice, Method, Statistics
from .awq import AWQ
from .bct import BCT
from .gptq import GPTQ
from .rtn import RTN
from .statistics import Collector
from .single import compress_weight  # isort: skip
from ..transforms import comet, fireq, flatquant, flexq, quarot, smoothquant  # noqa: F401  isort: skip (they register themselves)

__all__ = ["AWQ", "BCT", "GPTQ", "RTN", "Choice", "Collector", "Method", "Statistics", "compress_weight"]
