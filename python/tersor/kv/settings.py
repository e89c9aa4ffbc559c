"""What a cache spec says: bits, options with their defaults, and methods."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import CacheSpec, SpecError, parse_cache
from .layout import BITS

OPTIONS = {
    "group": "32, 64 or 128", "recent": "0 or more", "sinks": "0 or more", "levels": "int, nuq or e4m3",
    "outliers": "0 to 0.1", "rope": "post or pre", "keys": "channel or token", "values": "token or separable",
    "hadamard": "true or false",
}


@dataclass(frozen=True)
class Settings:
    """A spec's options with their defaults filled in.

    ``group``: tokens of a page, and channels that share a value's scale; ``recent``, ``sinks``: tokens that stay 16-bit
    at either end; ``levels``: int (even steps), nuq (levels of a normal distribution, or calibrated ones), e4m3;
    ``outliers``: the share of numbers that are stored apart, in 16 bits; ``rope``: whether packed keys are kept as they
    come, or turned back within their page; ``keys``, ``values``: what shares a scale; ``hadamard``: turn heads by a
    Hadamard matrix first.
    """

    key_bits: int
    value_bits: int
    group: int = 64
    recent: int = 0
    sinks: int = 0
    levels: str = "int"
    outliers: float = 0.0
    rope: str = "post"
    keys: str = "channel"
    values: str = "token"
    hadamard: bool = False
    key_levels: tuple[int, ...] | None = None  # calibrated ones, where levels is nuq
    value_levels: tuple[int, ...] | None = None

    @property
    def packs(self) -> bool:
        return min(self.key_bits, self.value_bits) < 16

    @property
    def name(self) -> str:
        return f"K{self.key_bits}V{self.value_bits}"

    @classmethod
    def of(cls, spec: str | CacheSpec, options: dict | None = None) -> "Settings":
        """Read a spec. ValueError that names the spec, what was found and what is accepted."""
        parsed = parse_cache(spec) if isinstance(spec, str) else spec
        low = min(parsed.key_bits, parsed.value_bits)
        name = f"K{parsed.key_bits}V{parsed.value_bits}"
        for which, bits in (("keys", parsed.key_bits), ("values", parsed.value_bits)):
            if bits not in BITS:
                raise ValueError(f"cache spec {str(spec)!r}: found {bits} bits for {which}, accepted are "
                                 f"{', '.join(map(str, BITS))}")
        given = dict(parsed.options) | (options or {})
        accepted = OPTIONS if low < 16 else {}
        for key, value in given.items():
            if key not in accepted:
                raise ValueError(f"cache spec {str(spec)!r}: found option {key!r}, accepted is {name} "
                                 f"{'with ' + ', '.join(accepted) if accepted else 'without options'}")
            if not _valid(key, value):
                raise ValueError(f"cache spec {str(spec)!r}: {key}: found {value!r}, accepted is {OPTIONS[key]}")
        few = low < 8  # where the first tokens and the last ones matter
        defaults = {"group": 64 if low > 3 else 32, "recent": 32 if few else 0, "sinks": 4 if few else 0,
                    "rope": "pre" if given.get("levels") == "nuq" and parsed.key_bits < 16 else "post"}
        settings = cls(parsed.key_bits, parsed.value_bits, **(defaults | given))
        settings.check(str(spec))
        return settings

    def check(self, spec: str) -> None:
        """ValueError for options that exclude each other."""
        bits = {b for b in (self.key_bits, self.value_bits) if b < 16}
        if self.levels == "e4m3" and bits != {8}:
            raise ValueError(f"cache spec {spec!r}: levels: found e4m3 with {self.name}, accepted is K8V8")
        if self.levels == "nuq" and 8 in bits:
            raise ValueError(f"cache spec {spec!r}: levels: found nuq with {self.name}, accepted are 2, 3 and 4 bits")
        for part, how in (("keys", self.keys), ("values", self.values)):
            if self.levels == "e4m3" and how in ("separable",):
                raise ValueError(f"cache spec {spec!r}: {part}: found {how} with e4m3, accepted is {OPTIONS[part]}")


def _valid(key: str, value) -> bool:
    if key in ("group", "recent", "sinks"):
        return type(value) is int and value >= 0 and (key != "group" or value in (32, 64, 128))
    if key == "outliers":
        return type(value) in (int, float) and 0 <= value <= 0.1
    if key == "hadamard":
        return type(value) is bool
    return value in OPTIONS[key].replace(",", "").split() and value != "or"


__all__ = ["OPTIONS", "Settings", "SpecError"]
