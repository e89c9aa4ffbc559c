"""What a packed cache costs in quality: the reference model, teacher-forced, its tokens read through the cache."""

import pytest
import torch
from outliers import MODEL, text_tokens
from transformers import AutoModelForCausalLM, DynamicCache

import tersor

LENGTH, PROMPT, STEP = 448, 256, 16


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, text_tokens(4 * LENGTH).view(4, LENGTH)


def through(model, ids, cache):
    """Perplexity and most likely tokens after the prompt, which is read at once; the rest follows in steps of a few."""
    parts = []
    with torch.no_grad():
        logits = model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1:]
        for at in range(PROMPT, LENGTH, STEP):
            parts.append(logits[:, -1:])
            logits = model(ids[:, at:at + STEP], past_key_values=cache).logits
            parts.append(logits[:, :-1])
    logits = torch.cat(parts, 1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten())
    return loss.exp().item(), logits.argmax(-1)


def test_perplexity_through_the_cache(reference):
    model, ids = reference
    truth, tokens = through(model, ids, DynamicCache(config=model.config))
    found = {}
    for spec in ("K16V16", "K8V8", "K4V4", "K2V2"):
        perplexity, ours = through(model, ids, tersor.Cache(model, spec))
        found[spec] = perplexity / truth, (ours == tokens).float().mean().item()
    print(truth, found)
    assert abs(found["K16V16"][0] - 1) < 1e-4 and found["K16V16"][1] > 0.999
    assert abs(found["K8V8"][0] - 1) < 0.003 and found["K8V8"][1] >= 0.99
    assert found["K4V4"][0] < 1.03 and found["K4V4"][1] > 0.9
    assert found["K2V2"][0] > found["K4V4"][0], "fewer bits are worse: the cache is read as it is stored"


def test_generated_tokens(reference):
    model, ids = reference
    plain = model.generate(ids[:2, :100], max_new_tokens=30, do_sample=False)
    ours = model.generate(ids[:2, :100], max_new_tokens=30, do_sample=False,
                          past_key_values=tersor.Cache(model, "K16V16"))
    assert torch.equal(plain, ours)
    cache = tersor.Cache(model, "K4V4", recent=0, sinks=0)
    model.generate(ids[:2, :100], max_new_tokens=30, do_sample=False, past_key_values=cache)
    assert all(row.tokens == 129 and row.kind == "K4V4" for row in cache.report().rows)
