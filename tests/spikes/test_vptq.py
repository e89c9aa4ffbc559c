"""Spike: VPTQ (Liu et al. 2024, arXiv 2409.17066) as a method on `OutputVectors`, through the public interface."""

from dataclasses import dataclass, replace

import torch
from problem import output_error, problem
from torch import Tensor, nn

from tersor.formats import Int, OutputVectors, Params
from tersor.formats.bits import kmeans, nearest
from tersor.layer import Linear
from tersor.methods import RTN, Choice, Method, Statistics
from tersor.methods.gptq import factor, feed_back
from tersor.registry import register_method, resolve


@dataclass(frozen=True)
class Recorder(OutputVectors):
    """Notes what every column lacked when its turn came, for the residual codebook."""

    def project(self, w: Tensor, params: Params, lo: int = 0, *, importance: Tensor | None = None) -> Tensor:
        w_hat = super().project(w, params, lo, importance=importance)
        params["lacked"][:, lo : lo + w.shape[1]] = w - w_hat
        return w_hat


@register_method("vptq")
@dataclass(frozen=True)
class VPTQ(Method):
    """Vectors along the outputs, chosen inside the column loop: a column has one Hessian weight, so plain nearest
    centroids are right. A second pass over the columns adds the residual codebook."""

    damp: float = 0.01

    needs = frozenset({"hessian"})

    def choose(self, w: Tensor, fmt, stats: Statistics | None, previous: Choice | None = None, *, dtype=None) -> Choice:
        hessian = self.require(stats, "hessian").hessian.to(w)
        by_diagonal = factor(hessian, self.damp, order="static")
        main = Recorder(fmt.length, fmt.nbits)
        params = main.fit(w, importance=hessian.diagonal(), dtype=dtype)
        params["lacked"] = torch.zeros_like(w)
        choice = feed_back(w, main, params, by_diagonal)
        if not fmt.residual:
            return choice
        left = main.vectors(params["lacked"] / params["scales"])
        params["residual_codebook"] = main.cluster(left, 2**fmt.residual, params)
        params["residual_codes"] = torch.zeros_like(params["codes"])
        params["codes"] = torch.zeros_like(params["codes"])
        return feed_back(w, fmt, params, by_diagonal)


def proxy(w_hat, w, hessian):
    return float(((w - w_hat) @ hessian * (w - w_hat)).sum())


def test_vectors_of_one_with_a_uniform_codebook_are_scalar_gptq():
    w, _, stats = problem()
    w[:, 0] = w.abs().max() * torch.where(torch.arange(64) % 2 == 0, 1, -1)  # every row has one range: one grid
    scalar = Int(4, 0)
    own = scalar.fit(w)
    own["scales"] *= 1.05  # the largest weight is no tie between two codes
    step = own["scales"][0, 0]
    vector = OutputVectors(1, 4)
    params = vector.fit(w)
    params["codebook"] = (torch.arange(16.0) - 8)[:, None] * step
    params["scales"] = torch.ones_like(params["scales"])
    upper = factor(stats.hessian, 0.01)
    found, wanted = feed_back(w, vector, params, upper), feed_back(w, scalar, own, upper, static=True)
    assert torch.allclose(found.w_hat, wanted.w_hat, atol=1e-6)
    assert (wanted.w_hat - w).norm() > 0


def test_an_identity_hessian_leaves_plain_nearest_centroids():
    w, _, _ = problem()
    fmt = OutputVectors(8, 5)
    params = fmt.fit(w)
    choice = feed_back(w, fmt, params, factor(torch.eye(64), 1e-9))
    points = fmt.vectors(w / params["scales"]).flatten(0, 1)
    plain = params["codebook"][nearest(points, params["codebook"])].view(64, 64).T * params["scales"]
    assert torch.allclose(choice.w_hat, plain, atol=1e-6)


def test_heavy_columns_pull_the_centroids():
    points = torch.tensor([[0.0], [1.0], [10.0]])
    light = kmeans(points, 2, torch.tensor([1.0, 1.0, 1.0]))
    heavy = kmeans(points, 2, torch.tensor([1.0, 99.0, 1.0]))
    assert sorted(light[:, 0].tolist()) == [0.5, 10.0]
    assert torch.allclose(heavy.sort(0).values[:, 0], torch.tensor([0.99, 10.0]))


def test_the_loop_and_the_residual_lower_the_loss_and_codes_decode():
    w, x, stats = problem()
    losses = {}
    for fmt in (OutputVectors(4, 6), OutputVectors(4, 6, 5)):
        params = fmt.fit(w, importance=stats.hessian.diagonal(), dtype=torch.bfloat16)
        losses[fmt, "rtn"] = proxy(RTN().choose(w, fmt, None, dtype=torch.bfloat16).w_hat, w, stats.hessian)
        losses[fmt, "kmeans"] = proxy(fmt.project(w, params), w, stats.hessian)
        choice = resolve("vptq:v4x6").methods[0].choose(w, fmt, stats, dtype=torch.bfloat16)
        losses[fmt, "vptq"] = proxy(choice.w_hat, w, stats.hessian)
        stored = fmt.unpack(fmt.pack(choice.w_hat, choice.params), tuple(w.shape))
        assert torch.allclose(stored, choice.w_hat, atol=1e-7)
        assert losses[fmt, "vptq"] < 0.8 * min(losses[fmt, "kmeans"], losses[fmt, "rtn"])
    assert losses[OutputVectors(4, 6, 5), "vptq"] < 0.5 * losses[OutputVectors(4, 6), "vptq"]


def test_residuals_of_the_loop_serve_better_than_residuals_of_the_weight():
    """The second codebook is trained on what the loop left, which is what it will be asked for."""
    w, x, stats = problem(96, 64)
    fmt = OutputVectors(4, 5, 4)
    mine = VPTQ().choose(w, fmt, stats, dtype=torch.bfloat16)
    params = fmt.fit(w, importance=stats.hessian.diagonal(), dtype=torch.bfloat16)
    plain = feed_back(w, fmt, params, factor(stats.hessian, 0.01, order="static"))
    assert output_error(mine.w_hat, w, x) < 1.1 * output_error(plain.w_hat, w, x)


def test_a_layer_from_the_spec_alone():
    w, x, _ = problem()
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(w)
    layer = Linear.from_linear(linear, "vptq:v4x6[residual=5]", inputs=x)
    assert layer.method == "vptq" and layer.kernel.startswith("reference")
    rtn = Linear.from_linear(linear, "rtn:v4x6[residual=5]")
    assert (layer(x) - linear(x)).norm() < 0.9 * (rtn(x) - linear(x)).norm()
    assert replace(layer.format, residual=0) == OutputVectors(4, 6)
