"""`accelerate` on modules as GPTQ and AWQ libraries keep them (compressed-tensors' own are in their file's tests)."""

import pytest
import torch
from io_models import TOKENS, linears, llama, logits, random_parts, randomize, weights
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


def test_learned_maps_of_keys_stay_in_use(tmp_path):
    """Attentions keep them: the cache is the same before and after, and so it is saved, where it can be."""
    model, _ = loaded("gptq", Int(4, 32))
    for i, layer in enumerate(model.model.layers):
        torch.manual_seed(i)
        turn = 2 * torch.linalg.qr(torch.randn(32, 32))[0]
        layer.self_attn.register_buffer("key_transform", turn.bfloat16())
    maps = [layer.self_attn.key_transform.clone() for layer in model.model.layers]
    tersor.accelerate(model, strict=True)
    with pytest.raises(ValueError, match="key_transform, which tersor holds"):
        tersor.save(model, tmp_path / "q", "gptq")
    model.save_pretrained(tmp_path / "q")
    for one in (model, tersor.load(tmp_path / "q")):
        cache = tersor.Cache(one, "flatquant:K16V16")
        plain = tersor.Cache(one, "K16V16")
        with torch.no_grad():
            for ids in (TOKENS, TOKENS[:, :2]):
                out, same = (one(ids, past_key_values=c, use_cache=True).logits.float() for c in (cache, plain))
                assert (out - same).norm() < 0.02 * same.norm()
        for i, layer in enumerate(one.model.layers):
            assert torch.equal(layer.self_attn.key_transform, maps[i])
            held, keys = (c.layers[i].store.decode()[0][:, :, :6] for c in (cache, plain))
            assert (held - keys @ maps[i].double()).abs().max() < 0.02 * held.abs().max()


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "add_module"])
def test_modules_with_more_than_packed_tensors_are_kept_and_named(hook):
    """As compressed-tensors attaches online transforms, and PEFT adapters."""
    model, _ = loaded("gptq", Int(4, 32))
    module = model.model.layers[0].mlp.up_proj
    module.add_module("extra", nn.Identity()) if hook == "add_module" else getattr(module, hook)(lambda *given: None)
    match = "found submodules" if hook == "add_module" else "found forward hooks"
    with pytest.raises(ValueError, match=f"strict: layer 'model.layers.0.mlp.up_proj'.*{match}"):
        tersor.accelerate(model, strict=True)
    report = tersor.accelerate(model)
    assert match in report.kept["model.layers.0.mlp.up_proj"] and model.model.layers[0].mlp.up_proj is module
