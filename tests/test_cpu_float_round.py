"""Activations rounded to small floats, bit for bit as the definition, on every instruction set."""

import pytest
import torch

from tersor import ops_round
from tersor.formats.floating import ELEMENTS
from tersor.formats.inputs import _ROUNDING
from tersor.ops_round import float_round
from tersor.registry import resolve_format

pytestmark = pytest.mark.usefixtures("isa")


def inputs(m, k, dtype, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(m, k) * torch.logspace(-6, 4, m)[:, None] * 2.0 ** torch.randint(-12, 6, (m, k))
    x[:, ::7] = 0
    if m > 2:
        x[1] = 0
        x[2] = 1e-38  # below what a scale can be
    return x.to(dtype)


def same(a, b):
    return torch.equal(torch.nan_to_num(a, nan=12345.0), torch.nan_to_num(b, nan=12345.0)) and torch.equal(
        torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", _ROUNDING)
def test_bit_for_bit(kind, dtype):
    for index, (m, k) in enumerate([(1, 1), (1, 4096), (3, 33), (16, 130), (5, 16), (300, 257)]):
        x = inputs(m, k, dtype, index)
        got, wanted = float_round(x, *_ROUNDING[kind]), ops_round._float_round_reference(x, *_ROUNDING[kind])
        assert got.dtype is dtype and got.shape == x.shape and same(got, wanted), (m, k)
    wide = torch.randn(9, 96, dtype=dtype)[:, :80]
    assert same(float_round(wide, *_ROUNDING[kind]), ops_round._float_round_reference(wide, *_ROUNDING[kind]))
    assert float_round(x[:0], *_ROUNDING[kind]).shape == (0, 257)
    assert float_round(x[:, :0], *_ROUNDING[kind]).shape == (300, 0)


@pytest.mark.parametrize("element", ops_round.ELEMENTS)
def test_every_value_and_every_tie(element):
    """Under a scale of one: values of the element stay, and what lies halfway goes to the even one."""
    x = torch.arange(-4480, 4481) / 10 if element == "e4m3" else torch.arange(-600, 601) / 100
    fine = torch.arange(-4096, 4097) / 2.0**14
    row = torch.cat([x, fine, torch.tensor([ELEMENTS[element][3]])])[None]
    got = float_round(row, element, "largest", 0)
    if element == "e4m3":
        assert torch.equal(got, row.to(torch.float8_e4m3fn).float())
    assert torch.equal(float_round(got, element, "largest", 0), got)
    assert same(got, ops_round._float_round_reference(row, element, "largest", 0))


@pytest.mark.parametrize("kind", _ROUNDING)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_group(kind, bad):
    x = torch.randn(6, 256)
    x[2, 100] = bad
    got = float_round(x, *_ROUNDING[kind])
    group = _ROUNDING[kind][2] or 256
    begin = 100 // group * group
    assert got[2, begin:begin + group].isnan().all() and got.isnan().sum() == group
    x[2, begin:begin + group] = 0
    assert torch.equal(got[got.isfinite()], float_round(x, *_ROUNDING[kind])[got.isfinite()])


@pytest.mark.parametrize("spec", ["W4AFP8", "FP8", "MXFP4", "MXFP8", "MXFP4XFP8", "NVFP4", "MXFP6A8",
                                  "AMXFP6/MXFP6A16"])
def test_formats_run_in_kernels(spec):
    fmt = resolve_format(spec)
    w, x = torch.randn(40, 256), torch.randn(5, 256)
    params = fmt.fit(w)
    tensors = fmt.pack(fmt.project(w, params), params)
    assert not fmt.kernel((40, 256)).startswith("reference") and "float_round" in fmt.kernel((40, 256))
    wanted = fmt.quantize_input(x).double() @ fmt.unpack(tensors, (40, 256), torch.float64).T
    got = fmt.linear(x, tensors, None, (40, 256))
    assert (got - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("arguments", [("e5m2", "largest", 0), ("e4m3", "token", 0), ("e4m3", "largest", 24),
                                       ("e4m3", "largest", -16)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="float_round: .*found .*accepted"):
        float_round(torch.randn(2, 32), *arguments)
    with pytest.raises(ValueError, match="float_round: .*found .*accepted"):
        float_round(torch.ones(2, 32, dtype=torch.int32), "e4m3", "largest", 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", _ROUNDING)
def test_finite_numbers_stay_finite(kind, dtype):
    """The largest number of a group may round to one that the dtype does not hold: it becomes the dtype's largest."""
    most = torch.finfo(dtype).max
    x = torch.linspace(0.9, 1, 48)[:, None] * torch.tensor([[1.0, -1.0]]).repeat(1, 80) * most
    x = torch.cat([x, torch.full((1, 160), most)]).to(dtype)
    got = float_round(x, *_ROUNDING[kind])
    assert got.isfinite().all() and same(got, ops_round._float_round_reference(x, *_ROUNDING[kind]))
    assert got.abs().amax() == most and ((got.double() - x.double()).abs() <= 0.13 * x.double().abs()).all()
