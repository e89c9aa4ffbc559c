"""Int with rounded activations: its spec strings, static scales, and layers that are saved and loaded."""

import pytest
import torch
import torch.nn.functional as F
from io_models import compressed, linears, llama, logits, random_parts, randomize
from torch import nn

from tersor import ops
from tersor.formats import Int
from tersor.formats.base import Params
from tersor.formats.integer import quantize_activations
from tersor.io import load, save
from tersor.io.errors import Unsupported
from tersor.layer import Linear
from tersor.methods import Collector
from tersor.patch import LayerSpec, patch
from tersor.registry import resolve_format

TEXTS = {
    "W4A4": Int(4, 128, activation=4),
    "W6A6": Int(6, 128, activation=6),
    "W6A8": Int(6, 128, activation=8),
    "W8A8": Int(8, 0, activation=8),
    "W4A4[act_group=0,act_clip=0.9]": Int(4, 128, activation=4, act_group=0, act_clip=0.9),
    "W6A6[group=32,act_group=128]": Int(6, 32, activation=6, act_group=128),
    "W8A8[act_scale=static]": Int(8, 0, activation=8, act_scale="static"),
    "W8A8[act_group=64,act_sym=false]": Int(8, 0, activation=8, act_group=64, act_sym=False),
    "W4A8[sym=false,scale=fp16,act_clip=0.5]": Int(4, 128, False, 8, "fp16", act_clip=0.5),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_format(text):
    assert resolve_format(text) == TEXTS[text] and TEXTS[text].text() == text


def test_minus_one_is_the_whole_token():
    assert resolve_format("W4A4[act_group=-1]") == resolve_format("W4A4[act_group=0]")


@pytest.mark.parametrize("text,message", [
    ("W4A5", "found 5 activation bits, accepted are 4, 6, 8 and 16"), ("W4A4[act_group=48]", "found act_group=48"),
    ("W4A4[act_clip=0]", "found act_clip=0.0, accepted"), ("W4A4[act_clip=1.5]", "found act_clip=1.5, accepted"),
    ("W4A4[act_scale=fixed]", "found act_scale='fixed', accepted are dynamic and static"),
    ("W4A4[act_scale=static,act_sym=false]", "accepted are static scales of symmetric codes"),
    ("W4A16[act_group=0]", "options of quantized activations with 16 bits"),
])  # fmt: skip
def test_what_does_not_fit_is_named(text, message):
    with pytest.raises(ValueError, match="accepted") as error:
        resolve_format(text)
    assert message in str(error.value)


def static_layer(text, largest, seed=0):
    torch.manual_seed(seed)
    fmt = resolve_format(text)
    w = torch.randn(48, len(largest)) * 0.1
    params = fmt.fit(w)
    params["input_scale"] = fmt.input_scale(largest)
    w_hat = fmt.project(w, params)
    layer = Linear(len(largest), 48, fmt, dtype=torch.float32)
    layer.load_tensors(fmt.pack(w_hat, params))
    return layer, w_hat


@pytest.mark.parametrize("text,groups", [("W8A8[act_group=0,act_scale=static]", 1),
                                         ("W4A6[act_group=64,act_scale=static]", 3),
                                         ("W8A8[act_scale=static,act_clip=0.5]", 5)])
def test_static_scales_come_from_params(text, groups):
    largest = torch.rand(150) + 0.5
    layer, w_hat = static_layer(text, largest)
    fmt, scale = layer.format, layer.tensors()["input_scale"]
    assert scale.shape == (groups,) and scale.dtype == torch.float32
    step = fmt.act_clip * largest[: fmt.act_group or 150].max() / (2 ** (fmt.activation - 1) - 1)
    assert torch.isclose(scale[0], step)
    x = torch.randn(5, 150) * 2  # beyond what calibration saw
    seen = quantize_activations(x, fmt.activation, fmt.act_group, scale=scale)
    assert torch.equal(fmt.quantize_input(x, layer.tensors()), seen)
    assert not torch.equal(seen, fmt.quantize_input(x / 2, layer.tensors()) * 2), "the scale follows no input"
    wanted = F.linear(seen.double(), w_hat.double())
    for y in (layer(x), fmt.linear(x, layer.tensors(), None, layer.shape)):
        assert (y - wanted).norm() < 1e-6 * wanted.norm()
    before = scale.clone()
    layer._buffers["input_scale"].mul_(3)
    assert not torch.equal(layer(x), y), "a scale that changes in place is read anew"
    layer._buffers["input_scale"] = before
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("text,groups", [("W8A8[act_group=0,act_scale=static,act_clip=0.7]", 1),
                                         ("W4A6[act_group=64,act_scale=static,act_clip=0.5]", 3),
                                         ("W4A4[act_scale=static]", 5)])
def test_calibration_gives_static_scales_with_the_clip(text, groups):
    fmt, x = resolve_format(text), torch.randn(40, 150) * torch.linspace(0.1, 9, 150)
    collector, params = Collector(150, fmt.needs), fmt.fit(torch.randn(16, 150))
    for part in x.split(15):
        collector.add(part)
    fmt.calibrate(params, collector.finish())
    top = {8: 127, 6: 31, 4: 7}[fmt.activation]
    expected = torch.stack([fmt.act_clip * part.abs().max() / top for part in x.split(fmt.act_group or 150, 1)])
    assert params["input_scale"].shape == (groups,) and torch.allclose(params["input_scale"], expected, rtol=1e-6)
    y = fmt.quantize_input(x, fmt.pack(fmt.project(torch.zeros(16, 150), params), params))
    assert torch.allclose(y.abs().max(), fmt.act_clip * x.abs().max(), rtol=1e-5), "what lies beyond saturates"


def test_static_scales_are_asked_for():
    fmt = resolve_format("W8A8[act_group=64,act_scale=static]")
    w = torch.randn(16, 128)
    params = fmt.fit(w)
    with pytest.raises(ValueError, match="found no input_scale, accepted are finite steps above 0, .2."):
        fmt.pack(fmt.project(w, params), params)
    for bad in (torch.ones(3), torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(ValueError, match="found input_scale .* accepted"):
            fmt.pack(fmt.project(w, params), Params(params, input_scale=bad))
    assert (fmt.input_scale(torch.zeros(128)) > 0).all()


def test_each_expert_has_its_static_scale():
    torch.manual_seed(0)
    fmt = Int(4, 32, activation=8, act_group=0, act_scale="static")
    parts = [fmt.pack_codes(*random_parts(fmt, 33, 96, seed=i), torch.tensor([0.01 * (i + 1)])) for i in range(3)]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    x, ends = torch.randn(7, 96), torch.tensor([2, 2, 6], dtype=torch.int32)
    y = fmt.linear_grouped(x, ends, stacked, None, (33, 96))
    assert torch.equal(y[:2], fmt.linear(x[:2], parts[0], None, (33, 96)))
    assert torch.equal(y[2:6], fmt.linear(x[2:6], parts[2], None, (33, 96))) and not y[6:].any()


@pytest.mark.parametrize("spec,container", [
    ("W6A6[group=32,act_group=0,act_clip=0.9]", "tersor"), ("W4A8[group=32,act_sym=false]", "tersor"),
    ("W4A4[group=64,act_group=64]", "compressed-tensors"), ("W8A8[act_group=0]", "compressed-tensors")])
def test_saved_and_loaded(tmp_path, spec, container):
    model = randomize(llama(), spec)
    assert save(model, tmp_path / "q") == container
    again = load(tmp_path / "q")
    assert all(module.format.text() == spec for module in compressed(again).values())
    assert torch.equal(logits(again), logits(model))


def test_saved_and_loaded_with_static_scales(tmp_path):
    model = llama()
    fmt = resolve_format("W8A8[group=32,act_scale=static]")
    for i, layer in enumerate(patch(model, {name: LayerSpec(fmt) for name in linears(model)}).values()):
        scale = torch.rand(fmt.input_groups(layer.in_features)) * 0.05 + 0.01
        layer.load_tensors(fmt.pack_codes(*random_parts(fmt, *layer.shape, seed=i), scale))
    save(model, tmp_path / "q", "tersor")
    again = load(tmp_path / "q")
    for name, layer in compressed(model).items():
        assert torch.equal(again.get_submodule(name).tensors()["input_scale"], layer.tensors()["input_scale"])
    with pytest.raises((ValueError, Unsupported), match="accepted are dynamic symmetric ones"):
        save(model, tmp_path / "p", "compressed-tensors")


def test_every_rounded_activation_has_a_kernel():
    for bits in (4, 6, 8):
        for options in ({}, {"act_group": 0}, {"act_sym": False}, {"act_scale": "static"}):
            fmt = Int(4, 32, activation=bits, **options)
            assert fmt.kernel((64, 64)) == f"int_linear {ops._C.isa()}"
            ran = "quantize_rows cuda, lowbit_linear cuda" if ops._C.has_cuda_build else "reference: "
            assert fmt.kernel((64, 64), "cuda").startswith(ran)


def test_siblings_with_static_scales_run_alone():
    largest = torch.rand(64) + 0.5
    model = nn.ModuleList([static_layer("W8A8[act_scale=static]", largest * (i + 1), i)[0] for i in range(2)])
    from tersor.layer import Siblings

    assert not Siblings.fit_together(list(model))
