"""The KV cache of a generating model."""

from .cache import Cache, CacheReport, CacheRow

__all__ = ["Cache", "CacheReport", "CacheRow"]
