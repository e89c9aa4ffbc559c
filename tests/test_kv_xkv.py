"""xKV (arXiv 2503.18893): neighbouring layers share the features of a prompt."""

import pytest
import torch
from test_kv_models import latent, logits_by_steps, make, prompt
from test_kv_quality import reference, through  # noqa: F401  (a fixture)
from transformers import DynamicCache

import tersor
from tersor.kv.bases import beside
from tersor.kv.layout import reference_attention
from tersor.kv.methods import xkv as module
from tersor.kv.methods.xkv import shared_basis
from tersor.kv.store import Step

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSLESS = "xkv[layers={},keys=1.0,values=1.0]:K16V16"


@pytest.fixture
def always(monkeypatch):
    """Features also for prompts that are too short to gain by them."""
    monkeypatch.setattr(module.LayerGroup, "gains", lambda *numbers: True)


@pytest.mark.parametrize("kind,layers", [("llama", 1), ("llama", 2), ("llama", 3), ("qwen3", 4), ("gemma2", 2),
                                         ("gpt_oss", 4)])
def test_lossless_at_full_rank(always, kind, layers):
    model, ids = make(kind), prompt(2, 100)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    cache = tersor.Cache(model, LOSSLESS.format(layers))
    assert (logits_by_steps(model, cache, ids) - truth).norm() < 1e-3 * truth.norm()
    full = [row for row in cache.report().rows if "sliding" not in row.kind]
    assert full and all(f"features of {min(layers, len(full))} layers" in row.kernel
                        or "features of 1 layers" in row.kernel for row in full)


def test_fewer_tokens_than_channels_are_lossless(always):
    model, ids = make("llama"), prompt(1, 40)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, steps=(20, 1, 1, 18))
    cache = tersor.Cache(model, LOSSLESS.format(3))
    assert (logits_by_steps(model, cache, ids, steps=(20, 1, 1, 18)) - truth).norm() < 1e-3 * truth.norm()
    assert cache.layers[0].store.tokens == 20


def test_basis_keeps_all_energy_but_the_discarded_and_lies_between_the_per_layer_bounds():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(90, 20, generator=generator)
    layers = [common @ torch.randn(20, 32, generator=generator) + torch.randn(90, 32, generator=generator)
              for _ in range(3)]
    both = torch.cat(layers, 1)

    def lost(x, rank):
        features, directions = shared_basis(x, rank)
        return (x - features @ directions).square().sum()

    for rank in (16, 32, 48):
        energies = torch.linalg.svdvals(both).square()
        assert torch.allclose(lost(both, rank), energies[rank:].sum(), rtol=1e-4)
        alone = sum(lost(x, rank) for x in layers)
        split = sum(lost(x, rank // 3) for x in layers)
        assert alone <= lost(both, rank) * 1.0001 and lost(both, rank) <= split * 1.0001
    assert torch.allclose(lost(both[:50], 32), torch.linalg.svdvals(both[:50]).square()[32:].sum(), rtol=1e-4)


def test_padding_is_left_out(always):
    model, ids = make("llama"), prompt(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, mask)
    cache = tersor.Cache(model, LOSSLESS.format(3))
    ours, seen = logits_by_steps(model, cache, ids, mask), mask.bool()
    assert (ours[seen] - truth[seen]).norm() < 1e-3 * truth[seen].norm()
    keys = cache.layers[0].store.decode()[0]
    assert keys[0, :, :30].abs().max() == 0 and keys[0, :, 30:].abs().amin(-1).min() > 0
    spec = "xkv[layers=3,keys=0.3,values=0.3]:K16V16"
    padded = logits_by_steps(model, tersor.Cache(model, spec), ids, mask)[:1, 30:]
    alone = logits_by_steps(model, tersor.Cache(model, spec), ids[:1, 30:], steps=(20, 1, 1, 3, 1, 30, 1, 12, 1))
    assert (padded - alone).norm() < 1e-3 * alone.norm()


def test_attention_is_that_over_the_decoded_cache(always):
    model, ids = make("llama"), prompt(2, 96)
    for spec in ("xkv[layers=2,keys=0.5,values=0.5]:K16V16", "xkv[layers=2,keys=0.5,values=0.5]:K4V4[group=32]"):
        cache = tersor.Cache(model, spec)
        logits_by_steps(model, cache, ids, steps=(70, 1, 20, 5))
        store, generator = cache.layers[1].store, torch.Generator().manual_seed(3)
        query, keys, values = (torch.randn(2, heads, 3, 16, generator=generator) for heads in (4, 2, 2))
        mask = torch.ones(2, 1, 3, 99, dtype=torch.bool).tril(96)
        mask[0, :, :, :20] = False
        out, total = store.attend(Step(query, keys, values, 0.3, False, 0.0, None, mask, 0, None, True))
        truth, score = reference_attention(query, *store.decode(), 0.3, mask)
        assert (out - truth).norm() < 2e-3 * truth.norm() and (total - score).abs().max() < 1e-3


def test_bytes_are_shared_and_a_prompt_is_freed():
    model, ids = make("llama"), prompt(2, 440)
    cache, plain = tersor.Cache(model, "xkv[layers=3]:K16V16"), tersor.Cache(model, "K16V16")
    steps = (400, 1, 39)
    for each in (cache, plain):
        logits_by_steps(model, each, ids[:, :400], steps=(400,))
    stores = [layer.store for layer in cache.layers]
    assert all(store.waiting is None and store.group is stores[0].group for store in stores)
    ranks = stores[0].group.pages.layout
    assert (ranks.key_dim, ranks.value_dim) == (16, 32)  # of 96 channels: 12 and 18, rounded up to multiples of 16
    features, matrices = -(-400 // 64) * 64 * 48 * 4 * 2, 48 * 32 * 4 * 2
    assert abs(cache.nbytes - features - 3 * matrices) < 2000
    assert cache.nbytes < 0.36 * plain.nbytes
    packed = tersor.Cache(model, "xkv[layers=3]:K4V4[sinks=0]")
    logits_by_steps(model, packed, ids, steps=steps)
    pages = packed.layers[0].store.group.pages
    assert sum(p.packed for p in pages.pages) == 6 and packed.nbytes < cache.nbytes + 80 * 64 * 4 * 2 * 3


def test_a_prompt_that_would_not_gain_stays_whole():
    model, ids = make("llama"), prompt(2, 60)
    cache, plain = tersor.Cache(model, "xkv[layers=3,keys=0.9,values=0.9]:K16V16"), tersor.Cache(model, "K16V16")
    assert torch.equal(logits_by_steps(model, cache, ids, steps=(50, 1, 9)),
                       logits_by_steps(model, plain, ids, steps=(50, 1, 9)))
    assert cache.nbytes == plain.nbytes


def test_beams_and_crops(always):
    model, ids = make("llama"), prompt(2, 100)
    spec = "xkv[layers=2,keys=0.5,values=0.5]:K16V16"
    cache = tersor.Cache(model, spec)
    ours = logits_by_steps(model, cache, ids)
    cache.crop(-30)
    with torch.no_grad():
        again = model(ids[:, 70:], past_key_values=cache).logits
    assert (again - ours[:, 70:]).norm() < 1e-3 * ours[:, 70:].norm()
    cache.crop(-80)  # into the prompt
    assert cache.get_seq_length() == 20 and cache.layers[0].store.decode()[0].shape[2] == 20
    with torch.no_grad():
        assert model(ids[:, 20:30], past_key_values=cache).logits.isfinite().all()
    options = dict(max_new_tokens=20, do_sample=False, num_beams=3)
    lossless = tersor.Cache(model, LOSSLESS.format(2))
    assert torch.equal(model.generate(ids[:, :40], past_key_values=lossless, **options),
                       model.generate(ids[:, :40], **options))
    rows = tersor.Cache(model, spec)
    logits_by_steps(model, rows, ids[:, :60], steps=(50, 10))
    before = rows.layers[2].store.decode()
    rows.batch_select_indices(torch.tensor([1]))
    assert all(torch.equal(a[1:], b) for a, b in zip(before, rows.layers[2].store.decode()))
    assert all(len(page.memory) == 1 for page in rows.layers[0].store.group.pages.pages)
    rows.reset()
    logits_by_steps(model, rows, ids[:, :60], steps=(50, 10))
    assert torch.equal(before[0], rows.layers[2].store.decode()[0])


def test_latent_attention(always):
    model, ids = latent(), prompt(2, 60)
    steps = (40, 1, 3, 16)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, steps=steps)
    cache = tersor.Cache(model, LOSSLESS.format(2))
    ours = logits_by_steps(model, cache, ids, steps=steps)
    assert (ours - truth).norm() < 1e-3 * truth.norm()
    assert all("copied out at each step" in row.kernel for row in cache.report().rows)
    assert cache.layers[1].store.group.pages is not None and cache.layers[0].store.waiting is None
    half = tersor.Cache(model, "xkv[layers=2,keys=0.5,values=0.5]:K16V16")
    near = logits_by_steps(model, half, ids, steps=steps)
    assert torch.equal(near[:, :40], truth[:, :40]), "the prompt itself runs on what it computed"
    assert 1e-4 * truth.norm() < (near - truth).norm() < 0.5 * truth.norm()
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer 0: this model computes with cached keys outside"):
        cache = tersor.Cache(model, "xkv[layers=2]:K4V4")
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)


def test_perplexity_depends_on_the_prompts_basis(reference, always, monkeypatch):  # noqa: F811
    model, ids = reference
    truth, _ = through(model, ids[:2], DynamicCache(config=model.config))
    found = []
    for random in (False, True):
        if random:
            def other(x, rank):
                turn = torch.linalg.qr(torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(0)))[0]
                return x @ turn, turn.T.contiguous()
            monkeypatch.setattr(module, "shared_basis", other)
        cache = tersor.Cache(model, "xkv[keys=0.25,values=0.375]:K4V4")
        found.append((through(model, ids[:2], cache)[0] / truth, cache.nbytes))
    print(found)
    assert found[0][0] < 1.01 < 1.02 < found[1][0] and found[0][1] == found[1][1]


def test_refusals():
    model = make("llama")
    for spec, found in (("xkv[layers=0]:K16V16", "layers: found 0"), ("xkv[keys=2.0]:K16V16", "keys: found 2.0"),
                        ("xkv:K4V4[rope=pre]", "rope=pre")):
        with pytest.raises(ValueError, match=found):
            tersor.Cache(model, spec)
    cache = tersor.Cache(model, "xkv[layers=2]:K16V16")
    group = module.LayerGroup(module.XKV(), lambda shape: None)
    with torch.no_grad():
        model(prompt(1, 20), past_key_values=cache)
    shape = cache.layers[0].store.shape
    group.join(shape, None)
    with pytest.raises(ValueError, match="layer 7: found 4 heads with keys of 16 .* layer 0 of its group has: 2"):
        group.join(shape.changed(layer=7, kv_heads=4), None)


def test_flat_channels_stand_beside_each_other():
    x = torch.arange(24).view(1, 2, 3, 4)
    assert torch.equal(beside(x)[0, 1], torch.cat((x[0, 0, 1], x[0, 1, 1])))
