"""RazorAttention: the heads that look things up are found, keep everything, and suffice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from induction import INDUCTION, VOCABULARY, haystack, induction_model
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM)

import tersor
from tersor.kv import CachePlan, calibrate
from tersor.kv.eviction import WindowStore, around_pages
from tersor.kv.layout import reference_attention
from tersor.kv.methods.razor import Razor, head_scores
from tersor.kv.settings import Settings
from tersor.kv.store import Shape, Step

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = Path(__file__).resolve().parent.parent / "examples" / "models" / "stdlib-llama"
SPEC = "razor[window=128,ratio=16,tokens=150]:K16V16"


@pytest.fixture(scope="module")
def model():
    return induction_model()


@pytest.fixture(scope="module")
def plan(model):
    return calibrate(model, SPEC)


def ask(model, cache, ids, needles):
    """How many needles are found, and the logits, once the text is in the cache; all are asked for in one step."""
    with torch.no_grad():
        model(ids[None], past_key_values=cache, logits_to_keep=1)
        logits = model(needles[None, :, 0], past_key_values=cache).logits[0]
    return (logits.argmax(-1) == needles[:, 1]).float().mean().item(), logits


def with_heads(plan, chosen):
    """The plan with other heads that keep all."""
    tensors = {layer: dict(own, retrieval=torch.tensor([(layer, h) in chosen for h in range(8)]))
               for layer, own in plan.tensors["razor"].items()}
    return CachePlan(plan.settings, plan.spec, plan.methods, {"razor": tensors}, plan.geometry)


def kept(plan):
    return {(layer, head) for layer, own in plan.tensors["razor"].items()
            for head in own["retrieval"].nonzero().flatten().tolist()}


def test_heads_are_found_and_named(plan):
    assert kept(plan) == set(INDUCTION)
    text = plan.report()
    assert "layer 1 keeps all of head 2 (induction 1.000" in text and "head 5 (induction 1.000" in text
    assert "layer 0" not in text
    for layer, own in plan.tensors["razor"].items():
        for head in range(8):
            if (layer, head) not in INDUCTION:
                assert own["induction"][head] < 0.05


def test_all_needles_at_4096_tokens_with_most_of_the_cache_gone(model, plan):
    ids, needles = haystack(4096, 16)
    full, razor = tersor.Cache(model, "K16V16"), tersor.Cache(model, plan)
    found, truth = ask(model, full, ids, needles)
    assert found == 1
    found, logits = ask(model, razor, ids, needles)
    gone = 1 - razor.nbytes / full.nbytes
    print(f"retrieval {found:.0%}, {gone:.1%} of {full.nbytes} bytes gone")
    assert found == 1 and gone >= 0.7
    assert (logits - truth).norm() < 0.005 * truth.norm(), "decoys look everywhere: a mean stands for what they lost"
    rows = razor.report().rows
    assert rows[0].tokens < 400 < rows[1].tokens < 4096 / 2 and rows[0].seen == 4096 + 16


@pytest.fixture(scope="module")
def short(model):
    ids, needles = haystack(800, 16, seed=1)
    return ids, needles, ask(model, DynamicCache(config=model.config), ids, needles)


def test_other_heads_do_not_do(model, plan, short):
    ids, needles, (found, _) = short
    assert found == 1
    assert ask(model, tersor.Cache(model, plan), ids, needles)[0] == 1
    for heads in ({(0, 3), (1, 0)}, {(1, 4), (1, 6)}):
        assert ask(model, tersor.Cache(model, with_heads(plan, heads)), ids, needles)[0] < 0.4, "those in the window"
    half = ask(model, tersor.Cache(model, with_heads(plan, {INDUCTION[0]})), ids, needles)[0]
    assert 0.3 < half < 0.9, "one of the two heads finds the even tokens alone, and those in the window"
    window = tersor.Cache(model, "streaming[sinks=4,window=128]:K16V16")
    assert ask(model, window, ids, needles)[0] < 0.4


def test_the_mean_stands_for_what_is_gone(model, plan, short):
    ids, needles, (_, truth) = short
    without = CachePlan(plan.settings, plan.spec, (replace(plan.methods[0], compensate=False),), plan.tensors)
    with_mean = ask(model, tersor.Cache(model, plan), ids, needles)[1]
    plain = ask(model, tersor.Cache(model, without), ids, needles)[1]
    assert (with_mean - truth).norm() < 0.2 * (plain - truth).norm()


def test_long_answers_packed(model):
    """Needles of five tokens, through generate, with pages of 8 bits; in batches with padding."""
    ids, needles = haystack(900, 2, run=4)
    plan = calibrate(model, "razor[window=128,ratio=16,tokens=100]:K8V8[group=32]")
    assert kept(plan) == set(INDUCTION)
    rows = [torch.cat((ids[:length], needle[:1])) for length, needle in zip((900, 900), needles)]
    cut = torch.cat((rows[1][:1], rows[1][101:]))  # the second text is shorter and padded
    if not (cut == needles[1, 1]).any():
        cut = rows[1]
    batch = torch.ones(2, 901, dtype=torch.long)
    batch[0], batch[1, 901 - len(cut):] = rows[0], cut
    mask = torch.ones_like(batch)
    mask[1, :901 - len(cut)] = 0
    cache = tersor.Cache(model, plan)
    found = model.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(found[:, 901:], needles[:, 1:])


def test_reference_model_has_retrieval_heads():
    """On a trained model: two heads of 16 that induce, and a mean for the others, keep most of what is said next."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    ids = tokenizer((REFERENCE / "heldout.txt").read_text()[:20000], return_tensors="pt").input_ids[0]
    ids = ids[:6 * 240].view(6, 240)
    plan = calibrate(model, "razor[window=28,ratio=100.0,tokens=63]:K16V16")
    scores = torch.stack([own["induction"] for own in plan.tensors["razor"].values()]).flatten()
    chosen = torch.stack([own["retrieval"] for own in plan.tensors["razor"].values()]).flatten()
    assert chosen.sum() == 2 and scores[chosen].min() > 0.4 > 2 * scores[~chosen].median()

    def through(cache):
        with torch.no_grad():
            model(ids[:, :144], past_key_values=cache)
            parts = [model(ids[:, at:at + 8], past_key_values=cache).logits for at in range(144, 240, 8)]
        return torch.cat(parts, 1).log_softmax(-1)

    truth, found = through(DynamicCache(config=model.config)), {}
    others = {layer: dict(own, retrieval=own["retrieval"].roll(1)) for layer, own in plan.tensors["razor"].items()}
    for name, method, tensors in (("razor", plan.methods[0], plan.tensors["razor"]),
                                  ("no mean", replace(plan.methods[0], compensate=False), plan.tensors["razor"]),
                                  ("other heads", plan.methods[0], others)):
        logits = through(tersor.Cache(model, CachePlan(plan.settings, plan.spec, (method,), {"razor": tensors})))
        found[name] = (truth.exp() * (truth - logits)).sum(-1).mean().item()
    print("divergence", {name: round(value, 4) for name, value in found.items()})
    assert found["razor"] < 0.5 * found["no mean"] and found["razor"] < 0.2 * found["other heads"]


# -- the parts ------------------------------------------------------------------------------------------------------


def test_scores_of_made_up_heads():
    """Heads that induce, echo, look at themselves and look everywhere, on a sequence of 3 blocks."""
    block = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.tensor([50]), block.repeat(3)))
    codes, tokens = torch.nn.functional.one_hot(ids, 64).float() * 30, len(ids)
    before = torch.nn.functional.pad(codes[:-1], (0, 0, 1, 0))
    key = torch.stack((before, codes, torch.zeros(tokens, 64)))
    query = codes.expand(6, -1, -1).clone()
    query[1], query[3] = 0, 0  # the other query head of a group looks everywhere; the larger score counts
    induction, echo = head_scores(query[None], key[None], 1.0, ids, 3)
    assert abs(induction[0] - 1) < 1e-4 and induction[1] < 0.05 and induction[2] < 0.05
    assert abs(echo[1] - (1 / 2 + 2 / 3) / 2) < 1e-4, "a token looks at its earlier copies and at itself"
    assert echo[0] < 0.05 and echo[2] < 0.05
    at = torch.arange(41, 121)
    earlier = 1 + (at > 80).long()
    assert abs(echo[2] - (earlier / (at + 1)).mean()) < 1e-6, "a uniform head: earlier copies over all that it sees"


def test_choice_is_a_union_over_all_layers():
    scores = {layer: {"induction": torch.tensor([0.1, 0.9 - layer / 10]), "echo": torch.tensor([layer / 2, 0.0])}
              for layer in range(3)}
    assert Razor(retrieval=1 / 3, echo=1 / 6).choose(scores) == {(0, 1), (1, 1), (2, 0)}
    assert Razor(retrieval=0, echo=0).choose(scores) == set()
    assert len(Razor(retrieval=1.0).choose(scores)) == 6


def shape(batch=2, heads=2, bits=16, **settings):
    return Shape(0, batch, heads, 32, 16, torch.float32, Settings(bits, bits, **({"group": 32} | settings)))


def feed(store, keys, values, query, sizes, scale=0.3, mask=None, softcap=0.0):
    """Outputs of all queries, tokens coming in steps of ``sizes``; after each step ``store.gone`` so far."""
    at, parts, gone = 0, [], []
    for i, n in enumerate(sizes):
        end = at + n
        step = Step(query[:, :, at:end], keys[:, :, at:end], values[:, :, at:end], scale, softcap=softcap)
        if mask is not None:
            step.mask, step.causal = mask[:, :, at:end, :end], False
        gone.append(store.gone)
        parts.append(store.attend(step))
        at = end
    return torch.cat(parts, 1), gone


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_mean_against_float64(padding, softcap):
    torch.manual_seed(0)
    batch, heads, tokens, sinks, window = 2, 2, 300, 3, 40
    keys, values = torch.randn(batch, heads, tokens, 32), torch.randn(batch, heads, tokens, 16)
    query = torch.randn(batch, 4, tokens, 32)
    real = torch.ones(batch, tokens, dtype=torch.bool)
    real[0, :padding] = False
    keys[0, :, :padding] = values[0, :, :padding] = 1e4  # whatever a model computes there
    mask = (torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None, None]) if padding else None
    store = WindowStore(shape(), sinks, window, ratio=4, compensate=True)
    sizes = [120, 1, 1, 7, 64, 1, 40, 1, 1, 64]
    out, gone = feed(store, keys, values, query, sizes, mask=mask, softcap=softcap)
    assert gone[-1] > 100 and store.seen == tokens
    at, positions = 0, torch.arange(tokens)
    for size, left in zip(sizes, gone):
        for row, first in ((0, padding), (1, 0)):
            sink = (positions >= first) & (positions < first + sinks)
            dropped = (positions >= first + sinks) & (positions < left)
            alone = (positions >= first) & ~dropped & ((positions >= left) | sink)
            k, v = (t[row].double().repeat_interleave(2, 0) for t in (keys, values))
            if dropped.any():
                k, v = (torch.cat((t, t[:, dropped].mean(1, keepdim=True)), 1) for t in (k, v))
            scores = query[row, :, at:at + size].double() @ k.transpose(-1, -2) * 0.3
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            later = positions > torch.arange(at, at + size).view(-1, 1)
            scores[..., :tokens] = scores[..., :tokens].masked_fill(later | ~alone, -torch.inf)
            scores[..., tokens:] += dropped.sum().double().log()
            truth = (scores.softmax(-1) @ v).transpose(0, 1)
            skip = max(first - at, 0)  # rows of padding see nothing
            assert (out[row, at + skip:at + size] - truth[skip:]).norm() < 1e-5 * truth[skip:].norm(), (row, at)
        at += size


def test_nothing_gone_is_exact_and_equal_tokens_stay_exact():
    torch.manual_seed(0)
    tokens = 200
    query = torch.randn(1, 4, tokens, 32)
    keys, values = torch.randn(1, 2, tokens, 32), torch.randn(1, 2, tokens, 16)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    truth = reference_attention(query, keys, values, 0.3, visible)[0]
    out, gone = feed(WindowStore(shape(1), 4, 300, 5, True), keys, values, query, [100] + [20] * 5)
    assert gone[-1] == 0 and (out - truth).norm() < 1e-6 * truth.norm()
    keys[:, :, 4:100], values[:, :, 4:100] = keys[:, :, 4:5], values[:, :, 4:5]
    truth = reference_attention(query, keys, values, 0.3, visible)[0]
    out, gone = feed(WindowStore(shape(1), 4, 100, 5, True), keys, values, query, [100] + [1] * 100)
    assert gone[-1] >= 64 and (out - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("bits", [16, 8])
def test_first_prompt_at_once_equals_tokens_one_by_one(bits):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 400, 32), torch.randn(2, 2, 400, 16)
    query = torch.randn(2, 4, 400, 32)
    many, few = (WindowStore(shape(bits=bits), 4, 96, compensate=True) for _ in range(2))
    many.prompt(Step(query[:, :, :384], keys[:, :, :384], values[:, :, :384], 0.3))
    feed(few, keys[:, :, :384], values[:, :, :384], query, [32] * 12)
    assert many.seen == few.seen == 384 and many.count.tolist() == few.count.tolist() == [384 - 96 - 4] * 2
    a, b = (feed(store, keys[:, :, 384:], values[:, :, 384:], query[:, :, 384:], [1] * 16)[0] for store in (many, few))
    assert (a - b).norm() < (1e-5 if bits == 16 else 0.01) * b.norm()
    assert many.nbytes < 0.4 * 400 * 48 * 4 * 4 and abs(many.nbytes / few.nbytes - 1) < 0.1


def test_beams_and_crop():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 16)
    query = torch.randn(2, 4, 300, 32)
    a, b = (WindowStore(shape(), 4, 64, 5, True) for _ in range(2))
    for store in (a, b):
        store.prompt(Step(query[:, :, :200], keys[:, :, :200], values[:, :, :200], 0.3))
    b.record_past()
    feed(b, keys[:, :, 200:210], values[:, :, 200:210], query, [10])
    b.crop(10)
    a.select([1, 1, 0])
    b.select([1, 1, 0])
    rows = [1, 1, 0]
    out = [store.attend(Step(query[rows][:, :, 210:213], keys[rows][:, :, 210:213], values[rows][:, :, 210:213], 0.3))
           for store in (a, b)]
    assert (out[0] - out[1]).abs().max() < 1e-6 and torch.equal(out[0][0], out[0][1])
    assert not torch.equal(out[0][0], out[0][2])
    with pytest.raises(RuntimeError, match="only the last .* are still whole"):
        a.crop(150)
    assert a.seen == 203


# -- what it refuses ------------------------------------------------------------------------------------------------


def small(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    torch.manual_seed(0)
    return kind(config(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=80,
                       num_key_value_heads=2, head_dim=16, **{"max_position_embeddings": 512, **options})).eval()


@pytest.mark.parametrize("spec, text", [("razor[retrieval=1.5]:K8V8", "retrieval"), ("razor[window=0]:K8V8", "window"),
                                        ("razor[ratio=0.5]:K8V8", "ratio"), ("razor[repeats=1]:K8V8", "repeats")])
def test_options_out_of_range(spec, text):
    with pytest.raises(ValueError, match=f"razor: {text}: found"):
        calibrate(small(), spec)


def test_models_it_cannot_serve():
    with pytest.raises(ValueError, match="sliding windows in all layers"):
        calibrate(small(MistralForCausalLM, MistralConfig, sliding_window=64), "razor:K8V8")
    with pytest.raises(ValueError, match="room for 16 different tokens"):
        calibrate(small(max_position_embeddings=32), "razor:K8V8")
    with pytest.raises(ValueError, match="learns from data first"):
        tersor.Cache(small(), "razor:K8V8")


def test_plan_in_a_file(tmp_path):
    model = small()
    plan = calibrate(model, "razor[window=32,retrieval=0.5]:K4V4[hadamard=true,group=32]")
    plan.save(tmp_path / "plan.safetensors")
    again = CachePlan.load(tmp_path / "plan.safetensors")
    assert again.report() == plan.report() and len(kept(plan)) == 2
    ids = torch.randint(3, 80, (2, 150), generator=torch.Generator().manual_seed(0))
    found = [model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=tersor.Cache(model, p),
                            attention_mask=torch.ones_like(ids), pad_token_id=0)
             for p in (plan, again)]
    assert torch.equal(*found)


def test_stores_it_does_not_know():
    with pytest.raises(ValueError, match="razor: found object inside it, accepted are"):
        around_pages(object(), "razor", lambda own, heads: None)
