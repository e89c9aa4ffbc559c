"""The paged storage of one layer: a random history of edits against plain tensors, and what it must never do."""

import random

import pytest
import torch

from tersor.kv.layout import Layout, reference_attention
from tersor.kv.pages import Pages


pytestmark = pytest.mark.usefixtures("one_thread")


class Plain:
    """The same edits on tensors."""

    def __init__(self, batch, heads, dim):
        self.keys, self.values = (torch.zeros(batch, heads, 0, dim) for _ in range(2))
        self.first = 0

    def append(self, keys, values):
        self.keys, self.values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)

    def edit(self, function):
        self.keys, self.values = function(self.keys), function(self.values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [16, 8])
def test_any_history_of_edits(bits, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    layout = Layout.uniform(2, 32, 32, torch.float32, bits, bits, 32, 32)
    pages, plain, batch = Pages(layout, 2, recent=seed % 3 * 16, sink_pages=seed % 2), Plain(2, 2, 32), 2
    for _ in range(40):
        action = random.choice(["append", "append", "attend", "attend", "prompt", "crop", "select", "drop"])
        if action in ("append", "prompt", "attend"):
            count = random.randint(1, 150 if action == "prompt" else 6)
            keys, values = torch.randn(2, batch, 2, count, 32).unbind(0)
            plain.append(keys, values)
        if action in ("append", "prompt"):
            pages.append(keys, values)
        elif action == "attend":
            q = torch.randn(batch, 4, count, 32)
            out = pages.attend(q, keys, values, 0.2)
            at = torch.arange(pages.tokens)
            visible = (at <= pages.tokens - count + torch.arange(count).view(-1, 1)).expand(batch, 1, -1, -1)
            before = reference_attention(q, plain.keys[:, :, -pages.tokens:], plain.values[:, :, -pages.tokens:], 0.2,
                                         visible)[0]
            assert (out - before).norm() <= (1e-5 if bits == 16 else 0.02) * before.norm()
        elif action == "crop":
            count = random.randint(0, min(pages.tokens, 70))
            pages.crop(count)
            plain.edit(lambda t: t[:, :, :t.shape[2] - count])
        elif action == "select":
            rows = [random.randrange(batch) for _ in range(random.choice([batch, 1, 3]))]
            pages.select(rows)
            plain.edit(lambda t: t[rows])
            batch = len(rows)
        else:
            pages.drop_before(pages.first + random.randint(0, 20))
        held = plain.keys[:, :, plain.keys.shape[2] - pages.tokens:]
        stored = pages.decode(torch.float32)[0]
        assert stored.shape == held.shape
        error = (stored - held).abs().max() if held.numel() else 0
        assert error == 0 if bits == 16 else error < 0.03
        assert sum(pages.counts()) == pages.tokens and len(pages.pages) == len(pages.counts())


def test_history_is_never_packed_again():
    layout = Layout.uniform(1, 32, 32, torch.float32, 2, 2, 32, 32)
    pages = Pages(layout, 1)
    pages.append(*torch.randn(2, 1, 1, 100, 32).unbind(0))
    before = [page.memory.clone() for page in pages.pages if page.packed]
    addresses = [page.memory.data_ptr() for page in pages.pages if page.packed]
    for _ in range(80):
        pages.attend(torch.randn(1, 2, 1, 32), *torch.randn(2, 1, 1, 1, 32).unbind(0), 1.0)
    packed = [page.memory for page in pages.pages if page.packed]
    assert len(before) == 3 and len(packed) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, packed))
    assert addresses == [memory.data_ptr() for memory in packed[:3]]


def test_recent_tokens_and_sinks_stay_raw():
    layout = Layout.uniform(1, 32, 32, torch.float32, 4, 4, 32, 32)
    pages = Pages(layout, 1, recent=40, sink_pages=1)
    for count in (150, *[1] * 100, 9, 70):
        fresh = torch.randn(2, 1, 1, count, 32).unbind(0)
        if count % 2:
            pages.attend(torch.randn(1, 1, count, 32), *fresh, 1.0)
        else:
            pages.append(*fresh)
        raw_tail = 0
        for page, held in zip(reversed(pages.pages), reversed(pages.counts())):
            if page.packed:
                break
            raw_tail += held
        assert 40 <= raw_tail < 40 + 32 and not pages.pages[0].packed and pages.pages[1].packed


def test_a_cropped_page_that_is_shared_is_copied_before_it_is_written():
    layout = Layout.uniform(1, 32, 32, torch.float32, 16, 16, 32, 32)
    pages = Pages(layout, 1)
    keys = torch.randn(1, 1, 32, 32)
    pages.append(keys, keys)
    pages.select([0, 0])
    pages.crop(4)
    fresh = torch.randn(2, 1, 4, 32)
    pages.append(fresh, fresh)
    stored = pages.decode(torch.float32)[0]
    assert torch.equal(stored[:, :, :28], keys[:, :, :28].expand(2, -1, -1, -1))
    assert torch.equal(stored[:, :, 28:], fresh)


def test_a_step_allocates_no_unpacked_cache():
    layout = Layout.uniform(2, 64, 64, torch.float32, 4, 4, 64, 64)
    pages = Pages(layout, 1)
    pages.append(*torch.randn(2, 1, 2, 4096, 64).unbind(0))
    q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64)
    before = pages.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pages.attend(q, k, k, 0.1)
    allocated = sum(max(0, event.self_device_memory_usage or event.cpu_memory_usage) for event in profile.events())
    one_page = 2 * layout.page_bytes(False)
    assert allocated <= one_page + 3 * q.nbytes, "the output, and a page where one begins"
    assert pages.nbytes - before <= one_page + 64
