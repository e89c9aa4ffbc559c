"""SmoothQuant: its identities, and that the model computes the same before quantization."""

import pytest
import torch

from toys import Block, batch, group_of, names_of
from tersor.transforms.smoothquant import SmoothQuant


def smoothed(alpha, block=None):
    block = block or Block()
    group = group_of(block, "q_proj")
    before = block(batch())
    assert SmoothQuant(alpha).transform(group) == ""
    return block, group, before


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_output_is_unchanged_before_quantization(alpha):
    block, group, before = smoothed(alpha)
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()
    assert names_of(group) == ["q_proj", "k_proj", "v_proj"]


def test_half_meets_in_the_middle():
    block = Block()
    group = group_of(block, "q_proj")
    x_max = group.stats.abs_max.double()
    w_max = torch.stack([group.weight(name).abs().amax(0) for name in group.names]).amax(0)
    SmoothQuant(0.5).transform(group)
    after_w = torch.stack([group.weight(name).abs().amax(0) for name in group.names]).amax(0)
    expected = (x_max * w_max).sqrt()
    assert torch.allclose(group.stats.abs_max.double(), expected, rtol=1e-5)
    assert torch.allclose(after_w, expected, rtol=1e-5)


def test_one_moves_all_difficulty_to_the_weights_and_zero_none():
    _, group, _ = smoothed(1.0)
    assert torch.allclose(group.stats.abs_max, torch.ones_like(group.stats.abs_max), rtol=1e-5)
    _, group, _ = smoothed(0.0)
    w = torch.stack([group.weight(name).abs().amax(0) for name in group.names]).amax(0)
    assert torch.allclose(w, torch.ones_like(w), rtol=1e-5)


def test_only_what_reads_a_norm_is_smoothed():
    block = Block()
    for name in ("o_proj", "down_proj"):
        group = group_of(block, name)
        before = block.get_submodule(name).weight.clone()
        assert SmoothQuant().transform(group) == ""
        assert torch.equal(block.get_submodule(name).weight, before)


def test_what_cannot_be_folded_is_left_alone_and_said():
    block = Block(residual_from_norm=True)
    group = group_of(block, "q_proj")
    before = block.get_submodule("q_proj").weight.clone()
    assert "not smoothed" in SmoothQuant().transform(group)
    assert torch.equal(block.get_submodule("q_proj").weight, before)


def test_smoothing_evens_out_the_inputs_and_that_check_fails_without_it(monkeypatch):
    def spread():
        _, group, _ = smoothed(0.5)
        return float(group.stats.abs_max.max() / group.stats.abs_max.median())

    plain = group_of(Block(), "q_proj").stats.abs_max
    limit = 0.5 * float(plain.max() / plain.median())
    assert spread() < limit
    monkeypatch.setattr(SmoothQuant, "transform", lambda self, group: "")
    assert not spread() < limit
