"""QuaRot: rotations that leave no outliers, in the weights where they fold and online where they do not."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.base import Method
from ..registry import register_method
from .group import Group
from .rotation import rotate_residual
from .steps import Hadamard


@register_method("quarot")
@dataclass(frozen=True)
class QuaRot(Method):
    """Hadamard rotations of all that is quantized (Ashkboos et al. 2024, arXiv 2404.00456).

    The gains of the norms are folded and the residual stream is turned by a Hadamard matrix with random signs: what
    attention and feed-forward layers read has no outlier channels any more, at no cost at run time. Layers that read
    something else (the attention output, the down projection) turn it online, as one step before their activations are
    quantized; the value heads' rotation is part of it. Keys and queries are turned by the cache:
    ``tersor.Cache(model, "K4V4[hadamard=true]")``.

    Activations are quantized as the format says; the paper's are ``W4A4[act_group=0,act_clip=0.9]``. ``seed``: of the
    signs. ValueError for models whose residual stream cannot be turned, and widths without a Hadamard matrix.
    """

    seed: int = 0

    needs = frozenset({"inputs"})
    transforms = True
    chooses = False

    def prepare(self, model, entries, ids) -> None:
        width = model.get_input_embeddings().weight.shape[1] if hasattr(model, "get_input_embeddings") else 0
        rotate_residual(model, ids, Hadamard.random(width, self.seed) if width else None)

    def transform(self, group: Group) -> str:
        if group.producer is not None and group.producer.kind == "norm":
            return ""
        group.insert(Hadamard.random(group.in_features, self.seed))
        return "quarot: turned online"
