"""Each method's own test fails when the step that makes the method is taken out."""

import pytest
import test_rotations as rotations
import torch

from tersor.transforms import comet, fireq, flatquant, flexq, quarot, smoothquant
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
    "flatquant does not train": (rotations.test_training_finds_better_transforms_and_clips, flatquant, "train",
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
