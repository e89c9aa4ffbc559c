"""BCT: shifts and tables against exact arithmetic, and an encoder in small integers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import tersor
from tersor import blockwise
from tersor.blockwise import matmul, quantize, shifts, softmax, table, through_table

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shifts_are_the_largest_that_fit(bits):
    top = 2 ** (bits - 1) - 1
    largest = torch.cat([torch.rand(200) * 10.0 ** torch.randint(-6, 6, (200,)),
                         torch.tensor([float(top), top / 4, 1e-30]),
                         torch.tensor([top * 1.0001])])
    e = shifts(largest, bits).double()
    assert (largest.double() * 2.0**e <= top).all() and (largest.double() * 2.0 ** (e + 1) > top).all()
    assert shifts(torch.zeros(2), bits).tolist() == [0, 0]


@pytest.mark.parametrize("bits,block", [(8, 64), (4, 16), (8, 0), (6, 32)])
def test_numbers_are_within_half_a_step(bits, block):
    x = torch.randn(5, 100) * torch.exp(2 * torch.randn(100))
    x[2] = 0
    found = quantize(x, bits, block)
    steps = torch.ldexp(torch.ones_like(found.shift, dtype=torch.float32), -found.shift)
    steps = steps.expand_as(found.codes).flatten(-2)[:, :100]
    assert ((found.values() - x).abs() <= steps / 2).all()
    assert found.codes.abs().max() <= 2 ** (bits - 1) - 1 and (found.values()[2] == 0).all()
    with pytest.raises(ValueError, match="found NaN or Inf"):
        quantize(torch.tensor([1.0, math.inf]), 8)


def test_one_block_is_a_power_of_two_for_the_layer():
    x = torch.randn(64)
    e = math.floor(math.log2(127 / x.abs().max()))
    assert torch.equal(quantize(x, 8).values(), (x * 2.0**e).round() * 2.0**-e)


def test_products_are_exact():
    a, b = quantize(torch.randn(2, 3, 70), 8, 32), quantize(torch.randn(2, 5, 70), 8, 32)
    expected = a.values(torch.float64) @ b.values(torch.float64).transpose(-1, -2)
    assert torch.equal(matmul(a, b), expected.float())


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu", "tanh", "relu", "exp"])
def test_tables_are_the_function_at_every_point(function):
    exact = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh,
             "relu": F.relu, "exp": torch.exp}[function]
    for shift in (0, 4, 7):
        grid = torch.arange(-128, 128, dtype=torch.float64) * 2.0**-shift
        assert torch.equal(table(function, shift, 8), exact(grid).float())
    x = quantize(torch.randn(7, 90), 8, 32)
    assert torch.equal(through_table(x, function, 8), exact(x.values(torch.float64)).float())


def test_softmax():
    scores = 4 * torch.randn(3, 5, 40)
    scores[0, 1, 10:] = -math.inf
    scores[1, 2] = -math.inf
    found = softmax(scores, 8)
    expected = scores.double().softmax(-1)
    expected[1, 2] = 0
    assert (found - expected).abs().max() < 0.02
    assert (found[0, 1, 10:] == 0).all() and (found[1, 2] == 0).all()
    assert (found.sum(-1)[expected.sum(-1) > 0] - 1).abs().max() < 1e-6


def test_normalisation():
    norm = torch.nn.LayerNorm(96)
    norm.weight.data, norm.bias.data = torch.rand(96) + 0.5, torch.randn(96)
    x = torch.randn(4, 96) * 3 + 1
    expected = norm(x)
    norm.__class__ = blockwise.LayerNorm
    assert (norm(x) - expected).abs().max() < 2.0 ** -(7 - 2), "half a step of numbers up to 4 in 8 bits"
    assert (norm(torch.zeros(1, 96)) - quantize(norm.bias.data[None], 8, 64).values()).abs().max() == 0


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=256, max_position_embeddings=64)).eval()


def outputs(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state


RECIPE = {"*embeddings*": "bct:W8A16[group=64,scale=bf16]", "*": "bct:W8A8[group=64,act_group=64,scale=bf16]"}


def test_an_encoder_in_small_integers():
    model = bert()
    ids = torch.randint(0, 200, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    expected, errors = outputs(model, ids, mask), {}
    for bits in (8, 4):
        twin = copy.deepcopy(model)
        report = tersor.compress(twin, {name: spec.replace("W8A8", f"W{bits}A{bits}").replace("W8A16", f"W{bits}A16")
                                        for name, spec in RECIPE.items()})
        made = blockwise.convert(twin, bits)
        found = outputs(twin, ids, mask)
        seen = mask.bool()
        errors[bits] = float((found - expected)[seen].norm() / expected[seen].norm())
        # bits, and 16 for the scale of each 64
        assert report.bits == pytest.approx(bits + 0.25, abs=0.1)
    assert errors[8] < 0.03 and 4 * errors[8] < errors[4] < 0.6
    counts = [sum(kind in what for what in made.values()) for kind in ("attention", "table")]
    assert counts == [2, 3]
    assert sum("normalisation" in what for what in made.values()) == 5


def test_padding_does_not_reach_the_others():
    model = bert()
    blockwise.convert(model)
    ids, mask = torch.randint(0, 200, (1, 20)), torch.ones(1, 20, dtype=torch.long)
    mask[:, 12:] = 0
    other = ids.clone()
    other[:, 12:] = 3
    assert torch.equal(outputs(model, ids, mask)[:, :12], outputs(model, other, mask)[:, :12])


def test_scales_are_powers_of_two_and_what_cannot_be_is_refused():
    linear = torch.nn.Linear(128, 48)
    layer = tersor.Linear.from_linear(linear, "bct:W8A8[group=64,act_group=64]")
    scales = layer.format.unpack_codes(layer.tensors(), layer.shape)[1].float()
    assert torch.equal(scales.log2(), scales.log2().round())
    assert (layer.dequantize() - linear.weight).abs().max() <= scales.max() / 2
    with pytest.raises(ValueError, match="accepted are symmetric integers"):
        tersor.Linear.from_linear(linear, "bct:W8A8_ASYM")
    with pytest.raises(ValueError, match="bits: found 2, accepted are 4 to 8"):
        blockwise.convert(bert(), 2)
    with pytest.raises(ValueError, match="found nothing to exchange"):
        blockwise.convert(torch.nn.Linear(3, 3))


def test_causal_attention_with_shared_heads():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()
    ids = torch.randint(0, 64, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits
        blockwise.convert(model)
        found = model(ids).logits
        shorter = model(ids[:, :7]).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.allclose(found[:, :7], shorter, atol=1e-5), "nothing later is seen"
