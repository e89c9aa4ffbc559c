"""Names to meanings: formats and methods register here; specs are resolved here."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .spec import Atom, Spec, SpecError, parse

if TYPE_CHECKING:
    from .formats.base import Format


@dataclass(frozen=True)
class FormatName:
    """How an atom becomes a format: a pattern for the name, a maker, an example and a line of help."""

    pattern: re.Pattern
    make: Callable[..., "Format"]  # make(match, inner: Format | None, **options)
    example: str
    help: str


FORMATS: list[FormatName] = []
METHODS: dict[str, type] = {}


def register_format(pattern: str, example: str, help: str):
    """Decorator: ``make(match, inner, **options) -> Format`` serves atoms whose whole name matches ``pattern``."""

    def register(make):
        FORMATS.append(FormatName(re.compile(pattern), make, example, help))
        resolve.cache_clear()
        return make

    return register


def register_method(name: str):
    """Decorator for a method dataclass; its fields are the options that a spec may give in brackets."""

    def register(method):
        if METHODS.get(name, method) is not method:
            raise ValueError(f"method {name!r} is already registered by {METHODS[name].__module__}")
        METHODS[name] = method
        method.name = name
        resolve.cache_clear()
        return method

    return register


@dataclass(frozen=True)
class Resolved:
    """A spec with meanings: method instances in order, and the format."""

    methods: tuple[object, ...]
    format: "Format"
    text: str

    @property
    def method_text(self) -> str:
        return "+".join(method.name for method in self.methods)


@functools.lru_cache(maxsize=None)
def resolve(spec: str | Spec, default_method: str = "rtn") -> Resolved:
    """Methods and format of a spec. Unknown names and options raise SpecError with the nearest valid name."""
    from . import formats, methods  # noqa: F401  (fill the registry)

    parsed = parse(spec) if not isinstance(spec, Spec) else spec
    atoms = parsed.methods or (Atom(default_method),)
    made = tuple(_make_method(atom, parsed) for atom in atoms)
    return Resolved(made, _make_terms(parsed), str(Spec(atoms, parsed.terms)))


def resolve_format(text: str) -> "Format":
    """The format of a spec without methods."""
    from . import formats  # noqa: F401  (fill the registry)

    parsed = parse(text)
    if parsed.methods:
        raise SpecError(f"format {text!r}: found a method ({parsed.methods[0]}), accepted is a format alone")
    return _make_terms(parsed)


def _make_terms(spec: Spec) -> "Format":
    terms = tuple(_make_term(term, spec) for term in spec.terms)
    if len(terms) == 1:
        return terms[0]
    from .formats.combine import Sum

    try:
        return Sum(terms)
    except ValueError as error:
        raise SpecError(f"spec {str(spec)!r}: {error}") from None


def _make_method(atom: Atom, spec: Spec):
    kind = METHODS.get(atom.name)
    if kind is None:
        raise SpecError(f"spec {str(spec)!r}: unknown method {atom.name!r}{_nearest(atom.name, METHODS)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in atom.options:
        if key not in fields:
            raise SpecError(f"spec {str(spec)!r}: method {atom.name!r} has no option {key!r}{_nearest(key, fields)}")
        _check_option(spec, atom.name, key, value, fields[key].default)
    try:
        return kind(**dict(atom.options))
    except (TypeError, ValueError) as error:
        raise SpecError(f"spec {str(spec)!r}: method {atom.name!r}: {error}") from None


def _check_option(spec: Spec, name: str, key: str, value, default) -> None:
    kind = type(default)
    accepted = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(kind)
    if accepted and (not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))):
        raise SpecError(
            f"spec {str(spec)!r}: option {key!r} of {name!r}: found {value!r}, accepted is a {kind.__name__} "
            f"(default {default!r})"
        )


def _make_term(term: tuple[Atom, ...], spec: Spec) -> "Format":
    inner = None
    for atom in reversed(term):
        inner = _make_format(atom, inner, spec)
    return inner


def _make_format(atom: Atom, inner: "Format | None", spec: Spec) -> "Format":
    for entry in FORMATS:
        match = entry.pattern.fullmatch(atom.name)
        if match:
            try:
                return entry.make(match, inner, **dict(atom.options))
            except TypeError as error:
                wanted = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if not wanted:
                    raise
                options = [name for name in entry.make.__code__.co_varnames[2 : entry.make.__code__.co_argcount
                           + entry.make.__code__.co_kwonlyargcount]]
                raise SpecError(f"spec {str(spec)!r}: format {atom.name!r} has no option {wanted[1]!r}"
                                f"{_nearest(wanted[1], options)}") from None
            except ValueError as error:
                raise SpecError(f"spec {str(spec)!r}: format {atom.name!r}: {error}") from None
    raise SpecError(f"spec {str(spec)!r}: unknown format {atom.name!r}"
                    f"{_nearest(atom.name, [entry.example for entry in FORMATS] + preset_names())}")


def preset_names() -> list[str]:
    """Names of compressed-tensors' presets, all of them valid formats."""
    from .formats.presets import PRESETS

    return list(PRESETS)


def _nearest(found: str, accepted) -> str:
    accepted = sorted(set(accepted))
    close = difflib.get_close_matches(found, accepted, n=1, cutoff=0.5) or difflib.get_close_matches(
        found.lower(), [name.lower() for name in accepted], n=1, cutoff=0.5)
    close = [name for name in accepted if close and name.lower() == close[0].lower()]
    listed = ", ".join(accepted)
    return f"; did you mean {close[0]!r}? Accepted: {listed}" if close else f"; accepted: {listed}"
