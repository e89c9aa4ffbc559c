"""What a file of this package offers to bench/linear.py.

    ABOUT: str                                what is called, in a phrase
    variants(options) -> list[str]            names of the ways to run it; imports nothing heavy
    available() -> dict[str, str]             versions in use; raises Unavailable with the reason otherwise
    make(variant, k, n, options) -> Contender weights of y[m, n] = x[m, k] w^T, in enough copies

A contender lives alone in its process, so libraries with thread pools of their own do not meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EXACT, INT8 = "exact", "int8"  # classes of activation handling; peers are compared within one
CHECKED_ROWS = 64  # output channels that `sample` is asked for


class Unavailable(Exception):
    """A library or variant that cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    """``dtype`` of the inputs (bf16, fp32, fp16) where a library leaves the choice; ``min_bytes`` of all copies
    together, so that rotating through them reads memory; ``specs`` of tersor; ``quick`` asks for fewer variants."""

    dtype: str = "bf16"
    min_bytes: int = 260_000_000
    specs: tuple[str, ...] = ()
    quick: bool = False

    def copies(self, nbytes: int) -> int:
        """Copies of a weight of ``nbytes``: at least two."""
        return max(2, math.ceil(self.min_bytes / nbytes))


class Contender:
    """One library's product in one shape."""

    activations = EXACT
    nbytes = 0  # stored bytes of one copy: codes, scales, zero points
    copies = 0
    itemsize = 4  # bytes of one value of x and y

    def calls(self, m: int, threads: int) -> tuple[Sequence[Callable[[], object]], int]:
        """Callables to rotate through, and how many products one of them computes."""
        raise Unavailable(f"{type(self).__name__} does not say how it runs")

    def sample(self, m: int, threads: int):
        """``(x [m, k], y [m, r], w [r, k])`` as float64 numpy arrays: an input, the output's first ``r`` channels,
        and the weights that the stored tensors stand for."""
        raise Unavailable(f"{type(self).__name__} offers no sample")


class TorchContender(Contender):
    """A product that is one call of a torch function per copy."""

    def __init__(self, k: int, n: int, dtype, weights: Sequence):
        self.k, self.n, self.dtype, self.weights = k, n, dtype, list(weights)
        self.copies, self.itemsize = len(self.weights), dtype.itemsize

    def product(self, x, weight):
        """``x @ weight^T`` with one of the copies."""
        raise Unavailable(f"{type(self).__name__} does not say how it multiplies")

    def rows(self, count: int):
        """Dequantized rows of the first copy, ``[count, k]``."""
        raise Unavailable(f"{type(self).__name__} does not tell its weights")

    def input(self, m: int):
        import torch

        generator = torch.Generator().manual_seed(m)
        return torch.randn(m, self.k, generator=generator).to(self.dtype)

    def calls(self, m, threads):
        import torch

        torch.set_num_threads(threads)
        x, product = self.input(m), self.product

        def call(weight):
            def run():
                with torch.inference_mode():
                    return product(x, weight)

            return run

        return [call(weight) for weight in self.weights], 1

    def sample(self, m, threads):
        import torch

        torch.set_num_threads(threads)
        x = self.input(m)
        with torch.inference_mode():
            y = self.product(x, self.weights[0])[:, :CHECKED_ROWS]
            w = self.rows(CHECKED_ROWS)
            return x.double().numpy(), y.double().numpy(), w.double().numpy()


def torch_dtype(name: str):
    """bf16, fp32, fp16 as a torch dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name]


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(x, y, w) -> float:
    """|y - x w^T| / |x w^T| in float64."""
    import numpy as np

    truth = x @ w.T
    return float(np.linalg.norm(y - truth) / np.linalg.norm(truth))


def distinct_codes(nbytes: int, copies: int):
    """``copies`` arrays of random bytes that differ from each other (some libraries share equal constants)."""
    import numpy as np

    first = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    for index in range(copies):
        yield first if index == 0 else np.roll(first, 131 * index)
