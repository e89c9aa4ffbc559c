"""Attention mass on CUDA, host-executed, against float64 over the numbers as stored."""

import pytest
import torch
from cuda_kv import attention_mass, cached, cached_layout, layout, mass_library, true_mass, truth
from test_cuda_kv import FOUR, RAW, queries
from test_cuda_kv_formats import FORMATS, layout_of

pytestmark = pytest.mark.usefixtures("one_thread")


def agree(cache, q, tokens, splits=1, seeds=(0, 1), **options):
    total = truth(cache, q, **options)[1].float()
    mass, counters = attention_mass(mass_library(cache.dim), cache, q, total, tokens, splits, seeds=seeds, **options)
    expected = true_mass(cache, q, total, tokens, **options)
    assert float((mass - expected).abs().max()) < 1e-4 * max(1.0, float(expected.max()))
    return mass, counters


@pytest.mark.parametrize("dim", layout.DIMS)
def test_every_head_dim_and_bits(dim):
    """Several row tiles, unequal sequences, tokens past the end of some."""
    for bits in layout.BITS:
        page = (64, bits, bits)
        cache = cached(dim, 2, torch.float16, [[page, page, (17, 16, 16)], [page, (1, 16, 16)]], seed=bits)
        agree(cache, queries(2, 4, 1 if bits > 2 else 9, dim, torch.float16), 200)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    """Values and their outliers are passed over."""
    made = layout_of(FORMATS[name], kv_heads=2, dtype=torch.bfloat16, biased=name != "plain")
    cache = cached_layout(made, [[(64, 1), (64, 1), (17, 0)], [(64, 1), (30, 1)]])
    agree(cache, queries(2, 4, 5, 64, torch.bfloat16), 150)


def test_splits_and_many_queries():
    """However many blocks, and whatever the order of threads: the same to the bit."""
    cache = cached(64, 1, torch.float16, [[FOUR] * 9 + [(3, 16, 16)], [], [FOUR] * 2])
    q = queries(3, 4, 21, 64, torch.float16)
    made = [agree(cache, q, 600, splits, seeds=range(4))[0] for splits in (1, 2, 5)]
    assert all(torch.equal(made[0], mass) for mass in made)
    assert not made[0][1].any()


def test_what_queries_do_not_see_gets_nothing():
    cache = cached(64, 2, torch.float16, [[FOUR, RAW, FOUR, (20, 16, 16)], [FOUR, FOUR, RAW, (20, 16, 16)]])
    q = queries(2, 4, 12, 64, torch.float16)
    mass, _ = agree(cache, q, 212, window=70, softcap=5.0)
    assert not mass[:, :, : 212 - 70 - 11].any() and mass[:, :, 212 - 70 - 11].all()
    agree(cache, q, 212, first=torch.tensor([70, 205], dtype=torch.int32))
    agree(cache, q, 212, positions=torch.tensor([30, 64], dtype=torch.int32), causal=False, window=40, scale=0.3)
    mask = torch.rand(2, 4, 12, 100, generator=torch.Generator().manual_seed(2)) < 0.4
    mass, counters = agree(cache, q, 212, mask=mask, mask_first=90)
    assert not mass[:, :, :90].any() and not mass[:, :, 190:].any()


def test_only_keys_are_read():
    cache = cached(128, 1, torch.float16, [[FOUR] * 4])
    q = queries(1, 4, 1, 128, torch.float16)
    total = truth(cache, q)[1].float()
    _, counters = attention_mass(mass_library(128), cache, q, total, 256, count=True)
    for name in cache.pages:
        assert counters["total"]["global"][name]["loaded"] == layout.key_bytes(128, 4)
    assert counters["regions"]["pages"]["shared"]["extra_cycles"] == 0
