"""GPTQ on the small reference model: perplexity on its held-out text against rounding and the original."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from tersor.calibration_text import standard_library_texts
from tersor.methods import gptq

REFERENCE = Path(__file__).parents[1] / "examples" / "models" / "stdlib-llama"


@pytest.fixture(scope="module")
def reference():
    if not (REFERENCE / "model.safetensors").exists():
        pytest.fail(f"the reference model is missing from {REFERENCE}")
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    held_out = (REFERENCE / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(held_out[:20_000], add_special_tokens=False)["input_ids"])
    texts = itertools.islice(standard_library_texts(held_out), 40)
    text_ids = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"][: 8 * 256])
    return ids[: 16 * 256].view(-1, 256), list(text_ids.view(-1, 1, 256))


def perplexity(recipe, reference):
    held_out, batches = reference
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    if recipe:
        tersor.compress(model, recipe, batches if "gptq" in recipe else None)
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss for ids in held_out.split(8)]
    return math.exp(float(torch.stack(losses).mean()))


def test_gptq_is_below_rounding_on_the_reference_model_and_four_bits_within_three_percent(reference):
    original = perplexity("", reference)
    for bits in (4, 3, 2):
        chosen, nearest = (perplexity(f"{method}:W{bits}A16", reference) for method in ("gptq", "rtn"))
        assert original < chosen < nearest
        if bits == 4:
            assert chosen < 1.03 * original


def test_that_check_fails_when_gptq_rounds(reference, monkeypatch):
    def rounded(w, fmt, params, factor, **_):
        params = fmt.fit(w, search=True, dtype=torch.float32)
        return gptq.Choice(fmt.project(w, params), params, 0.0)

    monkeypatch.setattr(gptq, "feed_back", rounded)
    assert not perplexity("gptq:W3A16", reference) < perplexity("rtn:W3A16", reference)
