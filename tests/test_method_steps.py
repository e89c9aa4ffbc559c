"""Each method's own test fails when the step that makes the method is taken out."""

import pytest
import test_flatquant
import test_rotations as rotations
import torch

from tersor.formats import Int
from tersor.formats.mixed import MixedInputs
from tersor.methods import Collector
from tersor.transforms import comet, fireq, flatquant, flexq, quarot, smoothquant
from tersor.transforms.group import Lone
from tersor.transforms.steps import Permute

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def outlier_model():
    return rotations.with_outliers()


def unordered(index):
    return Permute(torch.arange(len(index)))


ORDER = rotations.test_methods_order_as_they_should
# What is taken out: the test that must see it, where the step is, and what stands in for it.
STEPS = {
    "smoothquant scales nothing": (ORDER, smoothquant.SmoothQuant, "transform", lambda self, group: ""),
    "quarot leaves the residual stream": (ORDER, quarot, "rotate_residual", lambda *arguments: None),
    "quarot turns nothing online": (ORDER, quarot.QuaRot, "transform", lambda self, group: ""),
    "flatquant maps nothing": (ORDER, flatquant.FlatQuant, "transform_block", lambda self, block: None),
    "flatquant does not train": (test_flatquant.test_training_finds_better_transforms_and_clips, flatquant, "train",
                                 lambda *arguments: None),
    "comet gathers nothing": (rotations.test_comet_gathers_outliers_in_wide_blocks, comet, "Permute", unordered),
    "flexq finds nothing sensitive": (rotations.test_flexq_gives_eight_bits_where_six_cost_most, flexq.FlexQ, "loss",
                                      lambda self, group, fmt: 0.0),
    "fireq has no power of two": (rotations.test_fireq_scales_are_eight_bit_floats_under_one_power_of_two, fireq,
                                  "power", lambda largest: 1.0),
    "fireq scales no channels": (rotations.test_fireq_evens_out_the_weights_that_share_a_scale, fireq.FireQ,
                                 "transform", lambda self, group: ""),
}


@pytest.mark.parametrize("name", STEPS)
def test_without_its_step_a_method_fails_its_test(name, outlier_model, monkeypatch):
    test, where, attribute, instead = STEPS[name]
    monkeypatch.setattr(where, attribute, instead)
    arguments = [outlier_model] if "outlier_model" in test.__code__.co_varnames[:test.__code__.co_argcount] else []
    with pytest.raises(AssertionError):
        test(*arguments)


@pytest.mark.parametrize("share,wide", [(0.0, 1), (0.3, 1), (0.5, 2), (1.0, 2)])
def test_comet_widens_no_more_than_its_share_for_outliers(share, wide):
    """200 of 512 channels are outliers: two blocks of four hold them, and the largest go first where one is allowed.
    Their sizes are far above the median channel's, and would not be so above the mean."""
    torch.manual_seed(0)
    x, order = torch.rand(64, 512) + 1, torch.randperm(512)
    x[:, order[:200]] *= torch.linspace(200, 100, 200)
    collector = Collector(512, comet.Comet.needs)
    collector.add(x)
    lone = Lone(torch.randn(32, 512), MixedInputs(Int(4, 128, activation=4)), collector.finish())
    note = comet.Comet(share=share).transform(lone)
    assert note == f"comet: 200 outlier channels, {wide} of 4 blocks in eight bits"
    assert lone.stored["weight"]["block_bits"].tolist() == [8] * wide + [4] * (4 - wide)
    largest = x.amax(0).argsort(descending=True)
    assert set(lone.steps[0].index[:128].tolist()) == set(largest[:128].tolist())
