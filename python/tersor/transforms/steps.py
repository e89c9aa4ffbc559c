"""Small exact steps that a layer runs before or after its multiplication: what a transform could not fold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats.base import TensorSpec

STEPS: dict[str, type["Step"]] = {}


class Step(nn.Module):
    """An invertible linear map of the channels. ``kind`` names it in checkpoints; `spec` lists its tensors.

    As a ``pre`` step the layer computes ``x -> W(step(x))``; `fold` gives the weight that stands for the same product
    without the step.
    """

    kind: str

    def __init_subclass__(cls, kind: str, **rest):
        super().__init_subclass__(**rest)
        cls.kind = kind
        STEPS[kind] = cls

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the step's tensors for ``width`` channels."""
        raise TypeError(f"{cls.__name__} does not list its tensors")

    @classmethod
    def empty(cls, width: int, device=None) -> "Step":
        """A step whose tensors wait to be filled from a checkpoint."""
        step = cls.__new__(cls)
        nn.Module.__init__(step)
        for name, tensor in cls.spec(width).items():
            step.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        return step

    def validate(self) -> None:
        """Raise ValueError when the tensors (from a checkpoint, say) do not make a valid step."""

    def fold(self, weight: Tensor) -> Tensor:
        """``weight @ matrix(step)``: the weight that acts on inputs before the step."""
        raise TypeError(f"{type(self).__name__} cannot be folded")

    def inverse(self, x: Tensor) -> Tensor:
        """Undo the step."""
        raise TypeError(f"{type(self).__name__} has no inverse")


class Permute(Step, kind="permute"):
    """``y[..., j] = x[..., index[j]]``: puts channels into the order in which the columns are stored."""

    def __init__(self, index: Tensor):
        super().__init__()
        self.register_buffer("index", index.to(torch.int64).contiguous())
        self.validate()

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        return {"index": TensorSpec((width,), torch.int64)}

    def validate(self) -> None:
        width = self.index.numel()
        if self.index.dim() != 1 or not torch.equal(self.index.sort().values.cpu(), torch.arange(width)):
            raise ValueError(f"permute step: found an index that is not a permutation of {width} channels")

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index)

    def fold(self, weight: Tensor) -> Tensor:
        return torch.empty_like(weight).index_copy_(1, self.index, weight)

    def inverse(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index.argsort())


class ChannelScale(Step, kind="scale"):
    """``y = x * scale`` per channel, for smoothing that no earlier operation could take over."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.to(torch.float32).contiguous())
        self.validate()

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec((width,), torch.float32)}

    def validate(self) -> None:
        if self.scale.dim() != 1 or not bool((self.scale.isfinite() & (self.scale != 0)).all()):
            raise ValueError("scale step: found zero or non-finite factors, accepted are finite non-zero ones")

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        return (weight * self.scale).to(weight.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return (x / self.scale).to(x.dtype)
