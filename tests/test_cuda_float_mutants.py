"""Mutation test: defects planted in the kernels for small floats and in what they share must be caught."""

import pytest
import test_cuda_fp4_linear as fp4
import test_cuda_fp8_linear as fp8
import torch
from cuda_floats import Stored, inputs, library, multiply
from cuda_instances import instances
from test_cpu_int_linear import Weight
from test_cuda_float_linear import assert_near

from tersor.formats import NVFP4, Float, Microscaling
from tersor.ops_round import float_round

KERNEL, ROWS, STREAM = "cuda/kernels/sm80_float_linear.cu", "cuda/tile/row_stream.h", "cuda/tile/stream_k.h"
INSTANCE = instances(2, ["BFloat16"])
FORMAT = {0: Float("e4m3", "channel"), 1: Microscaling("e2m1"), 2: NVFP4(), 3: Microscaling("e2m3")}


def check(native, kind, dtype=torch.bfloat16):
    """Raises AssertionError (Violation is one) where the kernel is not right."""
    for seed, (n, k, ranges) in enumerate(((204, 300, 4), (132, 416, 3), (36, 1030, 1))):
        weight = Stored(FORMAT[kind], n, k, seed)
        x, bias = inputs(11, n, k, dtype, True, seed)
        y, _ = multiply(native, weight, x, bias, ranges, seeds=range(3), pad=4)
        assert_near(y, x, weight, bias)
    weight = Stored(FORMAT[kind], 204, 900)
    x, _ = inputs(11, 204, 900, dtype, False)
    y, _ = multiply(native, weight, x, None, ranges=12)
    # What a bias of -y leaves of token 0 shows the sum's last bits, which the harness compares between the seeds.
    multiply(native, weight, x, -y[0].contiguous(), ranges=12, seeds=range(4))


MUTANTS = {  # kind of weight, file, what is replaced, by what
    "no barrier in the main loop": (1, STREAM, "    ptx::barrier();                     // everyone's",
                                    "    // everyone's"),
    "scales settled a stage late": (1, STREAM, "    settle();\n    ptx::cp_async_wait<kStages - 2>();",
                                    "    ptx::cp_async_wait<kStages - 2>();"),
    "sums in the order of arrival": (1, STREAM, "partial(r == 0 || range + r < last ? range + r : last)",
                                     "partial(first + (range + r + blockIdx.y - 2 * first) % (last - first + 1))"),
    "no fence after the arrival": (1, STREAM, "    ptx::fence();  // the others'", "    // the others'"),
    "the row block of what is fetched": (1, ROWS, "    next.advance(a.stages);\n", "    ++next.stage;\n"),
    "tails of rows whole": (0, ROWS, "left < kPieceBytes ? left : kPieceBytes", "kPieceBytes"),
    "a scale for two rows": (0, STREAM, "scale[2 * j + i / 2]", "scale[2 * j]"),
    "the next block's scales": (1, KERNEL, "kStreamRows * block + row : row", "kStreamRows * (block ^ 1) + row : row"),
    "the mantissa lost": (1, KERNEL,
                          "kFields = (kWide ? 0x7f00u : kSix ? 0x7c00u : 0x7000u)",
                          "kFields = (kWide ? 0x7f00u : kSix ? 0x7c00u : 0x6000u)"),
    "the even code of six for the odd one": (3, KERNEL, "four << (p % 2 ? 8 : 20)", "four << (p % 2 ? 14 : 26)"),
    "one scale for all lanes": (2, KERNEL, "16 * (block % 2) + 8 * (c / 2)", "16 * (block % 2)"),
    "the global scale left out": (2, KERNEL, "Decoder::kFactor / ptx::load_global_constant(a.global)",
                                  "Decoder::kFactor / 1.0f"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMAT)
def test_the_unchanged_kernel_passes(kind):
    check(library(kind, edits=INSTANCE), kind)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    kind, *edit = MUTANTS[name]
    mutant = library(kind, edits=(*INSTANCE, tuple(edit)))
    with pytest.raises(AssertionError):
        check(mutant, kind)


# -- e4m3 and e2m1 activations ------------------------------------------------------------------------------------

FP8, FP8_ROWS, FP8_CODES = ("cuda/kernels/sm89_fp8_linear.cu", "cuda/kernels/quantize_fp8_rows.cu",
                            "cuda/tile/fp8_codes.h")
FP4, FP4_ROWS = "cuda/kernels/sm120_fp4_linear.cu", "cuda/kernels/quantize_fp4_rows.cu"


def check_fp8(edits):
    native = fp8.library(0, (*INSTANCE, *edits))
    for seed, (n, k, group, ranges) in enumerate(((204, 300, 32, 4), (36, 1030, 128, 1))):
        weight = Weight(n, k, 4, group, True, torch.float16, seed)
        if seed:
            fp8.with_byte_scales(weight)
        x, bias = inputs(11, n, k, torch.bfloat16, True, seed)
        x[2, 5] *= 500  # the others of its row become subnormal
        wanted = float_round.reference(x.float(), "e4m3", "largest", 0)
        codes, scales, _ = fp8.rounded(native, x, interleaved=True, seeds=range(3))
        assert torch.equal(fp8.values(codes, scales, k, True).float(), wanted)
        y, _ = fp8.multiply(native, weight, codes, scales, torch.bfloat16, bias, ranges, seeds=range(3), pad=4)
        fp8.assert_near(y, wanted.double(), weight.truth, bias)


def check_fp4(kind, edits):
    native = fp4.library(kind, (*INSTANCE, *edits))
    for seed, (n, k, ranges) in enumerate(((204, 300, 4), (36, 1030, 1))):
        weight = Stored(fp4.FORMATS[kind], n, k, seed)
        x, bias = inputs(11, n, k, torch.bfloat16, True, seed)
        seen = fp4.rounded(native, x, kind, seeds=range(3))[:3]
        wanted = float_round.reference(x.float(), *fp4.ROUNDING[kind]).double()
        assert (fp4.values(*seen, k) - wanted).abs().max() <= 1e-6
        y, _ = fp4.multiply(native, weight, seen, kind, torch.bfloat16, bias, ranges, seeds=range(3), pad=4)
        fp4.assert_near(y, wanted, weight.truth, bias)


INPUT_MUTANTS = {  # the check and its kind, file, what is replaced, by what
    "negative codes from 0x80": (check_fp8, None, FP8_CODES, "0x88888888 - low", "0x80808080 + low"),
    "the codes' halves exchanged": (check_fp8, None, FP8, "e4m3_of_int4(word >> 4, word)",
                                    "e4m3_of_int4(word, word << 4)"),
    "one token's scale for two": (check_fp8, None, FP8, "of_tokens[i % 2]", "of_tokens[0]"),
    "no multiplier of byte scales": (check_fp8, None, FP8, "512.0f * (a.scale_dtype", "512.0f * (-1 == a.scale_dtype"),
    "the next group's scale": (check_fp8, None, FP8, "const int group = a.groups == 1 ? 0 : block / a.group_blocks",
                               "const int group = a.groups == 1 ? 0 : index * 4 / a.group_blocks"),
    "no barrier before the largest": (check_fp8, None, FP8_ROWS, "  ptx::barrier();\n", ""),
    "ties away from even": (check_fp8, None, FP8_CODES, "0x7ffff + (magnitude >> 20 & 1)", "0x80000"),
    "row g's scales for g + 8": (check_fp4, 1, FP4, "row + 2 * j + c % 2", "row + 2 * j"),
    "the first half's scales again": (check_fp4, 0, FP4, ">> (16 * half)", ">> 0"),
    "no second exponent": (check_fp4, 0, FP4_ROWS, "(top & 0x7fffff) >= up ? 1 : 0", "0"),
    "halves of 16 as 32": (check_fp4, 1, FP4_ROWS, "lanes / 2; mask > 0", "lanes; mask > 0"),
    "codes of the other half": (check_fp4, 1, FP4, "swizzled_nibble_piece(token, 2 * half + i)",
                                "swizzled_nibble_piece(token, 2 * i + half)"),
}  # fmt: skip


def planted(name):
    check_of, kind, *edit = INPUT_MUTANTS[name]
    check_of(*([] if kind is None else [kind]), [tuple(edit)])


def test_the_unchanged_kernels_for_rounded_inputs_pass():
    check_fp8([])
    check_fp4(0, [])
    check_fp4(1, [])


@pytest.mark.parametrize("name", INPUT_MUTANTS)
def test_mutant_of_rounded_inputs_is_killed(name):
    with pytest.raises(AssertionError):
        planted(name)
