"""The int8-activation kernels (act_bits 8) against exact integer arithmetic, on every instruction set."""

import math

import pytest
import torch

from tersor import _C
from tersor.formats.integer import quantize_activations, tile_rows

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT32, BFLOAT16, FLOAT16 = CODE
BITS = range(2, 9)


pytestmark = pytest.mark.usefixtures("isa")


def quantize(x):
    """Integer activations ``[m, blocks, 32]`` and their scales ``[m, blocks]`` by the definition."""
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scales > 0, (blocks / scales).round(), 0.0).clamp(-127, 127)
    return q.long(), scales[..., 0]


class Weight:
    """A packed weight of ``codes [n, k]``, random scales and, if asymmetric, zero points."""

    def __init__(self, codes, bits, group, asymmetric=False, scale_dtype=FLOAT32, zeros=None, scales=None):
        self.codes, self.bits, self.group = codes, bits, group
        n, k = codes.shape
        groups = math.ceil(k / group) if 0 < group < k else 1
        self.scales = torch.rand(n, groups) + 0.5 if scales is None else scales.expand(n, groups).clone()
        self.scales = self.scales.to(scale_dtype)
        if asymmetric and zeros is None:
            zeros = torch.randint(0, 2**bits, (n, groups))
        self.zeros = zeros
        self.qweight = torch.empty(math.ceil(n / 16), math.ceil(k / 32), 64 * bits, dtype=torch.uint8)
        _C.int_pack(codes.data_ptr(), n, k, bits, self.qweight.data_ptr(), 1)
        self.tiled_scales = tile_rows(self.scales)
        self.tiled_zeros = None if zeros is None else tile_rows(zeros.to(torch.uint8))

    @classmethod
    def random(cls, n, k, bits, *rest, **options):
        return cls(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits, *rest, **options)

    def call(self, x, bias=None, threads=2, y=None, act=8):
        n, k = self.codes.shape
        y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype) if y is None else y
        _C.int_linear(*self._x(x), self.qweight.data_ptr(), self.tiled_scales.data_ptr(), CODE[self.scales.dtype],
                      *self._optional(bias), y.data_ptr(), n, y.stride(0), self.bits, self.group, act, threads)
        return y

    @staticmethod
    def _x(x):
        return x.data_ptr(), CODE[x.dtype], *x.shape, x.stride(0)

    def _optional(self, bias):
        return (0 if self.tiled_zeros is None else self.tiled_zeros.data_ptr(), 0 if bias is None else bias.data_ptr())

    def projection(self, bias, y):
        return (self.qweight.data_ptr(), self.tiled_scales.data_ptr(), *self._optional(bias), y.data_ptr(),
                self.codes.shape[0], y.stride(0))

    def reference(self, x, bias=None):
        """The result in float64 from exact integer sums, and a bound of what fp32 sums of its terms may differ."""
        n, k = self.codes.shape
        q, x_scales = quantize(x)
        blocks = q.shape[1]
        group = torch.arange(blocks) * 32 // (self.group if 0 < self.group < k else blocks * 32)
        centre = 2 ** (self.bits - 1)
        w = torch.full((n, blocks * 32), centre, dtype=torch.long)
        w[:, :k] = self.codes.long()
        sums = torch.einsum("mbk,nbk->mnb", q.double(), (w - centre).double().unflatten(1, (-1, 32)))  # exact
        factor = x_scales.double()[:, None] * self.scales.double()[:, group]
        size = (sums * factor).abs().sum(-1)
        if self.zeros is not None:
            shift = (centre - self.zeros.double())[:, group] * q.double().sum(-1)[:, None]
            sums = sums + shift
            size += (shift * factor).abs().sum(-1)
        y = (sums * factor).sum(-1)
        if bias is not None:
            y, size = y + bias.double(), size + bias.double().abs()
        return y, size * 2**-24 * (blocks + 8)


def check(y, expected):
    reference, bound = expected
    if y.dtype != FLOAT32:  # one rounding more, of half a unit in the last place
        bound = 1.01 * bound + reference.abs() * torch.finfo(y.dtype).eps / 2
        bound = bound + 2 * torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = (y.double() - reference).abs()
    assert (error <= bound).all(), f"off by up to {(error / bound).nan_to_num(float('inf')).max():.3g} times the bound"


SHAPES = [  # m, n, k, group
    (1, 33, 97, 32), (1, 16, 1120, 0), (2, 50, 640, 64), (3, 17, 320, 96), (5, 16, 32, 32), (6, 47, 256, 128),
    (16, 40, 130, 64), (33, 35, 576, 128), (64, 16, 96, 0), (130, 49, 160, 32),
]  # fmt: skip


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_equals_exact_integers(bits, asymmetric):
    torch.manual_seed(bits)
    for index, (m, n, k, group) in enumerate(SHAPES):
        scale_dtype = (FLOAT32, BFLOAT16, FLOAT16)[index % 3]
        weight = Weight.random(n, k, bits, group, asymmetric, scale_dtype)
        x = torch.randn(m, k) + 3 * (index % 2)  # a mean must not cost accuracy
        bias = torch.randn(n) if index % 3 else None
        check(weight.call(x, bias), weight.reference(x, bias))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_half_precision_is_rounded_once(bits, dtype):
    torch.manual_seed(bits)
    for m in (1, 4, 9, 20):
        weight = Weight.random(37, 200, bits, 64, m % 2 == 0, dtype)
        x, bias = torch.randn(m, 200).to(dtype), torch.randn(37).to(dtype)
        check(weight.call(x, bias), weight.reference(x, bias))


def extreme_codes(bits, n, k):
    top = 2**bits - 1
    yield torch.zeros(n, k, dtype=torch.uint8)
    yield torch.full((n, k), top, dtype=torch.uint8)
    alternating = torch.full((n, k), top, dtype=torch.uint8)
    alternating[:, ::2] = 0
    yield alternating
    yield alternating.roll(1, 1)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_sums_do_not_overflow(bits):
    """Codes and activations at their limits, with scales that are powers of two: every sum is exact in fp32."""
    k, one = 96, torch.ones(1, 1)
    signs = torch.ones(6, k)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, 1::2] = -1
    signs[4, (torch.arange(k) % 8) < 4] = -1
    signs[5] = torch.randn(k, generator=torch.Generator().manual_seed(0)).sign()
    for codes in extreme_codes(bits, 20, k):
        for m in (1, 3, 6):
            x = signs[-m:] * 127 * 0.25
            y = Weight(codes, bits, 32, scales=one).call(x)
            exact = (127 * signs[-m:].long()) @ (codes.long() - 2 ** (bits - 1)).T
            assert torch.equal(y, exact.float() * 0.25)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_zero_points_of_any_byte(bits):
    torch.manual_seed(bits)
    for value in (0, 2**bits - 1, min(2**bits, 255), 255):
        weight = Weight.random(18, 160, bits, 64, zeros=torch.full((18, 3), value))
        for m in (2, 7):
            x = torch.randn(m, 160) + 1
            check(weight.call(x), weight.reference(x))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=["fp32", "bf16", "fp16"])
def test_quantization_equals_the_reference_bit_for_bit(dtype):
    """Through an identity, whose products are single: what comes out are the quantized activations themselves."""
    torch.manual_seed(0)
    k = 90
    codes = torch.full((k, k), 8, dtype=torch.uint8) + torch.eye(k, dtype=torch.uint8)
    identity = Weight(codes, 4, 0, scales=torch.ones(1, 1))
    x = torch.randn(40, k)
    x[1] = 0
    x[2] = 5e-39 * torch.randn(k)  # subnormal
    x[3] = 1e-44 * torch.randn(k)  # some of it vanishes with its scale
    x[4, 7] = 3e38 if dtype is not FLOAT16 else 6e4  # one outlier
    x[5] = x[5].sign() * 0.3
    x[6, 32:64] = 0
    x[7] = torch.arange(k) - 45.0  # ties: quotients that end in one half
    x[8] = (torch.arange(k) - 45) * 0.5 * 2.0**-100
    x[9] = torch.randint(-254, 255, (k,)) * 0.5
    x[9, ::30] = 127
    x[10:20] *= 10.0 ** torch.linspace(-37, 37, 10)[:, None]
    x = x.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    expected = quantize_activations(x, 8)
    assert (expected[2] != 0).any() or dtype is FLOAT16
    for rows in (slice(0, 40), slice(0, 1), slice(2, 4), slice(3, 10)):
        assert torch.equal(identity.call(x[rows].contiguous()), expected[rows])


def test_not_a_number_stays_in_its_token():
    torch.manual_seed(0)
    weight = Weight.random(20, 130, 4, 64, True)
    clean = torch.randn(7, 130)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = clean.clone()
        x[2, 70] = value
        y, others = weight.call(x), [0, 1, 3, 4, 5, 6]
        assert y[2].isnan().all()
        assert torch.equal(y[others], weight.call(clean)[others])


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
def test_a_row_does_not_depend_on_its_batch(bits):
    torch.manual_seed(bits)
    weight = Weight.random(70, 1312, bits, 96, True)
    x = torch.randn(41, 1312)
    alone = torch.cat([weight.call(row[None]) for row in x])
    for m in (2, 4, 5, 9, 16, 17, 33, 41):
        assert torch.equal(weight.call(x[:m]), alone[:m]), m


@pytest.mark.parametrize("m", [1, 3, 9, 70])
def test_threads_change_nothing(m):
    torch.manual_seed(m)
    for n in (16, 200):
        k = 16384 if n == 16 else 4096  # large enough that several threads are used
        weight = Weight.random(n, k, 4, 128, True)
        x = torch.randn(m, k)
        one = weight.call(x, threads=1)
        for threads in (2, 3, 7):
            assert torch.equal(weight.call(x, threads=threads), one)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_multi_equals_separate_calls(bits):
    torch.manual_seed(bits)
    weights = [Weight.random(n, 290, bits, 64, i != 1 and bits != 2) for i, n in enumerate((48, 16, 25, 1))]
    biases = [torch.randn(48), None, torch.randn(25), None]
    for m in (1, 6, 40):
        x = torch.randn(m, 290)
        outputs = [torch.full((m, w.codes.shape[0]), float("nan")) for w in weights]
        projections = [w.projection(b, y) for w, b, y in zip(weights, biases, outputs, strict=True)]
        _C.int_linear_multi(*Weight._x(x), projections, 0, bits, 64, 8, 2)
        for weight, bias, y in zip(weights, biases, outputs, strict=True):
            assert torch.equal(y, weight.call(x, bias))


def test_strides_and_nothing_outside_is_written():
    torch.manual_seed(0)
    weight = Weight.random(21, 100, 4, 32)
    for m in (1, 4, 11):
        wide = torch.randn(m, 160)
        x = wide[:, 30:130]
        y = torch.full((m + 1, 40), -7.0)
        weight.call(x, y=y[:m])
        assert torch.equal(y[:m, :21], weight.call(x.contiguous()))
        assert (y[:m, 21:] == -7).all() and (y[m] == -7).all()


def test_smallest_sizes():
    for bits in BITS:
        weight = Weight.random(1, 1, bits, 0, bits % 2 == 0)
        x = torch.tensor([[0.5], [-2.0], [0.0]])
        for m in (1, 3):
            check(weight.call(x[:m]), weight.reference(x[:m]))
