"""Shared key heads: the cache method, and the conversion of a model (arXiv 2406.07056)."""

import copy

import pytest
import torch
from test_kv_models import SMALL, logits_by_steps, make, prompt
from transformers import (AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM)

import tersor
from tersor.kv import calibrate
from tersor.kv.convert import share_heads
from tersor.kv.record import recording

pytestmark = pytest.mark.usefixtures("one_thread")


def biased(heads=4, seed=0):
    """A Qwen2 with biases that matter and ``heads`` key heads."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM._from_config(Qwen2Config(**SMALL | {"num_key_value_heads": heads}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def data(seed=5):
    return torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(seed))


def seen_by(model, ids):
    found = {}
    with torch.no_grad(), recording(model, lambda seen: found.__setitem__(seen.layer, seen)):
        logits = model(ids, use_cache=False).logits
    return found, logits


@pytest.mark.parametrize("spec", ["share_heads[heads=4]:K16V16", "share_heads[heads=2,rank=32]:K16V16",
                                  "share_heads[heads=1,rank=64]:K16V16"])
def test_cache_at_full_rank_is_exact(spec):
    model, ids = biased(), prompt(2, 100)
    cache = tersor.Cache(model, calibrate(model, spec, data()))
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    assert (logits_by_steps(model, cache, ids) - truth).norm() < 1e-4 * truth.norm()


def test_cache_discards_what_the_plan_says_and_less_than_any_other_basis():
    model, ids = biased(), data()
    plan = calibrate(model, "share_heads[heads=2]:K16V16", ids, length=64)
    seen, _ = seen_by(model, ids)
    random = torch.linalg.qr(torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(1)))[0]
    for layer, tensors in plan.tensors["share_heads"].items():
        for part in ("key", "value"):
            beside = getattr(seen[layer], part).unflatten(1, (2, 2)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
            lost = [((beside - beside @ p @ p.mT).square().sum((1, 2)) / beside.square().sum((1, 2)))
                    for p in (tensors[f"{part}_basis"], random)]
            assert torch.allclose(lost[0], tensors[f"{part}_discarded"].float(), rtol=1e-3)
            assert (lost[0] < 0.9 * lost[1]).all()


def test_cache_is_smaller_packs_and_serves_beams_and_crops():
    model, ids = biased(), prompt(2, 100)
    plan = calibrate(model, "share_heads[heads=2]:K16V16", data())
    cache, plain = tersor.Cache(model, plan), tersor.Cache(model, "K16V16")
    ours = logits_by_steps(model, cache, ids)
    logits_by_steps(model, plain, ids)
    assert abs(cache.nbytes / plain.nbytes - 0.5) < 0.01
    packed = tersor.Cache(model, calibrate(model, "share_heads[heads=2]:K8V8[group=32]", data()))
    near = logits_by_steps(model, packed, ids)
    assert (near - ours).norm() < 0.02 * ours.norm() and packed.nbytes < 0.6 * cache.nbytes
    cache.crop(-20)
    with torch.no_grad():
        again = model(ids[:, 80:], past_key_values=cache).logits
    assert (again - ours[:, 80:]).norm() < 1e-4 * ours.norm()
    out = model.generate(ids[:, :40], max_new_tokens=30, num_beams=3, do_sample=False,
                         past_key_values=tersor.Cache(model, plan))
    assert out.shape[1] == 70


def test_cache_refuses():
    model = biased()
    with pytest.raises(ValueError, match="heads: found 3 for 4 key heads, accepted are divisors of 4"):
        calibrate(model, "share_heads[heads=3]:K16V16", data())
    with pytest.raises(ValueError, match="rank: found 24"):
        calibrate(model, "share_heads[heads=2,rank=24]:K16V16", data())
    with pytest.raises(ValueError, match="rope=pre"):
        calibrate(model, "share_heads:K4V4[rope=pre]", data())
    with pytest.raises(ValueError, match="learns from data first"):
        tersor.Cache(model, "share_heads:K16V16")


def test_model_with_as_many_heads_is_the_same():
    model, ids = biased(), prompt(2, 60)
    same = share_heads(model, 4, data()).model
    with torch.no_grad():
        assert torch.allclose(same(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["halves", "partial"])
def test_model_whose_heads_are_multiples_of_each_other_loses_nothing(kind):
    """Keys that differ by a complex factor for each pair, and values by a matrix, fit in one head."""
    if kind == "halves":
        model = biased()
    else:
        torch.manual_seed(0)
        model = PhiForCausalLM._from_config(PhiConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=97, partial_rotary_factor=0.5, max_position_embeddings=512)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    generator = torch.Generator().manual_seed(2)
    half = 8 if kind == "halves" else 4
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear, turned in ((attention.k_proj, True), (attention.v_proj, False)):
            for tensor in (linear.weight.data, linear.bias.data):
                heads = tensor.view(4, 16, -1)
                for i in range(4):
                    if turned:
                        pairs = torch.complex(heads[0, :half], heads[0, half:2 * half])
                        angle = torch.rand(half, 1, generator=torch.Generator().manual_seed(i)) * 6
                        pairs = pairs * torch.polar(torch.full_like(angle, 0.5 + i / 4), angle)
                        heads[i, :2 * half] = torch.cat((pairs.real, pairs.imag))
                        heads[i, 2 * half:] = heads[0, 2 * half:] * (1 + i / 4)
                    else:
                        matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) / 4
                        heads[i] = matrix @ heads[0]
    ids = torch.randint(3, 97, (2, 60), generator=generator)
    shared = share_heads(model, 1, data())
    assert shared.model.config.num_key_value_heads == 1 and model.config.num_key_value_heads == 4
    assert all(row.key_energy < 1e-6 and row.value_energy < 1e-6 for row in shared.rows)
    with torch.no_grad():
        truth = model(ids).logits
        assert (shared.model(ids).logits - truth).norm() < 1e-3 * truth.norm()


def test_merged_values_are_absorbed_exactly_and_energy_is_what_the_cache_loses():
    """Logits equal those of the original whose keys and values are projected as the rows say, in its attention."""
    model, ids = biased(), data()
    shared = share_heads(model, 2, ids, length=64)
    original, _ = seen_by(model, ids)
    smaller, logits = seen_by(shared.model, ids)
    for row in shared.rows[:1]:  # the first layer sees the same input in both
        beside = original[row.layer].value.unflatten(1, (2, 2)).transpose(2, 3).flatten(3)
        energy = beside.square().sum() - smaller[row.layer].value.square().sum()
        assert abs(energy / beside.square().sum() - row.value_energy) < 1e-4
        energy = original[row.layer].key.square().sum() - smaller[row.layer].key.square().sum()
        assert abs(energy / original[row.layer].key.square().sum() - row.key_energy) < 1e-4

    def project(seen):
        values = seen.value.unflatten(1, (2, 2)).transpose(2, 3).flatten(3)
        basis = torch.linalg.svd(values.transpose(0, 1).flatten(1, 2), full_matrices=False)[2][:, :16].mT
        values = (values @ basis @ basis.mT).unflatten(3, (2, 16)).transpose(2, 3).flatten(1, 2)
        pairs = torch.complex(*seen.key.unflatten(1, (2, 2)).chunk(2, -1))  # [batch, group, head, token, pair]
        rows = pairs.permute(1, 4, 0, 3, 2).flatten(2, 3)
        top = torch.linalg.svd(rows, full_matrices=False)[2][:, :, :1].mH  # [group, pair, head, 1] of V^H
        kept = (rows @ top @ top.mH).unflatten(2, (len(ids), -1)).permute(2, 0, 4, 3, 1)
        return seen.query, torch.cat((kept.real, kept.imag), -1).flatten(1, 2), values

    def first_layer(seen):
        return project(seen) if seen.layer == 0 else None

    only = copy.deepcopy(model)
    only.model.layers = only.model.layers[:1]
    only.config.num_hidden_layers = 1
    with torch.no_grad(), recording(only, first_layer):
        truth = only(ids, use_cache=False).logits
    one = share_heads(only, 2, ids, length=64).model
    with torch.no_grad():
        assert (one(ids, use_cache=False).logits - truth).norm() < 1e-3 * truth.norm()


def test_saved_and_loaded_by_transformers(tmp_path):
    model, ids = biased(), prompt(1, 40)
    smaller = share_heads(model, 2, data()).model
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.config.num_key_value_heads == 2
    assert loaded.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, smaller(ids).logits, atol=1e-5)
    cache = tersor.Cache(loaded, "K4V4")
    assert loaded.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache).shape == (1, 48)


def test_conversion_refuses():
    with pytest.raises(ValueError, match=r"self_attn: found .*k_norm.* between projection and attention"):
        share_heads(make("qwen3"), 1, data())
    with pytest.raises(ValueError, match="kv_heads: found 3, accepted are divisors of the model's 4"):
        share_heads(biased(), 3, data())
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model.model.layers[1].self_attn.v_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj: found Identity, accepted are separate linear"):
        share_heads(model, 1, data())
