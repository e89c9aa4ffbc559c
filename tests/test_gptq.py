"""GPTQ against its definition: fixed-order optimal brain quantization with explicit downdates of the inverse."""

import pytest
import torch

from tersor.formats import Int
from tersor.methods import GPTQ, RTN, Statistics, gptq
from tersor.registry import resolve_format


def correlated(tokens, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype)
    mix = torch.randn(width, width, generator=generator, dtype=dtype) / width**0.5
    return (x @ mix) * torch.rand(width, generator=generator, dtype=dtype).mul(2).exp()


def weight(rows, width, seed=1, dtype=torch.float64):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.02


def statistics(x):
    return Statistics(len(x), hessian=x.T @ x * (2 / len(x)), inputs=x)


def damped(h, damp=0.01):
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def optimal_brain(w, fmt, params, h, refit=False, order=None):
    """Columns in order; after each, every later column moves and the inverse Hessian loses that column."""
    w, w_hat, inverse = w.clone(), torch.empty_like(w), torch.linalg.inv(h)
    for position, j in enumerate(range(w.shape[1]) if order is None else order.tolist()):
        if refit and j % fmt.group_columns == 0:
            fmt.refit(params, w[:, j : j + fmt.group_columns], j)
        w_hat[:, j] = fmt.project(w[:, j : j + 1], params, j)[:, 0]
        w -= torch.outer((w[:, j] - w_hat[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w_hat


def output_error(w, w_hat, x):
    return float((x @ (w_hat - w).T).norm() / (x @ w.T).norm())


@pytest.mark.parametrize("order", gptq.ORDERS)
@pytest.mark.parametrize("fmt", [Int(4, 0), Int(3, 32), Int(2, 64, symmetric=False), Int(8, 0)], ids=str)
def test_an_identity_hessian_gives_round_to_nearest_exactly(fmt, order):
    w = weight(24, 200)
    stats = Statistics(10, hessian=torch.eye(200, dtype=w.dtype))
    chosen = GPTQ(search=False, order=order).choose(w, fmt, stats)
    nearest = RTN(search=False).choose(w, fmt)
    assert torch.equal(chosen.w_hat, nearest.w_hat)


@pytest.mark.parametrize("fmt,refit", [(Int(4, 0), False), (Int(3, 32), True), (Int(2, 64, symmetric=False), True),
                                       (Int(4, 128), True)], ids=str)
def test_equals_optimal_brain_quantization_with_downdates(fmt, refit):
    x, w = correlated(400, 160), weight(16, 160)
    stats = statistics(x)
    chosen = GPTQ(search=False, block=64, order="none").choose(w, fmt, stats)
    expected = optimal_brain(w, fmt, fmt.fit(w), damped(stats.hessian), refit)
    assert (chosen.w_hat - expected).abs().max() < 1e-12
    assert (chosen.w_hat - RTN(search=False).choose(w, fmt).w_hat).abs().max() > 1e-3  # another answer than rounding


def test_static_order_equals_optimal_brain_quantization_in_that_order():
    x, w, fmt = correlated(400, 96), weight(16, 96), Int(3, 32)
    stats = statistics(x)
    chosen = GPTQ(search=False, order="static").choose(w, fmt, stats)
    order = stats.hessian.diagonal().argsort(descending=True)
    expected = optimal_brain(w, fmt, fmt.fit(w), damped(stats.hessian), order=order)
    assert (chosen.w_hat - expected).abs().max() < 1e-12


@pytest.mark.parametrize("order", gptq.ORDERS)
@pytest.mark.parametrize("fmt", [Int(3, 0), Int(3, 32), Int(3, 96), Int(3, 256)], ids=str)
def test_block_size_does_not_change_the_result(fmt, order):
    x, w = correlated(500, 300), weight(8, 300)
    stats = statistics(x)
    results = [GPTQ(block=block, order=order).choose(w, fmt, stats) for block in (1, 32, 100, 128, 1000)]
    for other in results[1:]:
        assert (results[0].w_hat - other.w_hat).abs().max() < 1e-12
        assert other.loss == pytest.approx(results[0].loss, rel=1e-9)


@pytest.mark.parametrize("spec", ["W4A16[group=32]", "2:4"])
def test_the_loss_is_half_the_squared_errors_and_the_quadratic_form(spec):
    x, w, fmt = correlated(500, 192), weight(8, 192), resolve_format(spec)
    stats = statistics(x)
    chosen = GPTQ().choose(w, fmt, stats)
    difference = w - chosen.w_hat
    quadratic = float(((difference @ damped(stats.hessian)) * difference).sum()) / 2
    assert chosen.loss == pytest.approx(quadratic, rel=1e-9)


def test_the_factor_reproduces_the_damped_hessian_and_the_published_factor():
    h = statistics(correlated(300, 70)).hessian
    factor = gptq.factor(h, 0.01)
    assert torch.allclose(factor.r @ factor.r.T, damped(h), rtol=1e-10)
    published = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    assert torch.allclose(torch.linalg.inv(factor.r), published, rtol=1e-7, atol=1e-9)


def test_orders_keep_groups_together_and_descend():
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 8.0, 7.0, 0.5])
    assert gptq.descending(diagonal, 4, 1).tolist() == [3, 1, 2, 0, 5, 6, 4, 7]
    assert gptq.descending(diagonal, 2, 2).tolist() == [2, 3, 4, 5, 6, 7, 0, 1]
    assert gptq.descending(torch.rand(10), 4, 2).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("order", ["grouped", "static"])
def test_ordered_results_are_stored_in_the_original_layout(order):
    x, w, fmt = correlated(600, 256).float(), weight(32, 256).float(), Int(4, 32)
    stats = statistics(x)
    chosen = GPTQ(order=order).choose(w, fmt, stats)
    stored = fmt.unpack(fmt.pack(chosen.w_hat, chosen.params), tuple(w.shape))
    assert torch.allclose(stored, chosen.w_hat, rtol=1e-6, atol=1e-9)
    assert output_error(w, stored, x) < 0.8 * output_error(w, RTN().choose(w, fmt).w_hat, x)


def test_groups_are_fitted_from_the_weights_with_all_updates():
    # A group of 32 in a block of 128: weights without the block's own updates would fit other scales.
    x, w, fmt = correlated(400, 128), weight(16, 128), Int(3, 32)
    stats = statistics(x)
    chosen = GPTQ(search=False, block=128).choose(w, fmt, stats)
    narrow = GPTQ(search=False, block=32).choose(w, fmt, stats)
    assert torch.equal(chosen.params["scales"], narrow.params["scales"])
    assert not torch.equal(chosen.params["scales"], fmt.fit(w)["scales"])


def test_dead_channels_are_rounded_and_change_nothing_else():
    x, w, fmt = correlated(400, 64), weight(8, 64), Int(4, 0)
    x[:, 10] = 0
    stats = statistics(x)
    chosen = GPTQ().choose(w, fmt, stats)
    assert torch.isfinite(chosen.w_hat).all()
    nearest = fmt.project(w, chosen.params)
    assert torch.equal(chosen.w_hat[:, 10], nearest[:, 10])


def test_a_singular_hessian_is_damped_more_and_an_indefinite_one_refused():
    h = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    assert gptq.factor(h, 0.01).damp == pytest.approx(0.1)
    with pytest.raises(ValueError, match="not positive definite.*'damp'"):
        gptq.factor(torch.tensor([[1.0, 500.0], [500.0, 1.0]]), 0.01)
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq.factor(torch.full((3, 3), torch.nan), 0.01)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("order", gptq.ORDERS)
def test_the_weight_is_left_untouched(turned, order):
    x, w = correlated(200, 64), weight(64, 64)
    given = w.t().contiguous().t() if turned else w.clone()
    chosen = GPTQ(order=order).choose(given, Int(4, 32), statistics(x))
    assert torch.equal(given, w) and not torch.equal(chosen.w_hat, w)


def test_layers_that_share_an_input_factor_it_once(monkeypatch):
    stats = statistics(correlated(200, 64))
    calls = []
    real = gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *a, **k: calls.append(1) or real(*a, **k))
    for seed in range(3):
        GPTQ().choose(weight(8, 64, seed), Int(4, 32), stats)
    assert len(calls) == 1


def test_a_previous_choice_fixes_the_scales():
    x, w, fmt = correlated(400, 128), weight(16, 128), Int(3, 32)
    previous = RTN().choose(w, fmt)
    before = previous.params["scales"].clone()
    chosen = GPTQ().choose(w, fmt, statistics(x), previous)
    assert torch.equal(chosen.params["scales"], before)
    assert output_error(w, chosen.w_hat, x) < output_error(w, previous.w_hat, x)


FORMATS = ["W8A8", "W4A16", "W4A16_ASYM", "W3A16[group=32]", "W2A16[group=64,sym=false]", "NVFP4A16", "MXFP4A16",
           "FP8", "2:4", "2:4/W4A16", "W3A16+lr8"]


def compare(spec):
    x, w, fmt = correlated(800, 256).float(), weight(48, 256).float(), resolve_format(spec)
    nearest = RTN().choose(w, fmt, None)
    chosen = GPTQ().choose(w, fmt, statistics(x))
    return output_error(w, chosen.w_hat, x), output_error(w, nearest.w_hat, x)


@pytest.mark.parametrize("spec", FORMATS)
def test_one_function_beats_rounding_on_every_format(spec):
    ours, nearest = compare(spec)
    assert ours < 0.9 * nearest


@pytest.mark.parametrize("spec", ["W4A16", "2:4"])
def test_that_check_fails_without_error_feedback(spec, monkeypatch):
    def rounded(w, fmt, params, factor, **_):
        params = fmt.fit(w, search=True)
        return gptq.Choice(fmt.project(w, params), params, 0.0)

    monkeypatch.setattr(gptq, "feed_back", rounded)
    ours, nearest = compare(spec)
    assert not ours < 0.9 * nearest


def test_masks_are_chosen_by_what_an_error_costs():
    # Column 0 hardly matters, so its large weight goes; by magnitude it would stay.
    h = torch.diag(torch.tensor([1e-4, 1.0, 1.0, 1.0], dtype=torch.float64))
    w = torch.tensor([[3.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    chosen = GPTQ(damp=1e-9).choose(w, resolve_format("2:4"), Statistics(1, hessian=h))
    assert (chosen.w_hat != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("options", [{"damp": 0.0}, {"damp": float("nan")}, {"block": 0}, {"order": "random"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GPTQ(**options)


def test_missing_statistics_are_named():
    with pytest.raises(ValueError, match="hessian"):
        GPTQ().choose(weight(4, 64), Int(4, 32), None)
