"""AWQ: scale search, folding by a traced forward, clipping."""

import pytest
import torch
from torch import nn

from tersor.formats import Int
from tersor.methods import AWQ, RTN, awq
from tersor.transforms.graph import shared_inputs
from toys import HEAD, HEADS, KV_HEADS, WIDTH, Block, Norm, batch, group_of

ALL = ["q_proj", "o_proj", "gate_proj", "down_proj"]


def random_scale(group, seed=3):
    s = torch.rand(group.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    return group.tie(s)


# -- folding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_folding_any_scale_keeps_the_function(name, kv_heads):
    block = Block(kv_heads=kv_heads)
    before, group = block(batch()), group_of(block, name)
    group.fold(random_scale(group))
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()


def test_groups_and_producers_come_from_the_traced_forward():
    block = Block()
    found = {shared.names: (shared.producer.name, shared.producer.kind)
             for shared in shared_inputs(block, (batch(8),), {}, folds=True)}
    assert found == {
        ("q_proj", "k_proj", "v_proj"): ("norm1", "norm"), ("o_proj",): ("v_proj", "rows"),
        ("gate_proj", "up_proj"): ("norm2", "norm"), ("down_proj",): ("up_proj", "rows"),
    }


def test_grouped_query_heads_are_scaled_together():
    group = group_of(Block(), "o_proj")
    tied = group.tie(torch.rand(HEADS * HEAD, dtype=torch.float64)).view(KV_HEADS, HEADS // KV_HEADS, HEAD)
    assert torch.equal(tied[:, 0], tied[:, 1]) and not torch.equal(tied[0, 0], tied[1, 0])


def test_norms_that_add_one_to_their_gain_are_recognised_by_what_they_compute():
    block = Block(offset=1.0)
    before, group = block(batch()), group_of(block, "q_proj")
    assert group.producer.kind == "norm" and group.producer.offset == 1.0
    group.fold(random_scale(group))
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()


def test_a_norm_that_something_else_reads_is_refused():
    block = Block(residual_from_norm=True)
    group = group_of(block, "q_proj")
    assert group.producer is None and "norm1" in group.why
    assert AWQ().transform(group).startswith("awq: not scaled, scaling norm1")
    with pytest.raises(ValueError, match="cannot be folded"):
        group.fold(torch.ones(WIDTH))


def test_a_reader_that_is_no_linear_layer_is_named():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

        def forward(self, x):
            return (x * self.weight).sum(-1, keepdim=True)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.router, self.linear = Norm(WIDTH).double(), Router(), nn.Linear(WIDTH, WIDTH).double()

        def forward(self, x):
            h = self.norm(x)
            return x + self.linear(h) * self.router(h)

    (shared,) = shared_inputs(Mixed().requires_grad_(False), (batch(8),), {}, folds=True)
    assert shared.producer is None and "router" in shared.why


def test_a_scale_is_folded_as_the_rounded_gain_takes_it_over():
    # bfloat16 gains cannot hold gain / s: the columns are multiplied by what the stored gain really gave up.
    block = Block(dtype=torch.bfloat16)
    group = group_of(block, "q_proj")
    gain, w = block.norm1.weight.double(), group.weight("q_proj").double()
    group.fold(random_scale(group))
    product = group.weight("q_proj").double() * block.norm1.weight.double()
    assert torch.allclose(product, w * gain, rtol=1e-6, atol=0)


def test_zero_gains_and_bad_scales():
    block = Block()
    block.norm1.weight.data[3] = 0
    before, group = block(batch()), group_of(block, "q_proj")
    group.fold(random_scale(group))
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and positive"):
            group.fold(torch.full((WIDTH,), bad, dtype=torch.float64))


# -- the search ------------------------------------------------------------------------------------------


def test_ratio_zero_is_round_to_nearest():
    magnitude = torch.rand(64) * 10
    assert torch.equal(awq.scale(magnitude, 0.0), torch.ones(64))
    s = awq.scale(magnitude, 0.5)
    assert s.max() * s.min() == pytest.approx(1.0, rel=1e-5)
    block = Block()
    before = block.q_proj.weight.clone()
    AWQ(grid=1).transform(group_of(block, "q_proj"))
    assert torch.equal(block.q_proj.weight, before)


@pytest.mark.parametrize("name", ALL)
def test_the_best_ratio_is_no_worse_than_rounding(name):
    group = group_of(Block(), name)
    fmt = group.formats[name]
    nearest = {n: fmt.project(group.weight(n), fmt.fit(group.weight(n))) for n in group.names}
    rounding = group.loss(nearest)
    ratio, s = AWQ().search(group, group.tie(group.stats.abs_mean))
    found = group.loss({n: fmt.project(group.weight(n) * s, fmt.fit(group.weight(n) * s)) / s for n in group.names})
    assert found <= rounding
    if name in ("q_proj", "gate_proj"):
        assert 0 < ratio < 1 and found < rounding


def test_the_loss_runs_the_module_around_the_layers_and_restores_it():
    block = Block(dtype=torch.float32)
    group = group_of(block, "gate_proj")
    x = batch(dtype=torch.float32)
    group.runs = [lambda: block(x)]
    before, expected = block.gate_proj.weight.clone(), block(x)
    trial = {"gate_proj": torch.zeros_like(before)}
    loss = group.loss(trial)
    assert torch.equal(block.gate_proj.weight, before)
    block.gate_proj.weight.data.zero_()
    assert loss == pytest.approx(float((block(x) - expected).square().mean()), rel=1e-4)


def scaled_against_rounding():
    """Error of the block's output with scaled, rounded q/k/v, relative to rounding alone."""
    errors = []
    for transform in (True, False):
        block = Block()
        before, group = block(batch()), group_of(block, "q_proj")
        if transform:
            AWQ().transform(group)
        for name in group.names:
            block.get_submodule(name).weight.data = RTN(search=False).choose(group.weight(name), Int(3, 32)).w_hat
        errors.append(float((block(batch()) - before).norm()))
    return errors[0] / errors[1]


def test_scaling_beats_rounding_and_that_check_fails_without_it(monkeypatch):
    assert scaled_against_rounding() < 0.9
    monkeypatch.setattr(AWQ, "search", lambda self, group, magnitude: (0.0, torch.ones_like(magnitude)))
    assert not scaled_against_rounding() < 0.9


# -- clipping ------------------------------------------------------------------------------------------


def clipping_against_rounding(fmt):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 128, generator=generator)
    x = torch.randn(300, 128, generator=generator)
    plain = RTN(search=False).choose(w, fmt).w_hat
    clipped = awq.clipped(w, fmt, x, None)
    clipped = fmt.project(clipped, fmt.fit(clipped))

    def error(w_hat):
        return float((x @ (w_hat - w).T).norm())

    return error(clipped) / error(plain), w, awq.clipped(w, fmt, x, None)


@pytest.mark.parametrize("fmt", [Int(3, 32), Int(2, 32, symmetric=False), Int(3, 0), Int(3, 96)], ids=str)
def test_clipping_lowers_the_error_within_half_of_the_range(fmt):
    ratio, w, clipped = clipping_against_rounding(fmt)
    assert ratio < 0.97
    size = fmt.group_size or 128
    for lo in range(0, 128, size):
        before, after = w[:, lo : lo + size].abs().amax(1), clipped[:, lo : lo + size].abs().amax(1)
        assert (after >= 0.5 * before).all() and (after <= before).all()


def test_that_check_fails_without_clipping(monkeypatch):
    monkeypatch.setattr(awq, "_clip_rows", lambda w, *_: w)
    assert not clipping_against_rounding(Int(3, 32))[0] < 0.97


@pytest.mark.parametrize("name,clips", [
    ("model.layers.0.self_attn.q_proj", False), ("a.k_proj", False), ("attention.query", False), ("Wqkv", False),
    ("qkv_proj", False), ("attn.c_attn", False), ("query_key_value", False), ("v_proj", True), ("o_proj", True),
    ("gate_proj", True), ("down_proj", True), ("fc1", True), ("c_fc", True),
])
def test_query_and_key_projections_are_not_clipped(name, clips):
    assert awq.clippable(name) is clips
    assert AWQ().for_layer(name).clip is clips
