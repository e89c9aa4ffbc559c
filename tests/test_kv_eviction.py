"""Caches that hold a part of the tokens: what is held, what a step computes from it, edits, and what they refuse."""

from pathlib import Path

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig,
                          GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM)

import tersor
from tersor.kv import calibrate
from tersor.kv.eviction import EvictingStore, WindowStore, best, prompt_mass
from tersor.kv.layout import reference_attention
from tersor.kv.methods.ems import EMS
from tersor.kv.methods.h2o import H2O
from tersor.kv.settings import Settings
from tersor.kv.store import PagedStore, Shape, Step

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = Path(__file__).resolve().parent.parent / "examples" / "models" / "stdlib-llama"


def shape(batch=2, heads=2, bits=16, dtype=torch.float32, **settings):
    return Shape(0, batch, heads, 32, 16, dtype, Settings(bits, bits, **({"group": 32} | settings)))


def tokens_of(batch, heads, query_heads, tokens, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, tokens, d, generator=g).to(dtype)
            for h, d in ((heads, 32), (heads, 16), (query_heads, 32))]


def causal(tokens, padding=()):
    """Bool ``[batch, 1, tokens, tokens]``, rows of padding in front hidden."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    real = torch.arange(tokens) >= torch.tensor(padding).view(-1, 1)
    return seen & real[:, None, None]


def step_of(data, first, end, mask=None, softcap=0.0):
    keys, values, query = (t[:, :, first:end] for t in data)
    if mask is None:
        return Step(query, keys, values, 0.3, softcap=softcap)
    return Step(query, keys, values, 0.3, False, softcap, None, mask[:, :, first:end, :end])


def feed(store, data, sizes, mask=None, softcap=0.0, first=0):
    parts = []
    for size in sizes:
        parts.append(store.attend(step_of(data, first, first + size, mask, softcap)))
        first += size
    return torch.cat(parts, 1)


def evicting(method, own):
    return method.wrap(own, {}, PagedStore)


# -- first and last tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sizes", [[1] * 60, [50, 1, 1, 8], [17, 30, 13]])
def test_sinks_and_window_are_exactly_a_mask(sizes, softcap):
    data, sinks, window, padding = tokens_of(2, 2, 4, 60), 3, 20, (9, 0)
    mask = causal(60, padding)
    out = feed(WindowStore(shape(), sinks, window), data, sizes, mask, softcap)
    at = torch.arange(60)
    near = at > at.view(-1, 1) - window
    first = torch.stack([at < p + sinks for p in padding])[:, None, None]
    truth, _ = reference_attention(data[2], *data[:2], 0.3, mask & (near | first), softcap)
    for row, p in enumerate(padding):
        assert (out[row, p:] - truth[row, p:]).norm() < 1e-5 * truth[row, p:].norm()
    plain, _ = reference_attention(data[2], *data[:2], 0.3, mask & near, softcap)
    assert (out[1] - plain[1]).norm() > 0.05 * truth[1].norm(), "the first tokens are read"


def test_window_frees_memory_and_edits():
    data = tokens_of(2, 2, 4, 400)
    a, b = WindowStore(shape(), 4, 64), WindowStore(shape(), 4, 64)
    a.prompt(step_of(data, 0, 300))
    b.prompt(step_of(data, 0, 300))
    assert a.nbytes < 0.4 * 300 * 2 * 2 * 48 * 4 and a.seen == 300 and a.held <= 64 + 32 + 4
    b.record_past()
    feed(b, data, [9], first=300)
    b.crop(9)
    assert torch.equal(*(feed(store, data, [1, 2], first=300) for store in (a, b)))
    a.select([1, 0, 1])
    swapped = [t[[1, 0, 1]] for t in data]
    assert torch.allclose(feed(a, swapped, [3], first=303), feed(b, data, [3], first=303)[[1, 0, 1]], atol=1e-6)
    with pytest.raises(RuntimeError, match="has been freed"):
        a.crop(200)


# -- attention mass -------------------------------------------------------------------------------------------------


def weights_of(data, mask, softcap=0.0):
    """Attention weights in float64 ``[batch, kv_heads, group, queries, tokens]``; rows of padding give nothing."""
    keys, _, query = data
    scores = query.double().unflatten(1, (keys.shape[1], -1)) @ keys.double().unsqueeze(2).transpose(-1, -2) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0)
    return weights


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("padding", [(0, 0), (11, 0)])
def test_mass_of_a_prompt_and_of_steps(padding, softcap, monkeypatch):
    monkeypatch.setattr("tersor.kv.eviction.BLOCK", 2 * 4 * 90 * 7)  # seven rows at a time
    data, mask = tokens_of(2, 2, 4, 90), causal(90, padding)
    weights = weights_of(data, mask, softcap)
    use = mask if any(padding) else None
    total, local = prompt_mass(step_of(data, 0, 90, use, softcap), last=8)
    assert (total - weights.sum((2, 3))).norm() < 1e-5 * weights.sum((2, 3)).norm()
    last = weights[:, :, :, -8:].sum((2, 3))
    assert (local - last).norm() < 1e-5 * last.norm()
    store = EvictingStore(shape(), 200, 10, 5, 8, lambda held: held)
    store.prompt(step_of(data, 0, 60, use, softcap))
    feed(store, data, [1, 4, 25], use, softcap, first=60)
    assert (store.total - weights.sum((2, 3))).norm() < 1e-5 * weights.sum((2, 3)).norm()
    assert (store.local - last).norm() < 1e-5 * last.norm()


def test_best_in_order_and_ties():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0, -1.0]])
    kept, rest = best(scores, 2)
    assert kept.tolist() == [[2, 4]] and rest.tolist() == [[0, 1, 3, 5]]


# -- the tokens that heads choose -----------------------------------------------------------------------------------


class PlainH2O:
    """One sequence and key head in float64, token by token: its choice is what H2O must keep."""

    def __init__(self, method):
        self.method, self.at = method, []  # positions held, each with its score
        self.score: dict[int, float] = {}

    def step(self, data, row, head, first, size):
        keys, values, query = (t[row].double() for t in data)
        self.at += range(first, first + size)
        held, group = torch.tensor(self.at), query.shape[0] // keys.shape[0]
        scores = query[head * group:(head + 1) * group, first:first + size] @ keys[head, held].T * 0.3
        later = held > torch.arange(first, first + size).view(-1, 1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        for position, got in zip(self.at, weights.sum((0, 1)).tolist()):
            self.score[position] = self.score.get(position, 0.0) + got
        if len(self.at) > self.method.budget + self.method.slack:
            old, recent = self.at[:-self.method.recent], self.at[-self.method.recent:]
            heavy = sorted(old, key=lambda p: -self.score[p])[:self.method.budget - self.method.recent]
            self.at = sorted(heavy) + recent
        return weights @ values[head, held]


@pytest.mark.parametrize("sizes", [[100, 1, 1, 1, 20, 1, 40, 1, 1], [3] * 50])
def test_h2o_against_a_plain_one(sizes):
    method, data = H2O(budget=40, recent=10, slack=6), tokens_of(2, 2, 4, sum(sizes))
    store = evicting(method, shape())
    plain = [[PlainH2O(method) for _ in range(2)] for _ in range(2)]
    at = 0
    for i, size in enumerate(sizes):
        if i or size < 50:
            out = feed(store, data, [size], first=at)
        else:
            store.prompt(step_of(data, at, at + size))
        for row in range(2):
            for head in range(2):
                truth = plain[row][head].step(data, row, head, at, size)
                if i or size < 50:
                    ours = out[row, :, 2 * head:2 * head + 2].transpose(0, 1)
                    assert (ours - truth).norm() < 1e-5 * truth.norm(), (i, row, head)
        at += size
        held = store.decode()[0]
        for row in range(2):
            for head in range(2):
                assert torch.equal(held[row, head], data[0][row, head, plain[row][head].at].double())
    assert plain[0][0].at != plain[0][1].at, "each head holds its own"
    assert store.seen == at and store.held <= 46


METHODS = [H2O(budget=40, recent=10, slack=6), EMS(budget=40, window=10)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_nothing_changes_within_the_budget(method):
    data = tokens_of(2, 2, 4, 40)
    truth, _ = reference_attention(data[2], *data[:2], 0.3, causal(40, (0, 0)))
    out = feed(evicting(method, shape()), data, [30, 1, 1, 8])
    assert (out - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_padding_never_takes_the_place_of_a_token(method):
    data, padding = tokens_of(2, 2, 4, 140), (30, 0)
    mask = causal(140, padding)
    for t in data[:2]:
        t[0, :, :30] = 50  # a key that would win if it were seen
    both, alone = evicting(method, shape(2)), evicting(method, shape(1))
    own = [t[:1, :, 30:] for t in data]
    both.prompt(step_of(data, 0, 100, mask))
    alone.prompt(step_of(own, 0, 70))
    steps = [1, 1, 9, 20, 1, 1, 7]
    a, b = feed(both, data, steps, mask, first=100), feed(alone, own, steps, first=70)
    assert (a[:1] - b).norm() < 1e-4 * b.norm()
    few = evicting(method, shape(2))  # fewer real tokens than the budget: all are kept, and padding stays hidden
    mask = causal(140, (80, 0))
    few.prompt(step_of(data, 0, 100, mask))
    assert (few.count[0] > 0).sum(-1).tolist() == [20, 20]
    out = feed(few, data, [1], mask, first=100)
    truth, _ = reference_attention(data[2][:1, :, 100:101], *(t[:1, :, 80:101] for t in data[:2]), 0.3)
    assert (out[:1] - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_beams_crop_and_memory(method):
    data = tokens_of(2, 2, 4, 500)
    a, b = (evicting(method, shape()) for _ in range(2))
    for store in (a, b):
        store.prompt(step_of(data, 0, 450))
    assert a.held == 40 and a.seen == 450 and a.nbytes < 0.2 * 450 * 2 * 2 * 48 * 4
    with pytest.raises(RuntimeError, match="only the last 10 are still whole"):
        a.crop(11)
    b.record_past()
    feed(b, data, [30], first=450)  # more than fit: what was held must be there again after the crop
    b.crop(30)
    a.total, a.local = b.total.clone(), b.local.clone()  # what the forgotten queries gave stays counted
    swapped = [t[[1, 1, 0]] for t in data]
    for store in (a, b):
        store.select([1, 1, 0])
    out = [feed(store, swapped, [3, 1, 1], first=450) for store in (a, b)]
    assert (out[0] - out[1]).norm() < 1e-6 * out[0].norm()
    assert torch.equal(out[0][0], out[0][1]) and not torch.equal(out[0][0], out[0][2])
    a.crop(10)
    assert a.seen == 445


@pytest.mark.parametrize("bits, limit", [(8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_packed_pages(method, bits, limit):
    method = type(method)(budget=128, **({"recent": 32} if method.name == "h2o" else {"window": 32}))
    data = tokens_of(2, 2, 4, 420)
    raw, packed = (evicting(method, shape(bits=b, recent=0, sinks=0)) for b in (16, bits))
    out = []
    for store in (raw, packed):
        store.prompt(step_of(data, 0, 400))
        out.append(feed(store, data, [1] * 20, first=400))
    assert 1e-4 < (out[1] - out[0]).norm() / out[0].norm() < limit
    assert packed.nbytes < (0.5 if bits == 8 else 0.4) * raw.nbytes
    assert packed.inner.pages.pages[0].packed


# -- in models ------------------------------------------------------------------------------------------------------

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 40}),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {"sliding_window": 40, "num_local_experts": 1,
                                                  "num_experts_per_tok": 1, "attn_implementation": "eager"}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 40}),
}


def make(kind="llama", seed=0, **options):
    torch.manual_seed(seed)
    config, model, own = KINDS[kind]
    options = {**own, **options}
    implementation = options.pop("attn_implementation", "sdpa")
    layers = 6 if kind == "gemma3" else 2
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, head_dim=16,
                 num_key_value_heads=2, vocab_size=97, max_position_embeddings=512, pad_token_id=0)
    model = model._from_config(config(**{**sizes, **options}), attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def prompt(batch=2, length=60, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


SPECS = ["streaming[window=30]", "h2o[budget=32,recent=16,slack=4]", "ems[budget=32,window=16]"]


@pytest.mark.parametrize("kind", KINDS)
def test_models(kind):
    """Layers with a sliding window are left alone; attention sinks of the model go with every method."""
    model, ids = make(kind), prompt()
    options = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    truth = model.generate(ids, **options)
    for spec in ("streaming[window=200]", "h2o[budget=200,recent=32]", "ems[budget=200]"):
        assert torch.equal(model.generate(ids, past_key_values=tersor.Cache(model, f"{spec}:K16V16"), **options), truth)
    for spec in SPECS:
        cache = tersor.Cache(model, f"{spec}:K8V8[group=32]")
        model.generate(ids, past_key_values=cache, **options)
        for row in cache.report().rows:
            assert row.seen == 79 and row.tokens <= (79 if "sliding" in row.kind else 30 + 4 + 32)
    if kind == "mistral":
        plain = tersor.Cache(model, "K16V16")
        model.generate(ids, past_key_values=plain, **options)
        cache = tersor.Cache(model, f"{SPECS[1]}:K16V16")
        model.generate(ids, past_key_values=cache, **options)
        assert [r.nbytes for r in cache.report().rows] == [r.nbytes for r in plain.report().rows]


@pytest.mark.parametrize("spec", SPECS)
def test_generation(spec):
    """Padding, beams, drafts that are taken back, prompts one after the other, half precision."""
    model, ids = make(), prompt()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    both = model.generate(ids, attention_mask=mask, past_key_values=tersor.Cache(model, f"{spec}:K16V16"), **options)
    alone = model.generate(ids[:1, 11:], attention_mask=mask[:1, 11:],
                           past_key_values=tersor.Cache(model, f"{spec}:K16V16"), **options)
    assert torch.equal(both[0, 60:], alone[0, 49:])
    beams = model.generate(ids, attention_mask=mask, num_beams=3, past_key_values=tersor.Cache(model, f"{spec}:K16V16"),
                           **options)
    assert beams.shape == (2, 84)
    drafts = model.generate(ids[1:].repeat(1, 2), attention_mask=torch.ones(1, 120), prompt_lookup_num_tokens=4,
                            past_key_values=tersor.Cache(model, f"{spec}:K16V16"), **options)
    assert drafts.shape == (1, 144)
    cache = tersor.Cache(model, f"{spec}:K16V16")
    with torch.no_grad():
        for _ in range(3):
            logits = model(ids, past_key_values=cache).logits
    assert logits.isfinite().all() and cache.get_seq_length() == 180
    assert all(row.tokens <= 100 for row in cache.report().rows)
    half = make().bfloat16()
    found = half.generate(ids, attention_mask=mask, past_key_values=tersor.Cache(half, f"{spec}:K4V4"), **options)
    assert found.shape == (2, 84)


def test_with_other_methods():
    """Around rotated heads and learned levels; inside projected ones."""
    model, ids = make(head_dim=32), prompt(2, 100)
    text = [prompt(1, 256, seed=i) for i in range(2)]
    options = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    for spec in ("h2o[budget=40,recent=16]:K8V8[hadamard=true,group=32]", "ems[budget=40]+kvquant[fisher=false]:K4V4",
                 "matryoshka[budget=0.5,train=false]+ems[budget=40]:K8V8[group=32]",
                 "razor[window=32,retrieval=0.5]+matryoshka[budget=0.5,train=false]:K8V8[group=32]"):
        cache = tersor.Cache(model, calibrate(model, spec, text))
        model.generate(ids, past_key_values=cache, **options)
        rows = cache.report().rows
        assert all(row.tokens <= 119 and row.seen == 119 for row in rows)
        assert min(row.tokens for row in rows) < 90
    cache = tersor.Cache(model, "h2o[budget=40,recent=16]+gear:K4V4")
    with pytest.raises(ValueError, match="h2o: found .* inside it, accepted are methods that hold tokens in pages"):
        model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("spec", ["streaming[window=0]", "streaming[sinks=-1]", "h2o[budget=64,recent=64]",
                                  "h2o[recent=-1]", "h2o[slack=-1]", "ems[budget=32,window=32]", "ems[window=0]",
                                  "ems[similarity=1.5]", "ems[evict=1.0]"])
def test_options_out_of_range(spec):
    with pytest.raises(ValueError, match=f"{spec.split('[')[0]}: found"):
        tersor.Cache(make(), f"{spec}:K8V8")


# -- quality --------------------------------------------------------------------------------------------------------


def test_reference_model_at_equal_budgets():
    """How far the next tokens' distribution moves from the whole cache's, when a head holds 60 of 240 tokens on
    average; perplexity is told. Texts are no longer than those that the model was trained on, and what it needs stands
    near: this says that merging loses less than evicting, and little of long texts."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    ids = tokenizer((REFERENCE / "heldout.txt").read_text()[:40000], return_tensors="pt").input_ids[0]
    ids = ids[:8 * 240].view(8, 240)

    def through(cache):
        parts = []
        with torch.no_grad():
            parts.append(model(ids[:, :144], past_key_values=cache).logits[:, -1:])
            for at in range(144, 240, 8):
                parts.append(model(ids[:, at:at + 8], past_key_values=cache).logits)
        logits = torch.cat(parts, 1)[:, :-1].log_softmax(-1)
        return logits, (-logits.gather(2, ids[:, 144:, None]).mean()).exp().item()

    truth, perplexity = through(DynamicCache(config=model.config))
    found = {}
    for name, spec in {"window": "streaming[sinks=0,window=60]", "streaming": "streaming[window=56]",
                       "h2o": "h2o[budget=48,slack=24]", "ems": "ems[budget=48,window=24]",
                       "ems without merging": "ems[budget=48,window=24,similarity=1.0]",
                       "razor": "razor[window=28,ratio=100.0,tokens=63]"}.items():
        logits, own = through(tersor.Cache(model, calibrate(model, f"{spec}:K16V16")))
        found[name] = (truth.exp() * (truth - logits)).sum(-1).mean().item(), own / perplexity
    print(f"perplexity {perplexity:.3f}", {k: (round(a, 4), round(b, 4)) for k, (a, b) in found.items()})
    assert found["ems"][0] < found["ems without merging"][0]
    assert found["razor"][0] < found["window"][0]
