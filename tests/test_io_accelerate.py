"""`accelerate` on modules as GPTQ and AWQ libraries keep them (compressed-tensors' own are in their file's tests)."""

import pytest
import torch
from io_models import linears, llama, logits, random_parts, randomize, weights
from torch import nn

import tersor
from tersor import Int
from tersor.io import awq, gptq


class Packed(nn.Module):
    """What these libraries' modules have in common: sizes, bits, and the stored tensors as buffers."""

    def __init__(self, tensors, bits, group_size, shape, bias=None):
        super().__init__()
        self.bits, self.group_size, (self.out_features, self.in_features) = bits, group_size, shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)


class PackedV2(Packed):
    def qzero_format(self):
        return 2


def loaded(kind, format, order=False):
    """A model with such modules, and the one of ours that holds the same weights."""
    model, ours = llama(bias=True), llama(bias=True)
    randomize(ours, str(format))
    for i, name in enumerate(linears(model)):
        linear = model.get_submodule(name)
        codes, scales, zero = random_parts(format, *linear.weight.shape, seed=i)
        index = torch.randperm(codes.shape[1], generator=torch.Generator().manual_seed(i)) if order else None
        if kind == "awq":
            tensors, made = awq.pack(codes, scales.half(), zero), Packed
        else:
            v2 = kind == "gptq_v2"
            tensors = gptq.pack(codes, scales.half(), zero, format.num_bits, format.group_size, index, v2)
            made = PackedV2 if v2 else Packed
        bias = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(name, made(tensors, format.num_bits, format.group_size or -1, linear.weight.shape, bias))
    return model, ours


@pytest.mark.parametrize("kind,format", [
    ("gptq", Int(4, 32)), ("gptq", Int(8, 0, False)), ("gptq_v2", Int(3, 32, False)), ("gptq_v2", Int(2, 64)),
    ("awq", Int(4, 32, False)), ("awq", Int(4, 0)),
])
def test_same_values(tmp_path, kind, format):
    model, ours = loaded(kind, format)
    report = tersor.accelerate(model, strict=True)
    assert [row.name for row in report.rows] == linears(ours) and all(row.kernel for row in report.rows)
    assert torch.equal(logits(model), logits(ours))
    for name, w in weights(ours).items():
        assert torch.equal(model.get_submodule(name).weight, w)
    tersor.save(model, tmp_path / "q", "gptq")
    assert torch.equal(logits(tersor.load(tmp_path / "q")), logits(ours))


def test_activation_order():
    model, _ = loaded("gptq", Int(4, 32), order=True)
    tersor.accelerate(model)
    assert all(model.get_submodule(name).pre is not None for name in linears(llama()))


def test_what_is_left_alone_is_named_and_strict_refuses_it(tmp_path):
    model, _ = loaded("gptq", Int(4, 32))
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).group_size = 48
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="strict: layer 'model.layers.0.mlp.up_proj'.*group_size: found 48"):
        tersor.accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == before
    report = tersor.accelerate(model)
    assert "group_size: found 48" in report.kept[name] and type(model.get_submodule(name)) is Packed
    assert len(report.rows) == len(linears(llama())) - 1
    with pytest.raises(ValueError, match="up_proj.*packed tensors of another library"):
        tersor.save(model, tmp_path / "q")


def test_unsound_tensors_are_refused():
    model, _ = loaded("gptq", Int(4, 32))
    model.model.layers[0].mlp.up_proj.scales[0, 0] = float("nan")
    with pytest.raises(ValueError, match="up_proj.*found NaN or infinite"):
        tersor.accelerate(model)
    model, _ = loaded("awq", Int(4, 32))
    module = model.model.layers[0].mlp.up_proj
    module.qzeros = module.qzeros[:, :-1]
    with pytest.raises(ValueError, match="up_proj.*qzeros.*accepted is"):
        tersor.accelerate(model)
