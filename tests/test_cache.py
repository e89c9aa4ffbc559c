"""The reserved cache: exact at 16 bits, counts its bytes, refuses what no kernel serves."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import tersor

HEADS, WIDTH, LAYERS = 2, 16, 3


def llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
                         num_key_value_heads=HEADS, head_dim=WIDTH, vocab_size=97)
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_generates_the_same_tokens_and_counts_its_bytes(dtype):
    model = llama(dtype)
    prompt = torch.randint(0, 97, (2, 7))
    cache = tersor.Cache(model, "K16V16")
    assert isinstance(cache, DynamicCache) and cache.nbytes == 0
    ours = model.generate(prompt, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=8, do_sample=False))
    tokens = 7 + 8 - 1  # the last token was never fed back
    report = cache.report()
    assert [(row.layer, row.sequences, row.tokens) for row in report.rows] == [(i, 2, tokens) for i in range(LAYERS)]
    assert report.nbytes == cache.nbytes and report.spec == "K16V16" and f"{cache.nbytes} bytes" in str(report)
    page = 64 * 2 * HEADS * WIDTH * dtype.itemsize  # of each sequence; its table has 4 numbers
    assert cache.nbytes == LAYERS * (2 * page + 4 * 8)
    assert report.rows[0].bits == 8 * dtype.itemsize and "kv_attention" in report.rows[0].kernel


def test_bytes_fall_with_the_bits_and_equal_the_promise():
    model = llama()
    ids = torch.randint(0, 97, (2, 64 * 20))
    sizes = {}
    for bits in (16, 8, 4, 3, 2):
        cache = tersor.Cache(model, f"K{bits}V{bits}", **({"group": 64, "sinks": 0, "recent": 0} if bits < 16 else {}))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        row = cache.report().rows[0]
        assert row.bytes_per_token == pytest.approx(2 * HEADS * WIDTH * row.bits / 8, rel=0.03)
        sizes[bits] = cache.nbytes
    assert sizes[8] < 0.58 * sizes[16] and sizes[4] < 0.33 * sizes[16] and sizes[2] < sizes[3] < sizes[4]


def test_crop_and_beams_keep_counting():
    model = llama()
    cache = tersor.Cache(model, "K16V16")
    model.generate(torch.randint(0, 97, (1, 5)), max_new_tokens=4, do_sample=False, num_beams=2, past_key_values=cache)
    assert {row.sequences for row in cache.report().rows} == {2}
    with torch.no_grad():
        model(torch.randint(0, 97, (2, 64)), past_key_values=cache)
    page = 64 * 2 * HEADS * WIDTH * 2
    assert cache.nbytes == LAYERS * 2 * (2 * page + 4 * 8)
    cache.crop(-64)
    assert cache.nbytes == LAYERS * (2 * page + 4 * 8), "pages are freed at once"
    cache.reset()
    assert cache.nbytes == 0


def test_sliding_windows_hold_a_window():
    torch.manual_seed(0)
    config = MistralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=16, vocab_size=97, sliding_window=4)
    model = MistralForCausalLM(config).eval()
    cache = tersor.Cache(model, "K8V8", group=32)
    ids = torch.randint(0, 97, (1, 300))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        sizes = []
        for i in range(100):
            model(ids[:, i:i + 1], past_key_values=cache)
            sizes.append(cache.nbytes)
    assert all(row.tokens < 4 + 32 and "sliding 4" in row.kind for row in cache.report().rows)
    assert max(sizes[50:]) <= max(sizes[:50]) and cache.get_seq_length() == 400


@pytest.mark.parametrize("spec, message", [
    ("K5V4", "5 bits for keys, accepted are 2, 3, 4, 8, 16"), ("K4V1", "1 bits for values"),
    ("K2V2[level=nuq]", "option 'level', accepted is K2V2 with group, recent, sinks"),
    ("K8V8[levels=nuq]", "found nuq with K8V8"), ("K4V4[levels=e4m3]", "found e4m3 with K4V4"),
    ("K2V2[outliers=0.5]", "outliers: found 0.5, accepted is 0 to 0.1"), ("rasor:K4V4", "method 'rasor' is unknown"),
    ("K4V4[group=48]", "group: found 48, accepted is 32, 64 or 128"), ("K4V4[sinks=-1]", "sinks: found -1"),
    ("K4V4[recent=1.5]", "recent: found 1.5")])
def test_specs_that_cannot_be_served_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        tersor.Cache(llama(), spec)


def test_bad_specs_options_and_models_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="option 'levels'"):
        tersor.Cache(model, "K16V16[levels=nuq]")
    with pytest.raises(ValueError, match="option 'window'"):
        tersor.Cache(model, "K16V16", window=4)
    with pytest.raises(tersor.SpecError, match="accepted are names like"):
        tersor.Cache(model, "W4A16")
    with pytest.raises(tersor.SpecError, match="a spec is a string"):
        tersor.Cache(model, None)
    with pytest.raises(ValueError, match="accepted is a transformers model"):
        tersor.Cache(torch.nn.Linear(2, 2), "K16V16")
