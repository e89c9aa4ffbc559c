"""Small exact steps that a layer runs before or after its multiplication: what a transform could not fold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..formats.base import TensorSpec
from . import definitions

STEPS: dict[str, type["Step"]] = {}
KEY_TRANSFORM = "key_transform"  # buffer of an attention module: FlatQuant's map of keys, [head_dim, head_dim]


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
    def spec_of(cls, width: int, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """`spec`, where shapes do not follow from the width: those of the tensors ``found``, if they are possible."""
        return cls.spec(width)

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

    def absorb(self, weight: Tensor) -> Tensor:
        """The weight ``[out, in]`` that gives behind the step what ``weight`` gives without it; in its dtype."""
        raise TypeError(f"{type(self).__name__} has no inverse")

    def inverse(self, x: Tensor) -> Tensor:
        """Undo the step."""
        raise TypeError(f"{type(self).__name__} has no inverse")

    def producer(self) -> dict:
        """The step as fields of `ops_fused.Producer`, for kernels that run it while they round; {} where none does."""
        return {}


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

    def absorb(self, weight: Tensor) -> Tensor:
        return self(weight)

    def inverse(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index.argsort())

    def producer(self) -> dict:
        return {"index": self.index.to(torch.int32)}


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

    def absorb(self, weight: Tensor) -> Tensor:
        return (weight / self.scale).to(weight.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return (x / self.scale).to(x.dtype)


class Hadamard(Step, kind="hadamard"):
    """``y = H diag(signs) x / sqrt(width)``: spreads outliers of the channels over all of them (QuaRot).

    ``signs [width]``: -1 and 1; ValueError for widths without a Hadamard matrix (`definitions.hadamard_base`).
    """

    def __init__(self, signs: Tensor):
        super().__init__()
        self.register_buffer("signs", signs.to(torch.int8).contiguous())
        self.validate()

    @classmethod
    def random(cls, width: int, seed: int = 0) -> "Hadamard":
        """With random signs."""
        generator = torch.Generator().manual_seed(seed)
        return cls(2 * torch.randint(0, 2, (width,), generator=generator) - 1)

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        return {"signs": TensorSpec((width,), torch.int8)}

    def validate(self) -> None:
        if self.signs.dim() != 1 or not bool((self.signs.abs() == 1).all()):
            raise ValueError("hadamard step: found signs that are not one row of -1 and 1")
        definitions.hadamard_base(self.signs.numel())

    def forward(self, x: Tensor) -> Tensor:
        return definitions.hadamard(_wide(x), signs=self.signs).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        return self.inverse(weight)

    def absorb(self, weight: Tensor) -> Tensor:
        return self(weight)

    def inverse(self, x: Tensor) -> Tensor:
        return definitions.hadamard(_wide(x), signs=self.signs, inverse=True).to(x.dtype)

    def producer(self) -> dict:
        return {"hadamard": 0, "signs": self.signs.float()}


class Kronecker(Step, kind="kronecker"):
    """``y = left^T X right`` with the channels as a matrix ``X [n1, n2]``: an invertible map of ``n1 n2`` channels by
    ``n1^2 + n2^2`` numbers (FlatQuant). Factors float32 ``[n1, n1]``, ``[n2, n2]``, sized as in `factors`."""

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__()
        self.register_buffer("left", left.to(torch.float32).contiguous())
        self.register_buffer("right", right.to(torch.float32).contiguous())
        self.validate()

    @staticmethod
    def factors(width: int) -> tuple[int, int]:
        """The most balanced ``(n1, n2)`` with ``n1 n2 = width`` and ``n1 <= n2``."""
        first = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
        return first, width // first

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        return {name: TensorSpec((n, n), torch.float32) for name, n in zip(("left", "right"), cls.factors(width))}

    def validate(self) -> None:
        width = self.left.shape[0] * self.right.shape[0]
        if (self.left.shape[0], self.right.shape[0]) != self.factors(width):
            raise ValueError(f"kronecker step: found factors {list(self.left.shape)} and {list(self.right.shape)}, "
                             f"accepted are square ones of {self.factors(width)} for {width} channels")
        for name in ("left", "right"):
            _check_inverse(f"kronecker step: {name}", getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        return definitions.kronecker(_wide(x), self.left, self.right).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        return definitions.kronecker(_wide(weight), self.left.T, self.right.T).to(weight.dtype)

    def absorb(self, weight: Tensor) -> Tensor:
        left, right = (torch.linalg.inv(factor.double()).T for factor in (self.left, self.right))
        return definitions.kronecker(_wide(weight), left, right).to(weight.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        left, right = (torch.linalg.inv(factor.double()) for factor in (self.left, self.right))
        return definitions.kronecker(_wide(x), left, right).to(x.dtype)

    def producer(self) -> dict:
        return {"left": self.left, "right": self.right}


class HeadMix(Step, kind="head_mix"):
    """``y = left^T X`` with the channels as ``X [heads, width / heads]``: an invertible map among attention's heads,
    the same for all channels of a head (FlatQuant's P_o). ``left [heads, heads]`` float32."""

    def __init__(self, left: Tensor):
        super().__init__()
        self.register_buffer("left", left.to(torch.float32).contiguous())
        self.validate()

    @classmethod
    def spec(cls, width: int) -> dict[str, TensorSpec]:
        return {"left": TensorSpec((1, 1), torch.float32)}

    @classmethod
    def spec_of(cls, width: int, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        shape = tuple(found["left"].shape) if "left" in found else ()
        if len(shape) == 2 and shape[0] == shape[1] > 0 and width % shape[0] == 0:
            return {"left": TensorSpec(shape, torch.float32)}
        return cls.spec(width)

    def validate(self) -> None:
        if self.left.dim() != 2 or self.left.shape[0] != self.left.shape[1]:
            raise ValueError(f"head_mix step: found a matrix {list(self.left.shape)}, accepted is a square one")
        _check_inverse("head_mix step", self.left)

    def forward(self, x: Tensor) -> Tensor:
        return definitions.kronecker(_wide(x), self.left, None).to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        return definitions.kronecker(_wide(weight), self.left.T, None).to(weight.dtype)

    def absorb(self, weight: Tensor) -> Tensor:
        return definitions.kronecker(_wide(weight), torch.linalg.inv(self.left.double()).T, None).to(weight.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return definitions.kronecker(_wide(x), torch.linalg.inv(self.left.double()), None).to(x.dtype)

    def producer(self) -> dict:
        return {"left": self.left}


def _check_inverse(what: str, matrix: Tensor) -> None:
    if not matrix.is_meta and (not bool(matrix.isfinite().all())
                               or int(torch.linalg.matrix_rank(matrix.double())) < len(matrix)):
        raise ValueError(f"{what}: found a matrix without an inverse, accepted is a finite one of full rank")


def _wide(x: Tensor) -> Tensor:
    """At least float32: what is spread and summed is rounded once, at the end."""
    return x if x.dtype is torch.float64 else x.float()
