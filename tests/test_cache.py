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
    per_token = 2 * HEADS * WIDTH * dtype.itemsize
    assert cache.nbytes == LAYERS * 2 * tokens * per_token
    report = cache.report()
    assert [(row.layer, row.sequences, row.tokens, row.bytes_per_token) for row in report.rows] == \
        [(i, 2, tokens, per_token) for i in range(LAYERS)]
    assert report.bytes_per_token == LAYERS * per_token and report.nbytes == cache.nbytes
    assert report.spec == "K16V16" and f"{cache.nbytes} bytes" in str(report)


def test_crop_and_beams_keep_counting():
    model = llama()
    cache = tersor.Cache(model, "K16V16")
    model.generate(torch.randint(0, 97, (1, 5)), max_new_tokens=4, do_sample=False, num_beams=2, past_key_values=cache)
    assert {row.sequences for row in cache.report().rows} == {2}
    before = cache.nbytes
    cache.crop(-3)
    assert cache.nbytes == before, "a view keeps the memory alive, and it is counted"
    cache.reset()
    assert cache.nbytes == 0


def test_sliding_windows_hold_a_window():
    torch.manual_seed(0)
    config = MistralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=16, vocab_size=97, sliding_window=4)
    model = MistralForCausalLM(config).eval()
    cache = tersor.Cache(model, "K16V16")
    model.generate(torch.randint(0, 97, (1, 9)), max_new_tokens=3, do_sample=False, past_key_values=cache)
    assert all(row.tokens <= 4 and "Sliding" in row.kind for row in cache.report().rows)


@pytest.mark.parametrize("spec", ["K4V4", "K8V16", "K2V2[levels=nuq,outliers=0.01]"])
def test_specs_without_a_kernel_are_refused(spec):
    with pytest.raises(ValueError, match="no kernel for it; accepted is K16V16"):
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
