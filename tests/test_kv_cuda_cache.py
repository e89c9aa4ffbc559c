"""`tersor.Cache` on a GPU: models over the host-compiled kernels, against the cache on the CPU."""

import pytest
import torch
from cuda_cache import device  # noqa: F401
from transformers import (DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

import tersor
from tersor.kv import devices
from tersor.kv.methods import CACHE_METHODS

SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=64, vocab_size=97, max_position_embeddings=512, pad_token_id=0)
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
         "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 30})}
CLOSE = 0.03  # of logits in bfloat16, two ways


def make(kind="llama", seed=0, dtype=torch.bfloat16, **changes):
    torch.manual_seed(seed)
    config, model, options = KINDS[kind]
    model = model(config(**SMALL | options | changes)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    return model


def prompt(batch=1, length=70, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, cache, ids, steps, mask=None):
    """Logits of all tokens, in pieces of the lengths given."""
    parts, at = [], 0
    with torch.no_grad():
        for step in steps:
            own = None if mask is None else mask[:, :at + step]
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, at:at + step]
            parts.append(model(ids[:, at:at + step], attention_mask=own, position_ids=positions, past_key_values=cache,
                               use_cache=True).logits.float())
            at += step
    return torch.cat(parts, 1)


def on_cpu(monkeypatch, call):
    """What the CPU's own cache makes of it."""
    with monkeypatch.context() as other:
        other.setattr(devices, "on_cuda", lambda device: False)
        return call()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_are_those_of_the_cpu(device, monkeypatch, kind):
    model, ids, steps = make(kind), prompt(2, 80), (66, 1, 3, 1, 9)
    truth = run(model, DynamicCache(config=model.config), ids, steps)
    for spec in ("K16V16", "K4V4"):
        cache = tersor.Cache(model, spec)
        device.calls.clear()
        ours = run(model, cache, ids, steps)
        theirs = on_cpu(monkeypatch, lambda spec=spec: run(model, tersor.Cache(model, spec), ids, steps))
        assert distance(ours, theirs) < CLOSE
        assert device.calls.count("attention") == 2 * 4, "the prompt went to SDPA, all else to the kernel"
        assert cache.get_seq_length() == 80
        assert all(row.kernel == "kv_attention sm80 64 (CUDA)" and row.tokens == 80 for row in cache.report().rows)
        if spec == "K16V16":
            assert distance(ours, truth) < CLOSE
    assert cache.report().rows[0].bits == 4.5


def test_generates_what_the_cpu_does(device, monkeypatch):
    model, ids = make(), prompt(1, 60)
    options = dict(max_new_tokens=16, do_sample=False)
    truth = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=tersor.Cache(model, "K16V16"), **options), truth)
    eight = model.generate(ids, past_key_values=tersor.Cache(model, "K8V8"), **options)
    assert torch.equal(eight, on_cpu(monkeypatch, lambda: model.generate(
        ids, past_key_values=tersor.Cache(model, "K8V8"), **options)))


def test_left_padded_batches(device, monkeypatch):
    model, ids, steps = make(), prompt(2, 75), (66, 1, 4, 4)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    ours = run(model, tersor.Cache(model, "K8V8"), ids, steps, mask)
    theirs = on_cpu(monkeypatch, lambda: run(model, tersor.Cache(model, "K8V8"), ids, steps, mask))
    assert distance(ours[mask.bool()], theirs[mask.bool()]) < CLOSE


def test_float_masks(device):
    """Masks of 0 and the lowest number are looked at for several queries, and once a layer for single ones."""
    model, ids = make(), prompt(1, 14)
    cache, plain = tersor.Cache(model, "K16V16"), tersor.Cache(model, "K16V16")
    run(model, plain, ids[:, :13], (12, 1))
    run(model, cache, ids[:, :12], (12,))
    low = torch.finfo(torch.bfloat16).min
    masks = torch.zeros(1, 1, 1, 13, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 14, dtype=torch.bfloat16)
    masks[1][..., :4] = low
    with torch.no_grad():
        seen = model(ids[:, 12:13], attention_mask=masks[0], past_key_values=cache).logits
        assert all(layer.mask_known for layer in cache.layers)
        hidden = model(ids[:, 13:], attention_mask=masks[1], past_key_values=cache).logits
        biased = tersor.Cache(model, "K16V16")
        model(ids[:, :12], past_key_values=biased)
        with pytest.raises(ValueError, match="with a bias, accepted is a mask"):
            model(ids[:, 12:13], attention_mask=masks[0] - 0.5, past_key_values=biased)
        whole = model(ids[:, 13:], past_key_values=plain).logits
    assert seen.isfinite().all() and distance(hidden.float(), whole.float()) > CLOSE


def test_beam_search(device):
    model, ids = make(), prompt(1, 62)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    truth = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=tersor.Cache(model, "K16V16"), **options), truth)
    cache = tersor.Cache(model, "K4V4", recent=0, sinks=0)
    assert model.generate(ids, past_key_values=cache, **options).shape == truth.shape
    assert {row.sequences for row in cache.report().rows} == {3}


def test_prompt_lookup_crops(device):
    model, ids = make(), prompt(1, 12).repeat(1, 4)
    options = dict(max_new_tokens=10, do_sample=False)
    truth = model.generate(ids, **options)
    found = model.generate(ids, past_key_values=tersor.Cache(model, "K16V16"), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found, truth)


def test_sliding_windows(device, monkeypatch):
    model, ids, steps = make("mistral"), prompt(1, 150), (66, 1, 62, 1, 20)
    cache = tersor.Cache(model, "K8V8")
    ours = run(model, cache, ids, steps)
    assert distance(ours, on_cpu(monkeypatch, lambda: run(model, tersor.Cache(model, "K8V8"), ids, steps))) < CLOSE
    assert all(row.tokens < 30 + 64 for row in cache.report().rows) and cache.get_seq_length() == 150


def test_hadamard_and_methods(device, monkeypatch):
    model, ids, steps = make(), prompt(1, 72), (66, 1, 5)
    plan = tersor.kv.calibrate(model.float(), "smoothattention:K4V4", [prompt(1, 64)[0]])
    model.to(torch.bfloat16)
    for layer in model.model.layers:  # what flatquant[kv=4] leaves
        turn = torch.eye(64) + 0.05 * torch.randn(64, 64)
        layer.self_attn.register_buffer("key_transform", turn.bfloat16())
    for spec in ("K4V4[hadamard=true]", plan, "flatquant:K4V4"):
        ours = run(model, tersor.Cache(model, spec), ids, steps)
        theirs = on_cpu(monkeypatch, lambda spec=spec: run(model, tersor.Cache(model, spec), ids, steps))
        assert distance(ours, theirs) < CLOSE
    monkeypatch.setattr(CACHE_METHODS["gear"], "cuda", False)  # a method that says nothing of GPUs
    words = "layer 0: found method 'gear' on .*accepted on CUDA are cskv, ems, fireq, flatquant, h2o, "
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        model(ids, past_key_values=tersor.Cache(model, "gear:K4V4"))


@pytest.mark.parametrize("spec", ["streaming[sinks=4,window=70]:K8V8", "h2o[budget=100,slack=16]:K8V8",
                                  "ems[budget=100,window=32]:K4V4"])
def test_eviction(device, monkeypatch, spec):
    """What is kept is chosen by numbers in 16 bits, which differ: so many tokens are held, and alike ones chosen."""
    model, ids, steps = make(), prompt(2, 170), (130, 1, 20, 1, 16, 1, 1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for own in (None, mask):
        cache, other = tersor.Cache(model, spec), tersor.Cache(model, spec)
        ours = run(model, cache, ids, steps, own)
        theirs = on_cpu(monkeypatch, lambda other=other, own=own: run(model, other, ids, steps, own))
        assert [row.tokens for row in cache.report().rows] == [row.tokens for row in other.report().rows]
        assert cache.report().rows[0].tokens < 170 == cache.get_seq_length()
        seen = torch.ones_like(ids).bool() if own is None else own.bool()
        assert distance(ours[seen], theirs[seen]) < (CLOSE if "streaming" in spec else 0.1)


@pytest.mark.parametrize("spec", ["K2V2", "gear:K4V4", "zipcache[gap=64]:K4V4[recent=0]",
                                  "xkv[layers=2,keys=0.5,values=0.5]:K8V8"])
def test_methods_on_the_device(device, monkeypatch, spec):
    """Padding, beams and what is taken back, with methods that pack or project by themselves. (How many tokens a page
    of such a cache has is not the same on the CPU.)"""
    model, ids, steps = make(), prompt(2, 160), (90, 1, 40, 1, 28)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    cache = tersor.Cache(model, spec)
    ours = run(model, cache, ids, steps, mask)
    theirs = on_cpu(monkeypatch, lambda: run(model, tersor.Cache(model, spec), ids, steps, mask))
    assert distance(ours[mask.bool()], theirs[mask.bool()]) < (0.3 if "K2V2" in spec else 0.1)
    with torch.no_grad():
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        both = model(ids[[1, 1, 0], :1], past_key_values=cache).logits
        cache.crop(-1)
        again = model(ids[[1, 1, 0], :1], past_key_values=cache).logits
    assert torch.equal(both[0], both[1]) and torch.equal(both, again)


def test_contexts_come_from_a_gpu_and_go_to_one(device, monkeypatch, tmp_path):
    model, ids = make(), prompt(1, 41)
    cache = tersor.Cache(model, "K16V16")
    run(model, cache, ids[:, :40], (40,))
    tersor.kv.save_context(cache, tmp_path / "context", model, level="high")

    def read():
        again = tersor.kv.load_context(tmp_path / "context", model, "K16V16")
        return run(model, again, ids[:, 40:], (1,)), again

    (ours, again), (theirs, _) = read(), on_cpu(monkeypatch, read)
    assert "CUDA" in again.report().rows[0].kernel and again.get_seq_length() == 41
    assert distance(ours, theirs) < CLOSE


def test_layers_wait_in_the_hosts_memory(device):
    """`offload` between `update` and attention, as transformers calls it, waits until the tokens are stored."""
    model, ids = make(), prompt(1, 74)
    plain, cache = tersor.Cache(model, "K4V4"), tersor.Cache(model, "K4V4")
    update = cache.update

    def offloading(keys, values, layer, *args, **options):
        cache.layers[(layer + 1) % 2].prefetch()
        result = update(keys, values, layer, *args, **options)
        cache.layers[layer].offload()
        return result

    cache.update = offloading
    for at, step in ((0, 66), (66, 1), (67, 6), (73, 1)):
        outs = []
        for one in (plain, cache):
            with torch.no_grad():
                outs.append(model(ids[:, at:at + step], past_key_values=one).logits)
        assert torch.equal(*outs)
        assert not cache.layers[1].store.pages.resident and cache.layers[0].store.pages.resident
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="offloading: found no GPU"):
            tersor.Cache(model, "K4V4", offloading=True)


def test_refusals_name_the_layer(device):
    ids = prompt(1, 9)
    with torch.no_grad():
        for options, dtype, words in (({}, torch.float32, "found torch.float32 on cpu, accepted on CUDA"),
                                      ({}, torch.bfloat16, "head dimension: found 48 for keys and 48 for values")):
            model = make(dtype=dtype, head_dim=64 if dtype is torch.float32 else 48)
            with pytest.raises(ValueError, match=f"tersor.Cache: layer 0: {words}"):
                model(ids, past_key_values=tersor.Cache(model, "K4V4", **options))


requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@requires_gpu
@pytest.mark.parametrize("spec", ["K16V16", "K8V8", "K4V4", "K2V2", "K2V2[group=64]", "gear:K2V2", "zipcache:K4V4"])
def test_on_a_gpu(spec):
    model, ids, steps = make(), prompt(2, 300), (200, 1, 3, 1, 64, 1, 30)
    theirs = run(model, tersor.Cache(model, spec), ids, steps)
    model.cuda()
    assert distance(run(model, tersor.Cache(model, spec), ids.cuda(), steps).cpu(), theirs) < CLOSE


@requires_gpu
def test_offloading_on_a_gpu():
    model, ids, steps = make().cuda(), prompt(2, 300).cuda(), (200, 1, 3, 1, 64, 1, 30)
    plain = run(model, tersor.Cache(model, "K4V4"), ids, steps)
    assert torch.equal(run(model, tersor.Cache(model, "K4V4", offloading=True), ids, steps), plain)


@requires_gpu
def test_a_step_waits_for_nothing():
    model, ids = make().cuda(), prompt(1, 300).cuda()
    cache = tersor.Cache(model, "K4V4")
    run(model, cache, ids[:, :200], (200,))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(200, 300):
            run(model, cache, ids[:, at:at + 1], (1,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
