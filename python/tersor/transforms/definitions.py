"""What the online transforms compute, as plain functions of tensors in any float dtype: the definition that kernels are
tested against and that steps call.

All act on the last dimension and keep its width. In float64 they are exact to rounding; other dtypes are computed as
they come.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MOST_ORDER = 1024  # of the dense factor beside the power of two
_FACTOR = 32  # order of the factors that a power of two is taken apart into


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix ``H [order, order]`` of -1 and 1 in float64: ``H @ H.T = order * I``.

    ``order = m * 2^k``; the matrix is ``base(m) kron sylvester(2^k)``, with the smallest m that one of these gives: 1,
    Paley's constructions (m - 1, or m / 2 - 1, a prime or the square of one), Williamson's (156, 172). ValueError where
    none does.
    """
    m = hadamard_base(order)
    return torch.kron(_base_matrix(m), _sylvester(order // m))


def hadamard_base(order: int) -> int:
    """The m of `hadamard_matrix`: ``order / m`` is a power of two. ValueError where no construction is known here."""
    odd = order
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    m = odd if odd == 1 else 4 * odd
    while order >= 1 and m <= min(order, MOST_ORDER) and order % m == 0:
        if m == 1 or _construction(m) is not None:
            return m
        m *= 2
    raise ValueError(f"Hadamard transform: found width {order}; accepted are powers of two times 1, 12, 20, 28, 36, "
                     f"44, 52, 60, 156, 172 and what else Paley's constructions give up to {MOST_ORDER}")


def hadamard(x: Tensor, size: int = 0, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Orthonormal Hadamard transform of ``x [..., width]`` in blocks of ``size`` channels (0: all of them as one).

    ``y = H diag(signs) x / sqrt(size)`` for each block, with ``H = hadamard_matrix(size)``; ``signs [width]`` of -1 and
    1. ``inverse`` undoes it: ``x = diag(signs) H^T y / sqrt(size)``. ValueError for widths that do not fit (QuaRot).
    """
    width = x.shape[-1]
    size = size or width
    if size < 1 or width % size:
        raise ValueError(f"Hadamard transform: found blocks of {size} channels, accepted are divisors of the width "
                         f"{width}, and 0 for the whole of it")
    m = hadamard_base(size)
    if signs is not None and tuple(signs.shape) != (width,):
        raise ValueError(f"Hadamard transform: found signs {list(signs.shape)}, accepted is [{width}]")
    if signs is not None and not inverse:
        x = x * signs.to(x.dtype)
    y = x.unflatten(-1, (-1, m, size // m))
    if m > 1:
        base = _base_matrix(m).to(y)
        y = (base.T if inverse else base) @ y
    # The matrix of the power of two is a Kronecker product of small symmetric ones: one product for each.
    inner, power = 1, size // m
    while inner < power:
        step = min(_FACTOR, power // inner)
        factor = _sylvester(step).to(y)
        y = (y.unflatten(-1, (-1, step)) @ factor).flatten(-2) if inner == 1 \
            else (factor @ y.unflatten(-1, (-1, step, inner))).flatten(-3)
        inner *= step
    y = y.flatten(-3) / math.sqrt(size)
    return y * signs.to(x.dtype) if signs is not None and inverse else y


def kronecker(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``left^T X right`` for each row of ``x [..., n1 * n2]`` taken as ``X [n1, n2]``, flattened again (FlatQuant).

    ``left [n1, n1]``, ``right [n2, n2]``: the row times ``kron(left, right)``; None: ``left`` alone, on ``width / n1``
    channels each. ValueError where widths do not fit.
    """
    width = x.shape[-1]
    if right is None:
        if left.dim() != 2 or left.shape[0] != left.shape[1] or not len(left) or width % len(left):
            raise ValueError(f"Kronecker transform: found a factor {list(left.shape)} for width {width}, accepted is a "
                             "square one whose size divides it")
        return (left.to(x.dtype).T @ x.unflatten(-1, (len(left), -1))).flatten(-2)
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != left.shape[1] or right.shape[0] != right.shape[1] \
            or left.shape[0] * right.shape[0] != width:
        raise ValueError(f"Kronecker transform: found factors {list(left.shape)} and {list(right.shape)} for width "
                         f"{width}, accepted are square ones whose sizes multiply to it")
    rows = x.unflatten(-1, (left.shape[0], right.shape[0]))
    return (left.to(x.dtype).T @ rows @ right.to(x.dtype)).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over the last dimension, nothing rounded in between."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gate / (1 + exp(-gate)) * up``."""
    return torch.nn.functional.silu(gate) * up


def permute(x: Tensor, index: Tensor) -> Tensor:
    """``y[..., j] = x[..., index[j]]``."""
    return x.index_select(-1, index.to(torch.int64))


# -- constructions ----------------------------------------------------------------------------------------------

# The known part of the first rows of four symmetric circulant matrices whose squares add up to m I: entries 0 to m / 8.
_WILLIAMSON = {
    156: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    172: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _field(q: int) -> bool:
    """Whether `_characters` knows the field of q elements."""
    root = math.isqrt(q)
    return q % 2 == 1 and (_prime(q) or root * root == q and _prime(root))


def _construction(m: int) -> str | None:
    if m in (1, 2) or m % 4 == 0 and m & (m - 1) == 0:
        return "sylvester"
    if m % 4:
        return None
    if (m - 1) % 4 == 3 and _field(m - 1):
        return "paley"
    if (m // 2 - 1) % 4 == 1 and _field(m // 2 - 1):
        return "double"
    return "williamson" if m in _WILLIAMSON else None


def _characters(q: int) -> Tensor:
    """``[q, q]``: 0 on the diagonal, else 1 where the difference of two elements of the field of q elements is a
    square and -1 where it is not."""
    if _prime(q):
        difference = torch.arange(q)[:, None] - torch.arange(q)
        character = _legendre(q)
        return character[difference % q]
    # p^2 elements a + b r, with r^2 = d no square mod p: a square exactly where the norm a^2 - d b^2 is one mod p.
    p = math.isqrt(q)
    character = _legendre(p)
    d = int((character == -1).nonzero()[0])
    a, b = torch.arange(q) // p, torch.arange(q) % p
    da, db = a[:, None] - a, b[:, None] - b
    norm = (da * da - d * db * db) % p
    return torch.where((da == 0) & (db == 0), 0.0, character[norm])


def _legendre(p: int) -> Tensor:
    character = torch.full((p,), -1.0, dtype=torch.float64)
    character[torch.arange(p) ** 2 % p] = 1
    character[0] = 0
    return character


def _circulant(half: str, order: int) -> Tensor:
    """The symmetric circulant matrix with this beginning of its first row."""
    row = torch.tensor([1.0 if sign == "+" else -1.0 for sign in half], dtype=torch.float64)
    distance = (torch.arange(order)[:, None] - torch.arange(order)).abs()
    return row[torch.minimum(distance, order - distance)]


def _sylvester(order: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(h) < order:
        h = torch.kron(h, two)
    return h


@functools.lru_cache(maxsize=64)
def _base_matrix(m: int) -> Tensor:
    """The dense factor of order m."""
    kind = _construction(m)
    if kind == "sylvester":
        return _sylvester(m)
    if kind == "williamson":
        a, b, c, d = (_circulant(row, m // 4) for row in _WILLIAMSON[m])
        return torch.cat([torch.cat(row, 1) for row in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])
    q = m - 1 if kind == "paley" else m // 2 - 1
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[1:, 1:] = _characters(q)
    border[0, 1:] = 1
    border[1:, 0] = -1 if kind == "paley" else 1
    if kind == "paley":  # q = 3 mod 4: S is skew, and I + S is Hadamard
        return torch.eye(m, dtype=torch.float64) + border
    # q = 1 mod 4: S is symmetric; its entries and the diagonal are replaced by 2 x 2 matrices
    cross = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(border, cross) + torch.kron(torch.eye(q + 1, dtype=torch.float64), corner)
