"""Names to meanings: formats and methods register here; specs are resolved here."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
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
        _resolve.cache_clear()
        return make

    return register


def register_method(name: str):
    """Decorator for a method dataclass; its fields are the options that a spec may give in brackets."""

    def register(method):
        if METHODS.get(name, method) is not method:
            raise ValueError(f"method {name!r} is already registered by {METHODS[name].__module__}")
        METHODS[name] = method
        method.name = name
        _resolve.cache_clear()
        return method

    return register


@dataclass(frozen=True)
class Resolved:
    """A spec with meanings: method instances in order, and the format."""

    methods: tuple[object, ...]
    format: "Format"
    text: str

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the layer's input that methods and format ask for."""
        return self.format.needs.union(*(method.needs for method in self.methods))

    @property
    def method_text(self) -> str:
        return "+".join(method.name for method in self.methods)


def resolve(spec: str | Spec, default_method: str = "rtn") -> Resolved:
    """Methods and format of a spec. Unknown names and options raise SpecError with the nearest valid name."""
    return _resolve(spec if isinstance(spec, Spec) else parse(spec), default_method)


@functools.lru_cache(maxsize=None)
def _resolve(parsed: Spec, default_method: str) -> Resolved:
    from . import formats, methods  # noqa: F401  (fill the registry)

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
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    _check_options(spec, f"method {atom.name!r}", atom, defaults, _hints(kind))
    try:
        return kind(**dict(atom.options))
    except (TypeError, ValueError) as error:
        raise SpecError(f"spec {str(spec)!r}: method {atom.name!r}: {error}") from None


def _make_term(term: tuple[Atom, ...], spec: Spec) -> "Format":
    inner = None
    for atom in reversed(term):
        inner = _make_format(atom, inner, spec)
    return inner


def _make_format(atom: Atom, inner: "Format | None", spec: Spec) -> "Format":
    for entry in FORMATS:
        match = entry.pattern.fullmatch(atom.name)
        if match:
            parameters = inspect.signature(entry.make).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            _check_options(spec, f"format {atom.name!r}", atom, defaults, _hints(entry.make))
            try:
                return entry.make(match, inner, **dict(atom.options))
            except ValueError as error:
                raise SpecError(f"spec {str(spec)!r}: format {atom.name!r}: {error}") from None
    raise SpecError(f"spec {str(spec)!r}: unknown format {atom.name!r}"
                    f"{_nearest(atom.name, [entry.example for entry in FORMATS] + preset_names())}")


def _check_options(spec: Spec, what: str, atom: Atom, defaults: dict, hints: dict) -> None:
    """Names and types of an atom's options, against the defaults and annotations of what takes them."""
    for key, value in atom.options:
        if key not in defaults:
            raise SpecError(f"spec {str(spec)!r}: {what} has no option {key!r}{_nearest(key, defaults)}")
        hint = hints.get(key)
        kinds = set(typing.get_args(hint) or (hint,)) & {bool, int, float, str}
        if not kinds:
            continue
        if float in kinds:
            kinds.add(int)
        if type(value) not in kinds:
            accepted = " or ".join(sorted(_KINDS[kind] for kind in kinds - ({int} if float in kinds else set())))
            shown = "" if defaults[key] is None else f" (default {defaults[key]!r})"
            raise SpecError(f"spec {str(spec)!r}: option {key!r} of {what}: found {value!r}, accepted is {accepted}"
                            f"{shown}")


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}


def _hints(target) -> dict:
    """Annotations as types; none where they name something that cannot be imported."""
    try:
        return typing.get_type_hints(target)
    except NameError:
        return {}


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
