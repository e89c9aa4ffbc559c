"""BCT: shifts and tables against exact arithmetic, and an encoder in small integers."""

import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (BartConfig, BartModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MPNetConfig,
                          MPNetModel, T5Config, T5EncoderModel)

import tersor
from tersor import blockwise
from tersor.blockwise import matmul, quantize, shifts, softmax, table, through_table
from tersor.io import CheckpointError

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
    # half a step of 8 bits is at most 1 / 127 of the largest number; 16 bits before it are a 200th of that
    assert (norm(x) - expected).abs().max() < 1.01 * expected.abs().max() / 127
    assert (norm(torch.zeros(1, 96)) - quantize(norm.bias.data[None], 8, 64).values()).abs().max() == 0


@pytest.mark.parametrize("width", [1, 768, 4096, 8192, 65536])
def test_normalisation_is_exact_at_any_width_and_range(width):
    torch.manual_seed(width)
    plain = torch.randn(width)
    x = torch.stack([plain, plain.sign(), torch.ones(width), torch.full((width,), -1e30), 1e30 * plain, 1e-30 * plain,
                     1e-38 * plain.sign(), torch.where(torch.arange(width) == 0, 1e4, plain)])
    norm = torch.nn.LayerNorm(width)
    norm.weight.data, norm.bias.data = torch.rand(width) + 0.5, torch.randn(width)
    real = F.layer_norm(x.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    norm.__class__ = blockwise.LayerNorm
    integers = quantize(x, 16)
    y = torch.empty_like(x)
    for row, (codes, shift) in enumerate(zip(integers.codes[:, 0].tolist(), integers.shift.flatten().tolist())):
        total = sum(codes)
        square = width * sum(code * code for code in codes) - total * total  # of any size
        root = math.sqrt(square + width * width * norm.eps * 2.0 ** (2 * shift))
        y[row] = torch.tensor([(width * code - total) / root for code in codes], dtype=torch.float64)
    y = y * norm.weight.data + norm.bias.data
    with torch.no_grad():
        assert torch.equal(norm(x), quantize(y, 8, 64).values())
        norm.blockwise = 16, 0
        assert (norm(x) - real).abs().max() < 1e-3 * real.abs().max()


def test_attention_rounds_queries_keys_weights_and_values():
    bits, size = 4, 16

    def rounded(x):
        blocks = F.pad(x.double(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        step = 2.0 ** -((2 ** (bits - 1) - 1) / blocks.abs().amax(-1, keepdim=True)).log2().floor()
        return ((blocks / step).round() * step).flatten(-2)[..., : x.shape[-1]]

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 40, 24)
    module = SimpleNamespace(blockwise=(bits, size))
    weights = softmax((rounded(query) @ rounded(key).transpose(-1, -2)).float() * 24**-0.5, bits)
    found = blockwise.attention(module, query, key, value, None)[0].transpose(1, 2)
    assert torch.equal(found, (rounded(weights) @ rounded(value)).float())
    assert (found - (weights.double() @ rounded(value))).abs().max() > 1e-3
    # Values of one token each: what comes out are the weights themselves.
    shown = blockwise.attention(module, query, key, torch.eye(40).expand(2, 3, 40, 40), None)[0].transpose(1, 2)
    assert torch.equal(shown, rounded(weights).float())
    assert all(len(row.unique()) <= 2 ** (bits - 1) for row in shown[..., :size].reshape(-1, size))
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"found {name}, accepted is plain softmax"):
            blockwise.attention(module, query, key, value, None, **{name: 1.0})


def bert(**options):
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=256, max_position_embeddings=64, **options)).eval()


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
    for name, found in (("bits", 8.0), ("attention_bits", 0), ("block", 0), ("block", 65537)):
        with pytest.raises(ValueError, match=f"^{name}: found {found}, accepted are"):
            blockwise.convert(bert(), **{name: found})
    with pytest.raises(ValueError, match="found nothing to exchange"):
        blockwise.convert(torch.nn.Linear(3, 3))


def test_causal_attention_with_shared_heads():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()
    ids = torch.randint(0, 64, (1, 12))
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.warns(UserWarning, match=r"left as they are: .*model.norm \(LlamaRMSNorm\)"):
            blockwise.convert(model)
        found = model(ids).logits
        shorter = model(ids[:, :7]).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.allclose(found[:, :7], shorter, atol=1e-5), "nothing later is seen"


def test_converted_models_come_back(tmp_path):
    model = bert()
    ids = torch.randint(0, 200, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    tersor.compress(model, RECIPE)
    dense = outputs(model, ids, mask)
    blockwise.convert(model, bits=8, block=32, attention_bits=6)
    model.encoder.layer[1].output.LayerNorm.blockwise = 4, 16
    expected = outputs(model, ids, mask)
    assert not torch.equal(expected, dense)
    assert tersor.save(model, tmp_path / "first") == "tersor"
    loaded = tersor.load(tmp_path / "first")
    assert torch.equal(outputs(loaded, ids, mask), expected)
    assert blockwise.settings(loaded) == blockwise.settings(model)
    assert torch.equal(outputs(BertModel.from_pretrained(tmp_path / "first"), ids, mask), expected)
    tersor.save(loaded, tmp_path / "second")
    text, later = ((tmp_path / name / "config.json").read_text() for name in ("first", "second"))
    assert blockwise.ATTENTION not in text
    with pytest.raises(ValueError, match="compressed-tensors cannot hold layer .* it computes in blocks"):
        tersor.save(model, tmp_path / "third", as_="compressed-tensors")

    config = json.loads(text)
    entries = config["quantization_config"]["blockwise"]
    assert entries == json.loads(later)["quantization_config"]["blockwise"]
    assert sorted((entry["bits"], entry["block"]) for entry in entries) == [(4, 16), (6, 32), (8, 32)]
    for wrong, message in (({}, "blockwise: found"), (["pooler"], "blockwise: found"),
                           ([{**entries[0], "bits": 9}], "blockwise.0.bits: found 9"),
                           ([{**entries[0], "block": 0}], "blockwise.0.block: found 0"),
                           ([{**entries[0], "targets": [3]}], "blockwise.0.targets: found"),
                           (entries + entries[:1], "blockwise.3.targets: found"),
                           ([{**entries[0], "targets": ["pooler.dense"]}], "'pooler.dense': found Linear"),
                           ([{**entries[0], "targets": ["nowhere"]}], "'nowhere': found no module")):
        config["quantization_config"]["blockwise"] = wrong
        (tmp_path / "first/config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            tersor.load(tmp_path / "first")


def test_converting_again_converts_everything():
    model, fresh = bert(), bert()
    ids = torch.randint(0, 200, (2, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = blockwise.convert(model), blockwise.convert(model, 4, block=32)
        blockwise.convert(fresh, 4, block=32)
    assert first == again and set(blockwise.settings(model).values()) == {(4, 32)}
    assert torch.equal(outputs(model, ids, None), outputs(fresh, ids, None))


def test_what_is_not_known_is_named():
    torch.manual_seed(0)
    model = MPNetModel(MPNetConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=32, hidden_act="mish")).eval()
    model.extra = torch.nn.ModuleList([torch.nn.LayerNorm((4, 4)), torch.nn.LayerNorm(8, elementwise_affine=False),
                                       torch.nn.LayerNorm(65537), torch.nn.MultiheadAttention(8, 2)])
    with pytest.warns(UserWarning, match="left as they are: encoder.layer.0.attention.attn") as seen:
        made = blockwise.convert(model)
    left = {name: kind for name, kind in made.items() if kind.startswith("left as it is: ")}
    assert {name: kind.split(": ")[1] for name, kind in left.items()} == {
        "encoder.layer.0.attention.attn": "MPNetSelfAttention",
        "encoder.layer.0.intermediate.intermediate_act_fn": "MishActivation",
        "extra.0": "LayerNorm", "extra.1": "LayerNorm", "extra.2": "LayerNorm", "extra.3": "MultiheadAttention"}
    assert len(seen) == 1 and all(name in str(seen[0].message) for name in left)
    assert not set(left) & set(blockwise.settings(model)) and len(blockwise.settings(model)) == len(made) - len(left)


def test_parts_of_models():
    whole, part, hidden = bert(), bert(), torch.randn(1, 9, 128)
    blockwise.convert(whole)
    blockwise.convert(part.encoder)
    with torch.no_grad():
        assert torch.equal(part.encoder(hidden)[0], whole.encoder(hidden)[0])
    # An attention that is not converted and has the same configuration computes as before.
    torch.manual_seed(0)
    model = BartModel(BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
                                 decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)).eval()
    ids, states = torch.randint(3, 64, (2, 6)), torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = model.decoder(ids, encoder_hidden_states=states).last_hidden_state
        before = model.encoder(ids).last_hidden_state
        blockwise.convert(model.encoder)
        assert torch.equal(model.decoder(ids, encoder_hidden_states=states).last_hidden_state, expected)
        change = (model.encoder(ids).last_hidden_state - before).norm() / before.norm()
    assert 1e-4 < change < 0.05


def test_positions_count_in_the_scores():
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_ff=64, d_kv=16, num_layers=2, num_heads=4)).eval()
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data *= 5
    ids = torch.randint(0, 64, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    expected = outputs(model, ids, mask)
    with pytest.warns(UserWarning, match="T5LayerNorm"):
        blockwise.convert(model)
    change = (outputs(model, ids, mask) - expected)[mask.bool()].norm() / expected[mask.bool()].norm()
    assert 1e-4 < change < 0.05


def test_gated_feed_forwards_take_the_exchanged_function():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=16)).eval()
    twin, ids = copy.deepcopy(model), torch.randint(0, 64, (1, 12))
    with pytest.warns(UserWarning, match="LlamaRMSNorm"):
        tersor.compress(model, "bct:W8A8[group=64,act_group=64]")
        blockwise.convert(model)
        blockwise.convert(twin)
        tersor.compress(twin, "bct:W8A8[group=64,act_group=64]")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
