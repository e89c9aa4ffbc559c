"""What a storage format is: a set of matrices with a layout, and the few verbs methods and layers need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Shape = tuple[int, int]  # (out_features, in_features)


class Params(dict):
    """What `fit` found and `project` uses: scales, codebooks, masks, by name.

    A method may add to it while it runs (codes it searched for, outliers it set aside); `pack` reads it.
    """


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor of a format."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """A set of matrices with a storage layout. Fields are its hyper-parameters; an instance holds no tensor.

    A weight is ``[out_features, in_features]``; methods work in float32 or float64 and see `fit`, `refit` and
    `project` only. `pack` writes the stored tensors, `unpack` reads them back and is the reference truth:
    ``unpack(pack(project(w)))`` equals ``project(w)``. `linear` multiplies with the stored tensors.
    """

    block: ClassVar[int] = 1  # columns that are decided together: 1 scalars, 4 for 2:4, d for vectors along inputs
    takes_first: ClassVar[bool] = False  # in a sum: taken out of the weight before the first term is fitted (outliers)

    @property
    def group_columns(self) -> int:
        """Columns that share parameters fitted together; 0 when `refit` has nothing to do."""
        return 0

    @property
    def needs(self) -> frozenset[str]:
        """What of a layer's input (of `methods.base.NEEDS`) `calibrate` looks at."""
        return frozenset()

    def calibrate(self, params: Params, stats) -> None:
        """Note in ``params`` what is stored of the input's `methods.base.Statistics`."""

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        """Fixed parameters for all of ``w``. ``search`` spends time on a smaller error (weighted by
        ``importance [in]`` where given); ``dtype`` is the model's, in which scales and the like are stored."""
        return Params()

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        """Fit again the groups that lie in columns ``[lo, lo + w.shape[1])``, from the current values ``w``."""

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        """Nearest representable values of columns ``[lo, lo + w.shape[1])``.

        ``importance [columns]`` weighs the columns where a format must choose among them (masks, outliers).
        A format may note what it chose in ``params``.
        """
        return w

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        """Stored tensors of representable values ``w_hat [out, in]``; names and shapes as in `spec`."""
        raise TypeError(f"{type(self).__name__} has no storage of its own")

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix ``[out, in]`` that the stored tensors stand for."""
        raise TypeError(f"{type(self).__name__} has no storage of its own")

    def quantize_input(self, x: Tensor) -> Tensor:
        """What `linear` sees of ``x [..., in]``: ``x`` itself, or the values its low-bit copy stands for."""
        return x

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: Shape) -> Tensor:
        """``x [..., in] @ W.T + bias``. This default is the reference; a format with a kernel makes one op call."""
        return F.linear(self.quantize_input(x), self.unpack(tensors, shape, x.dtype), bias)

    def linear_grouped(self, x: Tensor, ends: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None,
                       shape: Shape) -> Tensor:
        """`linear` for a mixture of experts: ``x [rows, in]`` sorted by expert, ``ends [experts]`` int32 the row after
        each expert's last one, tensors and ``bias [experts, out]`` with experts first. Rows from the last end on give
        0. This default makes one `linear` call for each expert; a format with a grouped kernel makes one op call."""
        y, begin = x.new_zeros((x.shape[0], shape[0])), 0
        for expert, end in enumerate(ends.tolist()):
            if end > begin:
                y[begin:end] = self.linear(x[begin:end], {name: tensor[expert] for name, tensor in tensors.items()},
                                           None if bias is None else bias[expert], shape)
            begin = end
        return y

    def bind(self, tensors: Mapping[str, Tensor], shape: Shape) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """`linear` on these very tensors as a callable ``(x, bias) -> y`` for eager inputs on their device; on
        the CPU they are checked once instead of in every call. None where there is no such short cut."""
        return None

    @property
    def bind_copies(self) -> bool:
        """Whether what `bind` gives holds copies of stored tensors: it is made anew when those change in place."""
        return False

    def bind_grouped(self, tensors: Mapping[str, Tensor], shape: Shape) -> Callable | None:
        """`linear_grouped` on these very tensors as a callable ``(x, ends, bias) -> y`` for eager inputs, which
        makes once what the format would make of them in every call. None where it would make nothing."""
        return None

    def producer(self, tensors: Mapping[str, Tensor]) -> dict | None:
        """What `ops_fused.Producer` must know of the stored tensors, where the bound `linear` can also run a step
        while it rounds its input; None where it cannot."""
        return None

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight of ``shape`` in a model of ``dtype``."""
        raise TypeError(f"{type(self).__name__} has no storage of its own")

    def kernel(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        """Name of the kernel that would run, or ``reference: why`` when there is none."""
        return "reference: no kernel for this format"

    def kernel_grouped(self, shape: Shape, device: torch.device | str = "cpu") -> str:
        """`kernel` for `linear_grouped`."""
        name = self.kernel(shape, device)
        if torch.device(device).type != "cuda" or reference_kernel(name):
            return name
        return f"{name}, one call for each expert, which waits for the GPU"

    def check(self, shape: Shape) -> None:
        """Raise ValueError when a weight of this shape cannot be stored."""

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        """Raise ValueError when stored tensors, of the right shapes and dtypes, hold values that `pack` never gives and
        that kernels rely on not to meet."""

    def bits(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> float:
        """Stored bits per weight, everything counted (scales, zero points, codebooks, padding)."""
        return 8 * sum(t.nbytes for t in self.spec(shape, dtype).values()) / math.prod(shape)

    def text(self) -> str:
        """The format as a spec string; ``parse(format.text())`` gives the format back."""
        raise TypeError(f"{type(self).__name__} has no name in the spec grammar")

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Around(Format):
    """A format that stores its weights as ``inner`` does, and differs in what becomes of the input."""

    inner: Format

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def group_columns(self) -> int:
        return self.inner.group_columns

    def fit(self, w: Tensor, *, search: bool = False, importance: Tensor | None = None,
            dtype: torch.dtype | None = None) -> Params:
        return self.inner.fit(w, search=search, importance=importance, dtype=dtype)

    def refit(self, params: Params, w: Tensor, lo: int, *, search: bool = False) -> None:
        self.inner.refit(params, w, lo, search=search)

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        return self.inner.project(w, params, lo, importance=importance)

    def pack(self, w_hat: Tensor, params: Params) -> Tensors:
        return self.inner.pack(w_hat, params)

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.unpack(tensors, shape, dtype)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, TensorSpec]:
        return self.inner.spec(shape, dtype)

    def check(self, shape: Shape) -> None:
        self.inner.check(shape)

    def verify(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        self.inner.verify(tensors, shape)


def prefixed(tensors: Mapping[str, Tensor] | Mapping[str, TensorSpec], prefix: str) -> dict:
    """The same tensors with ``prefix.`` before each name, for formats made of formats."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix.``, without it."""
    start = prefix + "."
    return {name[len(start):]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def reference_kernel(text: str) -> bool:
    """Whether a kernel's name says that there is none."""
    return text.startswith("reference")
