"""Weights with integer group scales on the host-compiled CUDA kernel: against int64 bit for bit where scales of rows
and tokens are 1, against float64 with real ones; and defects that must be caught."""

import ctypes
import functools
import itertools

import pytest
import torch
from cuda_instances import instances
from cuda_lowbit import Activations, multiply, plan, units
from emulation import build
from two_level import Weight

from tersor.formats import Int, two_level

KERNEL, TILE = "cuda/kernels/sm80_two_level_linear.cu", "cuda/tile/two_level_linear.h"
SOURCES = [KERNEL, "cuda/dispatch/lowbit_linear.cu", "cpp/common/status.cpp", "cpp/common/parallel.cpp",
           "cpp/cpu/int_layout.cpp"]


@functools.cache
def library(bits):
    return build(SOURCES, {"TERSOR_BITS": bits})


@pytest.mark.parametrize("bits", range(2, 7))
def test_every_pair_of_widths_is_exact(bits):
    shapes = itertools.cycle([(20, 200), (144, 96), (16, 160), (130, 97)])
    groups = itertools.cycle([(32, 0), (128, 0), (96, 0), (64, 64), (256, 0), (32, 96), (128, 128)])
    flags = itertools.cycle(itertools.product((True, False), (False, True)))
    for seed, (act_bits, m) in enumerate(itertools.product((4, 6, 8), (1, 5, 16, 33, 128))):
        if bits != 4 and (seed + bits) % 3:  # of the others each pair, with some of the rows
            continue
        (n, k), (group, act_group), (symmetric, zeros) = next(shapes), next(groups), next(flags)
        weight = Weight(n, k, bits, group, symmetric, unit=True, seed=seed)
        x = Activations(m, k, act_bits, act_group, zeros=zeros, unit=True, seed=seed)
        y, _ = multiply(library(bits), x, weight, ranges=min(3, units(weight)))
        expected = x.integers @ weight.integers.T
        assert int(expected.abs().max()) < 2**24, "float32 holds every result"
        assert torch.equal(y, expected.float()), (act_bits, m, n, k, group, act_group, symmetric, zeros)


@pytest.mark.parametrize("bits", (3, 4, 6))
def test_extreme_codes_carry_nothing(bits):
    """All ends of codes in one word, beside zero points at theirs."""
    n, k = 32, 128
    ends = torch.tensor([0, 2**bits - 1])
    for seed, symmetric in itertools.product(range(3), (True, False)):
        codes = ends[torch.randint(0, 2, (n, k), generator=torch.Generator().manual_seed(seed))]
        weight = Weight(n, k, bits, 32, symmetric, unit=True, codes=codes, seed=seed)
        values = torch.eye(k, dtype=torch.long) * 127
        x = Activations(k, k, 8, values=values, unit=True)
        y, _ = multiply(library(bits), x, weight)
        assert torch.equal(y, 127.0 * weight.integers.T)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_real_scales_bias_and_residual_against_float64(dtype):
    for m, group, act_group, symmetric in ((3, 64, 32, False), (17, 128, 0, True), (40, 32, 0, False),
                                           (9, 96, 160, True)):
        weight = Weight(137, 300, 4, group, symmetric, seed=m)
        x = Activations(m, 300, 8, act_group, zeros=m == 40, seed=m)
        random = torch.Generator().manual_seed(m)
        bias = torch.randn(137, generator=random).to(dtype)
        residual = torch.randn(m, 140, generator=random).to(dtype)[:, :137] if m < 10 else None
        y, _ = multiply(library(4), x, weight, bias, residual, dtype, ranges=3, seeds=(0, 1))
        truth = x.truth @ weight.truth.T + bias.double() + (0 if residual is None else residual.double())
        bound = 1e-6 * truth.abs().max() + torch.finfo(dtype).eps * truth.abs() * 0.51
        assert bool(((y.double() - truth).abs() <= bound).all()), (m, group, act_group)


def test_ranges_change_nothing():
    """Sums over all of k are integers: however they are cut, the result is the same to the last bit."""
    weight, x = Weight(150, 700, 4, 64, False), Activations(11, 700, 8)
    whole, _ = multiply(library(4), x, weight)
    for ranges in (2, 5, 12):
        y, _ = multiply(library(4), x, weight, ranges=ranges, seeds=range(2))
        assert torch.equal(y, whole)


def test_counters():
    """Codes are read once, in 16-byte pieces; no bank conflict; as many products as with one level."""
    for m, group, act_group, symmetric in ((1, 128, 0, True), (16, 32, 64, False), (64, 96, 32, True),
                                           (128, 128, 0, True)):
        weight, x = Weight(136, 544, 4, group, symmetric), Activations(m, 544, 8, act_group)
        _, counters = multiply(library(4), x, weight, ranges=2, count=True)
        total = counters["total"]["global"]["qweight"]
        assert total["loaded"] == weight.qweight.numel() and total["repeated"] == 0
        assert total["load_widths"]["16"] == total["loaded"] and total["sectors"] == total["minimum_sectors"]
        assert counters["regions"]["main loop"]["shared"]["extra_cycles"] == 0
        tiles = {1: 1, 16: 2, 64: 8, 128: 16}[m]
        assert counters["total"]["mma"] == {"m16n8k32_s8": 2 * 17 * 4 * 2 * tiles}, "4 warps, 2 products"


def test_tokens_without_values_and_tokens_that_are_not_finite():
    weight = Weight(40, 200, 4, 64, False)
    for act_group in (0, 64):
        x = Activations(6, 200, 8, act_group)
        bias = torch.randn(40).to(torch.bfloat16)
        for tensor in (x.values, x.codes):
            tensor[2:4] = 0
        x.scales[2], x.scales[3] = 0.0, float("nan")
        y, _ = multiply(library(4), x, weight, bias, dtype=torch.bfloat16)
        assert torch.equal(y[2], bias) and torch.isnan(y[3]).all()
        assert y[[0, 1, 4, 5]].isfinite().all()


def test_the_plan_and_what_the_launcher_refuses():
    weight, x = Weight(16, 32, 4, 0), Activations(1, 32, 4)
    weight.n, weight.k = 8192, 28672
    x.m = 128
    assert plan(library(4), x, weight, 132, 228 * 1024)[0] == 2 * 132, "128 tokens at once, whatever the groups"
    weight = Weight(32, 512, 4, 128)
    x = Activations(2, 512, 4, width=1)
    with pytest.raises(RuntimeError, match="returned"):
        multiply(library(4), x, weight)
    native = library(4).library
    native.tersor_last_error.restype = ctypes.c_char_p
    assert "two levels" in native.tersor_last_error().decode()


def test_experts_hold_scales_of_one_level(monkeypatch):
    fmt, shape = Int(4, 32, False, 8, "int8"), (48, 96)
    torch.manual_seed(0)
    packed = []
    for _ in range(3):
        w = torch.randn(shape)
        params = fmt.fit(w)
        packed.append(fmt.pack(fmt.project(w, params), params))
    tensors = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
    x, ends = torch.randn(7, 96), torch.tensor([2, 2, 6], dtype=torch.int32)
    wide = {**tensors, "scales": two_level.expanded(tensors["scales"])}
    y, wanted = (fmt.linear_grouped(x, ends, of, None, shape) for of in (wide, tensors))
    assert (y - wanted).norm() < 0.02 * wanted.norm()
    assert fmt.bind_grouped(tensors, shape) is None, "the CPU's kernels know two levels"
    made, expanded = [], two_level.expanded
    monkeypatch.setattr(two_level, "expanded", lambda scales: made.append(1) or expanded(scales))
    bound = fmt.bind_grouped({name: of.to("meta") for name, of in tensors.items()}, shape)  # as on any other device
    for rows in (7, 5):
        assert bound(torch.empty(rows, 96, device="meta"), ends.to("meta"), None).shape == (rows, 48)
    assert len(made) == 1


# -- mutants ----------------------------------------------------------------------------------------------------------

FEW = [*instances(2), (KERNEL, "  if (token_tiles == 16) return grouped ? nullptr : "
                               "two_level_linear<TERSOR_BITS, 16, false>;\n", "")]
# (n, k, group, act_group, symmetric, zeros, ranges): groups that end within a stage, ranges that end within groups
PROBLEMS = [(150, 300, 96, 0, False, True, 4), (20, 900, 256, 96, True, False, 3), (40, 300, 32, 32, False, False, 2)]
MUTANTS = {
    "a carry": ("(128 - factor[r]", "(64 - factor[r]"),
    "the first group of a stage": ("if (i > 0) load_group(groups + ++slot * a.group_bytes);", ""),
    "zero points of another row": ("(zeros >> 8 * r & 0xff)", "(zeros & 0xff)"),
    "groups of a range from its start": ("weights_left = w.group_blocks - block % w.group_blocks;",
                                         "weights_left = w.group_blocks;"),
}


def check(native):
    for seed, (n, k, group, act_group, symmetric, zeros, ranges) in enumerate(PROBLEMS):
        weight = Weight(n, k, 4, group, symmetric, unit=True, seed=seed)
        x = Activations(11, k, 8, act_group, zeros=zeros, unit=True, seed=seed)
        y, _ = multiply(native, x, weight, ranges=ranges, seeds=range(2))
        assert torch.equal(y, (x.integers @ weight.integers.T).float())


def test_the_unchanged_kernel_passes():
    check(build(SOURCES, {"TERSOR_BITS": 4}, edits=FEW))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    mutant = build(SOURCES, {"TERSOR_BITS": 4}, edits=[*FEW, (TILE, *MUTANTS[name])])
    with pytest.raises(AssertionError):  # Violation is one
        check(mutant)
