"""EMS: the score, eviction and merging of entries, and needles that a window of the same size loses."""

import pytest
import torch
from induction import haystack, induction_model, questions
from transformers import DynamicCache

import tersor
from tersor.kv.eviction import Entries
from tersor.kv.layout import reference_attention
from tersor.kv.methods.ems import EMS
from tersor.kv.settings import Settings
from tersor.kv.store import PagedStore, Shape, Step

pytestmark = pytest.mark.usefixtures("one_thread")


def entries(tokens, batch=2, heads=3, seed=0, spread=0.0):
    """Random entries around a few directions, so that some are alike."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 6, (batch, heads, tokens, 1), generator=g)
    keys, values = (torch.randn(batch, heads, 6, d, generator=g).gather(2, kind.expand(-1, -1, -1, d))
                    + spread * torch.randn(batch, heads, tokens, d, generator=g) for d in (16, 16))
    total, local = torch.rand(2, batch, heads, tokens, generator=g).square().unbind(0)
    return Entries(keys, values, torch.ones(batch, heads, tokens), total * 40, local)


def attend(held, query, scale=0.4):
    """Attention to entries, each as often as it counts, in float64."""
    scores = query.double() @ held.keys.double().transpose(-1, -2) * scale + held.count.double().log().unsqueeze(2)
    return scores.softmax(-1) @ held.values.double()


def test_score_is_the_larger_of_two_sums_and_knows_no_scale():
    method, held = EMS(), entries(50)
    score = method.score(held)
    ratio = held.local.mean(-1, keepdim=True) / held.total.mean(-1, keepdim=True)
    assert torch.allclose(score, torch.maximum(held.total * ratio, held.local))
    assert (score == held.local).any() and (score > held.local).any(), "both sums decide"
    held.total = held.total * 1000
    assert torch.allclose(method.score(held), score, rtol=1e-5)
    held.count[0, 0, :5] = 0
    assert (method.score(held)[0, 0, :5] == -1).all()


def test_equal_entries_merge_without_a_trace():
    """Only how many tokens a centre stands for changes, and attention stays what it was."""
    held, query = entries(120), torch.randn(2, 3, 9, 16)
    truth = attend(held, query)
    merged = EMS(budget=40, window=10, evict=0.0, similarity=0.9).compress(held)
    assert merged.count.shape[2] == 40 and (merged.count.sum(-1) == 120).all() and merged.count.max() > 3
    assert (attend(merged, query) - truth).norm() < 1e-5 * truth.norm()
    merged.count.fill_(1)
    assert (attend(merged, query) - truth).norm() > 0.02 * truth.norm(), "the number of tokens matters"
    assert torch.allclose(merged.total.sum(-1), held.total.sum(-1), rtol=1e-4)


def test_merging_loses_less_than_evicting():
    held, query = entries(200, spread=0.15), torch.randn(2, 3, 9, 16)
    truth = attend(held, query)
    errors = [(attend(EMS(budget=50, window=10, similarity=s).compress(held), query) - truth).norm() / truth.norm()
              for s in (0.6, 1.0)]
    assert errors[0] < 0.3 * errors[1], errors


def by_hand(method, held, row, head):
    """One head, entry by entry, in float64."""
    keys, values = held.keys[row, head].double(), held.values[row, head].double()
    number, window = keys.shape[0], method.window
    old = number - window
    total, local = held.total[row, head, :old].double(), held.local[row, head, :old].double()
    score = torch.maximum(total * local.sum() / total.sum(), local)
    order = sorted(range(old), key=lambda i: -score[i].item())
    centres, rest = sorted(order[:method.budget - window]), order[method.budget - window:]
    sums = {c: [score[c] * keys[c], score[c] * values[c], score[c], held.count[row, head, c].double()] for c in centres}
    gone, spent = set(), 0.0
    for i in reversed(rest):
        spent += score[i].item()
        if spent > method.evict * score.sum().item():
            break
        gone.add(i)
    cosine = torch.nn.functional.cosine_similarity
    for i in rest:
        if i in gone:
            continue
        likeness = [(max(cosine(keys[i], keys[c], 0).item(), 0) * max(cosine(values[i], values[c], 0).item(), 0), c)
                    for c in centres]
        most, target = max(likeness)
        if most > method.similarity:
            for j, x in enumerate((score[i] * keys[i], score[i] * values[i], score[i], held.count[row, head, i])):
                sums[target][j] = sums[target][j] + x
    merged = [(a / w, b / w, n) for a, b, w, n in sums.values()]
    return [torch.stack(list(column)) for column in zip(*merged)], len(gone)


def test_against_one_entry_after_the_other():
    method = EMS(budget=30, window=6, evict=0.05, similarity=0.5)
    held = entries(110, spread=0.6)
    held.count = 1 + (torch.rand(held.count.shape) > 0.7).float()
    merged = method.compress(held)
    shares = set()
    for row in range(2):
        for head in range(3):
            (keys, values, count), evicted = by_hand(method, held, row, head)
            assert torch.allclose(merged.keys[row, head, :24].double(), keys, atol=1e-5)
            assert torch.allclose(merged.values[row, head, :24].double(), values, atol=1e-5)
            assert torch.equal(merged.count[row, head, :24].double(), count.double())
            assert torch.equal(merged.keys[row, head, 24:], held.keys[row, head, -6:])
            shares.add((evicted, int(count.sum())))
    assert len(shares) > 2, "each head has its own shares of eviction and merging"


def test_the_zero_class_leaves_centres_alone():
    method, held = EMS(budget=30, window=6, similarity=1.0), entries(110, spread=0.5)
    merged = method.compress(held)
    for row in range(2):
        for head in range(3):
            kept = {tuple(k.tolist()) for k in held.keys[row, head]}
            assert all(tuple(k.tolist()) in kept for k in merged.keys[row, head])
    assert (merged.count == 1).all()
    opposite = entries(110)
    opposite.keys[:, :, ::2], opposite.values[:, :, ::2] = -opposite.keys[:, :, ::2], -opposite.values[:, :, ::2]
    centres, rest = opposite.part(0, 40), opposite.part(40)
    method = EMS(similarity=0.3)
    target = method.classes(centres, rest, torch.zeros(rest.count.shape, dtype=torch.bool))
    found = target < 40
    assert found.any()
    keys = torch.cat((centres.keys, torch.zeros(2, 3, 1, 16)), 2).gather(2, target.unsqueeze(-1).expand(-1, -1, -1, 16))
    assert ((keys * rest.keys).sum(-1)[found] > 0).all(), "two negative cosines are no likeness"


def test_decoding_compresses_again_and_again():
    """Tokens of which many are equal: the cache stays at its budget, and its attention is that to all of them."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 12, (400,), generator=g)
    keys, values = (torch.randn(1, 2, 12, d, generator=g)[:, :, kinds] for d in (32, 16))
    query = torch.randn(1, 4, 400, 32, generator=g)
    store = EMS(budget=60, window=10, evict=0.0, similarity=0.9).wrap(
        Shape(0, 1, 2, 32, 16, torch.float32, Settings(16, 16, group=32)), {}, PagedStore)
    store.prompt(Step(query[:, :, :300], keys[:, :, :300], values[:, :, :300], 0.3))
    for at in range(300, 400):
        out = store.attend(Step(*(t[:, :, at:at + 1] for t in (query, keys, values)), 0.3))
        truth, _ = reference_attention(query[:, :, at:at + 1], keys[:, :, :at + 1], values[:, :, :at + 1], 0.3)
        assert (out - truth).norm() < 1e-4 * truth.norm(), at
        assert store.held <= 70 and (store.count.sum(-1) == at + 1).all()
    assert torch.equal(store.inner.pages.biases(), store.count.log()), "what an entry stands for is told to attention"


# -- needles --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return induction_model()


def found_in(model, cache, ids, needles):
    """The share of needles found once the text, which ends with the questions, is in the cache; asked again."""
    with torch.no_grad():
        model(torch.cat((ids, questions(needles)))[None], past_key_values=cache, logits_to_keep=1)
        logits = model(questions(needles)[None], past_key_values=cache).logits[0, ::2]
    return (logits.argmax(-1) == needles[:, 1]).float().mean().item()


def test_256_entries_find_what_a_window_loses(model):
    ids, needles = haystack(4096, 16)
    ems, window = tersor.Cache(model, "ems[budget=256]:K16V16"), tersor.Cache(model, "streaming[window=284]:K16V16")
    ours, recent = (found_in(model, cache, ids, needles) for cache in (ems, window))
    print(f"of 16 needles in 4096 tokens EMS with 256 entries finds {ours:.0%} in {ems.nbytes} bytes, "
          f"a window of 288 {recent:.0%} in {window.nbytes}")
    assert ours == 1 and recent < 0.3
    assert max(row.tokens for row in ems.report().rows) <= 256 + 32


def test_recency_in_place_of_the_score_fails(model, monkeypatch):
    ids, needles = haystack(1000, 16, seed=2)
    assert found_in(model, DynamicCache(config=model.config), ids, needles) == 1
    assert found_in(model, tersor.Cache(model, "ems[budget=128]:K8V8[group=32]"), ids, needles) == 1
    monkeypatch.setattr(EMS, "score", lambda self, held: torch.arange(0.0, held.count.shape[2]).expand_as(held.count))
    assert found_in(model, tersor.Cache(model, "ems[budget=128]:K8V8[group=32]"), ids, needles) < 0.5
