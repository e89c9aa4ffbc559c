"""int_linear for rows sorted by expert: `cpu`, the host-compiled CUDA kernel (`emulated`), `cuda`; against float64."""

import ctypes

import pytest
import torch
from cuda_int_weights import CODE, Weight, library

from tersor import ops

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


class ExpertWeights:
    """Several random weights, stacked, beside their float64 truths."""

    def __init__(self, count, n, k, bits, group, symmetric, scale_dtype=torch.float16):
        one = [Weight(n, k, bits, group, symmetric, scale_dtype, seed) for seed in range(count)]
        self.count, self.n, self.k, self.bits, self.group, self.scale_dtype = count, n, k, bits, group, scale_dtype
        self.truth = [w.truth for w in one]
        self.qweight, self.scales = torch.stack([w.qweight for w in one]), torch.stack([w.scales for w in one])
        self.zeros = None if symmetric else torch.stack([w.zeros for w in one])


def emulated(w, x, ends, bias, ranges, seeds=(0, 1)):
    host, rows = library(w.bits), x.shape[0]
    made = [ctypes.c_int64() for _ in range(3)]
    assert host.library.tersor_cuda_int_linear_grouped_plan(
        *map(ctypes.c_int64, (rows, w.n, w.k)), w.bits, ctypes.c_int64(w.group), CODE[w.scale_dtype],
        int(w.zeros is not None), ctypes.c_int64(w.count), 132, ctypes.c_int64(228 * 1024),
        *map(ctypes.byref, made)) == 0
    assert made[0].value >= 1
    # Scratch for the number of ranges that is tried here, not the planned one: the most token blocks there can be.
    tokens = 8 if rows <= 8 * min(rows, w.count) else 32
    blocks = rows // tokens + min(rows, w.count + 1)
    partials = torch.full((blocks * ranges * 2 * 128 * tokens,), float("nan"))
    counters = torch.zeros(blocks * -(-w.n // 128), dtype=torch.int32)
    if made[0].value > 1:
        assert partials.nbytes * made[0].value == made[1].value * ranges and counters.nbytes == made[2].value
    out = torch.full((rows, w.n + 3), float("nan"), dtype=x.dtype)
    tensors = {"x": x, "ends": ends, "qweight": w.qweight, "scales": w.scales, "zero_points": w.zeros, "bias": bias,
               "y": out, "partials": partials, "counters": counters}
    host.call("tersor_cuda_int_linear_grouped", x, CODE[x.dtype], rows, w.k, x.stride(0), ends, w.count, w.qweight,
              w.scales, CODE[w.scale_dtype], w.zeros, bias, out, w.n, out.stride(0), w.bits, w.group, ranges, partials,
              counters, None, names=[name for name, tensor in tensors.items() if tensor is not None],
              outputs=[out, partials, counters], seeds=seeds)
    assert not counters.any() and torch.isnan(out[:, w.n:]).all()
    return out[:, : w.n]


def run(device, w, x, ends, bias, ranges=1):
    if device == "emulated":
        return emulated(w, x, ends, bias, ranges)
    there = [None if t is None else t.to(device) for t in (x, ends, w.qweight, w.scales, w.zeros, bias)]
    return ops.int_linear_grouped(*there, w.n, w.bits, w.group, 16).cpu()


def wanted(w, x, ends, bias):
    y, begin = torch.zeros(x.shape[0], w.n, dtype=torch.float64), 0
    for expert, end in enumerate(ends.tolist()):
        y[begin:end] = x[begin:end].double() @ w.truth[expert].T + (0 if bias is None else bias[expert].double())
        begin = end
    return y


def rows(count, k, dtype, seed=0):
    """x [count, k] with 16-byte aligned rows."""
    x = torch.zeros(count, -(-k // 8) * 8, dtype=dtype)[:, :k]
    return x.copy_(torch.randn(count, k, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ends", ([3, 3, 11, 12], [0, 0, 0, 0], [0, 9, 10, 23], [17, 17, 17, 17]), ids=str)
@pytest.mark.parametrize("bits,group,symmetric,dtype", ((4, 32, False, torch.bfloat16), (3, 0, True, torch.float16)))
def test_against_float64(device, ends, bits, group, symmetric, dtype):
    w = ExpertWeights(4, 136, 300, bits, group, symmetric)
    x, ends = rows(25, w.k, dtype), torch.tensor(ends, dtype=torch.int32)
    bias = torch.randn(4, w.n).to(dtype)
    truth = wanted(w, x, ends, bias)
    for ranges in (1, 4):
        y = run(device, w, x, ends, bias, ranges).double()
        assert not y[int(ends[-1]):].any(), "rows of no expert"
        assert (y - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_and_many_experts(device):
    w = ExpertWeights(40, 16, 64, 4, 64, True)
    counts = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
    counts[7], counts[33] = 90, 0
    ends = counts.cumsum(0).to(torch.int32)
    x = rows(int(ends[-1]) + 2, w.k, torch.bfloat16)
    y, truth = run(device, w, x, ends, None).double(), wanted(w, x, ends, None)
    assert (y - truth).norm() < 5e-3 * truth.norm()
    w = ExpertWeights(2, 48, 128, 4, 32, True)
    x, ends = rows(70, w.k, torch.float16), torch.tensor([41, 70], dtype=torch.int32)
    y, truth = run(device, w, x, ends, None).double(), wanted(w, x, ends, None)
    assert (y - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("ends", ([5, 2, 9, 9], [-4, 3, 99, 7], [99, 99, 99, 99]), ids=str)
def test_ends_that_lie_stay_inside(ends):
    """On a GPU the ends cannot be looked at beforehand: whatever they say, nothing outside is read or written."""
    w = ExpertWeights(4, 48, 128, 4, 32, True)
    emulated(w, rows(12, w.k, torch.float16), torch.tensor(ends, dtype=torch.int32), None, 1, seeds=(0,))


def test_the_cpu_refuses_ends_that_lie():
    w = ExpertWeights(3, 16, 64, 4, 32, True)
    x = rows(6, w.k, torch.float32)
    for ends in ([4, 2, 6], [1, 2, 7], [-1, 2, 3]):
        with pytest.raises(ValueError, match=r"ends\[\d\] is -?\d after -?\d; accepted: ascending, up to 6 rows"):
            run("cpu", w, x, torch.tensor(ends, dtype=torch.int32), None)
    with pytest.raises(ValueError, match="ends: found torch.int64"):
        run("cpu", w, x, torch.tensor([1, 2, 3]), None)
    with pytest.raises(ValueError, match="qweight: found"):
        run("cpu", w, x, torch.tensor([1, 2], dtype=torch.int32), None)
