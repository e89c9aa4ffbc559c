"""Mutation test: every defect planted in the W4A16 kernel or its launcher must be caught by the emulated checks.

A mutant is a textual edit, compiled with one instance of the kernel and run on small problems that the unchanged
kernel passes. It is killed by a violation or by a wrong result; one that does not compile counts as a mistake here.
"""

import pytest
import torch
from cuda_int_weights import SOURCES, Weight, inputs, multiply, relative_error
from emulation import build

KERNEL, HEADER, LAUNCHER = SOURCES[0], "cuda/tile/int_tile.h", SOURCES[2]
DEQUANTIZER = "cuda/tile/int_dequantize.h"

# (m, n, k, group, symmetric, ranges): ragged everywhere; stages shared by ranges, groups that begin in the
# middle of a stage, groups of several stages. 11 tokens make two token tiles, 70 make two blocks of eight.
FEW = [(11, 204, 300, 96, False, 4), (11, 204, 300, 32, False, 1), (11, 204, 900, 256, True, 3)]
MANY = [(70, 136, 300, 96, False, 3)]


def instance(token_tiles):
    """The edits that leave one instance of the kernel to compile."""
    cases = [(KERNEL, f"    case {t}: return int_linear<Type, TERSOR_BITS, {t}>;\n", "")
             for t in (1, 2, 4, 8) if t != token_tiles]
    cases.append((KERNEL, "const bool entered_grouped = (int_linear_grouped_choosers[TERSOR_BITS] = "
                          "choose_grouped<TERSOR_BITS>, true);\n", ""))
    return [*cases, (KERNEL, "is_bfloat16 ? choose<BFloat16>(token_tiles) : choose<Float16>(token_tiles)",
                     "is_bfloat16 ? choose<BFloat16>(token_tiles) : nullptr")]


def check(library, problems):
    """Raises AssertionError (Violation is one) where the kernel is not right."""
    for seed, (m, n, k, group, symmetric, ranges) in enumerate(problems):
        weight = Weight(n, k, 4, group, symmetric, torch.float16, seed)
        x, bias = inputs(m, weight, torch.bfloat16, True, seed)
        y, _ = multiply(library, weight, x, bias, ranges, seeds=range(3), pad=4)
        assert relative_error(y, x, weight, bias) < 5e-3
    # Six ranges share each row block. What a bias of -y leaves of token 0 shows the sum's last bits, which the
    # harness compares between the seeds.
    weight = Weight(204, 900, 4, 0, True, torch.float16)
    x, _ = inputs(m, weight, torch.bfloat16, False)
    y, _ = multiply(library, weight, x, None, ranges=12)
    multiply(library, weight, x, -y[0].contiguous(), ranges=12, seeds=range(4))


MUTANTS = {
    # synchronisation
    "no barrier in the main loop": (KERNEL, "      ptx::barrier();                     // everyone's",
                                    "      // everyone's"),
    "no wait for copies": (KERNEL, "ptx::cp_async_wait<kStages - 2>();", ""),
    "a wait one group short": (KERNEL, "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    "no commit": (KERNEL, "      ptx::cp_async_commit();  // also", "      // also"),
    "no commit of empty groups": (KERNEL, "        advance(ahead);\n      }\n      ptx::cp_async_commit();",
                                  "        advance(ahead);\n        ptx::cp_async_commit();\n      }\n     "),
    "fetch into the stage being read": (KERNEL, "fetch_next(unit + kStages - 1, free_slot)",
                                        "fetch_next(unit + kStages - 1, slot)"),
    "no barrier before the arrival": (KERNEL, "      }\n    ptx::barrier();\n    const shared_t flag",
                                      "      }\n    const shared_t flag"),
    "no barrier after the arrival": (KERNEL, "    }\n    ptx::barrier();\n    if (ptx::load_shared<uint32_t>(flag)",
                                     "    }\n    if (ptx::load_shared<uint32_t>(flag)"),
    "no fence before the arrival": (KERNEL, "      ptx::fence();  // what", "      // what"),
    "no fence after the arrival": (KERNEL, "      ptx::fence();  // the others'", "      // the others'"),
    "a counter that does not wrap": (KERNEL, "atomic_inc_wrap(counter, last - first)",
                                     "atomic_inc_wrap(counter, last - first + 1)"),
    "the first arriver adds up": (KERNEL, "load_shared<uint32_t>(flag) != last - first",
                                  "load_shared<uint32_t>(flag) != 0"),
    # bounds
    "no bound on storage tiles": (KERNEL, "tile < tiles_left && block < blocks_left", "block < blocks_left"),
    "no bound on blocks": (KERNEL, "tile < tiles_left && block < blocks_left", "tile < tiles_left"),
    "no bound on tokens read": (KERNEL, "first_token + kRowsAtOnce * i < a.m", "true"),
    "no bound on k": (KERNEL, "left <= 0 ? 0 : left < kPieceBytes ? left : kPieceBytes", "kPieceBytes"),
    "the last piece of a row whole": (KERNEL, "left < kPieceBytes ? left : kPieceBytes", "kPieceBytes"),
    "no bound on the tiles of scales": (
        KERNEL, "(group * pieces + piece) * kPieceBytes,\n                         at.row_block * 8 + tile < a.tiles ?",
        "(group * pieces + piece) * kPieceBytes,\n                         true ?"),
    "no bound on the tiles of zero points": (
        KERNEL, "a.zero_points + group * kPieceBytes, at.row_block * 8 + tile < a.tiles ? kPieceBytes : 0",
        "a.zero_points + group * kPieceBytes, kPieceBytes"),
    "no bound on groups": (KERNEL, " && slot * a.group_blocks - at.in_group < blocks;", ";"),
    "groups of a whole stage at its end": (KERNEL, "slot * a.group_blocks - at.in_group < blocks;",
                                           "slot * a.group_blocks - at.in_group < kIntLinearStageBlocks;"),
    "groups begin past the last block": (KERNEL, "group_left == 0 && first_block + block < a.blocks",
                                         "group_left == 0"),
    "no bound on tokens stored": (KERNEL, "        if (token >= a.m) continue;\n", ""),
    "no bound on rows stored": (KERNEL, "if (i < rows) ptx::store_global", "ptx::store_global"),
    "no bound on rows stored as a whole": (KERNEL, "rows >= 4 && a.wide_stores", "a.wide_stores"),
    "no bound on the bias": (KERNEL, "a.bias != nullptr && i < rows", "a.bias != nullptr"),
    # stream-K
    "one slot for a range's two partial sums": (KERNEL, "(first_unit(range) < first_unit_of_rows ? 1 : 0)", "0"),
    "a partial sum left out": (KERNEL, "for (uint32_t range = first; range <= last; range += at_once) {",
                               "for (uint32_t range = first + 1; range <= last; range += at_once) {"),
    "the last partial sum added again": (KERNEL, "if (range + r <= last) total", "total"),
    "own sum added twice": (KERNEL, "    clear();\n    // A load", "    // A load"),
    "sums in the order of arrival": (KERNEL, "partial(slot_of(range + r < last ? range + r : last))",
                                     "partial(slot_of(first + (range + r + blockIdx.y - 2 * first) % "
                                     "(last - first + 1)))"),
    "sums carried to the next row block": (KERNEL, "      clear();\n      begin_group(groups, 0);",
                                           "      if (at.row_block == 0) clear();\n      begin_group(groups, 0);"),
    "tokens' blocks share counters": (KERNEL, "blockIdx.x * ((a.tiles + 7) / 8) + row_block", "row_block"),
    "tokens' blocks share partial sums": (KERNEL, "(int64_t(blockIdx.x) * gridDim.y * 2 + slot)", "int64_t(slot)"),
    "ranges of unequal start": (KERNEL, "range * a.share + (range < a.extra ? range : a.extra)", "range * a.share"),
    # groups, scales, codes
    "groups never end": (KERNEL, "        end_group();\n        begin_group(groups, group_slot);",
                         "        begin_group(groups, group_slot);"),
    "the last group is dropped": (KERNEL, "        end_group();\n        if (reduce", "        if (reduce"),
    "a sum that stays after its group": (KERNEL, "          sum[j][t][i] = 0;\n", ""),
    "one slot for all groups of a stage": (KERNEL, "if (block > 0 && group_left == 0) ++group_slot;", ""),
    "a range that begins within a group": (KERNEL, "      group_left -= first_block % a.group_blocks;\n", ""),
    "no scales where a range begins within a group": (
        KERNEL, "at.in_group > 0 && !range_starts ? 1 : 0", "at.in_group > 0 ? 1 : 0"),
    "one scale for two rows": (KERNEL, "scale[2 * j + i / 2] * sum", "scale[2 * j] * sum"),
    "no zero points": (DEQUANTIZER, "magic_[row] = (kMagic + zero) * 0x10001;", "magic_[row] = kMagic * 0x10001;"),
    "the middle is 2^bits": (KERNEL, "(1u << (kBits - 1)) * 0x01010101u", "(1u << kBits) * 0x01010101u"),
    "no bias": (KERNEL, "total[0][t][e] + bias[0]", "total[0][t][e]"),
    "too few group slots": (LAUNCHER, "|| p->groups == 1 ? 1 : 2;", "|| p->groups == 1 ? 1 : 1;"),
    "too few stages of shared memory": (LAUNCHER, "int_linear_stages(bits, p->token_tiles) * p->stage_bytes + 16",
                                        "int_linear_stages(bits, p->token_tiles) * p->stage_bytes"),
    "groups that are not counted on": (KERNEL, "      ++at.group;\n", ""),
    "the place in a group is lost at the next stage": (KERNEL, "    at.in_group += kIntLinearStageBlocks;\n", ""),
    "weights of the first stage again": (KERNEL, "    at.weights += kTileBytes;\n", ""),
    "tokens of the first stage again": (KERNEL, "    at.tokens += kTokenRowBytes;\n", ""),
    "the same row block again": (KERNEL, "source_at(at.row_block + 1, 0)", "source_at(at.row_block, 0)"),
    "both tiles of a warp from one": (KERNEL, "(tile == 0 ? 0 : next_tile)", "0"),
    # fragments
    "codes stored without the swizzle": (KERNEL, "(swizzled_piece(kBits, piece) - piece + lane)", "lane"),
    "codes read without the swizzle": (KERNEL, "codes.template load<true>", "codes.template load<false>"),
    "tokens read without the swizzle": (KERNEL, "swizzled_token_piece(token, 4 * block + c) * kPieceBytes",
                                        "(4 * block + c) * kPieceBytes"),
    "wrong pair order": (KERNEL, "weights[j][s][2] = upper[2 * s + 1];", "weights[j][s][2] = upper[2 * s];"),
    "rows of one product exchanged": (KERNEL, "dequantizer.pairs(lower, codes, 2 * j + 1, c);",
                                      "dequantizer.pairs(lower, codes, 2 * j, c);"),
    "steps of the tokens exchanged": (KERNEL, "{{x[0], x[1]}, {x[2], x[3]}}", "{{x[2], x[3]}, {x[0], x[1]}}"),
    "the wrong lane's tokens": (KERNEL, "token = token0 + 8 * t + 2 * c + e", "token = token0 + 8 * t + c + 4 * e"),
    "the wrong quad of rows": (KERNEL, "const int row = 16 * warp_tile + 4 * quad;",
                               "const int row = 16 * warp_tile + 4 * c;"),
}  # fmt: skip
# With 70 tokens: the others are caught with few.
NEEDS_MANY = {"tokens' blocks share counters", "tokens' blocks share partial sums"}


def test_the_unchanged_kernel_passes():
    for token_tiles, problems in ((2, FEW), (8, MANY)):
        check(build(SOURCES, {"TERSOR_BITS": 4}, edits=instance(token_tiles)), problems)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    token_tiles, problems = (8, MANY) if name in NEEDS_MANY else (2, FEW)
    mutant = build(SOURCES, {"TERSOR_BITS": 4}, edits=[*instance(token_tiles), MUTANTS[name]])
    with pytest.raises(AssertionError):  # Violation is one
        check(mutant, problems)
