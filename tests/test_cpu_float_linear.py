"""Products with FP8, MXFP4, MXFP6, MXFP8 and NVFP4 weights against their unpacked weights in float64, on every
instruction set."""

import pytest
import torch
import torch.nn.functional as F

from tersor import ops_float
from tersor.formats import NVFP4, Float, Microscaling
from tersor.formats.bits import pack_bits
from tersor.layer import Linear

pytestmark = pytest.mark.usefixtures("isa")

FORMATS = [Float("e4m3", "tensor"), Float("e4m3", "channel"), Float("e4m3", "block"), Microscaling("e2m1"),
           Microscaling("e4m3"), NVFP4(), Microscaling("e2m3")]
SHAPES = [(1, 1), (5, 33), (37, 99), (16, 130), (131, 257), (7, 2100)]


def stored(fmt, n, k, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(n, k) * torch.rand(n, 1) ** 4
    w.view(-1)[::13] *= 20  # subnormal elements beside them
    w.view(-1)[::29] = 0
    params = fmt.fit(w, dtype=torch.bfloat16)
    return fmt.pack(fmt.project(w, params), params)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_equals_the_unpacked_weight(fmt):
    for index, (n, k) in enumerate(SHAPES):
        tensors = stored(fmt, n, k, index)
        if fmt == Microscaling("e2m3") and k == 1:  # a row as long as one of e2m1: by the unpacked weight, and says so
            assert fmt.kernel((n, k)).startswith("reference")
            assert torch.equal(fmt.linear(torch.ones(1, k), tensors, None, (n, k)), fmt.unpack(tensors, (n, k)).T)
            continue
        codes, scales, one, rows, group = fmt._operands(tensors, (n, k))
        w = fmt.unpack(tensors, (n, k), torch.float64)
        decoded = ops_float.dequantize(codes, scales, one, n, k, rows, group)
        assert torch.equal(decoded, fmt.unpack(tensors, (n, k))), "decoding is exact"
        for m in (1, 2, 3, 5, 8, 16, 300):
            x, bias = torch.randn(m, k), torch.randn(n)
            y = fmt.linear(x, tensors, bias, (n, k))
            bound = (x.double().abs() @ w.abs().T + bias.abs()) * 2**-24 * (k / 16 + 12)
            assert ((y - F.linear(x.double(), w, bias.double())).abs() <= bound).all(), (n, k, m)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code_has_its_value(fmt):
    """Rows of all codes times the identity."""
    count = 254 if fmt.element == "e4m3" else 16
    if fmt.element == "e4m3":
        codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
        packed, k = codes.view(torch.float8_e4m3fn)[None].expand(3, -1).contiguous(), count
        values = packed[0].double()
    elif fmt.element == "e2m3":
        packed, k = pack_bits(torch.arange(64).expand(3, -1), 6), 64
        values = torch.tensor([m / 8 if e == 0 else (8 + m) * 2.0 ** (e - 4) for e in range(4) for m in range(8)])
        values = torch.cat([values, -values]).double()
    else:
        codes, k = torch.arange(16, dtype=torch.uint8), count
        packed = (codes[::2] | codes[1::2] << 4)[None].expand(3, -1).contiguous()
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    y = ops_float.float_linear(torch.eye(k)[:40], packed, torch.ones(3, 1), None, None, 3, 1, 256)
    assert torch.equal(y[:, 1].double(), values[:40])
    w = ops_float.dequantize(packed, torch.ones(3, 1), None, 3, k, 1, 256)
    assert torch.equal(w[2].double(), values)


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e4m3"])
def test_every_place_and_group_for_few_tokens(element):
    """Rows of the identity give columns as they are, whatever shares a scale and however many rows there are."""
    torch.manual_seed(0)
    n, k = 19, 1000  # chunks, blocks, and codes beyond the last whole one
    if element == "e4m3":
        codes = torch.randn(n, k).to(torch.float8_e4m3fn)
    else:
        codes = pack_bits(torch.randint(16 if element == "e2m1" else 64, (n, k)), 4 if element == "e2m1" else 6)
    for group in (16, 32, 48, 64, 160, 512, k):
        scales = torch.rand(n, -(-k // group)) + 0.5
        w = ops_float.dequantize(codes, scales, None, n, k, 1, group)
        starts = range(0, k, 8) if group < 64 else (0, 504, 512, 888, 960, 992)
        for m in (1, 4, 7):
            for start in starts[::m]:
                y = ops_float.float_linear(torch.eye(k)[start:start + m], codes, scales, None, None, n, 1, group)
                assert torch.equal(y, w[:, start:start + m].T), (group, m, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_half_precision_is_rounded_once(fmt, dtype):
    n, k = 35, 200
    tensors, w = stored(fmt, n, k), None
    w = fmt.unpack(tensors, (n, k), torch.float64)
    for m in (1, 7):
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        y, wanted = fmt.linear(x, tensors, bias, (n, k)), F.linear(x.double(), w, bias.double())
        assert y.dtype == dtype
        assert ((y.double() - wanted).abs() <= wanted.abs() * torch.finfo(dtype).eps / 1.9 + 1e-5).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_stand_alone_whatever_the_batch_and_threads(fmt):
    n, k = 70, 1500
    tensors = stored(fmt, n, k)
    x = torch.randn(21, k)
    alone = torch.cat([fmt.linear(row[None], tensors, None, (n, k)) for row in x])
    together = fmt.linear(x, tensors, None, (n, k))  # sums of many rows are taken in another order
    few = 8 if fmt.element == "e2m1" else 4
    assert (together - alone).norm() < 1e-6 * alone.norm()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for m in (1, 2, 3, 4, 5, 7, 8, 9, 21):
                assert torch.equal(fmt.linear(x[:m], tensors, None, (n, k)), (alone if m <= few else together)[:m])
    finally:
        torch.set_num_threads(before)


def test_layers_inputs_of_any_stride_and_none():
    torch.manual_seed(0)
    fmt = NVFP4()
    layer = Linear(96, 40, fmt, bias=True, dtype=torch.float32)
    layer.load_tensors(stored(fmt, 40, 96))
    assert layer.kernel.startswith("float_linear ")
    wide = torch.randn(2, 5, 300)
    for x in (wide[..., 7:103], wide[..., ::2][..., :96], wide[:, ::2, :96], wide[0, 0, :96], wide[:0, :, :96]):
        y = layer(x)
        assert y.shape == (*x.shape[:-1], 40) and torch.equal(y, layer(x.contiguous()))
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-5)


def test_what_is_not_finite_stays_in_its_row():
    fmt = Microscaling("e2m1")
    tensors, x = stored(fmt, 20, 100), torch.randn(5, 100)
    clean = fmt.linear(x, tensors, None, (20, 100))
    x[2, 5] = float("nan")
    y = fmt.linear(x, tensors, None, (20, 100))
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def arguments(**changes):
    made = dict(x=torch.randn(2, 64), codes=torch.zeros(8, 64, dtype=torch.uint8).view(torch.float8_e4m3fn),
                scales=torch.ones(8, 1), global_scale=None, bias=None, out_features=8, scale_rows=1, group=64)
    return tuple((made | changes).values())


BAD = {
    "x dtype": (dict(x=torch.randn(2, 64).double()), "x"),
    "x width": (dict(x=torch.randn(2, 65)), "codes"),
    "codes dtype": (dict(codes=torch.zeros(8, 64)), "codes"),
    "codes strided": (dict(codes=torch.zeros(64, 8, dtype=torch.uint8).view(torch.float8_e4m3fn).T), "contiguous"),
    "out_features": (dict(out_features=9), "codes"),
    "scales": (dict(scales=torch.ones(7, 1)), "scales"),
    "scales dtype": (dict(scales=torch.ones(8, 1).double()), "scales"),
    "global": (dict(global_scale=torch.ones(1)), "global_scale"),
    "no global": (dict(scales=torch.ones(8, 1).to(torch.float8_e4m3fn)), "global_scale"),
    "group": (dict(group=24), "group"),
    "rows": (dict(scale_rows=0), "scale_rows"),
    "bias": (dict(bias=torch.ones(7)), "bias"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match="found .* accepted") as error:
        ops_float.float_linear(*arguments(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["exponents", "floats"])
def test_scales_up_to_the_largest_numbers(dtype):
    """Scales of e4m3 from 2^120 on, next to small ones, for few tokens and many."""
    torch.manual_seed(0)
    n, k = 21, 1100
    codes = torch.randn(n, k).mul(0.3).clamp(-1, 1).to(torch.float8_e4m3fn)
    exponents = torch.randint(245, 255, (n, -(-k // 32)), dtype=torch.uint8)
    exponents[::4] = 130
    exponents[:, 5] = 100
    scales = exponents if dtype is torch.uint8 else 2.0 ** (exponents.float() - 127)
    w = codes.double() * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)[:, :k]
    assert torch.equal(ops_float.dequantize(codes, scales, None, n, k, 1, 32).double(), w)
    for m in (1, 2, 3, 5, 9):
        x = torch.randn(m, k) * 2.0**-20
        y = ops_float.float_linear(x, codes, scales, None, None, n, 1, 32)
        bound = (x.double().abs() @ w.abs().T) * 2**-24 * (k / 16 + 12)
        assert y.isfinite().all() and ((y - F.linear(x.double(), w)).abs() <= bound).all(), m


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_of_every_size_stand_alone(fmt):
    torch.manual_seed(0)
    n, k = 20, 200
    tensors = stored(fmt, n, k)
    w = fmt.unpack(tensors, (n, k), torch.float64)
    x = torch.randn(8, k) * 2.0 ** torch.tensor([-140, -100, -60, 0, 50, 95, 105, 110])[:, None]
    x[6, ::3] = 1e-9  # beside large ones
    for m in (1, 4, 8):
        for rows in x.split(m):
            y = fmt.linear(rows, tensors, None, (n, k))
            bound = (rows.double().abs() @ w.abs().T) * 2**-24 * (k / 16 + 12) + k * 2.0**-149
            assert ((y - F.linear(rows.double(), w)).abs() <= bound).all(), m
            if m <= (8 if fmt.element == "e2m1" else 4):
                assert torch.equal(y, torch.cat([fmt.linear(row[None], tensors, None, (n, k)) for row in rows]))


def test_many_rows_are_summed_alike():
    """In parts of at most 256, none of which has so few rows that they are summed in another order."""
    torch.manual_seed(0)
    tensors, x = stored(NVFP4(), 20, 200), torch.randn(520, 200)
    whole = NVFP4().linear(x, tensors, None, (20, 200))
    for m in (9, 256, 257, 260, 513):
        assert torch.equal(NVFP4().linear(x[:m], tensors, None, (20, 200)), whole[:m]), m


@pytest.mark.parametrize("k", [96, 224])
@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e4m3"])
def test_the_ends_of_the_exponents(element, k):
    """OCP MX: the code 0 is 2^-127, which is subnormal, and 255 is no number, in its groups alone."""
    torch.manual_seed(0)
    fmt, n = Microscaling(element), 18
    tensors = stored(fmt, n, k)
    tensors["weight_scale"][:, 1] = 0
    with pytest.raises(ValueError, match=r"weight_scale: found 255 \(NaN\) at \[3, 2\], accepted are exponents"):
        fmt.verify({**tensors, "weight_scale": tensors["weight_scale"].index_put(
            (torch.tensor([3]), torch.tensor([2])), torch.tensor(255, dtype=torch.uint8))}, (n, k))
    fmt.verify(tensors, (n, k))
    values = fmt.unpack({**tensors, "weight_scale": torch.full_like(tensors["weight_scale"], 127)}, (n, k))
    w = fmt.unpack(tensors, (n, k))
    assert w[:, 32:64].abs().max() > 0 and torch.equal(w[:, 32:64].double(), values[:, 32:64].double() * 2.0**-127)
    codes, scales, one, rows, group = fmt._operands(tensors, (n, k))
    assert torch.equal(ops_float.dequantize(codes, scales, one, n, k, rows, group), w)
    for m in (1, 2, 5, 9):
        x = torch.zeros(m, k)
        x[:, 40] = 2.0**126
        assert torch.equal(fmt.linear(x, tensors, None, (n, k)), (values[:, 40] / 2).expand(m, -1))
    tensors["weight_scale"][3, 2] = 255
    wrong = torch.zeros(n, k, dtype=torch.bool)
    wrong[3, 64:96] = True
    for found in (fmt.unpack(tensors, (n, k)), fmt.unpack(tensors, (n, k), torch.float64).float(),
                  ops_float.dequantize(codes, scales, one, n, k, rows, group)):
        assert torch.equal(found.isnan(), wrong)
    for m in (1, 2, 5, 9):
        y = fmt.linear(torch.ones(m, k), tensors, None, (n, k))
        assert torch.equal(y.isnan(), (torch.arange(n) == 3).expand(m, -1))
