"""tersor inside other libraries."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

_HOST = "transformers.quantizers.auto"


def register() -> None:
    """Register our own ``quant_method`` with transformers, now or as soon as transformers is imported.

    Importing transformers' quantizers costs seconds, which ``import tersor`` does not spend: a finder waits for the
    one module that holds the registry and registers when it has been executed.
    """
    if _HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from . import transformers

    # Where that module is the first to import the registry it is half-executed now, and registers at its own end.
    if hasattr(transformers, "register"):
        transformers.register()


def attach(model) -> None:
    """Let a compressed model's own ``save_pretrained`` write it; nothing for models that are not transformers'."""
    if "transformers" in sys.modules:
        from . import transformers

        transformers.attach(model)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name):
        return getattr(self.loader, name)
