"""tersor makes PyTorch language models small and fast.

    report = tersor.compress(model, "gptq:W4A16", calibration=texts, tokenizer=tokenizer)
    tersor.save(model, "out")
    model = tersor.load("out")

Importing the package registers its operations with torch and its own ``quant_method`` with transformers, and nothing
else; ``import tersor.auto`` additionally keeps compressed-tensors, GPTQ and AWQ checkpoints packed.
"""

from . import integrations
from ._version import __version__
from .api import compress, explain, specs
from .formats import Format, Int
from .layer import Embedding, Linear
from .patch import LayerSpec, patch
from .report import Report
from .spec import SpecError, parse, parse_cache

integrations.register()

_LAZY = {"save": "io", "load": "io", "accelerate": "io", "Cache": "kv",
         "StaticCache": "kv"}  # these import transformers


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "Cache", "Embedding", "Format", "Int", "LayerSpec", "Linear", "Report", "SpecError", "StaticCache", "__version__",
    "accelerate", "compress", "explain", "load", "parse", "parse_cache", "patch", "save", "specs",
]
