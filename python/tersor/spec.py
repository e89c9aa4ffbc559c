"""The spec grammar: ``method+method:format/inner+added[option=value]`` and cache specs, one parser.

    spec    = [methods ":"] format            the first colon ends the methods
    methods = name [options] {"+" name [options]}
    format  = term {"+" term}                 sums:    rtn:W3A16+lr32
    term    = atom {"/" atom}                 nesting: sparsegpt:2:4/W4A16
    atom    = name [options]                  W4A16, 2:4, 2x8, lr32, FP8_DYNAMIC
    options = "[" key "=" value {"," key "=" value} "]"
    cache   = [methods ":"] "K" bits "V" bits [options]     K4V4, kvquant:K2V2[levels=nuq,outliers=0.01]

This module knows the syntax alone; names get their meaning in `tersor.registry`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Value = bool | int | float | str

_METHOD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ATOM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9_.+-]+")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_CACHE = re.compile(r"K(\d+)V(\d+)")


class SpecError(ValueError):
    """A spec that cannot be read or names something unknown."""


@dataclass(frozen=True)
class Atom:
    """A name with options, in the order written."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}[{','.join(f'{key}={_show(value)}' for key, value in self.options)}]"


@dataclass(frozen=True)
class Spec:
    """A parsed spec: methods in order, then terms that are added, each a chain of nested atoms (outermost first)."""

    methods: tuple[Atom, ...]
    terms: tuple[tuple[Atom, ...], ...]

    def __str__(self) -> str:
        text = "+".join("/".join(map(str, term)) for term in self.terms)
        return f"{'+'.join(map(str, self.methods))}:{text}" if self.methods else text


@dataclass(frozen=True)
class CacheSpec:
    """Bits of keys and values of a compressed cache, options, and the methods around it, outermost first."""

    key_bits: int
    value_bits: int
    options: tuple[tuple[str, Value], ...] = ()
    methods: tuple[Atom, ...] = ()

    def __str__(self) -> str:
        text = str(Atom(f"K{self.key_bits}V{self.value_bits}", self.options))
        return f"{'+'.join(map(str, self.methods))}:{text}" if self.methods else text


def parse(text: str) -> Spec:
    """Read a weight spec. Raises SpecError that points at the offending character."""
    reader = _Reader(text)
    methods: tuple[Atom, ...] = ()
    end = _methods_end(text)  # after the reader has seen that it is a string
    if end is not None:
        methods = tuple(reader.sequence("+", lambda: reader.atom(_METHOD, "a method name"), stop=end))
        reader.expect(":")
    terms = tuple(
        tuple(term)
        for term in reader.sequence("+", lambda: reader.sequence("/", lambda: reader.atom(_ATOM, "a format name")))
    )
    reader.end()
    return Spec(methods, terms)


def parse_cache(text: str) -> CacheSpec:
    """Read a cache spec such as ``K4V4``, ``K2V2[levels=nuq,outliers=0.01]`` or ``razor[sinks=4]:K8V8``."""
    reader = _Reader(text)
    methods: tuple[Atom, ...] = ()
    end = _methods_end(text)
    if end is not None:
        methods = tuple(reader.sequence("+", lambda: reader.atom(_METHOD, "a method name"), stop=end))
        reader.expect(":")
    atom = reader.atom(_ATOM, "a cache spec such as K4V4")
    reader.end()
    match = _CACHE.fullmatch(atom.name)
    if not match:
        raise SpecError(f"cache spec {text!r}: found {atom.name!r}, accepted are names like K16V16, K4V4 or K2V4")
    return CacheSpec(int(match[1]), int(match[2]), atom.options, methods)


def _methods_end(text: str) -> int | None:
    """Where the methods end: the first colon outside brackets, unless it stands within a name such as 2:4."""
    depth = start = 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth > 0 or char == ":":
            if char == ":" and depth <= 0 and not text[start:i].strip().isdigit():
                return i
        elif char in "+/]":
            start = i + 1
    return None


def _show(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(word: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _NUMBER.fullmatch(word) else word


class _Reader:
    def __init__(self, text: str):
        if not isinstance(text, str):
            raise SpecError(f"a spec is a string such as 'gptq:W4A16', found {type(text).__name__}")
        self.text, self.at = text, 0
        self._space()

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def fail(self, wanted: str) -> None:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        raise SpecError(f"spec {self.text!r}: expected {wanted} at character {self.at + 1}, found {found}")

    def take(self, pattern: re.Pattern, wanted: str) -> str:
        match = pattern.match(self.text, self.at)
        if not match:
            self.fail(wanted)
        self.at = match.end()
        self._space()
        return match[0]

    def peek(self, char: str) -> bool:
        return self.text.startswith(char, self.at)

    def expect(self, char: str) -> None:
        if not self.peek(char):
            self.fail(repr(char))
        self.at += 1
        self._space()

    def end(self) -> None:
        if self.at != len(self.text):
            self.fail("the end, '+', '/' or '['")

    def sequence(self, separator: str, item, stop: int | None = None) -> list:
        items = [item()]
        while self.peek(separator) and (stop is None or self.at < stop):
            self.expect(separator)
            items.append(item())
        return items

    def atom(self, pattern: re.Pattern, wanted: str) -> Atom:
        name = self.take(pattern, wanted)
        options: list[tuple[str, Value]] = []
        if self.peek("["):
            self.expect("[")
            options = self.sequence(",", self.option)
            self.expect("]")
            keys = [key for key, _ in options]
            for key in keys:
                if keys.count(key) > 1:
                    raise SpecError(f"spec {self.text!r}: option {key!r} of {name!r} is given twice")
        return Atom(name, tuple(options))

    def option(self) -> tuple[str, Value]:
        key = self.take(_KEY, "an option name")
        self.expect("=")
        return key, _value(self.take(_WORD, f"a value for {key!r}"))
