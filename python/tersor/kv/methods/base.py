"""What a method of the cache is: it wraps the store that the rest of a spec makes."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ...spec import Atom, SpecError
from ..settings import Settings
from ..store import Inner, Shape, Store

if TYPE_CHECKING:
    from ..record import Recording

CACHE_METHODS: dict[str, type["CacheMethod"]] = {}


@dataclasses.dataclass(frozen=True)
class CacheMethod(ABC):
    """Subclasses are frozen dataclasses whose fields are the options of the spec; each is one file and one paper.

    ``calibrated``: needs tensors of each layer, which `learn` makes, from data unless not ``data``; ``given``: takes
    them from the model, where `find` looks for them; ``rotary``: works with keys turned back to position 0, so the
    model's rotary embedding must be found; ``cuda``: its stores take tensors of a GPU.
    """

    name: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False
    data: ClassVar[bool] = True
    given: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    cuda: ClassVar[bool] = False
    innermost: ClassVar[bool] = False  # makes pages of its own, so that no method can stand between it and the bits

    def check(self, model: nn.Module, settings: Settings) -> None:
        """ValueError for a model whose layers, or settings, that the method cannot serve."""

    def learn(self, model: nn.Module, batches: list[Tensor], settings: Settings,
              progress) -> dict[int, dict[str, Tensor]]:
        """Tensors of each layer, from token ids ``[sequences, length]`` of each batch. Only where ``calibrated``."""
        raise TypeError(f"{self.name} learns nothing")

    def find(self, model: nn.Module) -> dict[int, dict[str, Tensor]]:
        """Tensors of each layer that the model holds; ValueError where it does not. Only where ``given``."""
        raise TypeError(f"{self.name} takes nothing from a model")

    def describe(self, tensors: dict[int, dict[str, Tensor]]) -> str:
        """In words, what `learn` found that its user should know."""
        return ""

    @abstractmethod
    def wrap(self, shape: Shape, tensors: dict[str, Tensor], inner: Inner) -> Store:
        """The store of a layer; ``inner(shape)`` makes the one inside."""


def register_cache_method(name: str):
    """Decorator: the method's name in specs."""

    def register(method: type[CacheMethod]) -> type[CacheMethod]:
        CACHE_METHODS[name] = method
        method.name = name
        return method

    return register


def make_method(atom: Atom) -> CacheMethod:
    """The method that an atom of a spec names. SpecError for an unknown name or option, or a value of another type."""
    kind = CACHE_METHODS.get(atom.name)
    if kind is None:
        near = difflib.get_close_matches(atom.name, CACHE_METHODS, 1)
        raise SpecError(f"cache method {atom.name!r} is unknown{f'; did you mean {near[0]!r}?' if near else ''}; "
                        f"accepted are {', '.join(sorted(CACHE_METHODS))}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in atom.options:
        if key not in fields:
            raise SpecError(f"cache method {atom.name!r}: found option {key!r}, accepted are "
                            f"{', '.join(fields) or 'no options'}")
        wanted = type(fields[key].default)
        if not (type(value) is wanted or wanted is float and type(value) is int):
            raise SpecError(f"cache method {atom.name!r}: {key}: found {value!r}, accepted is {wanted.__name__}")
    return kind(**dict(atom.options))


def method_atom(method: CacheMethod) -> Atom:
    """The inverse of `make_method`: options that differ from their defaults."""
    return Atom(method.name, tuple((field.name, getattr(method, field.name)) for field in dataclasses.fields(method)
                                   if getattr(method, field.name) != field.default))
