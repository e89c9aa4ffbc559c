"""Methods of the cache: one file and one paper each."""

from importlib import import_module
from pkgutil import iter_modules

from .base import CACHE_METHODS, CacheMethod, make_method, method_atom, register_cache_method

for _module in iter_modules(__path__):
    if _module.name != "base":
        import_module(f".{_module.name}", __name__)

__all__ = ["CACHE_METHODS", "CacheMethod", "make_method", "method_atom", "register_cache_method"]
