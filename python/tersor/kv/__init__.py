"""The KV cache of a generating model."""

from importlib import import_module

_HOMES = {"Cache": "cache", "CacheReport": "cache", "CacheRow": "layer", "CachePlan": "plan", "calibrate": "plan",
          "StaticCache": "static"}
_HOMES |= {"LEVELS": "codec", "Level": "codec", "ContextError": "codec", "save_context": "contexts",
           "load_context": "contexts", "read_manifest": "contexts", "quantized": "contexts", "tune_level": "levels",
           "publish": "streaming", "stream_context": "streaming", "ContextServer": "streaming",
           "StreamError": "streaming"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # imports transformers
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
