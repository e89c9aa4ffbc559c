"""Mutation test: every defect planted in the kernels that round activations must be caught by the emulated checks."""

import pytest
import torch
from cuda_rows import KERNELS, SOURCES, Launchers, emulated
from emulation import build
from test_cuda_producers import ALL, check_exact, check_transformed, rows
from test_lowbit_fused import inputs, wide

from tersor.act_codes import row_bytes
from tersor.ops_lowbit_cuda import produce, quantize_input

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZE, ROWS, PRODUCTS = KERNELS
LAUNCHER = SOURCES[3]
TILE, BUFFER, PRODUCT = "cuda/tile/quantize_rows.h", "cuda/tile/producer_rows.h", "cuda/tile/producer_products.h"


def check(kernel, library):
    """Raises AssertionError (Violation is one) where the kernel is not right."""
    with emulated(Launchers(library, seeds=range(4))) as launchers:
        torch.manual_seed(0)
        if kernel == QUANTIZE:
            for options, width in (((8, 32, 0.9, True), 8), ((4, 0, 1.0, True), 4), ((8, 96, 1.0, False), 8)):
                x = rows(6, 300, torch.bfloat16)
                check_exact(quantize_input(x, *options, width=width), x, *options)
            x, bits = rows(5, 34 * 128, torch.float32), torch.full((34,), 4, dtype=torch.uint8)
            bits[[1, 2, 7, 32]] = 8
            q = quantize_input(x, 4, 128, block_bits=bits, width=4)
            assert q.codes.shape[1] == row_bytes(34 * 128, 4, bits)
            check_exact(q, x, 4, 128, block_bits=bits)
        names = {QUANTIZE: ["norm", "gate"], ROWS: ["hadamard of 4096", "hadamard of blocks", "norm, permute"],
                 PRODUCTS: ["kronecker 20 x 76", "hadamard 28 x 16, twice", "hadamard 36", "gate, kronecker",
                            "kronecker 136 x 8", "kronecker 32 x 64"]}
        for name in names[kernel]:
            torch.manual_seed(len(name))
            k, make = ALL[name]
            producer, x, other = inputs(make(k), 2, k, torch.bfloat16)
            made = wide(producer, x, other)
            check_transformed(produce(x, other, producer, 8, 32), made, 8, 32, 4e-3)
            check_transformed(produce(x, other, producer, 4, 0, width=4), made, 4, 0, 1e-3)
            if name in ("hadamard of 4096", "kronecker 32 x 64"):
                assert launchers.counters["total"]["shared"]["extra_cycles"] == 0


MUTANTS = {
    # rounding
    "no barrier before the quanta": (QUANTIZE, TILE, "      ptx::barrier();\n      find_quanta();",
                                     "      find_quanta();"),
    "no barrier after the quanta": (QUANTIZE, TILE, "      find_quanta();\n      ptx::barrier();",
                                    "      find_quanta();"),
    "halves away from even": (QUANTIZE, TILE, "quantum.low), quantum.high) + magic)",
                              "quantum.low), quantum.high) + 0.001f + magic)"),
    "a reciprocal": (QUANTIZE, TILE, "fmaxf(v[i] / divisor,", "fmaxf(v[i] * (1.0f / divisor),"),
    "infinities are sizes": (QUANTIZE, TILE, ">= kInfinityBits) return", "> kInfinityBits) return"),
    "blocks of equal width": (QUANTIZE, TILE, "      before += ptx::count_bits(eights);\n", ""),
    # a row in shared memory
    "no barrier before a pass": (ROWS, BUFFER, "      ptx::barrier();\n      const int left", "      const int left"),
    "no barrier before rounding": (ROWS, ROWS, "  ptx::barrier();\n", ""),
    "halves in one order": (ROWS, BUFFER, "swap_(threadIdx.x / 4 % 2)", "swap_(0)"),
    "stages of too many lanes": (ROWS, BUFFER, "if (8 * lanes >= a.butterflies) return;",
                                 "if (4 * lanes >= a.butterflies) return;"),
    "a difference of the wrong sign": (ROWS, BUFFER, "upper ? other - v[i]", "upper ? v[i] - other"),
    # products
    "no wait for a strip": (PRODUCTS, PRODUCT, "  ptx::sync_warp();  // all", "  // all"),
    "no low part of the row": (PRODUCTS, PRODUCT,
                               "        BFloat16::mma(y[w], a, {x[tile][w][2], x[tile][w][3]});\n", ""),
    "no low part of the matrix": (PRODUCTS, PRODUCT, "if (parts == 2) {", "if (parts == 3) {"),
    "no padding": (PRODUCTS, PRODUCTS, "if (a.rows % 16 != 0 || a.columns % 16 != 0)", "if (false)"),
    "lines of one bank": (PRODUCTS, LAUNCHER, "4 * div_up(r.columns, 16) * 16 + 16}",
                          "4 * div_up(r.columns, 16) * 16}"),
    "no barrier between the products": (PRODUCTS, PRODUCTS, "  ptx::barrier();\n  ptx::region(\"right\");",
                                        "  ptx::region(\"right\");"),
}


def compiled(kernel, *edits):
    return build([kernel, *SOURCES[3:]], edits=edits)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_pass(kernel):
    check(kernel, compiled(kernel))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name):
    kernel, *edit = MUTANTS[name]
    with pytest.raises(AssertionError):
        check(kernel, compiled(kernel, tuple(edit)))
