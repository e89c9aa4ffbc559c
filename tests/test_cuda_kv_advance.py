"""The kernel that advances a static cache's table: against its definition, for several orders of threads, and broken.

Its regions are addresses that nobody reads here; `test_kv_static.py` has what attention makes of them.
"""

import pytest
import torch
from cuda_cache import advance_library
from cuda_kv import fields, ints, launch
from emulation import build

pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL = "cuda/kernels/kv_advance.cu"
SINKS, RAW, PACKED = 1 << 32, 2 << 32, 3 << 32
RAW_BYTES, PACKED_BYTES, MOST = 4096, 1152, 128


class Static:
    """A cache's bookkeeping on the host, page by page, and the kernel's on tensors."""

    def __init__(self, totals, recent=40, sink_pages=1, pages=40, packed_pages=30, bits=(4, 8), max_tokens=0):
        self.recent, self.sink_pages, self.room, self.bits = recent, sink_pages, pages, bits
        self.raw_pages = -(-(recent + MOST) // 64) + 2 if min(bits) < 16 else pages
        self.packed_pages, self.max_tokens, self.batch = packed_pages, max_tokens or 64 * pages, len(totals)
        self.table = torch.full((self.batch, pages, 2), -1)
        self.used = torch.full((self.batch,), -1, dtype=torch.int32)
        self.jobs = torch.full((self.batch, MOST // 64, 2), -1)
        self.state = torch.tensor([[total, 0] for total in totals], dtype=torch.int32)
        self.entries = [{} for _ in totals]
        for b, total in enumerate(totals):  # all that a step does not touch any more
            self.entries[b] = self.expected_entries(b, total, total)
            for page, entry in self.entries[b].items():
                self.table[b, page] = torch.tensor(entry)

    def is_old(self, page, tokens):
        return min(self.bits) < 16 and page >= self.sink_pages and 64 * (page + 1) + self.recent <= tokens

    def places(self, b, page):
        """Raw and packed."""
        at = page - self.sink_pages
        raw = SINKS + (b * self.sink_pages + page) * RAW_BYTES if at < 0 else \
            RAW + (b * self.raw_pages + at % self.raw_pages) * RAW_BYTES
        return raw, PACKED + (b * self.packed_pages + at % self.packed_pages) * PACKED_BYTES

    def expected_entries(self, b, before, after):
        made = {}
        for page in range(-(-after // 64)):
            old = self.is_old(page, before)
            bits = self.bits if old else (16, 16)
            made[page] = (self.places(b, page)[old], 64 * page | min(64, after - 64 * page) << 32 | old * 5 << 40
                          | bits[0] << 48 | bits[1] << 56)
        return made

    def advance(self, library, tokens):
        before = self.state.clone()
        arguments = fields(self.table, self.used, self.state, self.jobs, SINKS, RAW, PACKED, self.batch, self.room,
                           MOST // 64, self.sink_pages, self.raw_pages, self.packed_pages, RAW_BYTES, PACKED_BYTES,
                           *self.bits, 5, self.recent, MOST, self.max_tokens)
        buffers = {"table": self.table, "used": self.used, "state": self.state, "jobs": self.jobs}
        counters = launch(library, "tersor_cuda_kv_advance", [arguments, *ints(tokens, 0)], buffers, list(buffers),
                          seeds=range(4), count=True)
        for b, (total, missed) in enumerate(before.tolist()):
            fits = total + tokens <= self.max_tokens
            after = total + tokens * fits
            assert self.state[b].tolist() == [after, missed + (not fits)]
            assert self.used[b] == -(-after // 64)
            expected = self.expected_entries(b, total, after)
            assert {page: tuple(self.table[b, page].tolist()) for page in expected} == expected
            jobs = [self.places(b, page) for page in range(self.room)
                    if self.is_old(page, after) and not self.is_old(page, total)]
            assert [tuple(job) for job in self.jobs[b].tolist()] == jobs + [(0, 0)] * (MOST // 64 - len(jobs))
        return counters


def check(library):
    """Sequences of unequal lengths, over page borders; pages that leave a ring; a step that does not fit."""
    cache = Static([0, 63, 64, 500, 2000])
    for tokens in (1, 63, 128, 1, 1, 40, 127, 64):
        cache.advance(library, tokens)
    cache.state[:, 0] = cache.state[:, 0].sub(30).clamp_min(0)
    cache.advance(library, 0)
    cache = Static([104, 105, 167, 168, 169], recent=104)
    for tokens in (1, 1, 64):
        cache.advance(library, tokens)
    cache = Static([1900, 1910, 1920], recent=0, sink_pages=0, packed_pages=7, max_tokens=1985)
    for tokens in (64, 1, 128, 0, 1):
        cache.advance(library, tokens)
    cache = Static([10, 700], bits=(16, 16), sink_pages=0)
    for tokens in (60, 1, 128):
        cache.advance(library, tokens)
    cache = Static([2500], recent=2400)  # more entries than lanes
    cache.advance(library, 1)


def test_against_its_definition():
    check(advance_library())


def test_a_step_touches_little():
    """Once a sequence is long, a step still writes a few entries of it."""
    cache = Static([20000] * 3, pages=400, recent=32)
    counters = cache.advance(advance_library(), 1)
    buffers = counters["total"]["global"]
    assert buffers["table"]["stored"] <= 3 * 16 * 8 and buffers["jobs"]["stored"] == 3 * 32
    assert buffers["state"]["loaded"] <= 3 * 32 * 8


MUTANTS = {
    "no sync after the state": ("  ptx::sync_warp();  // all lanes", "  // all lanes"),
    "a page too early": ("kKvTokens * (page + 1) + a.recent <= tokens", "kKvTokens * page + a.recent <= tokens"),
    "a token too late": ("+ a.recent <= tokens", "+ a.recent < tokens"),
    "sinks are packed": ("packs && page >= a.sink_pages &&", "packs &&"),
    "entries are packed a step too early": ("const bool packed = is_old(page, before)",
                                            "const bool packed = is_old(page, after)"),
    "entries begin too late": ("changed / kKvTokens - 1 : 0", "changed / kKvTokens + 2 : 0"),
    "entries of the first lanes alone": ("page < end; page += 32", "page < end; page += 3200"),
    "tokens of a full page": ("left < kKvTokens ? left : kKvTokens", "kKvTokens"),
    "the first sequence's place": ("(int64_t(sequence) * pages + page) * bytes", "page * bytes"),
    "no ring of raw pages": ("(page - a.sink_pages) % a.raw_pages)", "(page - a.sink_pages))"),
    "no ring of packed pages": ("(page - a.sink_pages) % a.packed_pages)", "(page - a.sink_pages))"),
    "a job for pages before": ("before > a.recent ? (before - a.recent) / kKvTokens : 0", "0"),
    "jobs that stay": ("    ptx::store_global(reinterpret_cast<Pair*>(a.jobs)",
                       "    if (addresses[0]) ptx::store_global(reinterpret_cast<Pair*>(a.jobs)"),
    "too many tokens": ("const bool fits = a.tokens <= a.max_tokens - before;", "const bool fits = true;"),
    "nothing missed": ("known[1] + (fits ? 0 : 1)", "known[1]"),
    "pages of the step before": ("int32_t(end)", "int32_t((before + kKvTokens - 1) / kKvTokens)"),
    "no format": ("packed ? a.format : 0", "0"),
    "a format of raw pages": ("packed ? a.format : 0", "a.format"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name):
    sources = [KERNEL, "cuda/dispatch/kv_advance.cu", "cpp/common/status.cpp"]
    library = build(sources, edits=[(KERNEL, *MUTANTS[name])])
    with pytest.raises(AssertionError):
        check(library)
