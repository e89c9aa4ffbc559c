"""Pages of several kinds in one list: biases, tokens packed at once, residuals that pages share, attention mass."""

import pytest
import torch

from tersor.kv.formats import normal_levels
from tersor.kv.layout import Layout, PageFormat, reference_attention, reference_mass
from tersor.kv.pages import Pages
from tersor.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = (PageFormat(8, 8, rank=4), PageFormat(2, 2, key_levels=normal_levels(2), value_outliers=8, rank=2),
           PageFormat(4, 4, value_axis="separable"))


def make(batch=2, biased=False, formats=FORMATS, rotary=None, **options):
    return Pages(Layout(2, 32, 32, torch.float32, 32, formats, rotary, biased), batch, **options)


def tokens(count, batch=2, seed=0):
    return torch.randn(2, batch, 2, count, 32, generator=torch.Generator().manual_seed(seed)).unbind(0)


def visible(pages, queries):
    at = torch.arange(pages.tokens)
    return (at <= pages.tokens - queries + torch.arange(queries).view(-1, 1)).expand(pages.batch, 1, -1, -1)


def check(pages, query, bias=None, limit=2e-5):
    """Attention and mass against float64 over what the pages hold."""
    keys, values = pages.decode()
    seen = visible(pages, query.shape[2])
    out, score = pages.attend(query, None, None, 0.2, log_sum_exp=True)
    exact, total = reference_attention(query, keys, values, 0.2, seen, bias=pages.biases() if bias is None else bias)
    assert (out - exact).norm() <= limit * exact.norm()
    assert (score - total).abs().max() < 1e-4
    mass = pages.mass(query, score, 0.2)
    truth = reference_mass(query, keys, score, 0.2, seen, bias=pages.biases())
    assert (mass - truth).norm() <= limit * truth.norm()
    # Each query spends all its weight, on the tokens it sees.
    assert torch.allclose(mass.sum(-1), torch.full(mass.shape[:2], 1.0 * query.shape[1] // 2 * query.shape[2]))
    return out


def residual(pages, first, count, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pages.batch, 2, rank, size, generator=generator) * 0.3
            for size in (32, 32, count * 32, count * 32)]


def test_pages_of_every_kind(isa):
    pages = make(rotary=Rotary((1.0, 0.3, 0.01)))
    pages.append(*tokens(70))
    kinds = [page.kind for page in pages.pages]
    assert kinds == [1, 1, 0]
    pages.append_packed(*tokens(64, seed=1), 2)
    pages.append_packed(*tokens(32, seed=2), 3)
    pages.append(*tokens(40, seed=3))
    assert [page.kind for page in pages.pages] == [1, 1, 0, 2, 2, 3, 1, 0]
    assert pages.counts() == [32, 32, 6, 32, 32, 32, 32, 8] and pages.tokens == 206
    stored = pages.decode(torch.float32)[0]
    given = torch.cat([tokens(count, seed=i)[0] for i, count in enumerate((70, 64, 32, 40))], 2)
    assert 0 < (stored - given).abs().max() < 1.5 and torch.equal(stored[:, :, 64:70], given[:, :, 64:70])
    query = torch.randn(2, 8, 3, 32)
    before = check(pages, query)
    pages.set_segment(0, 2, *residual(pages, 0, 2, 4))
    pages.set_segment(3, 2, *residual(pages, 3, 2, 2))
    after = check(pages, query)
    assert (after - before).norm() > 0.05 * before.norm()
    pages.crop(50)
    check(pages, query)
    with pytest.raises(ValueError, match="kind: found 4"):
        pages.append_packed(*tokens(32), 4)
    with pytest.raises(ValueError, match="keys: found 33 tokens"):
        pages.append_packed(*tokens(33), 1)


def test_a_residual_of_full_rank_restores_what_was_packed(isa):
    pages = make(formats=(PageFormat(2, 2, rank=16),))
    keys, values = tokens(64)
    basis = torch.randn(2, 2, 2, 16, 32)  # keys and values of 16 dimensions, so that a rank of 16 can be all of them
    keys, values = (x[..., :16] @ b for x, b in zip((keys, values), basis))
    pages.append(keys, values)
    stored = pages.decode()
    factors = []
    for exact, packed in zip((keys, values), stored):
        u, s, v = torch.linalg.svd(exact.double() - packed)
        factors.append((v[..., :16, :], (u[..., :16] * s[..., None, :16]).transpose(-1, -2)))
    (pk, qk), (pv, qv) = factors
    errors = [(packed - exact).norm() for exact, packed in zip((keys, values), pages.decode())]
    pages.set_segment(0, 2, pk, pv, qk, qv)
    for exact, packed, before in zip((keys, values), pages.decode(), errors):
        assert (packed - exact).norm() < 0.75 * before
    check(pages, torch.randn(2, 4, 2, 32))


def test_segments_follow_their_sequences(isa):
    pages = make(batch=3, recent=8)
    pages.append(*tokens(140, batch=3))
    pages.set_segment(0, 3, *residual(pages, 0, 3, 4))
    held = pages.nbytes
    query = torch.randn(3, 4, 2, 32)
    before = check(pages, query)
    pages.select([2, 0, 2, 1])
    out = check(pages, query[[2, 0, 2, 1]])
    assert (out - before[[2, 0, 2, 1]]).abs().max() < 1e-5 and pages.nbytes < held + 200
    pages.select([3])
    assert len(pages.pages[0].memory) == len(pages.pages[0].segment) == 1 and pages.nbytes < held / 2
    assert pages.pages[0].segment is pages.pages[2].segment
    out = check(pages, query[[1]])
    assert (out - before[[1]]).abs().max() < 1e-5
    pages.append(*tokens(32, batch=1))  # the table grows where segments stand
    pages.drop_before(40)
    assert pages.first == 32 and pages.pages[0].segment is not None
    check(pages, query[[1]])
    pages.select([0, 0])
    shared = pages.decode()[0]
    pages.set_segment(0, 1, *residual(pages, 0, 1, 4, seed=5))  # to pages that sequences share
    now = pages.decode()[0]
    assert not torch.equal(now[0, :, :32], now[1, :, :32]) and torch.equal(now[:, :, 32:], shared[:, :, 32:])
    check(pages, query[[1, 1]])


def test_what_segments_refuse():
    pages = make()
    pages.append(*tokens(100))
    good = residual(pages, 0, 2, 4)
    pages.append_packed(*tokens(32), 3)
    for first, count, factors, message in (
            (2, 2, good, "first_page, count|ranks \\[0, 4\\]"), (4, 2, good, "first_page, count: found \\[4, 2\\]"),
            (3, 1, good, "ranks \\[0\\]"), (0, 2, residual(pages, 0, 2, 3), "pk: found"),
            (0, 2, [*good[:3], good[3][..., 1:]], "qv: found"), (0, 1, good, "qk: found")):
        with pytest.raises(ValueError, match=message):
            pages.set_segment(first, count, *factors)
    with pytest.raises(ValueError, match="bias: found a tensor, accepted is None"):
        pages.append(*tokens(1), torch.zeros(2, 2, 1))
    with pytest.raises(ValueError, match="positions: found"):
        pages.attend(torch.randn(2, 4, 2, 32), None, None, 1.0, positions=torch.zeros(3).long())
    with pytest.raises(ValueError, match="log_sum_exp: found"):
        pages.mass(torch.randn(2, 4, 2, 32), torch.zeros(2, 4, 3), 1.0)


def test_biases(isa):
    pages, plain = make(biased=True), make()
    keys, values = tokens(75)
    bias = torch.randn(2, 2, 75)
    bias[:, :, 10:20], bias[0, 1, 40:] = -torch.inf, -torch.inf
    bias[1, 0, 32:64] = -torch.inf  # a page that nothing of is seen
    pages.append(keys[:, :, :70], values[:, :, :70], bias[:, :, :70])
    plain.append(keys, values)
    query = torch.randn(2, 4, 5, 32)
    out = pages.attend(query, keys[:, :, 70:], values[:, :, 70:], 0.2, bias=bias[:, :, 70:])
    assert torch.equal(pages.biases(), bias)
    exact, _ = reference_attention(query, *pages.decode(), 0.2, visible(pages, 5), bias=bias)
    assert out.isfinite().all() and (out - exact).norm() < 2e-5 * exact.norm()
    check(pages, query)
    # What is hidden is as what a mask hides; a token that stands for three is as three of it.
    pages = make(biased=True)
    pages.append(keys, values, torch.where(bias.isneginf(), bias, 0))
    mask = ~bias.isneginf().repeat_interleave(2, 1).unsqueeze(2).expand(-1, -1, 5, -1)
    assert torch.allclose(pages.attend(query, None, None, 0.2, causal=False),
                          plain.attend(query, None, None, 0.2, causal=False, mask=mask), atol=1e-6)
    thrice, once = make(), make(biased=True)
    thrice.append(torch.cat([keys, keys[:, :, -1:], keys[:, :, -1:]], 2),
                  torch.cat([values, values[:, :, -1:], values[:, :, -1:]], 2))
    once.append(keys, values, torch.cat([torch.zeros(2, 2, 74), torch.full((2, 2, 1), 3.0).log()], 2))
    assert torch.allclose(once.attend(query, None, None, 0.2, causal=False),
                          thrice.attend(query, None, None, 0.2, causal=False), atol=1e-5)
    pages = make(biased=True)
    pages.append(keys, values, torch.full((2, 2, 75), -torch.inf))
    out, score = pages.attend(query, None, None, 0.2, log_sum_exp=True)
    assert (out == 0).all() and score.isneginf().all() and (pages.mass(query, score, 0.2) == 0).all()


def test_queries_anywhere(isa):
    pages = make()
    pages.append(*tokens(150))
    query = torch.randn(2, 4, 150, 32)
    everywhere, total = pages.attend(query, None, None, 0.2, window=50, softcap=3.0, log_sum_exp=True)
    at = torch.tensor([3, 149, 60, 61, 0])
    out, score = pages.attend(query[:, :, at], None, None, 0.2, window=50, softcap=3.0, log_sum_exp=True, positions=at)
    assert torch.allclose(out, everywhere[:, at], atol=1e-6) and torch.allclose(score, total[..., at], atol=1e-6)
    options = {"window": 50, "softcap": 3.0}
    mass = pages.mass(query[:, :, at], score, 0.2, positions=at, **options)
    one_by_one = sum(pages.mass(query[:, :, i:i + 1], total[..., i:i + 1], 0.2, position=i, **options)
                     for i in at.tolist())
    assert torch.allclose(mass, one_by_one, atol=1e-5) and mass[..., 62:99].max() == 0 and mass[..., 100:].max() > 0


def test_mass_of_many_queries_does_not_depend_on_threads(isa):
    pages = make(batch=1)
    pages.append(*tokens(700, batch=1))
    query = torch.randn(1, 8, 40, 32)
    _, score = pages.attend(query, None, None, 0.2, log_sum_exp=True)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(pages.mass(query, score, 0.2))
    torch.set_num_threads(1)
    assert torch.equal(*results)
    mask = torch.rand(1, 1, 40, 700) > 0.5
    _, score = pages.attend(query, None, None, 0.2, mask=mask, log_sum_exp=True)
    truth = reference_mass(query, pages.decode()[0], score, 0.2, visible(pages, 40) & mask)
    assert (pages.mass(query, score, 0.2, mask=mask) - truth).norm() < 2e-5 * truth.norm()
