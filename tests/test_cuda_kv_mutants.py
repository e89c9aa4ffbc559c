"""Mutation test of the cache's CUDA kernels: every planted defect must be caught by the emulated checks.

As in `test_cuda_mutants`: a mutant is a textual edit, compiled with what the problems below need, and is killed by a
violation or by a wrong result; one that does not compile counts as a mistake here.
"""

import pytest
import torch
from cuda_kv import KERNEL, PAGE_SOURCES, SOURCES, attend, cached, relative_error, truth
from emulation import build
from test_cuda_kv import queries

pytestmark = pytest.mark.usefixtures("one_thread")
STREAM, RESULTS, CODES, ROWS, SCORES, VALUES, ATTENTION_H = (
    f"cuda/tile/kv_{part}.h" for part in ("stream", "results", "codes", "rows", "scores", "values", "attention"))
APPEND, PACK = PAGE_SOURCES[:2]

# 8 rows; pages of 4, 8 and 16 bits.
INSTANCE = [(KERNEL, "kv_attention<TERSOR_HEAD_DIM, kv_most_rows(TERSOR_HEAD_DIM)>", "nullptr")] + [
    (file, f"        case {bits}: {call}; break;\n", "") for bits in (2, 3)
    for file, call in ((SCORES, f"score_keys<{bits}>(score, page)"), (VALUES, f"add_values<{bits}>(p, valid, page)"))]

FOUR, EIGHT, RAW = (64, 4, 4), (64, 8, 8), (64, 16, 16)


def check_attention(library):
    """Raises AssertionError (Violation is one) where attention is not right."""
    caches = [cached(64, 2, torch.float16, [[FOUR] * 9 + [EIGHT, (20, 4, 4), (5, 16, 16)], [RAW, EIGHT, FOUR]]),
              cached(64, 1, torch.float16, [[FOUR] * 75 + [(3, 16, 16)]])]
    mask = torch.rand(2, 4, 3, 600, generator=torch.Generator().manual_seed(9)) < 0.5
    for cache, options in ((caches[0], {}), (caches[0], dict(splits=5, sinks=torch.tensor([1.0, 3.0, 0.0, 6.0]))),
                           (caches[0], dict(window=64)), (caches[1], {}), (caches[0], dict(mask=mask, mask_first=40))):
        q = queries(len(cache.rows), 2 * cache.kv_heads, 3, 64, torch.float16)
        out, lse, _ = attend(library, cache, q, seeds=range(4), **options)
        options.pop("splits", None)
        expected, total = truth(cache, q, **options)
        assert relative_error(out, expected) < 3e-4
        assert torch.allclose(lse.double(), total, atol=1e-4, rtol=0)


def check_pages(library):
    import test_cuda_kv

    before, test_cuda_kv.page_library = test_cuda_kv.page_library, lambda: library
    try:
        test_cuda_kv.test_append(80, 7)
        test_cuda_kv.test_append(64, 150)
        test_cuda_kv.test_pack_equals_the_reference_to_the_bit(80)
        test_cuda_kv.test_pack_equals_the_reference_to_the_bit(128)
        test_cuda_kv.test_pack_of_what_is_not_finite()
    finally:
        test_cuda_kv.page_library = before


ATTENTION = {
    # synchronisation
    "no wait for copies": (STREAM, "    ptx::cp_async_wait<kSlots - 2>();\n", ""),
    "a wait one group short": (STREAM, "cp_async_wait<kSlots - 2>", "cp_async_wait<kSlots - 1>"),
    "no sync of lanes": (STREAM, "    ptx::sync_warp();  // every", "    // every"),
    "no commit": (STREAM, "    ptx::cp_async_commit();\n", ""),
    "no sync after the list": (STREAM, "    ptx::sync_warp();\n  }\n\n  // A part", "  }\n\n  // A part"),
    "no barrier after the queries": (ATTENTION_H, "  ptx::barrier();\n  attention.run();", "  attention.run();"),
    "results over units": (ATTENTION_H, "    ptx::barrier();  // nobody", "    // nobody"),
    "no barrier after the statistics": (ATTENTION_H, "    ptx::barrier();\n    float factor", "    float factor"),
    "no barrier between warps": (ATTENTION_H, "      ptx::barrier();\n    }\n  }\n\n  TERSOR_DEVICE void run()",
                                 "    }\n  }\n\n  TERSOR_DEVICE void run()"),
    "no barrier before the arrival": (RESULTS, "    ptx::barrier();\n    if (threadIdx.x == 0) {",
                                      "    if (threadIdx.x == 0) {"),
    "no barrier after the arrival": (RESULTS, "    ptx::barrier();\n    if (ptx::load_shared",
                                     "    if (ptx::load_shared"),
    "no fence before the arrival": (RESULTS, "      ptx::fence();  // what", "      // what"),
    "no fence after the arrival": (RESULTS, "      ptx::fence();  // the others'", "      // the others'"),
    "a counter that does not wrap": (RESULTS, "place, a.splits - 1)", "place, a.splits)"),
    # the stream
    "pages over one another in the list": (STREAM, "list_entry(listed_ + before)", "list_entry(listed_)"),
    "a list that is too short": (STREAM, "index % kKvListed", "index % 8"),
    "units without parameters": (STREAM, "extra_ = value_bits_ < 16 ? kKvValueParameters : 0", "extra_ = 0"),
    "the first head's pages": (STREAM, "int64_t(head_) *", "int64_t(0) *"),
    "pages of a window's end left out": (STREAM, "page.position + page.tokens > from", "page.position >= from"),
    "the next unit's slot": (STREAM, "return ring_ + slot_ * kSlotBytes;",
                             "return ring_ + (slot_ + 1) % kSlots * kSlotBytes;"),
    "pages left over by the splits": (ATTENTION_H, "(pages + a.splits - 1) / a.splits", "pages / a.splits"),
    # masks
    "no mask of positions": (SCORES, "if (position < from[row] || position > to[row]) score", "if (false) score"),
    "no mask of bytes": (SCORES, "if (ptx::load_global_constant(bytes + at) == 0)", "if (false)"),
    "a mask of the first head": (SCORES, "this->query_head(index) * a.mask_strides[1]", "0"),
    "a mask from position 0": (SCORES, "(position - a.mask_first) *", "position *"),
    "positions before a mask": (ROWS, "a.mask != nullptr && a.mask_first > first ? a.mask_first : first", "first"),
    "positions after a mask": (ROWS, "a.mask != nullptr ? a.mask_end - 1 : INT32_MAX", "INT32_MAX"),
    "a window one token too long": (ROWS, "? own - a.window + 1 : least", "? own - a.window : least"),
    "unseen raw values": (VALUES, "if (kCode == 16 && valid != 0xffff)", "if (false)"),
    "every page seen whole": (SCORES, "page.position >= seen.all_from && last <= seen.all_to",
                              "page.position >= seen.any_from"),
    # sums
    "remainders of queries and weights dropped": (SCORES, "first[2 * half + 1] = remainder",
                                                  "first[2 * half + 1] = 0 * remainder"),
    "the offset of codes stays": (SCORES, "base[row] = 128.0f", "base[row] = 127.0f"),
    "minima of keys forgotten": (SCORES, "constant[row] += x[0] * lowest[0] + x[1] * lowest[1];", ""),
    "minima of keys of a lane's own": (SCORES, "        constant[row] += ptx::shuffle_xor(constant[row], 2);\n", ""),
    "sums not brought to a new maximum": (ATTENTION_H, "if (!ptx::any(moved)) return;", "return;"),
    "minima not brought to a new maximum": (ATTENTION_H, "minima[group][row] *= factor[row]", ""),
    "totals not brought to a new maximum": (ATTENTION_H, "total[row] * factor[row] + sum", "total[row] + sum"),
    "one half of the values' parameters": (VALUES, "32 * t + 16 * quarter", "32 * t"),
    "minima of values forgotten": (VALUES, "sum[row] += low_p * lowest[0] + high_p * lowest[1];", ""),
    "a sum of the wrong warp": (ATTENTION_H, "results.merged(g + 8 * row)[0])", "peak[row])"),
    "sinks that do not move the maximum": (RESULTS, "scale = ptx::exp2_approx(peak - reference_of(most));", ""),
    "splits in the order of arrival": (RESULTS, "const float* slot = slots + split *",
                                       "const float* slot = slots + (split + blockIdx.x) % a.splits *"),
    "a split left out": (RESULTS, "for (int first = 0; first < a.splits", "for (int first = 1; first < a.splits"),
    # codes
    "signs of 8 bits": (CODES, "ptx::lop3<kKvMergeMasked>(word, 0x00800080, kKvMagic)", "kKvMagic"),
    "the middle of the codes": (CODES, "1u << (kBits - 1)) * 0x10001u", "1u << kBits) * 0x10001u"),
}  # fmt: skip

PAGES = {
    "append: one token late": (
        APPEND, "last.position + last.tokens - 1 - behind", "last.position + last.tokens - behind"),
    "append: the first lane's page": (APPEND, "(lanes & (0u - lanes)) - 1) : 0", "0u) : 0"),
    "append: half a page": (APPEND, "slot = position - page.position", "slot = (position - page.position) & 31"),
    "append: values as they come": (APPEND, "v[i / 2] >> (16 * (i % 2))", "v[i / 2]"),
    "append: the first head": (APPEND, "int64_t(head) * kv_page_bytes(a.dim, 16, 16)", "0"),
    "pack: ranges of half the lanes": (PACK, "mask <= 16", "mask <= 8"),
    "pack: a minimum above the least": (PACK, "if (f16(minimum) > least) minimum = f16_below(minimum);", ""),
    "pack: a scale too small": (PACK, "if (double(f16(scale)) < step) scale = f16_above(scale);", ""),
    "pack: unsigned 8 bits": (PACK, "words[i] ^= 0x80808080", "words[i] ^= 0"),
    "pack: halves down": (PACK, "if (over + over >= scale)", "if (over + over > scale)"),
    "pack: infinity counts": (PACK, "range.finite = range.finite && finite;\n", "\n"),
    "pack: groups of the first page": (PACK, "raw + group * kv_value_group_bytes(a.dim, 16)", "raw"),
}  # fmt: skip


def test_the_unchanged_kernels_pass():
    check_attention(build(SOURCES, {"TERSOR_HEAD_DIM": 64}, edits=INSTANCE))
    check_pages(build(PAGE_SOURCES))


@pytest.mark.parametrize("name", ATTENTION)
def test_mutant_of_attention_is_killed(name):
    mutant = build(SOURCES, {"TERSOR_HEAD_DIM": 64}, edits=[*INSTANCE, ATTENTION[name]])
    with pytest.raises(AssertionError):
        check_attention(mutant)


@pytest.mark.parametrize("name", PAGES)
def test_mutant_of_pages_is_killed(name):
    mutant = build(PAGE_SOURCES, edits=[PAGES[name]])
    with pytest.raises(AssertionError):
        check_pages(mutant)
