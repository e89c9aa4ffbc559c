"""Collecting statistics of a layer's inputs in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import add_gram
from .base import NEEDS, Statistics

BLOCK = 256  # of the copy below the diagonal, and of the triangle where torch multiplies
BUFFER_BYTES = 32 << 20  # inputs gathered before they are multiplied
SAMPLE = 512  # tokens kept as `Statistics.inputs`


class Collector:
    """Sees the inputs of one group of layers, batch by batch; `finish` gives the `Statistics`.

    Only what ``needs`` names is kept. Memory: the Hessian ``[in, in]`` in float32, a buffer of 32 MiB and ``sample``
    tokens, however much is shown.
    """

    def __init__(self, in_features: int, needs=NEEDS, sample: int = SAMPLE, device=None):
        self.in_features, self.needs, self.sample = in_features, needs, sample
        self.tokens = 0
        self._hessian = None
        if "hessian" in needs:
            self._hessian = torch.zeros(in_features, in_features, device=device)
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device) if "abs_mean" in needs else None
        self._max = torch.zeros(in_features, device=device) if "abs_max" in needs else None
        self._waiting: list[Tensor] = []
        self._waiting_bytes = 0
        self._kept: list[Tensor] = []
        self._kept_rows, self._stride, self._next = 0, 1, 0

    def add(self, x: Tensor) -> None:
        """Inputs ``[..., in]``. ValueError for a wrong width and for NaN or Inf."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs: found {list(x.shape)}, accepted is [..., {self.in_features}]")
        rows = x.detach().reshape(-1, self.in_features)
        if not rows.shape[0]:
            return
        # One sum is much cheaper than a look at each value; only where it overflows does that tell.
        if not bool(torch.isfinite(rows.sum(dtype=torch.float32))) and not bool(torch.isfinite(rows).all()):
            raise ValueError("inputs: found NaN or Inf, accepted are finite values")
        if self._sum is not None or self._max is not None:
            magnitude = rows.abs()
            if self._sum is not None:
                self._sum += magnitude.sum(0, dtype=torch.float64)
            if self._max is not None:
                self._max = torch.maximum(self._max, magnitude.amax(0).float())
        if "inputs" in self.needs:
            self._keep(rows)
        if self._hessian is not None:
            self._waiting.append(rows)
            self._waiting_bytes += rows.nbytes
            if self._waiting_bytes >= BUFFER_BYTES:
                self._flush()
        self.tokens += rows.shape[0]

    def _keep(self, rows: Tensor) -> None:
        # Every stride-th token of all; the stride doubles when the sample is full, so it stays spread evenly.
        first = self._next - self.tokens
        picked = rows[first :: self._stride]
        self._next += self._stride * picked.shape[0]
        if picked.shape[0]:
            self._kept.append(picked.clone())
            self._kept_rows += picked.shape[0]
        while self._kept_rows > self.sample:
            halved = torch.cat(self._kept)
            self._next += self._stride * (halved.shape[0] % 2)
            halved = halved[::2].clone()
            self._kept, self._kept_rows, self._stride = [halved], halved.shape[0], 2 * self._stride

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        accumulate_gram(self._hessian, rows)

    def finish(self) -> Statistics:
        """The statistics. ValueError when no token was seen."""
        if not self.tokens:
            raise ValueError("inputs: found no token, accepted is at least one")
        self._flush()
        hessian = None
        if self._hessian is not None:
            hessian, self._hessian = self._hessian, None
            mirror(hessian).mul_(2 / self.tokens)
        return Statistics(
            self.tokens, hessian,
            None if self._sum is None else (self._sum / self.tokens).float(),
            self._max,
            torch.cat(self._kept) if self._kept else None,
        )


def accumulate_gram(gram: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram [in, in]`` (float32); `mirror` fills the rest.

    Little more than half the multiplications of the full product: by `ops.add_gram` on the CPU, by torch elsewhere.
    bfloat16 rows are multiplied as bfloat16 with float32 sums where the CPU has such instructions: products of
    bfloat16 values are exact in float32, so nothing is lost against widening them first.
    """
    if not rows.is_cpu:
        _add_upper(gram, rows.to(gram.dtype))
    elif rows.dtype is torch.bfloat16 and _narrow_products() is not None:
        with _narrowed(_narrow_products()):
            _add_upper(gram, rows.to(gram.dtype))
    else:
        add_gram(gram, rows if rows.dtype in (torch.bfloat16, torch.float16) else rows.to(gram.dtype))


def _add_upper(gram: Tensor, x: Tensor) -> None:
    # Halves, so that most of the work is in large square products.
    n = gram.shape[0]
    if n <= BLOCK:
        gram.addmm_(x.t(), x)
        return
    half = -(-n // (2 * BLOCK)) * BLOCK
    _add_upper(gram[:half, :half], x[:, :half])
    gram[:half, half:].addmm_(x[:, :half].t(), x[:, half:])
    _add_upper(gram[half:, half:], x[:, half:])


def mirror(gram: Tensor) -> Tensor:
    """Copy the upper triangle below the diagonal, in place."""
    for i in range(0, gram.shape[0], BLOCK):
        square = gram[i : i + BLOCK, i : i + BLOCK]
        square.copy_(square.triu() + square.triu(1).t())
        gram[i : i + BLOCK, :i] = gram[:i, i : i + BLOCK].t()
    return gram


def _narrow_products():
    """The switch for products of bfloat16 in float32 matrices, where this CPU has them; else None."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return getattr(torch.backends.mkldnn, "matmul", None) if supported() else None


@contextlib.contextmanager
def _narrowed(settings) -> Iterator[None]:
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
