"""Mutation test: defects planted in the kernels for small floats and in what they share must be caught."""

import pytest
import torch
from cuda_floats import Stored, inputs, library, multiply
from test_cuda_float_linear import assert_near

from tersor.formats import NVFP4, Float, Microscaling

KERNEL, STREAM = "cuda/kernels/sm80_float_linear.cu", "cuda/tile/row_stream.h"
FORMAT = {0: Float("e4m3", "channel"), 1: Microscaling("e2m1"), 2: NVFP4()}


def instance(token_tiles, bfloat16=True):
    """The edits that leave one instance of the kernel to compile."""
    types = ("is_bfloat16 ? choose<BFloat16>(token_tiles) : choose<Float16>(token_tiles)",
             "is_bfloat16 ? choose<BFloat16>(token_tiles) : nullptr" if bfloat16 else
             "is_bfloat16 ? nullptr : choose<Float16>(token_tiles)")
    return (*((KERNEL, f"    case {t}: return float_linear<Type, TERSOR_FLOAT, {t}>;\n", "")
              for t in (1, 2, 4, 8) if t != token_tiles), (KERNEL, *types))


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
    "no barrier in the main loop": (1, STREAM, "      ptx::barrier();                     // everyone's",
                                    "      // everyone's"),
    "scales settled a stage late": (1, STREAM, "      settle();\n      ptx::cp_async_wait<kStages - 2>();",
                                    "      ptx::cp_async_wait<kStages - 2>();"),
    "sums in the order of arrival": (1, STREAM, "partial(slot_of(range + r < last ? range + r : last))",
                                     "partial(slot_of(first + (range + r + blockIdx.y - 2 * first) % "
                                     "(last - first + 1)))"),
    "no fence after the arrival": (1, STREAM, "      ptx::fence();  // the others'", "      // the others'"),
    "tails of rows whole": (0, STREAM, "left < kPieceBytes16 ? left : kPieceBytes16", "kPieceBytes16"),
    "a scale for two rows": (0, STREAM, "scale[2 * j + i / 2]", "scale[2 * j]"),
    "the next block's scales": (1, KERNEL, "kStreamRows * block + row : row", "kStreamRows * (block ^ 1) + row : row"),
    "the mantissa lost": (1, KERNEL, 
                              "kFields = (kWide ? 0x7f00u : 0x7000u)",
                              "kFields = (kWide ? 0x7f00u : 0x6000u)"),
    "one scale for all lanes": (2, KERNEL, "16 * (block % 2) + 8 * (c / 2)", "16 * (block % 2)"),
    "the global scale left out": (2, KERNEL, "Decoder::kFactor / ptx::load_global_constant(a.global)",
                                  "Decoder::kFactor / 1.0f"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMAT)
def test_the_unchanged_kernel_passes(kind):
    check(library(kind, edits=instance(2)), kind)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    kind, *edit = MUTANTS[name]
    mutant = library(kind, edits=(*instance(2), tuple(edit)))
    with pytest.raises(AssertionError):
        check(mutant, kind)
