"""Formats are sets, methods choose points: one error-feedback loop serves every format through `project`."""

import pytest
import torch

from tersor.formats import (
    NVFP4, AdditiveCodebook, BilevelInt, BlockDiagonal, Float, Int, LowRank, Microscaling, Outliers, OutputVectors,
    Sparse24, Sum,
)
from tersor.methods import GPTQ, RTN, Statistics

# format: how much closer than round-to-nearest the loop has to come
CASES = [
    (Int(4, 32), 1.15), (Int(3, 32), 1.15), (Int(2, 32, False), 1.15), (Int(4, 0), 1.15), (Float("e4m3"), 1.1),
    (Microscaling("e2m1"), 1.15), (Microscaling("e2m3"), 1.15), (NVFP4(), 1.15), (BilevelInt(3), 1.15),
    (Sparse24(), 1.15), (Sparse24(Int(4, 32)), 1.15), (AdditiveCodebook(2, 6, 4), 1.15),
    (AdditiveCodebook(1, 6, 2), 1.15),
    (OutputVectors(4, 6), 1.15), (OutputVectors(4, 6, 4), 1.15), (Sum((Int(3, 32), LowRank(8))), 1.15),
    (Sum((Int(3, 32), Outliers(0.01))), 1.15), (Sum((Sparse24(Int(4, 32)), LowRank(8))), 1.15),
    (Sum((Int(2, 32), Int(2, 32))), 1.1), (BlockDiagonal(Sparse24(), 32), 1.15),
]


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(2048, 128) @ normal(128, 128) * torch.rand(128, generator=generator).exp()
    w = normal(192, 128) * 0.02
    return w, x, 2 / len(x) * x.T @ x


def output_error(w_hat, w, x):
    reference = x @ w.T
    return ((x @ w_hat.T - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("fmt, factor", CASES, ids=[str(case[0]) for case in CASES])
def test_the_loop_beats_rounding_in_every_format(problem, fmt, factor):
    w, x, hessian = problem
    rounded = RTN(search=False).choose(w, fmt, None, dtype=torch.bfloat16)
    chosen = GPTQ(search=False).choose(w, fmt, Statistics(len(x), hessian), dtype=torch.bfloat16)
    assert torch.allclose(fmt.unpack(fmt.pack(chosen.w_hat, chosen.params), tuple(w.shape)), chosen.w_hat, atol=1e-7)
    plain, better = output_error(rounded.w_hat, w, x), output_error(chosen.w_hat, w, x)
    assert better * factor < plain


def test_a_correction_fitted_to_the_residual_helps(problem):
    w, x, hessian = problem
    stats = Statistics(len(x), hessian)
    errors = []
    for fmt in (Int(3, 32), Sum((Int(3, 32), LowRank(16))), Sum((Int(3, 32), Outliers(0.03)))):
        errors.append(output_error(GPTQ(search=False).choose(w, fmt, stats).w_hat, w, x))
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.95 * errors[0]
