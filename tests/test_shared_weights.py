"""Transforms on models whose layers share weights, and on mixtures of experts as transformers runs them."""

import pytest
import torch
from test_calibration import SMALL, llama, logits, mixture, tokens
from transformers import LlamaConfig, LlamaForCausalLM

import tersor

METHODS = ["smoothquant:W8A8", "awq:W4A16[group=32]", "flatquant[steps=0]:W8A8[group=32]", "quarot:W8A8",
           "comet[ratio=1.2]:W8Ax[group=32]", "flexq:W6A6[act_group=128,group=32]"]


def sharing(kind):
    model = llama()
    first, second = model.model.layers[:2]
    if kind == "module":
        second.mlp.down_proj = first.mlp.down_proj
    elif kind == "weight":
        second.self_attn.v_proj.weight = first.self_attn.v_proj.weight
    elif kind == "norm":
        second.input_layernorm.weight = first.input_layernorm.weight
    else:
        second.self_attn.q_proj.weight = second.self_attn.o_proj.weight
    return model


SHARED = {"module": ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj"),
          "weight": ("layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"),
          "norm": ("layers.0.input_layernorm", "layers.1.input_layernorm"),
          "block": ("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj")}


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("spec", METHODS)
def test_transforms_refuse_weights_that_several_places_use(spec, kind):
    model = sharing(kind)
    before = logits(model, tokens(1)[0])
    with pytest.raises(ValueError) as error:
        tersor.compress(model, spec, tokens(2))
    message = str(error.value)
    assert all(name in message for name in SHARED[kind]) and spec.partition(":")[0].partition("[")[0] in message
    assert torch.equal(logits(model, tokens(1)[0]), before)  # nothing was touched


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("spec", ["rtn:W8A8", "gptq:W8A16"])
def test_methods_that_rewrite_nothing_take_shared_weights(spec, kind):
    model = sharing(kind)
    before = logits(model, tokens(1)[0])
    tersor.compress(model, spec, tokens(2))
    after = logits(model, tokens(1)[0])
    assert (after - before).norm() < 0.03 * before.norm()


def test_a_container_under_two_names_shares_nothing():
    model = llama()
    model.alias = model.model
    tersor.compress(model, "smoothquant:W8A8", tokens(2))
    assert isinstance(model.alias.layers[0].mlp.down_proj, tersor.Linear)


@pytest.mark.parametrize("spec", ["smoothquant:W8A8", "flatquant[steps=0]:W8A8[group=32]", "awq:W8A16[group=32]",
                                  "comet[limit=0.01]:W8Ax[group=32]"])
def test_transforms_take_mixtures_whose_experts_are_one_product(spec):
    model = mixture()
    model.config._experts_implementation = "grouped_mm"  # transformers' default, which knows no float64
    before = logits(model, tokens(1)[0])
    tersor.compress(model, spec, tokens(2))
    after = logits(model, tokens(1)[0])
    assert (after - before).norm() < 0.05 * before.norm()
    assert model.config._experts_implementation == "grouped_mm"


def two_blocks_wide():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 256, "num_hidden_layers": 1})).eval()


def test_mixed_inputs_share_one_call():
    model = two_blocks_wide()
    model.model.layers[0].input_layernorm.weight.data[::40] = 30
    tersor.compress(model, "comet:W4Ax", tokens(2))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    bits = layers[0].tensors()["block_bits"]
    assert sorted(bits.tolist()) == [4, 8]
    siblings = layers[0].siblings
    assert siblings is not None and siblings.layers == tuple(layers) and mlp.gate_proj.siblings is not None
    assert type(mlp).__mro__[1].__name__ == "FusedGate"
    x = torch.randn(3, 256, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        together = [layer(x) for layer in layers]
        assert siblings._fused  # the permutation is in the call
        siblings.dissolve()
        for layer, y in zip(layers, together):
            assert torch.equal(layer(x), y)


def test_layers_of_other_bits_run_on_their_own():
    model = two_blocks_wide()
    tersor.compress(model, "rtn:W4Ax", tokens(2))
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, 256, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
        assert layers[0].siblings is not None
        other = {**layers[1].tensors(), "block_bits": torch.tensor([8, 4], dtype=torch.uint8)}
        layers[1].load_tensors(other)
        after = [layer(x) for layer in layers]
    assert layers[0].siblings is None
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])
