"""A recipe says which spec goes to which layer; `make_plan` reads it against a model."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from torch import nn

from .experts import is_experts
from .layer import Embedding, Linear
from .patch import FUSED, is_conv1d
from .registry import Resolved, resolve

Recipe = str | Mapping[str, str | None] | os.PathLike
KEEP = ("keep", "UNQUANTIZED")
_LARGE = 1 << 20  # parameters of this many elements do not go unmentioned


@dataclass(frozen=True)
class Target:
    """A module that can be compressed."""

    name: str
    kind: str  # linear, head, embedding, experts
    type: str
    numel: int


@dataclass
class Plan:
    """What happens to each layer, in the model's order."""

    entries: dict[str, Resolved] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that some method or format of the plan asks for."""
        return frozenset().union(*(entry.needs for entry in self.entries.values()))


def read_recipe(recipe: Recipe) -> str | dict[str, str | None]:
    """A spec string, or a mapping from a mapping or a YAML file (whose top level, or key ``recipe``, is either)."""
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if isinstance(recipe, str) and not recipe.endswith((".yaml", ".yml")):
        return recipe
    if not isinstance(recipe, (str, os.PathLike)):
        raise ValueError(f"recipe: found {type(recipe).__name__}, accepted are a spec, a mapping of name patterns to "
                         "specs, or the path of a YAML file")
    path = Path(recipe)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not a YAML file ({error})") from None
    if isinstance(data, Mapping) and set(data) == {"recipe"}:
        data = data["recipe"]
    if not isinstance(data, (str, Mapping)):
        raise ValueError(f"recipe {path}: found {type(data).__name__}, accepted are a spec or a mapping of name "
                         "patterns to specs")
    return data if isinstance(data, str) else dict(data)


def targets(model: nn.Module) -> dict[str, Target]:
    """Every module that a recipe can name, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found: dict[str, Target] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            continue
        kind = None
        if isinstance(module, nn.Linear) or is_conv1d(module):
            kind = "head" if module is head else "linear"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif is_experts(module):
            kind = "experts"
        if kind:
            numel = sum(parameter.numel() for parameter in module.parameters())
            found[name] = Target(name, kind, type(module).__name__, numel)
    return found


def make_plan(model: nn.Module, recipe: Recipe, tie: bool = True) -> Plan:
    """Read a recipe against a model.

    A bare spec means every Linear, Conv1D and expert module; embeddings and the output head are kept unless a
    pattern of a mapping names them. Patterns are exact names, trailing names (``q_proj``), globs, ``re:`` regular
    expressions that match the whole name, or class names; the first match wins; a value of None or ``keep`` leaves
    the layer alone. With ``tie``, projections that servers fuse must get one format.

    ValueError: the recipe names no layer, a pattern matches nothing, a large layer is not covered by a mapping,
    or fused projections differ.
    """
    recipe = read_recipe(recipe)
    available = targets(model)
    plan = Plan(targets=available)
    if isinstance(recipe, str):
        resolved = resolve(recipe)
        for name, target in available.items():
            if target.kind in ("linear", "experts"):
                plan.entries[name] = resolved
            else:
                plan.kept[name] = f"{target.kind}, kept unless named"
    else:
        _apply_mapping(recipe, available, plan)
    if not plan.entries:
        raise ValueError(f"recipe {recipe!r} names no layer that can be compressed; this model has "
                         f"{_some(available) or 'no Linear, Conv1D, expert or embedding module'}")
    if tie:
        _check_tied(plan)
    _account(model, plan)
    return plan


def _apply_mapping(recipe: Mapping[str, str | None], available: dict[str, Target], plan: Plan) -> None:
    meanings: dict[str, Resolved | None] = {}
    for pattern, spec in recipe.items():
        if not isinstance(pattern, str) or not (spec is None or isinstance(spec, str)):
            raise ValueError(f"recipe entry {pattern!r}: {spec!r}: accepted are name patterns with a spec, or with "
                             "'keep' to leave a layer alone")
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"recipe pattern {pattern!r}: not a regular expression ({error})") from None
        meanings[pattern] = None if spec is None or spec in KEEP else resolve(spec)
    used: set[str] = set()
    uncovered = []
    for name, target in available.items():
        hits = [pattern for pattern in recipe if _matches(pattern, target)]
        used.update(hits)
        if hits:
            meaning = meanings[hits[0]]
            if meaning is None:
                plan.kept[name] = f"kept by the recipe ({hits[0]!r})"
            else:
                plan.entries[name] = meaning
        elif target.kind in ("head", "embedding"):
            plan.kept[name] = f"{target.kind}, kept unless named"
        else:
            uncovered.append(name)
    for pattern in recipe:
        if pattern not in used:
            close = difflib.get_close_matches(pattern, available, n=1, cutoff=0.3)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise ValueError(f"recipe pattern {pattern!r} matches no layer{hint}; this model has {_some(available)}")
    if uncovered:
        raise ValueError(f"recipe: no pattern covers {_some(uncovered)}; name them with a spec, or with 'keep' to "
                         "leave them alone")


def _matches(pattern: str, target: Target) -> bool:
    name = target.name
    if pattern in (name, target.type) or name.endswith("." + pattern):
        return True
    if pattern.startswith("re:"):
        hit = re.fullmatch(pattern[3:], name) is not None
        literal = re.sub(r"\\.|[^A-Za-z0-9_]", "", pattern[3:])
    else:
        hit = any(char in pattern for char in "*?[") and fnmatch.fnmatchcase(name, pattern)
        literal = re.sub(r"[^A-Za-z0-9_]", "", pattern)
    # A catch-all does not name the embeddings and the head.
    return hit and (target.kind not in ("head", "embedding") or bool(literal))


def _check_tied(plan: Plan) -> None:
    for name in plan.targets:
        parent, _, leaf = name.rpartition(".")
        for names in FUSED:
            if leaf != names[0]:
                continue
            members = [f"{parent}.{other}" if parent else other for other in names]
            formats = {m: plan.entries[m].format if m in plan.entries else None for m in members if m in plan.targets}
            if len(set(formats.values())) > 1:
                shown = ", ".join(f"{m}: {fmt or 'kept'}" for m, fmt in formats.items())
                raise ValueError(f"recipe: {shown}; servers fuse these into one matrix, so they must share a format "
                                 "(tie=False allows it)")


def _account(model: nn.Module, plan: Plan) -> None:
    """Bytes that stay, and large parameters that no target holds."""
    going = {id(p) for name in plan.entries for p in model.get_submodule(name).parameters(recurse=False)}
    shared = {id(p) for name in plan.kept for p in model.get_submodule(name).parameters(recurse=False)}
    holders = {id(p) for name in plan.targets for p in model.get_submodule(name).parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in going or id(parameter) in shared:
            plan.kept_bytes += parameter.nbytes
        if id(parameter) not in holders and parameter.dim() > 1 and parameter.numel() >= _LARGE:
            plan.kept[name] = f"{list(parameter.shape)} parameter of no known kind of layer"


def _some(names, limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
