"""CSKV (arXiv 2409.10593): features of old tokens, a window of recent ones, and attention over both."""

from dataclasses import replace

import pytest
import torch
from test_kv_models import latent, logits_by_steps, make, prompt
from test_kv_quality import MODEL, reference, through  # noqa: F401  (a fixture)
from transformers import AutoTokenizer, DynamicCache

import tersor
from tersor.kv import calibrate
from tersor.kv.bases import beside
from tersor.kv.layout import reference_attention
from tersor.kv.methods.cskv import straight_through
from tersor.kv.record import record
from tersor.kv.rotary import find_rotary
from tersor.kv.store import Step

pytestmark = pytest.mark.usefixtures("one_thread")


def data(seed=5):
    return torch.randint(3, 97, (4, 96), generator=torch.Generator().manual_seed(seed))


def recorded(model, ids):
    """Keys before rotary embedding and values of each layer, heads beside each other."""
    found = {}

    def take(seen):
        turned = find_rotary(model, seen.layer).turn(seen.key, torch.arange(seen.key.shape[2]), back=True)
        found.setdefault(seen.layer, []).append((beside(turned)[0].double(), beside(seen.value)[0].double()))

    record(model, list(ids.split(1)), take)
    return {layer: tuple(torch.cat(p) for p in zip(*pairs)) for layer, pairs in found.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_all_features_are_exact_and_sliding_layers_stay(kind):
    model, ids = make(kind), prompt(2, 100)
    plan = calibrate(model, "cskv[keys=1.0,values=1.0,window=8]:K16V16", data())
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    cache = tersor.Cache(model, plan)
    assert (logits_by_steps(model, cache, ids) - truth).norm() < 1e-3 * truth.norm()
    rows = [row for row in cache.report().rows if "sliding" not in row.kind]
    assert rows and all("features of rank 32 and 32" in row.kernel for row in rows)
    assert all("features" not in row.kernel for row in cache.report().rows if "sliding" in row.kind)


def test_a_window_of_all_tokens_is_exact_at_any_rank_and_bits():
    model, ids = make("llama"), prompt(2, 100)
    plan = calibrate(model, "cskv[keys=0.5,values=0.5,window=100]:K2V2", data())
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    assert (logits_by_steps(model, tersor.Cache(model, plan), ids) - truth).norm() < 1e-5 * truth.norm()


def test_left_padding_has_positions_of_its_own():
    model, ids = make("llama"), prompt(3, 100)
    mask = torch.ones_like(ids)
    mask[0, :37], mask[1, :5] = 0, 0
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, mask)
    whole = calibrate(model, "cskv[keys=1.0,values=1.0,window=8]:K16V16", data())
    cache = tersor.Cache(model, whole)
    ours, seen = logits_by_steps(model, cache, ids, mask), mask.bool()
    assert (ours[seen] - truth[seen]).norm() < 1e-3 * truth[seen].norm()
    assert cache.layers[0].store.offsets.tolist() == [-37, -5, 0]
    half = calibrate(model, "cskv[keys=0.5,values=0.5,window=8]:K16V16", data())
    padded = logits_by_steps(model, tersor.Cache(model, half), ids, mask)[:1, 37:]
    alone = logits_by_steps(model, tersor.Cache(model, half), ids[:1, 37:], steps=(13, 1, 1, 3, 1, 30, 1, 12, 1))
    assert (padded - alone).norm() < 0.2 * alone.norm(), "features are those of positions without padding"


def test_loss_is_the_energy_that_bases_discard():
    model, ids = make("llama"), data()
    plan = calibrate(model, "cskv[keys=0.5,values=0.5]:K16V16", ids, length=96)
    for layer, parts in recorded(model, ids).items():
        tensors = plan.tensors["cskv"][layer]
        for part, x in zip(("key", "value"), parts):
            x = x - x.mean(0)
            lost = x - x @ tensors[f"{part}_features"].double() @ tensors[f"{part}_back"].double()
            energies = torch.linalg.svdvals(x).square()
            assert torch.allclose(lost.square().sum(), energies[16:].sum(), rtol=1e-4)


def test_attention_is_that_over_the_decoded_cache():
    model, ids = make("llama"), prompt(2, 96)
    for spec, limit in (("cskv[window=8]:K16V16", 1e-4), ("cskv[window=8]:K4V4[group=32,sinks=0]", 2e-3)):
        cache = tersor.Cache(model, calibrate(model, spec, data()))
        logits_by_steps(model, cache, ids, steps=(70, 1, 20, 5))
        store, generator = cache.layers[1].store, torch.Generator().manual_seed(3)
        assert store.older.tokens == 64 and store.recent.pages.tokens == 32
        query, keys, values = (torch.randn(2, heads, 3, 16, generator=generator) for heads in (4, 2, 2))
        mask = torch.ones(2, 1, 3, 99, dtype=torch.bool).tril(96)
        mask[0, :, :, :20] = False
        out, total = store.attend(Step(query, keys, values, 0.3, False, 0.0, None, mask, 0, None, True))
        truth, score = reference_attention(query, *store.decode(), 0.3, mask)
        assert (out - truth).norm() < limit * truth.norm() and (total - score).abs().max() < 1e-3


def test_quantization_is_trained_where_it_is_coarse():
    model, ids = make("llama"), data()
    plans = [calibrate(model, f"cskv[steps={steps}]:K2V2", ids, length=96) for steps in (0, 60)]
    errors = [[], []]
    for layer, parts in recorded(model, ids).items():
        for part, x in zip(("key", "value"), parts):
            for plan, found in zip(plans, errors):
                t = plan.tensors["cskv"][layer]
                features = (x.float() - t[f"{part}_mean"]) @ t[f"{part}_features"]
                read = straight_through(features, part, 2, 32 if part == "key" else 16)
                found.append((read @ t[f"{part}_back"] + t[f"{part}_mean"] - x).square().mean().item())
    assert all(b <= a for a, b in zip(*errors)) and sum(errors[1]) < 0.98 * sum(errors[0]), errors


def test_bytes_beams_and_crops():
    model, ids = make("llama"), prompt(2, 400)
    plan = calibrate(model, "cskv[keys=0.5,values=0.5,window=32]:K4V4[sinks=0]", data())
    cache, plain = tersor.Cache(model, plan), tersor.Cache(model, "K4V4", sinks=0, recent=0)
    steps = (300, 1, 40, 59)
    logits_by_steps(model, cache, ids, steps=steps)
    logits_by_steps(model, plain, ids, steps=steps)
    store = cache.layers[0].store
    pages = [*store.older.pages, *store.recent.pages.pages]
    assert store.nbytes - sum(p.memory.nbytes for p in pages) < 400  # and the tables of pages
    packed = sum(p.memory.nbytes for p in store.older.pages if p.packed)
    assert packed <= 0.8 * sum(p.memory.nbytes for p in plain.layers[0].store.pages.pages if p.packed)
    cache.crop(-10)  # of the window
    with torch.no_grad():
        again = [model(ids[:, 390:], past_key_values=cache).logits]
        cache.crop(-10)
        again.append(model(ids[:, 390:], past_key_values=cache).logits)
    assert torch.equal(*again)
    cache.crop(-150)  # of the features
    assert cache.get_seq_length() == 250
    with torch.no_grad():
        logits = model(ids[:, 250:300], past_key_values=cache).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 300
    out = model.generate(ids[:, :90], max_new_tokens=40, num_beams=3, do_sample=False,
                         past_key_values=tersor.Cache(model, plan))
    alone = model.generate(ids[:1, :90], max_new_tokens=40, num_beams=3, do_sample=False,
                           past_key_values=tersor.Cache(model, plan))
    assert torch.equal(out[:1], alone)


def test_keys_are_rebuilt_a_chunk_at_a_time(monkeypatch):
    from tersor.kv import latent as module

    model, ids = make("llama"), prompt(1, 500)
    cache = tersor.Cache(model, calibrate(model, "cskv:K4V4", data()))
    most = []
    plain = module.Decoder.rebuild_keys
    monkeypatch.setattr(module.Decoder, "rebuild_keys",
                        lambda self, f, p: most.append(f.shape[1]) or plain(self, f, p))
    logits_by_steps(model, cache, ids, steps=(450, 1, 49))
    assert max(most) <= module.CHUNK and sum(most) >= 2 * 3 * 400


def test_perplexity_depends_on_the_learned_basis(reference):  # noqa: F811
    model, ids = reference
    text = (MODEL / "heldout.txt").read_text()[60000:80000]
    calibration = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids[0][:2048].view(8, 256)
    plan = calibrate(model, "cskv[steps=0]:K4V4", calibration)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0][:, :64]
    random = {layer: tensors | {f"{p}_features": turn for p in ("key", "value")}
              | {f"{p}_back": turn.T.contiguous() for p in ("key", "value")}
              for layer, tensors in plan.tensors["cskv"].items()}
    truth, _ = through(model, ids[:2], DynamicCache(config=model.config))
    found = []
    for tried in (plan, replace(plan, tensors={"cskv": random})):
        cache = tersor.Cache(model, tried)
        found.append((through(model, ids[:2], cache)[0] / truth, cache.nbytes))
    print(found)
    assert found[0][0] < 1.02 < 1.05 < found[1][0] and found[0][1] == found[1][1]


def test_refusals():
    model = make("llama")
    with pytest.raises(ValueError, match="cskv: keys: found 0.0"):
        calibrate(model, "cskv[keys=0.0]:K4V4", data())
    with pytest.raises(ValueError, match="cskv: found DeepseekV3ForCausalLM with latent attention"):
        calibrate(latent(), "cskv:K4V4", data())
    with pytest.raises(ValueError, match="rope=pre"):
        calibrate(model, "cskv:K4V4[rope=pre]", data())
    cache = tersor.Cache(model, calibrate(model, "cskv:K4V4[hadamard=true]", data()))
    with torch.no_grad(), pytest.raises(ValueError, match="layer 0: found a method, or hadamard, inside"):
        model(prompt(), past_key_values=cache)
    cache = tersor.Cache(model, calibrate(model, "cskv:K4V4", data()))
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="layer 0: found positions that jump"):
            model(prompt(1, 3), position_ids=torch.tensor([[40, 41, 42]]), past_key_values=cache)
