"""GPTQ: columns are decided one after another, and the rest of the row makes up for each error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.base import Format, Params
from ..registry import register_method
from .base import Choice, Method, Statistics

ORDERS = ("none", "grouped", "static")
_STRIP = 32  # columns between two updates of the rest of a span
_RETRIES = 4  # each with ten times the damping
_WIDE = 1 << 15  # elements from which one elementwise operation is worth several threads


class Factor(NamedTuple):
    """Upper triangular ``r [in, in]`` with ``r r^T`` the damped, reordered Hessian; ``order [in]`` or None."""

    r: Tensor
    order: Tensor | None
    dead: Tensor  # [in] bool, in the original order
    damp: float


@register_method("gptq")
@dataclass(frozen=True)
class GPTQ(Method):
    """Error feedback by the inverse Hessian of the layer's squared output error.

    One function for every format: scalars give GPTQ (Frantar et al. 2022, arXiv 2210.17323), 2:4 gives SparseGPT
    (arXiv 2301.00774), vectors along the inputs give GPTVQ; the format's ``project`` decides a block of columns at a
    time, and is told by ``importance = 1 / [U]_jj^2`` what an error in each column will cost, so masks and outliers
    are chosen inside the loop.

    ``damp``: of the mean diagonal, added to the diagonal; ``block``: columns that are updated lazily (no influence on
    the result but rounding); ``order``: ``none`` goes left to right, ``grouped`` takes groups and the columns inside
    each by descending Hessian diagonal, ``static`` takes all columns so, with parameters fitted beforehand. Storage
    is in the original order with either, and needs no index. ``static_groups``: fit all parameters beforehand,
    otherwise each group is fitted when its turn comes, from the weights with all updates so far (the original code
    fits from weights that lack the updates of the current block). ``search``: look for clipped ranges.
    ``sequential``: inside a block of the model, collect each layer's inputs after the layers before are compressed.

    Input channels that were zero throughout (dead) are rounded to nearest rather than zeroed, which costs nothing on
    the calibration data and keeps the layer usable on other data.
    """

    damp: float = 0.01
    block: int = 128
    order: str = "grouped"
    static_groups: bool = False
    search: bool = True
    sequential: bool = False

    needs = frozenset({"hessian"})

    def __post_init__(self):
        if not 0 < self.damp < math.inf:
            raise ValueError(f"option 'damp': found {self.damp}, accepted are positive numbers (0.01 is usual)")
        if self.block < 1:
            raise ValueError(f"option 'block': found {self.block}, accepted are positive numbers of columns")
        if self.order not in ORDERS:
            raise ValueError(f"option 'order': found {self.order!r}, accepted are {', '.join(ORDERS)}")

    def choose(self, w: Tensor, fmt: Format, stats: Statistics | None, previous: Choice | None = None, *,
               dtype: torch.dtype | None = None) -> Choice:
        """``w [out, in]``; ``stats.hessian [in, in]``. A previous choice fixes scales and the like; codes are new."""
        hessian = self.require(stats, "hessian").hessian
        unit = fitted_together(fmt) or fmt.block
        key = (self.damp, self.order, unit, fmt.block, w.dtype, w.device)
        if key not in stats.memo:
            stats.memo[key] = factor(hessian.to(w), self.damp, self.order, unit, fmt.block)
        static = previous is not None or self.static_groups or self.order == "static" or not fmt.group_columns
        if previous is None:
            params = fmt.fit(w, search=self.search and static, dtype=dtype)
        else:
            params = previous.params
        return feed_back(w, fmt, params, stats.memo[key], block=self.block, search=self.search, static=static)


def factor(hessian: Tensor, damp: float, order: str = "none", unit: int = 1, inner: int = 1) -> Factor:
    """Damp, reorder and factor a Hessian ``[in, in]``, all in its dtype.

    The published form factors the inverse, ``H^-1 = U^T U``. Here ``H = R R^T`` with R upper triangular: then
    ``U = R^-1``, so one factorization of H read backwards replaces two factorizations and an inversion, and loses
    less precision. ``unit`` and ``inner`` columns stay together in an order. Raises ValueError when damping up to ten
    thousand times ``damp`` does not make the matrix positive definite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("Hessian: found NaN or Inf on the diagonal, accepted are finite values")
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    permutation = None if order == "none" else descending(diagonal, unit if order == "grouped" else inner, inner)
    for attempt in range(_RETRIES + 1):
        added = damp * 10.0**attempt
        h = hessian.clone() if permutation is None else hessian[permutation][:, permutation]
        h.diagonal().add_(added * mean)
        if permutation is None:
            h.diagonal().masked_fill_(dead, mean)
        else:
            h.diagonal().masked_fill_(dead[permutation], mean)
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return Factor(lower.flip(0, 1), permutation, dead, added)
    raise ValueError(f"Hessian: not positive definite with damping {damp:g} to {added:g} of its mean diagonal; "
                     "accepted are inputs without NaN or Inf; use more calibration data or a larger 'damp'")


def descending(diagonal: Tensor, unit: int, inner: int) -> Tensor:
    """Order ``[in]`` of columns by descending diagonal: units of ``unit`` columns by their largest member, inside
    each unit blocks of ``inner`` columns likewise. The last unit may be shorter, and then stays last."""
    n = diagonal.numel()
    full = n - n % unit
    blocks = diagonal[:full].view(-1, unit // inner, inner).amax(-1)  # [units, blocks of a unit]
    units = blocks.amax(-1).argsort(descending=True, stable=True)
    inside = blocks.argsort(dim=-1, descending=True, stable=True)[units]
    start = units[:, None, None] * unit + inside[..., None] * inner
    order = (start + torch.arange(inner, device=diagonal.device)).flatten()
    return torch.cat([order, torch.arange(full, n, device=diagonal.device)])


def fitted_together(fmt: Format) -> int:
    """Columns of a group, as a multiple of the columns that are decided together; 0 without groups."""
    return math.lcm(fmt.block, fmt.group_columns) if fmt.group_columns else 0


def feed_back(w: Tensor, fmt: Format, params: Params, factor: Factor, *, block: int = 128, search: bool = False,
              static: bool = False) -> Choice:
    """The column loop. ``w [out, in]`` is left untouched; ``params`` are refitted per group unless ``static``.

    Columns are decided span by span. With D the differences ``w - w_hat`` of the columns decided so far, the weights
    of the next span S with all updates are ``w_S + (D R_:S) R_SS^-1``, so nothing but the span is ever rewritten.
    Returns values ``[out, in]`` and ``loss = sum(err^2) / 2``, which is ``tr(D H D^T) / 2`` with the damped Hessian.
    """
    n = w.shape[1]
    r, order = factor.r, factor.order
    group = 0 if static else fitted_together(fmt)
    unit = group or fmt.block
    span = -(-block // unit) * unit
    strip = fmt.block * max(1, _STRIP // fmt.block)
    if group % strip:
        strip = group if group <= 2 * _STRIP else math.gcd(group, strip)
    for name, value in params.items():  # a group's scales side by side, since columns take them one group at a time
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == w.shape[0]:
            params[name] = value.t().contiguous().t()
    wt = (w if order is None else w[:, order]).t().contiguous()  # [in, out]: a column is a contiguous row
    differences = torch.empty_like(wt)
    loss = w.new_zeros((), dtype=torch.float64)
    for lo in range(0, n, span):
        hi = min(lo + span, n)
        local = r[lo:hi, lo:hi]
        u = torch.linalg.solve_triangular(local, torch.eye(hi - lo, dtype=r.dtype, device=r.device), upper=True)
        current = wt[lo:hi].clone()
        if lo:
            moved = r[:lo, lo:hi].t() @ differences[:lo]
            current.addmm_(u.t(), moved)
        chosen, errors = decide_span(current, u, fmt, params, lo, order, group=group, strip=strip, search=search)
        torch.sub(wt[lo:hi], chosen, out=differences[lo:hi])
        loss += errors.square().sum(dtype=torch.float64)
    chosen = (wt - differences).t()  # not in place: wt may be w itself, turned
    if order is not None:
        chosen = torch.empty_like(chosen).index_copy_(1, order, chosen)
    return Choice(chosen, params, float(loss) / 2)


@contextlib.contextmanager
def _few_threads(columns: Tensor) -> Iterator[None]:
    """One thread for operations on single columns ``[s, out]``: most are too short to share, and some kernels would
    wake the other threads all the same."""
    threads = torch.get_num_threads()
    if columns.is_cuda or threads == 1 or columns.shape[1] >= _WIDE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decide_span(current: Tensor, u: Tensor, fmt: Format, params: Params, lo: int, order: Tensor | None, *,
                group: int, strip: int, search: bool) -> tuple[Tensor, Tensor]:
    """Decide the columns ``[lo, lo + s)`` (in processing order) of a span.

    ``current [s, out]``: their weights with all updates from before the span; ``u [s, s]``: the factor U of the
    span's own part. Returns values and errors ``(w - w_hat) U_BB^-1``, both ``[s, out]``.
    """
    size, block = current.shape[0], fmt.block
    chosen, errors = torch.empty_like(current), torch.empty_like(current)
    price = u.diagonal().pow(-2)
    scale = u.diagonal().reciprocal().tolist()
    positions = range(lo, lo + size) if order is None else order[lo : lo + size].tolist()
    for a in range(0, size, strip):
        b = min(a + strip, size)
        base = a - a % group if group else 0  # errors before it have reached these columns
        if group and a == base:
            c = min(a + group, size)
            if a:
                current[a:c].addmm_(u[:a, a:c].t(), errors[:a], alpha=-1)
            _refit(fmt, params, current[a:c], positions[a:c], search)
        elif a > base:
            current[a:b].addmm_(u[base:a, a:b].t(), errors[base:a], alpha=-1)
        with _few_threads(current):
            for i in range(a, b, block):
                j = min(i + block, b)
                w = current[i:j]
                if i > a and block == 1:
                    current[i].addmv_(errors[a:i].t(), u[a:i, i], alpha=-1)
                elif i > a:
                    w.addmm_(u[a:i, i:j].t(), errors[a:i], alpha=-1)
                q = fmt.project(w.t(), params, positions[i], importance=price[i:j]).t()
                chosen[i:j] = q
                if block == 1:
                    torch.sub(w, chosen[i:j], out=errors[i:j]).mul_(scale[i])
                else:
                    difference = (w - chosen[i:j]).t()
                    errors[i:j] = torch.linalg.solve_triangular(u[i:j, i:j], difference, upper=True, left=False).t()
    return chosen, errors


def _refit(fmt: Format, params: Params, current: Tensor, positions, search: bool) -> None:
    """Fit a group from its current weights ``[columns, out]``, given in processing order."""
    if not isinstance(positions, range):
        current = current[torch.tensor(positions, device=current.device).argsort()]
    fmt.refit(params, current.t(), min(positions), search=search)
