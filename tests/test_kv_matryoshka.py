"""MatryoshkaKV (arXiv 2410.14731): orthogonal bases, their training, ranks of heads, and the cache that they make."""

from dataclasses import replace

import pytest
import torch
from test_kv_models import logits_by_steps, make, prompt
from test_kv_quality import MODEL, reference, through  # noqa: F401  (a fixture)
from transformers import AutoTokenizer, DynamicCache

import tersor
from tersor.kv import calibrate
from tersor.kv.bases import principal
from tersor.kv.methods.matryoshka import cayley
from tersor.kv.record import record

pytestmark = pytest.mark.usefixtures("one_thread")


def data(seed=5):
    return torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(seed))


def orthogonal(*shape, seed=0):
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))[0]


def with_tensors(plan, change):
    """The plan with what ``change(layer, tensors)`` puts in place of a layer's tensors."""
    return replace(plan, tensors={"matryoshka": {layer: tensors | change(layer, tensors)
                                                 for layer, tensors in plan.tensors["matryoshka"].items()}})


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_full_rank_is_exact_for_any_orthogonal_basis_and_mean(kind):
    model, ids = make(kind), prompt(2, 100)
    plan = calibrate(model, "matryoshka[budget=1.0,train=false]:K16V16", data())
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    other = with_tensors(plan, lambda layer, tensors: {
        "key_basis": orthogonal(2, 16, 16), "value_basis": orthogonal(2, 16, 16, seed=1),
        "key_mean": torch.randn(2, 1, 16), "value_mean": torch.randn(2, 1, 16)})
    for found in (plan, other):
        ours = logits_by_steps(model, tersor.Cache(model, found), ids)
        assert (ours - truth).norm() < 1e-4 * truth.norm()


def test_softcap_and_sinks_work_without_the_mean_and_are_refused_with_it():
    for kind in ("gemma2", "gpt_oss"):
        model, ids = make(kind), prompt(2, 100)
        with pytest.raises(ValueError, match="matryoshka: found .* with softcap or sinks.*mean=false"):
            calibrate(model, "matryoshka:K16V16", data())
        plan = calibrate(model, "matryoshka[budget=1.0,train=false,mean=false]:K16V16", data())
        truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
        assert (logits_by_steps(model, tersor.Cache(model, plan), ids) - truth).norm() < 1e-4 * truth.norm()


def test_cayley_is_orthogonal_and_starts_at_the_identity():
    x = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    u = cayley(x)
    assert (u.mT @ u - torch.eye(32)).abs().max() < 1e-5
    assert torch.equal(cayley(torch.zeros(16, 16)), torch.eye(16))


def test_principal_bases_lose_less_with_each_coordinate_and_less_than_others(reference):  # noqa: F811
    model, ids = reference
    keys = []
    record(model, [ids[:1, :128]], lambda seen: keys.append(seen.key[0].double()))
    for x in keys[:3]:
        x = x - x.mean(1, keepdim=True)
        basis, energies = principal(x.mT @ x / x.shape[1])
        lost = [(x - x @ basis[:, :, :r] @ basis[:, :, :r].mT).square().sum() for r in range(0, 65, 16)]
        assert all(a >= b for a, b in zip(lost, lost[1:])) and lost[-1] < 1e-9 * lost[0]
        assert torch.allclose(lost[2] / x.shape[1], energies[:, 32:].sum(), rtol=1e-6)
        other = orthogonal(2, 64, 32).double()
        assert lost[2] < 0.5 * (x - x @ other @ other.mT).square().sum()


@pytest.fixture(scope="module")
def learned(reference):  # noqa: F811
    """Bases at half their ranks, with and without training, and ranks found for a budget, from text that perplexity is
    not measured on."""
    model, _ = reference
    text = (MODEL / "heldout.txt").read_text()[60000:140000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids[0][:100 * 128].view(100, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {"ranks": calibrate(model, "matryoshka[budget=0.5,train=false,samples=1]:K16V16", ids, sequences=8)}
    for name, steps in (("principal", 0), ("trained", 100)):
        plan = calibrate(model, f"matryoshka[budget=1.0,steps={steps},lr=0.002]:K16V16", ids, sequences=100)
        half = {f"{part}_ranks": torch.tensor([32, 32]) for part in ("key", "value")}
        found[name] = with_tensors(plan, lambda layer, tensors: half)
    torch.set_num_threads(threads)
    return found


def test_training_keeps_bases_orthogonal_and_beats_principal_ones(reference, learned):  # noqa: F811
    model, ids = reference
    for tensors in learned["trained"].tensors["matryoshka"].values():
        for part in ("key", "value"):
            basis = tensors[f"{part}_basis"]
            assert (basis.mT @ basis - torch.eye(64)).abs().max() < 1e-5
    truth, _ = through(model, ids[:2], DynamicCache(config=model.config))
    found = {name: through(model, ids[:2], tersor.Cache(model, plan))[0] / truth for name, plan in learned.items()}
    random = with_tensors(learned["principal"], lambda layer, t: {f"{part}_basis": orthogonal(2, 64, 64)
                                                                  for part in ("key", "value")})
    found["random"] = through(model, ids[:2], tersor.Cache(model, random))[0] / truth
    print(found)
    assert found["ranks"] < found["trained"] < 0.98 * found["principal"] < 0.5 * found["random"]


def test_ranks_meet_the_budget_and_the_cache_is_really_that_small(reference, learned):  # noqa: F811
    model, ids = reference
    plan = learned["ranks"]
    ranks = torch.cat([t[f"{p}_ranks"] for t in plan.tensors["matryoshka"].values() for p in ("key", "value")])
    assert (ranks % 16 == 0).all() and ranks.min() >= 16 and len(set(ranks.tolist())) > 1
    assert 0.49 < ranks.float().mean() / 64 <= 0.5
    ours, plain = tersor.Cache(model, plan), tersor.Cache(model, "K16V16")
    packed = tersor.Cache(model, replace(plan, settings=replace(plan.settings, key_bits=8, value_bits=8)))
    with torch.no_grad():
        for cache in (ours, plain, packed):
            model(ids[:2, :256], past_key_values=cache)
    assert abs(ours.nbytes / plain.nbytes - ranks.float().mean() / 64) < 0.02
    assert packed.nbytes < 0.6 * ours.nbytes
    assert "projected" in ours.report().rows[0].kernel


def test_plan_files_beams_and_crops(tmp_path):
    model, ids = make("llama"), prompt(2, 100)
    plan = calibrate(model, "matryoshka[budget=1.0,steps=3]:K8V8[group=32]", data())
    plan.save(tmp_path / "plan.safetensors")
    cache = tersor.Cache(model, tersor.kv.CachePlan.load(tmp_path / "plan.safetensors"))
    ours = logits_by_steps(model, cache, ids)
    assert torch.equal(ours, logits_by_steps(model, tersor.Cache(model, plan), ids))
    cache.crop(-10)
    with torch.no_grad():
        again = model(ids[:, 90:], past_key_values=cache).logits
    assert (again - ours[:, 90:]).norm() < 0.02 * ours[:, 90:].norm()
    out = model.generate(ids[:, :40], max_new_tokens=20, num_beams=3, do_sample=False,
                         past_key_values=tersor.Cache(model, plan))
    assert out.shape == (2, 60)


def test_refusals():
    model = make("llama")
    for spec, found in (("matryoshka[budget=0.0]:K16V16", "budget: found 0.0"),
                        ("matryoshka:K4V4[rope=pre]", "rope=pre"),
                        ("matryoshka[budget=0.5,train=false]:K16V16", "budget: found 0.5, accepted is at least 1")):
        with pytest.raises(ValueError, match=found):
            calibrate(model, spec, data())
    plan = calibrate(model, "matryoshka[budget=1.0,train=false]:K16V16", data())
    with pytest.raises(ValueError, match="found a model of"):
        tersor.Cache(make("llama").__class__(type(model.config)(vocab_size=97, hidden_size=64, num_hidden_layers=1,
                                                                num_attention_heads=2)), plan)
