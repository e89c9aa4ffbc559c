"""FlatQuant's map of keys: learned with a block, kept in the model, used by its cache."""

import json

import pytest
import torch
from outliers import MODEL, text_tokens
from safetensors import safe_open
from safetensors.torch import save_file
from test_calibration import llama, logits, tokens
from transformers import AutoModelForCausalLM

import tersor
from tersor.io.errors import CheckpointError
from tersor.transforms.flatquant import fake_cache

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = "flatquant[steps=2,kv=4]:W4A4[group=32]"


@pytest.fixture(scope="module")
def compressed():
    model = llama()
    tersor.compress(model, SPEC, tokens(2))
    return model


def generated(model, cache, prompt, count=12):
    return model.generate(prompt, past_key_values=cache, max_new_tokens=count, do_sample=False)


def stepped(model, cache, ids, first=12, step=1):
    """Logits of a prompt and of the tokens after it, ``step`` at a time."""
    with torch.no_grad():
        found = [model(ids[:, :first], past_key_values=cache).logits]
        for i in range(first, ids.shape[1], step):
            found.append(model(ids[:, i:i + step], past_key_values=cache).logits)
    return torch.cat(found, 1)


def test_the_product_of_queries_and_keys_is_the_same(compressed):
    ids = tokens(1)[0]
    expected = logits(compressed, ids)
    plain = stepped(compressed, tersor.Cache(compressed, "K16V16"), ids)
    turned = stepped(compressed, tersor.Cache(compressed, "flatquant:K16V16"), ids)
    assert (turned - plain).abs().max() < 1e-4 * expected.abs().max()
    assert (turned - expected).norm() < 0.05 * expected.norm()


def test_each_layer_has_a_map_of_its_own_that_was_trained(compressed):
    maps = [layer.self_attn.key_transform for layer in compressed.model.layers]
    size = compressed.config.head_dim
    assert all(m.shape == (size, size) and m.dtype is torch.float32 for m in maps)
    assert not torch.equal(maps[0], maps[1])
    eye = torch.eye(size)
    assert all((m @ m.T - eye).abs().max() > 1e-4 for m in maps), "no longer orthogonal"
    plain = llama()
    tersor.compress(plain, "flatquant[steps=0]:W4A4[group=32]", tokens(2))
    assert not hasattr(plain.model.layers[0].self_attn, "key_transform")


def test_keys_are_stored_in_the_map(compressed):
    ids = tokens(1)[0]
    plain, turned = (tersor.Cache(compressed, spec) for spec in ("K16V16", "flatquant:K16V16"))
    for cache in (plain, turned):
        stepped(compressed, cache, ids)
    for i, layer in enumerate(compressed.model.layers):
        keys, values = plain.layers[i].store.decode()
        held, held_values = turned.layers[i].store.decode()
        wanted = keys @ layer.self_attn.key_transform.double()
        assert (held - wanted).abs().max() < 1e-3 * wanted.abs().max()
        assert (held_values - values).abs().max() < 1e-3 * values.abs().max()
    assert "flatquant" in str(turned.report())


@pytest.mark.parametrize("spec", ["flatquant:K4V4", "streaming[window=32]+flatquant:K8V8"])
def test_saved_and_loaded_models_say_the_same(compressed, spec, tmp_path):
    assert tersor.save(compressed, tmp_path / "q") == "tersor"
    loaded = tersor.load(tmp_path / "q")
    for one, other in zip(compressed.model.layers, loaded.model.layers):
        assert torch.equal(one.self_attn.key_transform, other.self_attn.key_transform)
    prompt = tokens(1)[0][:, :10]
    one, other = (generated(m, tersor.Cache(m, spec), prompt) for m in (compressed, loaded))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="key_transform, which tersor holds"):
        tersor.save(compressed, tmp_path / "other", as_="gptq")


def test_damaged_maps_are_refused(compressed, tmp_path):
    tersor.save(compressed, tmp_path / "q")
    file, config = tmp_path / "q" / "model.safetensors", tmp_path / "q" / "config.json"
    with safe_open(file, "pt") as source:
        tensors, about = {name: source.get_tensor(name) for name in source.keys()}, source.metadata()
    name = next(name for name in tensors if name.endswith("key_transform"))
    save_file({**tensors, name: torch.eye(3)}, file, about)
    with pytest.raises(CheckpointError, match=r"key_transform'?: found .*\[3, 3\]"):
        tersor.load(tmp_path / "q")
    save_file({key: value for key, value in tensors.items() if key != name}, file, about)
    for load in (tersor.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="key_transform'?: not in the checkpoint"):
            load(tmp_path / "q")
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, about)
    with pytest.raises(ValueError, match=r"key_transform: found .* accepted is a finite matrix .* with an inverse"):
        tersor.Cache(tersor.load(tmp_path / "q"), "flatquant:K4V4")
    whole = json.loads(config.read_text())
    for wrong in (["model.layers.0.mlp"], ["nowhere"], "model", [1]):
        whole["quantization_config"]["key_transforms"] = wrong
        config.write_text(json.dumps(whole))
        with pytest.raises(CheckpointError, match="key_transforms: found"):
            tersor.load(tmp_path / "q")


def test_what_does_not_go_together_is_named(compressed):
    for spec, said in (("flatquant:K4V4[hadamard=true]", "found hadamard=true, accepted is false"),
                       ("flatquant:K4V4[rope=pre]", "found rope=pre, accepted is rope=post"),
                       ("flatquant+fireq:K4V4", "found 'fireq' inside 'flatquant'"),
                       ("flatquant+xkv:K16V16", "found 'xkv' inside 'flatquant'")):
        with pytest.raises(ValueError, match=said):
            tersor.Cache(compressed, spec)
    with pytest.raises(ValueError, match=r"layer 0: found no key_transform, accepted are models of .*kv=4"):
        tersor.Cache(llama(), "flatquant:K4V4")
    with pytest.raises(ValueError, match="option 'kv': found 5, accepted are"):
        tersor.compress(llama(), "flatquant[kv=5]:W4A4", tokens(2))


@pytest.mark.parametrize("bits", [4, 8])
def test_training_rounds_as_pages_do(bits):
    """Keys by channels over 64 tokens, values by tokens."""
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)
    for x, axis, size in ((keys, 2, 64), (values, 3, 32)):
        found = fake_cache(x, bits, axis, size)
        step = (x.amax(axis, keepdim=True) - x.amin(axis, keepdim=True)) / (2**bits - 1)
        assert ((found - x).abs() <= step * 0.5001).all() and found.unique().numel() < x.numel()
        codes = (found - x.amin(axis, keepdim=True)) / step
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.round().max() == 2**bits - 1
    x = torch.randn(2, 1, 70, 16, requires_grad=True)  # a last group of six
    fake_cache(x, bits, 2, 64).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_the_learned_map_suits_a_cache_of_few_bits():
    """A packed cache changes the reference model less with the map than without it."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids, data = text_tokens(224).view(1, 224), text_tokens(1024, 60_000).view(4, 256)
    tersor.compress(model, "flatquant[steps=4,kv=2]:W8A8[act_group=32]", data)
    exact, error = logits(model, ids).log_softmax(-1), {}
    for spec in ("K2V2[recent=0,sinks=0]", "flatquant:K2V2[recent=0,sinks=0]"):
        found = stepped(model, tersor.Cache(model, spec), ids, 192, 8).log_softmax(-1)
        error[spec[:4]] = float((exact.exp() * (exact - found)).sum(-1)[:, 192:].mean())
    assert 0 < error["flat"] < 0.9 * error["K2V2"], error
