"""FlatQuant outside attention: the scales folded before it trains, and the clips that it learns and stores."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_calibration import llama, tokens
from toys import Block, batch, group_of

import tersor
from tersor.formats import Int
from tersor.formats.integer import tile_rows, untile_rows
from tersor.methods import Collector
from tersor.transforms import flatquant
from tersor.transforms.flatquant import Flat, FlatQuant
from tersor.transforms.group import BlockView, Group, Weights

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(w, x, fmt, steps):
    """The group of one layer ``w [out, in]`` after FlatQuant on inputs ``x [tokens, in]``, four sequences of them."""
    collector = Collector(w.shape[1])
    collector.add(x)
    module = torch.nn.Module()
    module.layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.layer.weight.data = w.clone()
    group = Group(["layer"], {"layer": fmt}, collector.finish(), Weights(module))
    view = BlockView(module, [group], lambda b: module.layer(x.view(4, -1, w.shape[1])[b]), 4)
    with torch.no_grad():
        FlatQuant(steps=steps).transform_block(view)
    return group


@torch.no_grad()
def error(group, w, x, fmt=None, params=None):
    """Of the layer's output, relative, from what the group holds, or with another format or other parameters."""
    (step,), fmt = group.inserted, fmt or group.formats["layer"]
    w_hat = fmt.project(group.weight("layer"), params or group.params["layer"])
    exact = F.linear(x, w)
    return float((F.linear(fmt.quantize_input(step(x)), w_hat) - exact).norm() / exact.norm())


def test_training_finds_better_transforms_and_clips():
    torch.manual_seed(0)
    w, x = torch.randn(48, 64), torch.randn(256, 64) * torch.exp(1.5 * torch.randn(64))
    plain = Int(4, 32, activation=4, act_group=0)
    before, after = (error(trained(w, x, plain, steps), w, x) for steps in (0, 200))
    rounded = F.linear(plain.quantize_input(x), plain.project(w, plain.fit(w)))
    assert after < 0.92 * before < 0.92 * float((rounded - F.linear(x, w)).norm() / F.linear(x, w).norm())


def test_learned_clips_are_in_what_the_format_stores_and_each_is_worth_having():
    torch.manual_seed(0)
    tails = torch.distributions.StudentT(3.0)
    w, x = tails.sample((48, 256)), tails.sample((128, 256))
    group = trained(w, x, Int(3, 0, activation=4, act_group=0), 60)
    fmt, params, turned = group.formats["layer"], group.params["layer"], group.weight("layer")
    unclipped = fmt.fit(turned)
    assert fmt.act_clip < 0.95 and (params["scales"] < 0.95 * unclipped["scales"]).all()
    learned = error(group, w, x)
    assert learned < 0.98 * error(group, w, x, fmt=dataclasses.replace(fmt, act_clip=1.0))
    assert learned < 0.95 * error(group, w, x, params=unclipped)
    stored = fmt.pack(fmt.project(turned, params), params)
    assert torch.equal(untile_rows(stored["scales"], 48), params["scales"])


def test_compressed_layers_hold_the_clips(monkeypatch):
    found = {}

    def finish(flat):
        whole(flat)
        for name in flat.group.names:
            found.setdefault(name, []).append((flat.group.formats[name], flat.group.params[name]["scales"]))

    whole = Flat.finish
    monkeypatch.setattr(Flat, "finish", finish)
    start, model = round(float(torch.tensor(flatquant._CLIP).sigmoid()), 4), llama()
    tersor.compress(model, "flatquant[steps=8]:W4A4[group=32,act_group=0]", tokens(2))
    for i, block in enumerate(model.model.layers):
        for name, blocks in found.items():
            layer, (fmt, scales) = block.get_submodule(name), blocks[i]
            assert layer.format == fmt and fmt.act_clip not in (1.0, start), name
            assert torch.equal(layer.tensors()["scales"], tile_rows(scales)), name
    assert len(found) == 7 and all(len(blocks) == 3 for blocks in found.values())


@pytest.mark.parametrize("smooth", [0.3, 0.8])
@pytest.mark.parametrize("name,producer", [("q_proj", "norm1"), ("down_proj", "up_proj")])
def test_scales_are_of_both_sides_maxima(name, producer, smooth):
    """The input's channels are multiplied by ``max|W|^(1 - smooth) / max|X|^smooth`` where they are made."""
    block = Block()
    group, made = group_of(block, name, Int(4, 32, activation=4)), block.get_submodule(producer)
    before = made.weight.clone()
    x_max = group.stats.abs_max.double()
    w_max = torch.stack([group.weight(one).abs().amax(0) for one in group.names]).amax(0)
    view = BlockView(block, [group], lambda b: block(batch()), 1)
    FlatQuant(steps=0, smooth=smooth).transform_block(view)
    ratio = (made.weight / before).reshape(len(x_max), -1)
    expected = w_max ** (1 - smooth) / x_max**smooth
    assert torch.allclose(ratio, expected[:, None].expand_as(ratio), rtol=1e-5)
