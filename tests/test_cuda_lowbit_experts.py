"""Low-bit activations of a mixture of experts on the host-compiled kernel: each row by its expert's weight, bit for bit
against int64."""

import ctypes
import functools
import itertools

import pytest
import torch
from cuda_int_weights import CODE
from cuda_lowbit import EXPERT_SOURCES, Activations
from emulation import build
from test_cuda_lowbit_linear import integer_weight


@functools.cache
def library(bits):
    return build(EXPERT_SOURCES, {"TERSOR_BITS": bits})


def grouped(native, x, ends, weights, bias=None, dtype=torch.float32, ranges=1, seeds=(0,)):
    """y [rows, n] of the emulated kernel."""
    first, m, count = weights[0], x.m, len(weights)
    n = first.n
    stacked = [torch.stack([getattr(w, name) for w in weights]) for name in ("qweight", "scales")]
    zeros = None if first.zeros is None else torch.stack([w.zeros for w in weights])
    out = torch.full((m, n + 4), float("nan"), dtype=dtype)
    partials = torch.zeros((m + count + 1) * ranges * 2 * 128 * 16, dtype=torch.int32)
    counters = torch.zeros((m + count + 1) * -(-n // 128), dtype=torch.int32)
    tensors = {"codes": x.codes, "act_scales": x.scales, "sums": None if zeros is None else x.sums,
               "act_zero_points": x.zeros, "ends": ends, "qweight": stacked[0], "scales": stacked[1],
               "zero_points": zeros, "bias": bias, "y": out, "partials": partials, "counters": counters}
    native.call(
        "tersor_cuda_lowbit_linear_grouped", x.codes, x.codes.stride(0), x.scales, x.groups, tensors["sums"], x.zeros,
        x.group, m, x.k, ends, count, *stacked, CODE[first.scale_dtype], zeros, bias, out, CODE[dtype], n, n + 4,
        first.bits, first.group, ranges, partials, counters, None,
        names=[name for name, tensor in tensors.items() if tensor is not None], outputs=[out, partials, counters],
        seeds=seeds)
    assert not counters.any() and torch.isnan(out[:, n:]).all()
    return out[:, :n]


def expected(x, ends, weights):
    y, begin = torch.zeros(x.m, weights[0].n, dtype=torch.int64), 0
    for end, weight in zip(ends.tolist(), weights):
        y[begin:end] = x.integers[begin:end] @ weight.integers.T
        begin = end
    return y


@pytest.mark.parametrize("bits", (4, 8))
def test_each_row_by_its_expert(bits):
    """Experts without rows, rows of no expert, few rows and many; groups, zero points on both sides, several ranges."""
    options = itertools.cycle([(0, 0, False), (64, 32, True), (32, 0, True), (0, 64, False)])
    for m, ends in ((1, (0, 1, 1)), (7, (2, 2, 6)), (40, (25, 25, 38)), (40, (3, 3, 40)), (5, (0, 0, 0))):
        group, act_group, zeros = next(options)
        weights = [integer_weight(140, 200, bits, group, not zeros, seed) for seed in range(3)]
        x = Activations(m, 200, 8, act_group, zeros=zeros, unit=True, seed=m)
        ends = torch.tensor(ends, dtype=torch.int32)
        bias = torch.arange(3 * 140).reshape(3, 140).float()
        for ranges in (1, 3):
            y = grouped(library(bits), x, ends, weights, ranges=ranges, seeds=(0, 1))
            assert torch.equal(y.long(), expected(x, ends, weights)), (m, ends, ranges)
        y = grouped(library(bits), x, ends, weights, bias)
        owner = torch.bucketize(torch.arange(m), ends, right=True)
        added = torch.cat([bias, torch.zeros(1, 140)])[owner]
        assert torch.equal(y, expected(x, ends, weights).float() + added)


def test_ends_that_lie_stay_inside():
    """Ends out of order or range are cut to the rows that there are."""
    weights = [integer_weight(20, 96, 4, 0, True, seed) for seed in range(3)]
    x = Activations(9, 96, 8, unit=True)
    for ends in ((5, 3, 12), (-4, 20, 2)):
        y = grouped(library(4), x, torch.tensor(ends, dtype=torch.int32), weights)
        cut, highest = [], 0
        for end in ends:
            highest = max(highest, min(end, 9))
            cut.append(highest)
        assert torch.equal(y.long(), expected(x, torch.tensor(cut), weights))


KERNEL, EXPERTS = "cuda/kernels/sm80_lowbit_linear_experts.cu", "cuda/tile/expert_rows.h"


@pytest.mark.parametrize("edit", [
    (KERNEL, "  a.codes += shift * a.row_bytes;\n", ""), (EXPERTS, "expert * experts.scale_bytes", "0"),
    (KERNEL, "a.act_zero_points += shift * a.act_groups", "a.act_zero_points += 0"),
    (KERNEL, "    clear_rows(a, rows.begin, count < tokens ? count : tokens);\n", ""),
], ids=("codes", "scales", "zero points", "rows of no expert"))  # fmt: skip
def test_mutant_is_killed(edit):
    mutant = build(EXPERT_SOURCES, {"TERSOR_BITS": 4}, edits=[edit])
    weights = [integer_weight(20, 96, 4, 32, False, seed) for seed in range(3)]
    for seed, weight in enumerate(weights):
        weight.scales.fill_(seed + 1.0)
        weight.integers *= seed + 1
    x, ends = Activations(24, 96, 8, 32, zeros=True, unit=True), torch.tensor((11, 11, 20), dtype=torch.int32)
    assert torch.equal(grouped(library(4), x, ends, weights).long(), expected(x, ends, weights))
    with pytest.raises(AssertionError):  # Violation is one
        assert torch.equal(grouped(mutant, x, ends, weights).nan_to_num(7).long(), expected(x, ends, weights))
