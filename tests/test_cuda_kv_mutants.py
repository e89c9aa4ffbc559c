"""Mutation test of the cache's CUDA kernels: every planted defect must be caught by the emulated checks.

As in `test_cuda_mutants`: a mutant is a textual edit, compiled with what the problems below need, and is killed by a
violation or by a wrong result; one that does not compile counts as a mistake here.
"""

from unittest import mock

import pytest
import test_cuda_kv
import test_cuda_kv_formats
import torch
from cuda_kv import (FORMAT_SOURCES, KERNEL, MASS_SOURCES, PAGE_SOURCES, SOURCES, attend, attention_mass, cached,
                     cached_layout, relative_error, true_mass, truth)
from emulation import build
from test_cuda_kv import queries
from test_cuda_kv_formats import FORMATS, UNEVEN, PageFormat, layout_of, rotary_of

pytestmark = pytest.mark.usefixtures("one_thread")
STREAM, RESULTS, CODES, ROWS, SCORES, VALUES, ATTENTION_H = (
    f"cuda/tile/kv_{part}.h" for part in ("stream", "results", "codes", "rows", "scores", "values", "attention"))
APPEND, PACK, PACK_FORMATS = PAGE_SOURCES[:3]
PACK_H, CHOOSE = "cuda/tile/kv_pack.h", "cuda/tile/kv_choose.h"

# 8 rows; pages of 4, 8 and 16 bits.
INSTANCE = [(KERNEL, "kv_attention<TERSOR_HEAD_DIM, kv_most_rows(TERSOR_HEAD_DIM)>", "nullptr")] + [
    (file, f"        case {bits}: {call}; break;\n", "") for bits in (2, 3)
    for file, call in ((SCORES, f"score_keys<{bits}>(score, page)"), (VALUES, f"add_values<{bits}>(p, valid, page)"))]

FORMAT_INSTANCE = INSTANCE[1:]

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


def check_formats(library, dim=64):
    """Each part of a format, in one table; and keys that are turned."""
    formats = (PageFormat(4, 3, key_levels=UNEVEN, value_levels=UNEVEN[::2], key_outliers=40, value_outliers=50),
               PageFormat(8, 8, key_axis="token", key_levels="e4m3", value_levels="e4m3"),
               PageFormat(4, 4, key_axis="token", value_axis="separable", value_outliers=9),
               PageFormat(8, 4, key_outliers=30, value_group=64))
    made = layout_of(*formats, dim=dim, kv_heads=2, biased=True)
    halves = PageFormat(4, 4, key_tokens=32, value_group=32)
    turned = layout_of(formats[0], formats[3], formats[1], halves, dim=dim, rotary=rotary_of(48))
    for cache in (cached_layout(made, [[(64, 1), (64, 2), (64, 3), (64, 4), (40, 1), (7, 0)]]),
                  cached_layout(turned, [[(64, 1), (64, 2), (64, 3), (64, 4), (9, 0)]]),
                  cached_layout(layout_of(halves, dim=dim), [[(64, 1), (64, 1), (5, 0)]])):
        q = queries(1, 2 * cache.kv_heads, 3, dim, torch.float16)
        expected, total = truth(cache, q)
        out, lse, _ = attend(library, cache, q, 2, seeds=(0, 1))
        assert relative_error(out, expected) < 3e-4
        assert torch.allclose(lse.double(), total, atol=2e-4, rtol=0)


def check_residuals(library):
    with mock.patch.object(test_cuda_kv_formats, "attention_library", lambda *_: library):
        test_cuda_kv_formats.test_residuals(64, 0)


def check_mass(library):
    cache = cached_layout(layout_of(FORMATS["outliers"], kv_heads=2, biased=True),
                          [[(64, 1), (64, 0), (64, 1), (9, 0)], [(64, 1)] * 6])
    q = queries(2, 4, 11, 64, torch.float16)
    for splits, options in ((1, {}), (3, dict(window=150))):
        total = truth(cache, q, **options)[1].float()
        mass, _ = attention_mass(library, cache, q, total, 384, splits, seeds=range(3), **options)
        assert float((mass - true_mass(cache, q, total, 384, **options)).abs().max()) < 2e-4


def check_packing(library):
    with mock.patch.object(test_cuda_kv_formats, "page_library", lambda: library):
        for name in ("outliers", "outliers nuq", "nuq 3, 2", "e4m3", "token", "token e4m3", "halves outliers"):
            test_cuda_kv_formats.test_pack_equals_the_reference(name)
        test_cuda_kv_formats.test_pack_of_separable_values("outliers separable")
        test_cuda_kv_formats.test_pack_of_turned_keys("nuq 4")
        test_cuda_kv_formats.test_append_of_biases()
        test_cuda_kv_formats.test_append_of_turned_keys()
        test_cuda_kv_formats.test_pack_of_what_is_not_finite()


def check_pages(library):
    with mock.patch.object(test_cuda_kv, "page_library", lambda: library):
        test_cuda_kv.test_append(80, 7)
        test_cuda_kv.test_append(64, 150)
        test_cuda_kv.test_pack_equals_the_reference_to_the_bit(80)
        test_cuda_kv.test_pack_equals_the_reference_to_the_bit(128)
        test_cuda_kv.test_pack_of_what_is_not_finite()


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
    "units without parameters": (STREAM, "extra_ = bits < 16 ? kKvValueParameters : 0", "extra_ = 0"),
    "the first head's pages": (STREAM, "int64_t(head_) * kv_page_bytes(kDim, key_bits, page.value_bits);",
                              "int64_t(0);"),
    "pages of a window's end left out": (STREAM, "page.position + page.tokens > from", "page.position >= from"),
    "the next unit's slot": (STREAM, "return ring_ + slot_ * kSlotBytes;",
                             "return ring_ + (slot_ + 1) % kSlots * kSlotBytes;"),
    "pages left over by the splits": (ATTENTION_H, "(pages + a.splits - 1) / a.splits", "pages / a.splits"),
    # masks
    "no mask of positions": (SCORES, "if (position < from[row] || position > to[row]) score", "if (false) score"),
    "no mask of bytes": (SCORES, "if (ptx::load_global(bytes + at) == 0)", "if (false)"),
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
    "append: the first head": (APPEND, "int64_t(head) * kv_page_bytes(a.dim, 16, 16, {}, a.biased)", "0"),
    "pack: ranges of half the lanes": (PACK_H, "int last = 16", "int last = 8"),
    "pack: a minimum above the least": (PACK_H, "if (f16(minimum) > least) minimum = f16_below(minimum);", ""),
    "pack: a scale too small": (PACK_H, "if (double(f16(scale)) < step) scale = f16_above(scale);", ""),
    "pack: unsigned 8 bits": (PACK_H, "words[i] ^= 0x80808080", "words[i] ^= 0"),
    "pack: halves down": (PACK_H, "if (over + over >= scale)", "if (over + over > scale)"),
    "pack: infinity counts": (PACK_H, "range.finite = range.finite && finite;\n", "\n"),
    "pack: groups of the first page": (PACK, "raw + group * kv_value_group_bytes(a.dim, 16)", "raw"),
}  # fmt: skip


PACK_OF_FORMATS = {
    "no barrier before codes": (PACK_FORMATS,
        "    ptx::barrier();\n    if (a.key_bits == 16) {",
        "    if (a.key_bits == 16) {"),
    "no barrier before outliers": (PACK_FORMATS,
        "    ptx::barrier();\n    if (warp == 0 && f.key_outliers > 0) choose_keys",
                                   "    if (warp == 0 && f.key_outliers > 0) choose_keys"),
    "ranges with outliers": (PACK_FORMATS, "if (!taken(i)) range = with;", "range = with;"),
    "outliers of half a list": (PACK_FORMATS, "before += ptx::shuffle(sum, 31);", ""),
    "entries that are left": (PACK_FORMATS, "uint32_t(kKvTokens * a.dim - 1)", "uint32_t(0)"),
    "differences without factors": (PACK_FORMATS,
        "coder().value(value_code(token, channel), p) * double(factor_of(channel))",
                                    "coder().value(value_code(token, channel), p)"),
    "biases of the next token": (APPEND,
        "kv_key_bytes(a.dim, 16)) + slot, bias",
        "kv_key_bytes(a.dim, 16)) + (slot ^ 1), bias"),
    "raw keys as they come": (APPEND, "a.rotary.halves ? a.rotary.pairs : 0", "0"),
    "keys turned on": (PACK_FORMATS, "(channel % 2 == 0 ? y : -y)", "(channel % 2 == 0 ? -y : y)"),
    "scales of the first half": (PACK_FORMATS, "(f.key_halves ? token / 32 * kKvKeyParameters : 0)", "0"),
    "outliers of the first half": (PACK_FORMATS, "key_at(v % each * length + i, v / each)", "key_at(i, v / each)"),
    "no sync of gains": (CHOOSE,
        "    for (int n = 0; n < count; ++n) {\n      ptx::sync_warp();",
        "    for (int n = 0; n < count; ++n) {"),
    "no sync of what is taken": (CHOOSE, "      ptx::sync_warp();\n      look_at(of);", "      look_at(of);"),
    "gains of spans": (CHOOSE, "(span - after) * (span + after)", "(span - after)"),
    "the smallest alone": (CHOOSE, "symmetric || without_high <= without_low", "symmetric"),
    "a level too low at a border": (PACK_H,
        "units >= static_cast<float>(border);",
        "units > static_cast<float>(border) + 0.01f;"),
    "E4M3 cut off": (PACK_H, "(m + 0x7ffff + (m >> 20 & 1)) >> 20", "m >> 20"),
    "E4M3 of numbers below 2^-6": (PACK_H, "magnitude * 512.0f", "magnitude * 256.0f"),
}  # fmt: skip

FORMAT_MUTANTS = {
    "the first format": (SCORES, "return a.formats[page.format];", "return a.formats[1];"),
    "no tails": (STREAM, "tails_ = kv_key_tail_bytes(f.key_outliers, biased_)", "tails_ = 0"),
    "the scale of all levels": (CODES, "return {top / 254, top / 2};", "return {top / 255, top / 2};"),
    "levels from 0": (CODES, "return {top / 254, top / 2};", "return {top / 254, 0};"),
    "upper levels": (CODES, "ptx::prmt(0, 0xffffffff, upper)", "0u"),
    "thirds of levels": (CODES, "thirds << 5 & 0x00400040", "thirds << 4 & 0x00400040"),
    "signs of E4M3": (CODES,
        "kPair % 2 ? word : word << 8) & 0x80008000",
        "kPair % 2 ? word : word << 8) & 0x00008000"),
    "E4M3 of half the size": (CODES, "0x7b807b80", "0x7b007b00"),
    "scales of tokens of other lanes": (SCORES, "scratch() + 32 * t + 4 * j", "scratch() + 4 * j"),
    "no sync of tokens' scales": (SCORES, "KvUnits units) const {\n    ptx::sync_warp();", "KvUnits units) const {"),
    "minima of tokens": (SCORES, "+ lowest[column] * whole[row];", ";"),
    "biases in units of log e": (SCORES, "bias[i % 2] * kLog2E", "bias[i % 2]"),
    "biases of the outliers": (SCORES, "biases += kv_outlier_bytes(kKvTokens / 2, outliers);", ""),
    "outliers of the first token": (SCORES, "second ? 0.0f : add;", "add;"),
    "outliers of keys not turned": (SCORES, "turn = turn_of(index / kDim, channel / 2)", "turn = turn"),
    "sines of outliers": (SCORES, ": -query_at(row, channel - 1)", ": query_at(row, channel - 1)"),
    "keys turned back": (SCORES,
        "x * cosine - y * sine, y * cosine + x * sine",
        "x * cosine + y * sine, y * cosine - x * sine"),
    "remainders of turned keys": (SCORES, "BFloat16::mma(sum[kTile], q.first, rest);", ""),
    "queries as they come": (ROWS, "kFormats && a.rotary.halves ? a.rotary.pairs : 0", "0"),
    "scales of the first half": (SCORES, "record - kKvKeyParameters, first", "record - 2 * kKvKeyParameters, first"),
    "minima of the first half": (SCORES, "(j < 4 ? constant[row] : second[row])", "constant[row]"),
    "the offset of codes of halves": (SCORES, "constant[row] -= 128.0f * (first", "constant[row] -= 127.0f * (first"),
    "turned keys of the first half": (SCORES, "if (f.key_halves) turned.load(", "if (false) turned.load("),
    "scales of a pair's first turned token": (SCORES, "4 * kTile + 2 * (g % 2)", "4 * kTile"),
    "no sync of turned tokens' scales": (SCORES, "        ptx::sync_warp();\n        record += kKv",
                                         "        record += kKv"),
    "minima without factors": (VALUES,
        "two[i % 2] * (page_out[n][i] + constant)",
        "two[i % 2] * page_out[n][i] + constant"),
    "minima of one lane": (VALUES, "whole[row] = sum[row] + ptx::shuffle_xor(sum[row], 2);", "whole[row] = sum[row];"),
    "outliers of the first channel": (VALUES, "index % 2 != 0 ? 0.0f : add;", "add;"),
    "no sync of weights": (VALUES,
        "(g % 4 * 8)), two);\n      }\n      ptx::sync_warp();", "(g % 4 * 8)), two);\n      }"),
    "entries of tokens that nobody sees": (VALUES, "weight == 0 ? 0.0f : weight", "weight"),
}  # fmt: skip

GROUP_MUTANTS = {  # 64 channels are one group
    "one group's weights for all": (VALUES, "(f.value_begins >> (n / 2) & 1) != 0", "n == 0"),
    "groups of a unit without parameters": (STREAM, "step_ += unit / records * extra_;", "step_ += extra_;"),
}  # fmt: skip

RESIDUAL_MUTANTS = {
    "residuals of the first head": (SCORES, "int64_t(this->head()) * 2 + values", "int64_t(values)"),
    "keys' left factors for values": (VALUES, "residual_pair(r, i, j, true)", "residual_pair(r, i, j, false)"),
    "products of another segment": (SCORES, "a.residual_width + r.column + i", "a.residual_width + i"),
    "residuals of the first page": (SCORES, "a.table_pages + page.position / kKvTokens", "a.table_pages"),
    "a lane's own tokens": (VALUES, "sum[row] += ptx::shuffle_xor(sum[row], 2);\n      }\n      const int64_t right",
                            "}\n      const int64_t right"),
}  # fmt: skip

MASS = "cuda/kernels/kv_mass.cu"
MASS_MUTANTS = {
    "rows that do not exist": (MASS, "if (index >= this->row_count()) return infinity();", "if (index < 0) return 0;"),
    "the last tile alone": (MASS, "(this->tile > 0 ? ptx::load_global(mass + token) : 0.0f)", "0.0f"),
    "half the rows": (MASS, "lanes <= 16", "lanes <= 8"),
    "no barrier between tiles": (MASS, "    ptx::barrier();  // nobody reads", "    // nobody reads"),
    "no barrier after the queries": (MASS, "    rows.template load_queries<true>(rows.query);\n    ptx::barrier();",
                                     "    rows.template load_queries<true>(rows.query);"),
    "a log-sum-exp of base e": (MASS, "total * kLog2E;", "total;"),
    "the first head's mass": (MASS, "a.kv_heads + blockIdx.y) * m.tokens", "a.kv_heads) * m.tokens"),
    "values in the stream": (STREAM, "values_ = kValues ? page.value_bits |", "values_ = true ? page.value_bits |"),
}  # fmt: skip


# Sources, the edits that leave few instances to compile, channels of a head, what kills mutants, and they.
KINDS = {
    "attention": (SOURCES, INSTANCE, 64, check_attention, ATTENTION),
    "pages": (PAGE_SOURCES, [], None, check_pages, PAGES),
    "packing": (PAGE_SOURCES, [], None, check_packing, PACK_OF_FORMATS),
    "formats": (FORMAT_SOURCES, FORMAT_INSTANCE, 64, check_formats, FORMAT_MUTANTS),
    "groups": (FORMAT_SOURCES, FORMAT_INSTANCE, 128, lambda library: check_formats(library, 128), GROUP_MUTANTS),
    "residuals": (FORMAT_SOURCES, FORMAT_INSTANCE, 64, check_residuals, RESIDUAL_MUTANTS),
    "mass": (MASS_SOURCES, [], 64, check_mass, MASS_MUTANTS),
}


def compiled(kind, *edits):
    sources, few, dim, *_ = KINDS[kind]
    return build(sources, {"TERSOR_HEAD_DIM": dim} if dim else None, edits=[*few, *edits])


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_kernels_pass(kind):
    KINDS[kind][3](compiled(kind))


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, of in KINDS.items() for name in of[4]])
def test_mutant_is_killed(kind, name):
    *_, check, mutants = KINDS[kind]
    with pytest.raises(AssertionError):
        check(compiled(kind, mutants[name]))
