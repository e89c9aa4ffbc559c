"""The KV cache of a generating model."""

from importlib import import_module

__all__ = ["Cache", "CacheReport", "CacheRow"]


def __getattr__(name: str):
    if name in __all__:  # imports transformers
        return getattr(import_module(".cache", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
