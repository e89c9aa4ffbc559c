"""KVQuant, SmoothAttention, FireQ, GEAR and ZipCache: their algebra, and that each beats plain integers of like
bytes."""

from dataclasses import replace

import pytest
import torch
from outliers import MODEL, text_tokens
from transformers import AutoModelForCausalLM, DynamicCache

import tersor
from tersor.kv import CachePlan, calibrate
from tersor.kv.methods import fireq, gear, kvquant, make_method, smooth_attention, zipcache
from tersor.kv.methods.base import method_atom
from tersor.kv.rotary import Rotary, find_rotary
from tersor.spec import Atom, SpecError

LENGTH, PROMPT, STEP = 384, 256, 16


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, text_tokens(4 * LENGTH).view(4, LENGTH), text_tokens(2048, 4 * LENGTH).view(8, 256)


def log_probabilities(model, ids, cache):
    parts = []
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1:]
        for at in range(PROMPT, ids.shape[1], STEP):
            parts.append(logits[:, -1:])
            logits = model(ids[:, at:at + STEP], past_key_values=cache).logits
            parts.append(logits[:, :-1])
    return torch.cat(parts, 1).log_softmax(-1)


def divergence(model, ids, cache, truth):
    found = log_probabilities(model, ids, cache)
    return (truth.exp() * (truth - found)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def truth(reference):
    model, ids, _ = reference
    return log_probabilities(model, ids, DynamicCache(config=model.config))


# -- specs and plans --------------------------------------------------------------------------------------------------


def test_method_specs():
    method = make_method(Atom("gear", (("rank", 8),)))
    assert method == gear.Gear(rank=8) and str(method_atom(method)) == "gear[rank=8]"
    for atom, message in ((Atom("geer"), "did you mean 'gear'"),
                          (Atom("gear", (("ranks", 2),)), "found option 'ranks'"),
                          (Atom("gear", (("rank", "x"),)), "rank: found 'x', accepted is int")):
        with pytest.raises(SpecError, match=message):
            make_method(atom)


def test_methods_that_pack_come_last(reference):
    model = reference[0]
    for spec, message in (("gear+smoothattention:K4V4", "accepted is 'gear' as the last method"),
                          ("zipcache:K4V4[hadamard=true]", "accepted is hadamard=false")):
        with pytest.raises(SpecError, match=message):
            calibrate(model, spec, [])


def test_plans_are_kept_and_refused(reference, tmp_path):
    model, ids, data = reference
    with pytest.raises(ValueError, match="learns from data first"):
        tersor.Cache(model, "kvquant:K2V2")
    with pytest.raises(ValueError, match="no sequence of 32 tokens"):
        calibrate(model, "kvquant:K2V2", [data[0, :10]])
    with pytest.raises(ValueError, match="without a tokenizer"):
        calibrate(model, "kvquant:K2V2", ["text"])
    with pytest.raises(ValueError, match="found K8V8, accepted are 2, 3 or 4 bits"):
        calibrate(model, "kvquant:K8V8", [data])
    plan = calibrate(model, "smoothattention[alpha=0.7]:K4V4", data[:2])
    plan.save(tmp_path / "plan.safetensors")
    again = CachePlan.load(tmp_path / "plan.safetensors")
    assert str(again.spec) == str(plan.spec) == "smoothattention[alpha=0.7]:K4V4" and again.methods == plan.methods
    assert torch.equal(again.tensors["smoothattention"][3]["key_max"], plan.tensors["smoothattention"][3]["key_max"])
    with pytest.raises(ValueError, match="accepted is {'layers': 7"):
        tersor.Cache(model, replace(plan, geometry=dict(plan.geometry, layers=7)))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        CachePlan.load(tmp_path / "bad")


# -- the steps of each method -----------------------------------------------------------------------------------------


def test_turning_back_undoes_the_rotary_embedding(reference):
    model, ids, _ = reference
    rotary = find_rotary(model, 0)
    assert rotary.dim == 64 and not rotary.interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    x, positions = torch.randn(1, 2, 30, 64), torch.arange(30)
    cos, sin = model.model.rotary_emb(x, positions.view(1, -1))
    turned = apply_rotary_pos_emb(x, x, cos, sin)[0]
    assert torch.allclose(rotary.turn(x, positions), turned, atol=1e-5)
    assert torch.allclose(rotary.turn(turned, positions, back=True), x, atol=1e-5)
    wide = Rotary(rotary.inv_freq[:8], interleaved=True)
    assert torch.allclose(wide.turn(wide.turn(x, positions), positions, back=True), x, atol=1e-5)
    assert torch.equal(wide.turn(x, positions)[..., 16:], x[..., 16:])


def test_kmeans_on_a_line():
    torch.manual_seed(0)
    x = torch.randn(3000)
    same = kvquant.kmeans(x, torch.ones_like(x), 4)
    weighted = kvquant.kmeans(x, torch.full_like(x, 7.0), 4)
    assert torch.allclose(same, weighted, atol=1e-6), "uniform weights do not matter"
    found = ((x - same[kvquant.nearest(x, same)])**2).mean()
    assert 0.11 < found < 0.125, "the optimum for a normal distribution and four levels is 0.1175"
    weights = torch.where(x > 1, 100.0, 0.01)
    assert kvquant.kmeans(x, weights, 4)[0] > 0, "levels go where the weight is"
    repeated = torch.tensor([1.0, 1.0, 2.0]).repeat(10)
    assert set(kvquant.kmeans(repeated, torch.ones(30), 4).round(decimals=3).tolist()) >= {1.0, 2.0}


def test_levels_are_distinct_bytes():
    method = kvquant.KVQuant()
    for bits in (2, 3, 4):
        levels = method.levels(torch.tensor([0.0, 0.0, 1.0]), torch.ones(3), bits)
        assert levels.dtype is torch.int8 and len(levels) == 2**bits and (levels.int().diff() > 0).all()


def test_low_rank_residual():
    torch.manual_seed(0)
    residual = torch.randn(2, 3, 40, 16)
    for rank in (1, 4, 16):
        q, p = gear.low_rank(residual, rank, 3)
        left = residual - q @ p.transpose(-1, -2)
        assert torch.allclose(p.transpose(-1, -2) @ p, torch.eye(rank).expand(2, 3, rank, rank), atol=1e-5)
        assert left.norm() < residual.norm()
    assert left.norm() < 1e-4 * residual.norm(), "full rank is exact"
    exact = torch.randn(1, 1, 30, 2) @ torch.randn(1, 1, 2, 16)
    q, p = gear.low_rank(exact, 2, 3)
    assert (exact - q @ p.transpose(-1, -2)).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("spec", ["smoothattention:K16V16", "fireq:K16V16"])
def test_scaling_keys_keeps_the_function(reference, truth, spec):
    model, ids, data = reference
    plan = calibrate(model, spec, data[:2])
    found = log_probabilities(model, ids[:2], tersor.Cache(model, plan))
    assert (found - truth[:2]).abs().max() < 2e-3


def test_scales_are_equal_in_rotary_pairs_and_reach_what_they_should(reference):
    model, _, data = reference
    rotary = find_rotary(model, 0)
    x = torch.randn(2, 64).abs()
    pairs = smooth_attention.pair_max(x, rotary)
    assert torch.equal(pairs[:, :32], pairs[:, 32:]) and (pairs >= x).all()
    keys = torch.randn(1, 2, 50, 64) * 30
    norm = fireq.pair_norms(keys, rotary)
    turned = fireq.pair_norms(rotary.turn(keys, torch.arange(50)), rotary)
    assert torch.allclose(norm, turned, rtol=1e-4), "turning a pair keeps its length"
    top = keys.abs().amax((0, 2))
    method = fireq.FireQ()
    factor = method.factor(norm.amax((0, 2)), top, rotary)
    assert (fireq.pair_norms(keys * (method.alpha / norm.amax((0, 2))).view(1, 2, 1, 64), rotary) <= 8.001).all()
    changed = factor != method.alpha / norm.amax((0, 2)).clamp_min(1e-5)
    assert (changed.sum(-1) >= 8).all() and torch.equal(changed, fireq.partners(changed, rotary))
    assert torch.allclose((top * factor)[changed], torch.tensor(8.0))


# -- against plain integers of as many bytes --------------------------------------------------------------------------


# With groups of 64 and recent=0, 32 tokens are raw on average, as with groups of 32 and recent=16.
def both(model, ids, spec, truth, **options):
    """Divergence, and the bits of a number in a packed page."""
    cache = tersor.Cache(model, spec, **options)
    found = divergence(model, ids, cache, truth)
    return found, cache.report().rows[0].bits


def test_uneven_levels_and_outliers_beat_even_levels_of_more_bits(reference, truth):
    model, ids, _ = reference
    plain, plain_bits = both(model, ids, "K2V2[group=32,recent=16,sinks=0]", truth)
    ours, bits = both(model, ids, "K2V2[group=64,levels=nuq,outliers=0.01,recent=0,sinks=0]", truth)
    without, _ = both(model, ids, "K2V2[group=64,recent=0,sinks=0]", truth)
    print(plain, plain_bits, ours, bits, without)
    assert bits < plain_bits and ours < plain < without


def test_kvquant_beats_levels_of_a_normal_distribution(reference, truth):
    model, ids, data = reference
    options = "[group=64,outliers=0.01,recent=0,sinks=0]"
    plan = calibrate(model, f"kvquant:K2V2{options}", data)
    ours, bits = both(model, ids, plan, truth)
    normal, same = both(model, ids, f"K2V2{options}", truth, levels="nuq")
    turned, _ = both(model, ids, f"K2V2{options}", truth, levels="nuq", rope="post")
    plain, plain_bits = both(model, ids, "K2V2[group=32,recent=16,sinks=0]", truth)
    print(ours, normal, turned, plain)
    assert bits == same < plain_bits
    assert ours < normal < turned and ours < 0.7 * plain


def test_gear_beats_plain_integers_of_more_bits(reference, truth):
    model, ids, _ = reference
    ours, _ = both(model, ids, "gear:K2V2[group=64,recent=0,sinks=0]", truth)
    half, bits = both(model, ids, "gear[outliers=0.01]:K2V2[group=64,recent=0,sinks=0]", truth)
    plain, plain_bits = both(model, ids, "K2V2[group=32,recent=16,sinks=0]", truth)
    only_outliers, _ = both(model, ids, "K2V2[group=64,outliers=0.02,recent=0,sinks=0]", truth)
    print(ours, half, plain, only_outliers, bits, plain_bits)
    assert ours < 0.8 * only_outliers, "the low-rank part is read"
    assert ours < 0.7 * plain


def test_zipcache_spends_bits_where_attention_dwells(reference, truth, monkeypatch):
    model, ids, _ = reference
    spec = "zipcache[unimportant=0.5]:K4V4[group=32,recent=0,sinks=0]"
    ours, _ = both(model, ids, spec, truth)

    def against(self, step, positions):
        judge(self, step, positions)
        self.mass = self.mass.max() - self.mass
    judge = zipcache.ZipStore._judge
    monkeypatch.setattr(zipcache.ZipStore, "_judge", against)
    turned, _ = both(model, ids, spec, truth)
    monkeypatch.setattr(zipcache.ZipStore, "_judge", lambda *_: None)
    blind, _ = both(model, ids, spec, truth)
    plain, _ = both(model, ids, "K2V2[group=32,recent=0,sinks=0]", truth)
    print(ours, turned, blind, plain)
    assert ours < 0.8 * blind and ours < 0.7 * turned and ours < plain
