"""`save` and `load`: every kind of layer through the container that holds it, and directories that stay whole."""

import json
import os

import pytest
import torch
from io_models import compressed, config_of, gpt2, linears, llama, logits, moe, randomize, weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import tersor
from tersor.formats import presets  # noqa: F401  (fills the registry)
from tersor.io import load, save
from tersor.io.write import choose
from tersor.registry import FORMATS, resolve
from tersor.transforms.steps import ChannelScale, Permute


def same(model, again):
    assert torch.equal(logits(again), logits(model))
    held = compressed(model)
    assert compressed(again).keys() == held.keys()
    for name, layer in held.items():
        other = again.get_submodule(name)
        assert type(other) is type(layer)
        tensors = layer.tensors()
        assert other.tensors().keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert other.tensors()[key].dtype == tensor.dtype and torch.equal(other.tensors()[key], tensor)


@pytest.mark.parametrize("example", [entry.example for entry in FORMATS])
def test_every_format_comes_back_bit_by_bit(tmp_path, example):
    model = llama(layers=1, hidden=256)
    randomize(model, example, ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"])
    save(model, tmp_path / "q", "tersor")
    same(model, load(tmp_path / "q"))


def test_scales_of_another_dtype_than_the_models(tmp_path):
    model = randomize(llama(dtype=torch.float32, layers=1), "W4A16[group=32,scale=fp16]")
    assert save(model, tmp_path / "q") == "compressed-tensors"  # exact in float32
    assert torch.equal(logits(load(tmp_path / "q")), logits(model))
    model = randomize(llama(layers=1), "W5A16[group=32,scale=fp32]")
    for layer in compressed(model).values():
        layer.tensors()["scales"].add_(1e-5)  # no longer exact in bfloat16
    assert save(model, tmp_path / "p") == "tersor"
    same(model, load(tmp_path / "p"))


def test_steps_and_methods(tmp_path):
    steps = [ChannelScale(torch.rand(64) + 0.5), Permute(torch.randperm(64))]
    model = randomize(llama(layers=1), "W4A16[group=32]", ["model.layers.0.self_attn.o_proj"], steps)
    model.model.layers[0].self_attn.o_proj.method = "gptq"
    assert save(model, tmp_path / "q") == "tersor"
    group = config_of(tmp_path / "q")["config_groups"]["group_0"]
    assert group["pre"] == ["scale", "permute"] and group["method"] == "gptq" and group["format"] == "pack-quantized"
    again = load(tmp_path / "q")
    same(model, again)
    assert torch.equal(again.model.layers[0].self_attn.o_proj.pre[0].scale, steps[0].scale)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("names,container", [
    (["lm_head"], "compressed-tensors"), (["model.embed_tokens"], "compressed-tensors"),
    (["model.embed_tokens", "lm_head"], "compressed-tensors"),
])
def test_heads_and_embeddings(tmp_path, tie, names, container):
    model = randomize(llama(tie=tie, layers=1), "W8A16[group=32]", names)
    assert save(model, tmp_path / "q") == container
    again = load(tmp_path / "q")
    same(model, again)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_embeddings_left_alone_stay_tied(tmp_path):
    model = randomize(llama(tie=True), "W4A16[group=32]")
    save(model, tmp_path / "q")
    assert "lm_head.weight" not in load_file(tmp_path / "q" / "model.safetensors")
    again = load(tmp_path / "q")
    same(model, again)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_biases(tmp_path):
    model = randomize(llama(bias=True), "W4A16[group=32]")
    for as_ in ("compressed-tensors", "gptq", "awq", "tersor"):
        save(model, tmp_path / as_, as_)
        again = load(tmp_path / as_)
        assert torch.equal(logits(again), logits(model))
        assert again.model.layers[0].self_attn.q_proj.bias is not None


def test_conv1d_goes_to_gptq_and_to_ours(tmp_path):
    model = randomize(gpt2(), "W4A16[group=32]")
    assert save(model, tmp_path / "q") == "gptq"
    assert torch.equal(logits(load(tmp_path / "q")), logits(model))
    model = randomize(gpt2(), "W5A16[group=32]")
    assert save(model, tmp_path / "p") == "tersor"
    same(model, load(tmp_path / "p"))


def test_fused_experts(tmp_path):
    model = randomize(moe(), "W4A16[group=32]")
    assert save(model, tmp_path / "dense-experts") == "compressed-tensors"
    same(model, load(tmp_path / "dense-experts"))
    randomize(model, "W4A16[group=32]", ["model.layers.0.mlp.experts"])
    assert save(model, tmp_path / "q") == "tersor"
    same(model, load(tmp_path / "q"))


def test_plain_from_pretrained_after_import_tersor(tmp_path):
    model = randomize(llama(), "W5A16[group=32]")
    save(model, tmp_path / "q", "tersor")
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "q"))
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map={"": "cpu"}))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    for name, layer in compressed(half).items():  # stored tensors keep their dtype
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight.bfloat16(), model.get_submodule(name).weight)
    with pytest.raises(ValueError, match="offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map={"model": "cpu", "lm_head": "disk"},
                                             offload_folder=str(tmp_path / "off"))


def test_native_save_pretrained_and_what_changes_later(tmp_path):
    model = llama()
    tersor.compress(model, "rtn:W4A16[group=32]")
    model.save_pretrained(tmp_path / "q")
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "q" / "model.safetensors")
    assert config_of(tmp_path / "q")["quant_method"] == "compressed-tensors"
    same(model, load(tmp_path / "q"))
    again = load(tmp_path / "q")
    randomize(again, "W8A16[group=32]", ["lm_head"])
    again.save_pretrained(tmp_path / "p")
    same(again, load(tmp_path / "p"))


def test_shards(tmp_path):
    model = randomize(llama(layers=3), "W4A16[group=32]")
    save(model, tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 2
    same(model, load(tmp_path / "q"))


def test_no_weight_is_dequantized_on_the_way(tmp_path, monkeypatch):
    model = randomize(llama(), "W4A16[group=32]")

    def never(*args, **kwargs):
        raise AssertionError("dequantized")

    monkeypatch.setattr(tersor.Int, "unpack", never)
    monkeypatch.setattr(tersor.ops.int_dequantize, "cpu", never)
    save(model, tmp_path / "q")
    load(tmp_path / "q")


@pytest.mark.parametrize("as_,spec,names,match", [
    ("compressed-tensors", "FP8", None, "cannot hold layer 'model.layers.0.self_attn.q_proj': found format"),
    ("gptq", "W5A16[group=32]", None, "found 5 bits, accepted are 2, 3, 4 and 8"),
    ("gptq", "W4A8[group=32]", None, "exact activations"),
    ("gptq", "W4A16[group=32]", ["model.embed_tokens"], "found Embedding"),
    ("awq", "W8A16[group=32]", None, "found 8 bits, accepted are 4"),
    ("nonsense", "W4A16[group=32]", None, "accepted are auto, compressed-tensors, gptq, awq, tersor"),
])
def test_refusals_name_the_layer(tmp_path, as_, spec, names, match):
    model = randomize(llama(layers=1), spec, names)
    with pytest.raises(ValueError, match=match):
        save(model, tmp_path / "q", as_)
    assert not (tmp_path / "q").exists() and not list(tmp_path.iterdir())


def test_mixed_models_are_not_gptq():
    model = randomize(randomize(llama(layers=1), "W4A16[group=32]"), "W8A16[group=32]", ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="mlp.up_proj.*one width and group size"):
        choose(model, "gptq")
    assert choose(model).container == "compressed-tensors"


def test_ragged_groups_are_not_compressed_tensors():
    model = randomize(llama(layers=1, hidden=96), "W4A16[group=64]")
    with pytest.raises(ValueError, match="96 columns are not whole groups of 64"):
        choose(model, "compressed-tensors")
    assert choose(model).container == "gptq"


def test_what_is_not_a_compressed_transformers_model(tmp_path):
    with pytest.raises(TypeError, match="accepted is a transformers model"):
        save(nn.Linear(4, 4), tmp_path / "q")
    with pytest.raises(ValueError, match="found no compressed layer"):
        save(llama(), tmp_path / "q")


# -- directories ------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    save(model, tmp_path / "q")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "q").iterdir()}

    class Tokenizer:
        def save_pretrained(self, directory):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save(model, tmp_path / "q", tokenizer=Tokenizer())
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "q").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]
    monkeypatch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(OSError("renaming failed")))
    with pytest.raises(OSError, match="renaming failed"):
        save(model, tmp_path / "fresh")
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]


def test_directories_that_are_replaced_and_not(tmp_path):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    save(model, tmp_path / "q")
    (tmp_path / "q" / "leftover.safetensors").write_bytes(b"old")
    save(model, tmp_path / "q")
    assert not (tmp_path / "q" / "leftover.safetensors").exists()
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not just a model"):
        save(model, tmp_path / "home")
    (tmp_path / "q" / "results").mkdir()
    with pytest.raises(ValueError, match="also holds 'results'"):
        save(model, tmp_path / "q")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"
    save(model, tmp_path / "q", overwrite=True)
    assert not (tmp_path / "q" / "results").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="found a file"):
        save(model, tmp_path / "file")


def test_tokenizer_is_saved_beside(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model = randomize(llama(layers=1), "W4A16[group=32]")
    save(model, tmp_path / "q", tokenizer=tokenizer)
    assert (tmp_path / "q" / "tokenizer.json").exists()
    assert {name: w.shape for name, w in weights(load(tmp_path / "q")).items()} == \
        {name: w.shape for name, w in weights(model).items()}
    assert resolve("W4A16[group=32]").format == model.model.layers[0].mlp.up_proj.format
