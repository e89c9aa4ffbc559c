"""Mutation test: defects planted in the kernel for MXFP8 and MXFP6 inputs and in what it shares must be caught."""

import pytest
import test_cuda_mx_linear as mx
import torch
from cuda_floats import inputs
from cuda_instances import instances

from tersor.ops_round import float_round

KERNEL, SIX, ROWS = "cuda/kernels/sm120_mx_linear.cu", "cuda/tile/six_bits.h", "cuda/kernels/quantize_fp4_rows.cu"


def check(kind, edits):
    """Raises AssertionError (Violation is one) where the kernel or what rounds for it is not right."""
    element = kind // 3
    native = mx.build(mx.SOURCES, {"TERSOR_MX": kind},
                      edits=(*instances(2, ["BFloat16"]), *edits))
    for seed, (n, k, ranges) in enumerate(((204, 300, 4), (36, 1030, 1))):
        weight = mx.Stored(mx.ELEMENTS[kind % 3], n, k, seed)
        x, bias = inputs(11, n, k, torch.bfloat16, True, seed)
        x[:, 32] = 15.5  # above 1.75, below 1.9375 of a power of two
        seen = mx.rounded(native, x, element, seeds=range(3))[:2]
        wanted = float_round.reference(x.float(), mx.ELEMENTS[element], "power", 32).double()
        assert torch.equal(mx.values(*seen, element, k), wanted)
        y, _ = mx.multiply(native, weight, seen, element, torch.bfloat16, bias, ranges, seeds=range(3), pad=4)
        mx.assert_near(y, wanted, weight.truth, bias)


MUTANTS = {  # element of the weight + 3 that of the input, file, what is replaced, by what
    "codes out of order": (2, KERNEL, "ptx::prmt(even, odd, 0x5140)", "ptx::prmt(even, odd, 0x5410)"),
    "the first block's scales": (0, KERNEL, "mma_m16n8k32_mx<kWeight, kInput, block>",
                                 "mma_m16n8k32_mx<kWeight, kInput, 0>"),
    "row g's scales for g + 8": (0, KERNEL, "row + 2 * j + c % 2", "row + 2 * j"),
    "the wrong two of three words": (1, SIX, "first_(4 * six_first_word(c))", "first_(4 * six_second_word(c))"),
    "what a byte has beside six bits": (1, SIX, "halves << 2) & 0x3f3f3f3f", "halves << 2)"),
    "a power of two as for e2m1": (4, ROWS, "kKind == kMxfp6 ? 0x780000 : 0x600000", "0x600000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", (0, 1, 2, 4))
def test_the_unchanged_kernel_passes(kind):
    check(kind, ())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    kind, *edit = MUTANTS[name]
    with pytest.raises(AssertionError):
        check(kind, (tuple(edit),))
