"""COMET's choice of blocks: outliers first, then what costs the layers' outputs too much."""

import pytest
import torch
import torch.nn.functional as F

from tersor.formats import Int
from tersor.formats.mixed import MixedInputs
from tersor.methods import Collector
from tersor.transforms.comet import Comet
from tersor.transforms.group import Lone

FORMAT = MixedInputs(Int(4, 128, activation=4))


def layer(width=512, seed=0):
    """A weight, and inputs of which three channels are large and those from 256 on far smaller than the others."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(64, width, generator=generator), torch.randn(256, width, generator=generator)
    x[:, 256:] *= 0.01
    x[:, 300] *= 100
    x[:, [5, 40, 300]] *= 30
    return w, x


def chosen(limit):
    w, x = layer()
    collector = Collector(w.shape[1], Comet.needs)
    collector.add(x)
    lone = Lone(w, FORMAT, collector.finish())
    note = Comet(share=0.25, limit=limit).transform(lone)
    step, = lone.inserted
    bits = lone.stored["weight"]["block_bits"]
    rounded = FORMAT.quantize_input(step(x), {"block_bits": bits})
    exact = F.linear(x, w)
    error = (F.linear(rounded, lone.weight("weight")) - exact).norm() / exact.norm()
    return bits.tolist(), step.index[:3].tolist(), float(error), note


def test_blocks_are_widened_until_the_output_suffers_no_more_than_the_limit():
    bits, first, loose, note = chosen(1.0)
    assert bits == [8, 4, 4, 4] and sorted(first) == [5, 40, 300] and "1 of 4 blocks" in note
    bits, first, strict, note = chosen(loose / 2)
    assert bits == [8, 8, 4, 4] and sorted(first) == [5, 40, 300] and "2 of 4 blocks" in note
    assert strict <= loose / 2
    assert chosen(1e-9)[0] == [8, 8, 8, 8]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(ValueError, match="option 'limit': found"):
        Comet(limit=limit)
