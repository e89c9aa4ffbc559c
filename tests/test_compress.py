"""compress and explain end to end on small models, and how they refuse."""

import copy

import pytest
import torch
from test_calibration import gemma
from torch import nn
from transformers import BartConfig, BartModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import tersor
from tersor.api import token_batches
from tersor.io.errors import Unsupported
from tersor.io.layout import Site
from tersor.io.plan import Slot
from tersor.layer import lookup_scale


def llama(tie=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, tie_word_embeddings=tie)
    return LlamaForCausalLM(config).eval().to(dtype)


TOKENS = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(1))
LINEARS = 14


@pytest.mark.parametrize("recipe", ["rtn:W4A16[group=32]", "gptq:W4A16[group=32]", "awq:W4A16[group=32,sym=false]",
                                    "smoothquant:W8A8", "awq+gptq:W3A16[group=32]"])
def test_compress_reports_every_layer_and_the_model_still_runs(recipe):
    model = llama()
    before = model(TOKENS).logits.float()
    calls = []
    report = tersor.compress(model, recipe, calibration=TOKENS, progress=lambda *a: calls.append(a))
    assert len(report.rows) == LINEARS and calls and set(report.kept) == {"model.embed_tokens", "lm_head"}
    assert all(row.bits > 3 and row.relative_error is not None and not row.kernel.startswith("reference")
               for row in report.rows)
    after = model(TOKENS).logits.float()
    assert 0 < (after - before).norm() / before.norm() < 0.5
    total = sum(t.nbytes for t in list(model.parameters()) + list(model.buffers()))
    assert abs(report.bytes_after - total) < 0.02 * total
    assert report.bytes_before == sum(p.nbytes for p in llama().parameters())
    explained = tersor.explain(model)
    assert [row.name for row in explained.rows] == [row.name for row in report.rows]
    assert explained.rows[0].method == report.rows[0].method
    assert "lm_head" in str(report)


def test_layers_share_calls_and_generate():
    model = llama()
    tersor.compress(model, "rtn:W4A16[group=32]")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.siblings is attention.v_proj.siblings is not None
    out = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, tersor.Linear):
            layer.siblings = None
    assert torch.equal(out, twin.generate(TOKENS[:1], max_new_tokens=4, do_sample=False))


def test_the_head_of_a_tied_model_can_be_named():
    model = llama(tie=True)
    report = tersor.compress(model, {"lm_head": "rtn:W8A16[group=32]", "*": "rtn:W4A16[group=32]"})
    assert isinstance(model.lm_head, tersor.Linear) and isinstance(model.model.embed_tokens, nn.Embedding)
    assert not model.config.tie_word_embeddings
    assert report.rows[-1].name == "lm_head" and "model.embed_tokens" in report.kept
    model.tie_weights()
    assert isinstance(model.lm_head, tersor.Linear) and torch.isfinite(model(TOKENS).logits).all()


def test_a_layer_that_the_model_uses_twice_is_compressed_in_both_places():
    model = llama()
    first, last = model.model.layers[0].mlp, model.model.layers[-1].mlp
    last.down_proj = first.down_proj
    before = model(TOKENS).logits
    tersor.compress(model, "rtn:W8A16[group=32]")
    assert isinstance(last.down_proj, tersor.Linear) and last.down_proj is first.down_proj
    assert (model(TOKENS).logits - before).norm() < 0.02 * before.norm()


def test_embeddings_can_be_named():
    model = llama()
    tersor.compress(model, {"embed_tokens": "rtn:W8A16[group=32]", "*": "rtn:W4A16[group=32]"})
    assert isinstance(model.model.embed_tokens, tersor.Embedding)
    assert torch.isfinite(model(TOKENS).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scaled_word_embeddings_keep_their_scale(tmp_path, dtype):
    """Gemma's lookups are multiplied with a number of the model's dtype, BART's with a Python float."""
    model, ids = gemma(hidden_size=72, head_dim=16).to(dtype), torch.randint(0, 128, (2, 5))
    plain = copy.deepcopy(model)
    tersor.compress(model, {"embed_tokens": "rtn:W8A16[group=32]", "*": "keep"})
    layer, source = model.model.embed_tokens, plain.model.embed_tokens
    assert isinstance(layer, tersor.Embedding)
    source.weight = nn.Parameter(layer.dequantize())
    assert torch.equal(layer(ids), source(ids)) and layer(ids).norm() > 8 * layer.dequantize()[ids].norm()
    tersor.save(model, tmp_path / "q")
    again = tersor.load(tmp_path / "q")
    assert torch.equal(again.model.embed_tokens(ids), layer(ids))
    if dtype == torch.float32:  # `to` rounds the frequencies of rotations as well
        assert torch.equal(again(ids).logits, model(ids).logits)

    source = BartScaledWordEmbedding(128, 64, 0, 72 ** 0.5).to(dtype)
    layer = tersor.Embedding.from_embedding(source, "rtn:W8A16[group=32]")
    source.weight = nn.Parameter(layer.dequantize())
    assert torch.equal(layer(ids), source(ids)) and "scale=8.48528" in repr(layer)
    assert layer.embed_scale == 72 ** 0.5 and lookup_scale(layer) == layer.scale
    assert not hasattr(tersor.Embedding(4, 32, "W8A16[group=32]"), "embed_scale")


def test_embeddings_with_lookups_of_their_own_are_refused():
    model = BartModel(BartConfig(vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
                                 decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2))
    with pytest.raises(ValueError, match="layer 'encoder.embed_positions': embedding: found "
                                         "BartLearnedPositionalEmbedding, whose lookups are its own"):
        tersor.compress(model, {"embed_positions": "rtn:W8A16[group=32]", "*": "keep"})
    assert type(model.encoder.embed_positions).__name__ == "BartLearnedPositionalEmbedding"
    site = Site("positions", "embedding", (66, 64), torch.float32, False, module=model.encoder.embed_positions)
    with pytest.raises(Unsupported, match="a file: module 'positions': embedding: found BartLearnedPositional"):
        Slot(site, None, {}, None, "a file: module 'positions'")  # before a loader reads a tensor
    model = llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match="layer 'model.embed_tokens': embedding: found max_norm.*'keep'"):
        tersor.compress(model, {"embed_tokens": "rtn:W8A16[group=32]", "*": "keep"})


def test_conv1d():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)).eval()
    before = model(TOKENS).logits
    report = tersor.compress(model, "gptq:W8A16[group=32]", calibration=TOKENS)
    assert len(report.rows) == 8 and isinstance(model.transformer.h[0].attn.c_attn, tersor.Linear)
    assert (model(TOKENS).logits - before).norm() / before.norm() < 0.02


def test_strict_refuses_what_has_no_kernel():
    model = llama()
    with pytest.raises(ValueError, match="strict: layer 'model.layers.0.self_attn.q_proj'.*reference"):
        tersor.compress(model, "rtn:2:4", strict=True)
    assert isinstance(model.lm_head, nn.Linear) and not tersor.explain(model).rows
    tersor.compress(model, "rtn:W4A16[group=32]", strict=True)


def test_options_reach_methods_and_unknown_ones_are_refused():
    tersor.compress(llama(), "gptq:W4A16[group=32]", calibration=TOKENS, damp=0.1, samples=2)
    with pytest.raises(ValueError, match="option 'dampp'"):
        tersor.compress(llama(), "gptq:W4A16[group=32]", calibration=TOKENS, dampp=0.1)


@pytest.mark.parametrize("calibration,message", [
    (None, "gptq looks at data and found none"),
    ([], "found no tokens"),
    (["text"], "without a tokenizer"),
    ([torch.randn(4)], "found torch.float32"),
    ([3], "found int"),
    ([""], "without a tokenizer"),
])
def test_calibration_that_cannot_be_used(calibration, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        tersor.compress(model, "gptq:W4A16", calibration=calibration)
    assert not tersor.explain(model).rows


@pytest.mark.parametrize("recipe", ["rtn:W4A16[group=32]", "gptq:W4A16[group=32]", "awq:W4A16[group=32]"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_name_the_layer(recipe, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        tersor.compress(model, recipe, calibration=TOKENS)


def test_calibration_that_is_not_finite_names_the_layer():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(TOKENS[0, 0])] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0"):
        tersor.compress(model, "gptq:W4A16[group=32]", calibration=TOKENS)


def test_already_compressed_models_are_refused():
    model = llama()
    tersor.compress(model, "rtn:W4A16[group=32]")
    with pytest.raises(ValueError, match="names no layer|already"):
        tersor.compress(model, "rtn:W4A16[group=32]")


def test_the_report_compares_with_an_original():
    model = llama()
    original = copy.deepcopy(model)
    report = tersor.compress(model, "rtn:W4A16[group=32]", calibration=TOKENS, original=original)
    assert report.quality.kl > 0 and 0 < report.quality.agreement <= 1 and "against the original" in str(report)
    with pytest.raises(ValueError, match="the model itself"):
        tersor.compress(original, "rtn:W4A16[group=32]", calibration=TOKENS, original=original)
    with pytest.raises(ValueError, match="no calibration"):
        tersor.compress(original, "rtn:W4A16[group=32]", original=llama())


def test_token_batches():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(range(len(text)))}

    batches = token_batches(["a" * 5, "b" * 7], Tokenizer(), samples=8, length=4)
    assert [batch.tolist() for batch in batches] == [[[0, 1, 2, 3]], [[4, 0, 1, 2]], [[3, 4, 5, 6]]]
    assert len(token_batches(["a" * 100], Tokenizer(), samples=3, length=4)) == 3
    assert token_batches("abc", Tokenizer(), length=8)[0].shape == (1, 3)
    assert [b.shape for b in token_batches(TOKENS, None, samples=4)] == [(1, 32)] * 4


def test_specs_lists_every_name_with_its_kernel():
    infos = {info.name: info for info in tersor.specs()}
    assert infos["W4A16"].kernel.startswith("int_linear") and infos["W4A8"].kernel.startswith("int_linear")
    assert infos["2:4/W4A16"].kernel.startswith("reference") and infos["W4A4"].kernel.startswith("int_linear")
    assert {"rtn", "gptq", "awq", "smoothquant"} <= {name for name, info in infos.items() if info.kind == "method"}
    assert all(info.help for info in infos.values())
