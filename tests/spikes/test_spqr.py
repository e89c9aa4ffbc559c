"""Spike: SpQR (Dettmers et al. 2023, arXiv 2306.03078) on two-level integers plus outliers, by the public interface."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from problem import output_error, problem
from torch import Tensor, nn

from tersor.formats import BilevelInt, Outliers, Params, Sum
from tersor.formats.bits import rounded
from tersor.layer import Linear
from tersor.methods import GPTQ, RTN, Choice, Method, Statistics
from tersor.methods.gptq import factor, feed_back
from tersor.registry import register_method, resolve


@register_method("spqr")
@dataclass(frozen=True)
class SpQR(Method):
    """Error feedback in which weights that would cost too much leave the grid: looked for before each group's range is
    fitted (leave one out), and again when their column is decided. ``threshold`` is relative to the mean cost of the
    columns' variance; it is raised until the outliers fit the format's budget."""

    threshold: float = 0.2
    damp: float = 0.01

    needs = frozenset({"hessian"})

    def choose(self, w: Tensor, fmt, stats: Statistics | None, previous: Choice | None = None, *, dtype=None) -> Choice:
        if not (isinstance(fmt, Sum) and isinstance(fmt.terms[0], BilevelInt) and isinstance(fmt.terms[-1], Outliers)
                and len(fmt.terms) == 2):
            raise ValueError(f"spqr: found format {fmt}, accepted are two-level integers with outliers such as "
                             "bilevel3+outliers0.01")
        hessian = self.require(stats, "hessian").hessian
        r = factor(hessian.to(w), self.damp).r
        u = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=w.dtype), upper=True)
        threshold = self.threshold * (w.var(0) / u.diagonal().square()).mean().item()
        if not threshold < math.inf:
            threshold = math.inf
        while True:
            params = fmt.fit(w, dtype=dtype)
            loss = decide(w, fmt, params, u, threshold)
            if params["terms"][1]["mask"].sum() <= fmt.terms[1].capacity(w.shape):
                return Choice(params["parts"][0] + params["parts"][1], params, loss)
            threshold *= 1.25


def decide(w: Tensor, fmt: Sum, params: Params, u: Tensor, threshold: float) -> float:
    """The column loop; writes the parts of the sum and the outliers' mask into ``params``."""
    base, sparse = fmt.terms
    own, outliers = params["terms"]
    dense, kept, mask = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
    w, loss = w.clone(), 0.0
    for j in range(w.shape[1]):
        if j % base.group_size == 0:
            group = w[:, j : j + base.group_size]
            if threshold < math.inf:
                likely = leave_one_out(group, u.diagonal()[j : j + base.group_size], base.levels) > threshold
                mean = (group * ~likely).sum(1, keepdim=True) / (~likely).sum(1, keepdim=True).clamp_min(1)
                group = torch.where(likely, mean, group)
            base.refit(own, group, j)
        column = w[:, j : j + 1]
        q = base.project(column, own, j)
        error = (column - q) / u[j, j]
        out = error.square() > threshold
        zero = base.project(torch.zeros_like(column), own, j)
        dense[:, j : j + 1] = torch.where(out, zero, q)
        kept[:, j : j + 1] = torch.where(out, rounded(column - zero, outliers["dtype"]), 0.0)
        mask[:, j : j + 1] = out
        error = torch.where(out, (column - dense[:, j : j + 1] - kept[:, j : j + 1]) / u[j, j], error)
        loss += float(error.square().sum()) / 2
        w[:, j + 1 :] -= error * u[j, j + 1 :]
    outliers["mask"] = mask
    params["parts"] = [dense, kept]
    return loss


def leave_one_out(w: Tensor, diagonal: Tensor, levels: int) -> Tensor:
    """How much the group's cost ``sum (w_hat - w)^2 / U_ii^2`` falls when the range is fitted without weight j, and j
    is not counted: ``[out, group]`` for ``w [out, group]``."""
    price = diagonal.square().reciprocal()

    def cost(low, high):
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / levels).clamp_min(torch.finfo(w.dtype).tiny)[:, None]
        zero = -low[:, None] / scale
        q = (((w / scale + zero).round().clamp(0, levels) - zero) * scale - w).square() * price
        return q

    everything = cost(w.amin(1), w.amax(1)).sum(1)
    gains = []
    for j in range(w.shape[1]):
        rest = torch.cat([w[:, :j], w[:, j + 1 :]], 1)
        q = cost(rest.amin(1), rest.amax(1))
        gains.append(everything - q.sum(1) + q[:, j])
    return torch.stack(gains, 1)


def bf16(w):
    return w.to(torch.bfloat16).float()


def test_leaving_one_out_against_brute_force():
    torch.manual_seed(0)
    w, diagonal, levels = torch.randn(4, 16), torch.rand(16) + 0.5, 7
    gains = leave_one_out(w, diagonal, levels)
    for row in range(4):
        def price(columns):
            values = w[row, columns].double()
            low, high = min(values.min().item(), 0), max(values.max().item(), 0)
            scale = (high - low) / levels
            q = (values / scale - low / scale).round().clamp(0, levels)
            return (((q + low / scale) * scale - values).square() / diagonal[columns].double().square()).sum().item()

        for j in range(16):
            rest = [i for i in range(16) if i != j]
            assert gains[row, j].item() == pytest.approx(price(list(range(16))) - price(rest), abs=1e-5)


def test_an_infinite_threshold_is_gptq():
    w, _, stats = problem()
    for base in (BilevelInt(3), BilevelInt(4, 64, 8)):
        fmt = Sum((base, Outliers(0.01)))
        mine = SpQR(threshold=math.inf).choose(w.double(), fmt, stats, dtype=torch.bfloat16)
        params = base.fit(w.double(), dtype=torch.bfloat16)
        theirs = feed_back(w.double(), base, params, factor(stats.hessian.double(), 0.01), search=False)
        assert torch.allclose(mine.w_hat, theirs.w_hat, atol=1e-12)
        assert not mine.params["terms"][1]["mask"].any()
        assert mine.loss == pytest.approx(theirs.loss)


def test_a_threshold_of_zero_keeps_every_weight():
    w, _, stats = problem()
    w = bf16(w)
    fmt = Sum((BilevelInt(3), Outliers(1.0)))
    choice = SpQR(threshold=0.0).choose(w, fmt, stats, dtype=torch.bfloat16)
    mask = choice.params["terms"][1]["mask"]
    assert mask.float().mean() > 0.99
    assert (choice.w_hat - w).norm() < 4e-3 * w.norm(), "16 bits beside the grid's value nearest zero"


def test_outliers_stay_within_the_budget_and_pay():
    w, x, stats = problem()
    shape = tuple(w.shape)
    fmt = Sum((BilevelInt(3), Outliers(0.02)))
    choice = resolve("spqr:bilevel3+outliers0.02").methods[0].choose(w, fmt, stats, dtype=torch.bfloat16)
    count = int(choice.params["terms"][1]["mask"].sum())
    assert 0 < count <= fmt.terms[1].capacity(shape)
    tensors = fmt.pack(choice.w_hat, choice.params)
    assert torch.equal(fmt.unpack(tensors, shape), choice.w_hat)
    errors = {
        "spqr": output_error(choice.w_hat, w, x),
        "gptq": output_error(GPTQ(search=False, order="none").choose(w, fmt, stats, dtype=torch.bfloat16).w_hat, w, x),
        "rtn": output_error(RTN().choose(w, fmt, None, dtype=torch.bfloat16).w_hat, w, x),
        "without": output_error(GPTQ(order="none").choose(w, fmt.terms[0], stats, dtype=torch.bfloat16).w_hat, w, x),
    }
    assert errors["spqr"] < 0.75 * errors["rtn"] and errors["spqr"] < 0.9 * errors["without"]
    assert errors["spqr"] < errors["gptq"], errors


def test_a_tight_budget_raises_the_threshold():
    w, _, stats = problem()
    fmt = Sum((BilevelInt(3), Outliers(0.001)))
    choice = SpQR(threshold=0.01).choose(w, fmt, stats, dtype=torch.bfloat16)
    assert 0 < int(choice.params["terms"][1]["mask"].sum()) <= math.ceil(0.001 * w.numel())


def test_other_formats_are_refused_and_a_layer_from_the_spec_alone():
    w, x, stats = problem()
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(w)
    with pytest.raises(ValueError, match="bilevel3.outliers0.01"):
        Linear.from_linear(linear, "spqr:bilevel3", inputs=x)
    layer = Linear.from_linear(linear, "spqr[threshold=0.1]:bilevel3+outliers0.02", inputs=x)
    assert layer.method == "spqr" and layer.kernel.startswith("reference")
    assert (layer(x) - linear(x)).norm() < 0.12 * linear(x).norm()
    assert replace(layer.format.terms[0], num_bits=4) == BilevelInt(4)
