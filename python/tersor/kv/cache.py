"""`Cache`: keys and values of past tokens, in a precision that a spec names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from ..spec import CacheSpec, parse_cache

SPECS = ("K16V16",)


@dataclass(frozen=True)
class CacheRow:
    """One layer: how many tokens of how many sequences it holds, in how many bytes.

    ``bytes_per_token`` is per sequence; layers with a sliding window hold at most a window of tokens.
    """

    layer: int
    kind: str
    sequences: int
    tokens: int
    nbytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / (self.sequences * self.tokens) if self.sequences * self.tokens else 0.0


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, layer by layer; prints as a table."""

    spec: str
    rows: tuple[CacheRow, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of one sequence costs, all layers together."""
        return sum(row.bytes_per_token for row in self.rows)

    def __str__(self) -> str:
        lines = [f"cache {self.spec}: {self.nbytes} bytes, {self.bytes_per_token:g} a token"]
        lines += [f"  layer {row.layer:3d}  {row.kind}  {row.sequences} x {row.tokens} tokens  {row.nbytes} bytes  "
                  f"{row.bytes_per_token:g} a token" for row in self.rows]
        return "\n".join(lines)


class Cache(DynamicCache):
    """A cache for ``model.generate(..., past_key_values=tersor.Cache(model, "K16V16"))``.

    ``spec`` gives the bits of keys and of values (``K16V16``: both as the model computes them, exact) and options in
    brackets, which ``**options`` may give as well. ValueError for a spec that no kernel of this version serves, for
    unknown options, and for a model without a configuration.
    """

    def __init__(self, model, spec: str, **options):
        parsed = parse_cache(spec)
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise ValueError(f"model: found {type(model).__name__}, accepted is a transformers model")
        name = f"K{parsed.key_bits}V{parsed.value_bits}"
        if name not in SPECS:
            raise ValueError(f"cache spec {spec!r}: this version has no kernel for it; accepted is {', '.join(SPECS)}")
        unknown = dict(parsed.options) | options
        if unknown:
            raise ValueError(f"cache spec {spec!r}: found option {next(iter(unknown))!r}, accepted is {name} without "
                             "options")
        super().__init__(config=config)
        self.spec = CacheSpec(parsed.key_bits, parsed.value_bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that the cache keeps alive now."""
        return self.report().nbytes

    def report(self) -> CacheReport:
        """Tokens and bytes of each layer; memory that layers share is counted with the first."""
        seen: set[int] = set()
        rows = []
        for index, layer in enumerate(self.layers):
            nbytes = 0
            for tensor in _tensors(vars(layer)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    nbytes += storage.nbytes()
            keys = getattr(layer, "keys", None)
            held = keys.shape if isinstance(keys, Tensor) and keys.dim() == 4 else (0, 0, 0, 0)
            rows.append(CacheRow(index, type(layer).__name__, held[0], held[2], nbytes))
        return CacheReport(str(self.spec), tuple(rows))


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
