"""One list of demands that every format meets, and what is particular to some."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.formats import (
    NVFP4, PRESETS, AdditiveCodebook, BilevelInt, BlockDiagonal, ByteScales, Dense, Float, Inputs, Int, LowRank,
    Microscaling, Outliers, OutputVectors, Sparse24, Sum,
)
from tersor.formats.base import reference_kernel
from tersor.formats.bits import kmeans, nearest, pack_bits, unpack_bits
from tersor.formats.floating import ELEMENTS, from_codes, round_to, to_codes
from tersor.formats.lowrank import leading_vectors
from tersor.layer import Linear
from tersor.registry import resolve_format

FORMATS = [
    Int(4), Int(3, 32, False), Int(2, 0), Int(5, 64, scale_dtype="fp16"), Int(8, 0, activation=8),
    Int(4, 32, activation=4), Int(6, 32, activation=6, act_group=64, act_clip=0.9),
    Int(4, 32, False, activation=8, act_group=0, act_sym=False), Int(4, 32, activation=8, scale_dtype="int8"),
    Int(3, 64, False, activation=8, scale_dtype="int8", act_group=0),
    Sparse24(Int(4, 32, activation=8, scale_dtype="int8")), Dense(), LowRank(4),
    Float("e4m3", "tensor"), Float("e4m3", "channel"), Float("e4m3", "block"), Microscaling("e2m1"),
    Microscaling("e2m3"), Microscaling("e4m3"), NVFP4(),
    ByteScales(Int(3, 32, False, scale_dtype="fp32")), Inputs(ByteScales(Int(4, 64, scale_dtype="fp32"))),
    Inputs(Int(4, 32), "fp8", "token"), PRESETS["FP8"], PRESETS["FP8_BLOCK"], PRESETS["NVFP4"], PRESETS["MXFP4"],
    PRESETS["MXFP6A8"], PRESETS["MXFP4XFP8"], Sparse24(), Sparse24(Int(4, 32)), Sparse24(Int(4, 32, False)),
    Sparse24(Int(4, 32, activation=8)), Sparse24(NVFP4()), Sum((Int(3, 32), LowRank(4))),
    Sum((Int(2, 32, False), Outliers(0.03))), Sum((Sparse24(Int(4, 32)), LowRank(3), Outliers(0.01))),
    Sum((Int(2, 32), Int(2, 32))), Outliers(0.05), AdditiveCodebook(2, 4), AdditiveCodebook(1, 6, beam=1),
    AdditiveCodebook(3, 5, 4), OutputVectors(8, 6), OutputVectors(4, 5, 3), BilevelInt(3), BilevelInt(2, 8, 4, 5),
    Sum((BilevelInt(3), Outliers(0.02))), BlockDiagonal(Sparse24(), 16), BlockDiagonal(Sparse24(Int(4, 32)), 32),
]
EVEN, ODD = (64, 160), (37, 99)


def weight(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[0], 1, dtype=torch.float64).add(0.1) * 0.1
    w.view(-1)[:: 53] *= 6  # some outliers
    return w.to(dtype)


@pytest.fixture(params=FORMATS, ids=str)
def fmt(request):
    return request.param


@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("dtype, model_dtype", [(torch.float32, torch.bfloat16), (torch.float64, torch.float16)],
                         ids=["fp32-bf16", "fp64-fp16"])
def test_shared_list(fmt, shape, dtype, model_dtype):
    try:
        fmt.check(shape)
    except ValueError as error:
        assert shape == ODD and "accepted" in str(error) and str(shape[0]) in str(error)
        return
    w = weight(shape, dtype)
    before = w.clone()
    params = fmt.fit(w, dtype=model_dtype)
    w_hat = fmt.project(w, params).clone()
    assert torch.equal(w, before), "fit and project leave the weight alone"
    assert w_hat.shape == w.shape and w_hat.dtype == dtype
    assert torch.equal(fmt.project(w_hat, params), w_hat), "project is idempotent"
    tensors = fmt.pack(w_hat, params)
    spec = fmt.spec(shape, model_dtype)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == \
        {k: (t.shape, t.dtype) for k, t in spec.items()}
    assert all(t.is_contiguous() for t in tensors.values())
    stored = 8 * sum(t.nbytes for t in tensors.values())
    assert fmt.bits(shape, model_dtype) == pytest.approx(stored / math.prod(shape))
    assert torch.equal(fmt.unpack(tensors, shape, dtype), w_hat), "the round trip is exact"
    assert torch.equal(fmt.unpack(tensors, shape, model_dtype), fmt.unpack(tensors, shape).to(model_dtype))


def test_text_names_the_format(fmt):
    assert resolve_format(fmt.text()) == fmt
    assert resolve_format(str(resolve_format(fmt.text()))) == fmt


@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
def test_linear_is_the_product_with_the_unpacked_weight(fmt, shape):
    try:
        fmt.check(shape)
    except ValueError:
        return
    w = weight(shape)
    params = fmt.fit(w, dtype=torch.bfloat16)
    tensors = fmt.pack(fmt.project(w, params), params)
    exact = fmt.unpack(tensors, shape, torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x = torch.randn(3, 2, shape[1], dtype=torch.float64).to(dtype)
        if "W" in fmt.text() and dtype is torch.float64:
            continue  # the integer kernels take float32 and shorter
        y = fmt.linear(x, tensors, bias.to(dtype), shape)
        wanted = F.linear(fmt.quantize_input(x).double(), exact, bias)
        assert y.dtype == dtype
        assert (y - wanted).norm() <= tolerance * wanted.norm()


def test_a_method_can_go_column_block_by_column_block(fmt):
    """What `project` says of all columns it says of blocks, and refit of an unchanged weight changes nothing."""
    w = weight(EVEN)
    params, again = fmt.fit(w, dtype=torch.bfloat16), fmt.fit(w, dtype=torch.bfloat16)
    whole = fmt.project(w, params)
    step = fmt.block if fmt.block > 1 else 32
    if fmt.group_columns and not isinstance(fmt, Sum):
        for lo in range(0, EVEN[1], fmt.group_columns):
            fmt.refit(again, w[:, lo : lo + fmt.group_columns], lo)
    parts = torch.cat([fmt.project(w[:, lo : lo + step], again, lo) for lo in range(0, EVEN[1], step)], 1)
    assert torch.allclose(parts, whole, atol=1e-7)
    tensors = fmt.pack(parts, again)
    assert torch.allclose(fmt.unpack(tensors, EVEN), parts, atol=1e-7)


def test_the_error_shrinks_with_search_or_stays(fmt):
    w = weight(EVEN)
    plain = fmt.project(w, fmt.fit(w, dtype=torch.bfloat16))
    searched = fmt.project(w, fmt.fit(w, search=True, dtype=torch.bfloat16))

    def error(w_hat):
        return (w_hat - w).abs().pow(2.4).sum()

    assert error(searched) <= error(plain) * 1.02
    assert (plain - w).norm() < w.norm(), "closer than nothing"


def test_a_layer_holds_it(fmt):
    torch.manual_seed(2)
    linear = nn.Linear(160, 64, bias=True, dtype=torch.bfloat16)
    layer = Linear.from_linear(linear, f"rtn:{fmt}")
    x = torch.randn(5, 160, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    wanted = F.linear(fmt.quantize_input(x.detach()).double(), layer.weight.double(), linear.bias.double())
    # W = A S B is multiplied factor by factor in bfloat16, other formats round once or twice
    assert y.dtype == torch.bfloat16 and (y - wanted).norm() < 1e-2 * wanted.norm()
    y.sum().backward()
    assert (x.grad.double() - layer.weight.double().sum(0)).norm() < 1e-2 * x.grad.double().norm()
    again = Linear(160, 64, fmt, bias=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), y) and torch.equal(again.weight, layer.weight)
    assert 8 * layer.nbytes / layer.weight.numel() == pytest.approx(fmt.bits((64, 160)))


def test_kernel_is_named_or_reference(fmt):
    name = fmt.kernel(EVEN)
    fmt = fmt.inner if isinstance(fmt, Inputs) else fmt  # rounds its input, then does what the format in it does
    named = (ByteScales, Dense, Float, Int, LowRank, Microscaling, NVFP4)
    expected = isinstance(fmt, named) or isinstance(fmt, Sum) and all(
        isinstance(term, (Int, LowRank)) for term in fmt.terms)
    assert reference_kernel(name) is not expected, name


def test_zero_weight_stays_zero(fmt):
    w = torch.zeros(EVEN)
    params = fmt.fit(w, dtype=torch.bfloat16)
    w_hat = fmt.project(w, params)
    assert torch.equal(w_hat, w)
    assert torch.equal(fmt.unpack(fmt.pack(w_hat, params), EVEN), w)


# -- bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_pack_bits_round_trip_and_order(bits):
    codes = torch.randint(0, 2**bits, (3, 21), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, math.ceil(21 * bits / 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, 21), codes)
    for row, values in zip(packed.tolist(), codes.tolist()):  # against arbitrary precision integers
        whole = sum(value << bits * i for i, value in enumerate(values))
        assert int.from_bytes(bytes(row), "little") == whole


def test_bits_by_hand():
    shape = (256, 256)
    assert Sparse24(Int(4, 128)).bits(shape) == 2 + 1 + 16 / 256
    assert Sparse24().bits(shape) == 8 + 1
    assert AdditiveCodebook(2, 8).bits(shape) == 2 + 16 * 2 * 256 * 8 / 256**2 + 16 / 256
    assert OutputVectors(8, 8, 8).bits(shape) == 2 + 2 * 16 * 256 * 8 / 256**2 + 16 / 256
    assert BilevelInt(3).bits(shape) == 3.625  # b + 2 * 3 / 16 + 64 / 256
    assert Sum((BilevelInt(3), Outliers(1 / 64))).bits(shape) == 3.625 + 32 / 64 + 32 * 257 / 256**2
    assert NVFP4().bits(shape) == 4.5 + 32 / 256**2
    assert Microscaling("e2m3").bits(shape) == 6.25
    assert BlockDiagonal(Sparse24(), 32).bits(shape) == 9 + 16 * 32 * 512 / 256**2 + 16 * 512 / 256**2


def test_kmeans_finds_separate_clusters_and_serves_every_point():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 3, generator=generator) * 10
    points = (centres[:, None] + 0.01 * torch.randn(8, 40, 3, generator=generator)).flatten(0, 1)
    found = kmeans(points, 8)
    assert (points - found[nearest(points, found)]).norm(dim=1).max() < 0.1
    few = kmeans(points[:5], 8)
    assert torch.equal(few[:5], points[:5]) and not few[5:].any()


# -- float formats ----------------------------------------------------------------------------------------------


def test_round_to_matches_torch_fp8_and_the_tables():
    x = torch.cat([torch.randn(4000) * scale for scale in (1e-3, 0.1, 3, 100, 1000)])
    x = torch.cat([x, torch.arange(-512, 512) / 2**10, torch.arange(-448, 449.0)])
    assert torch.equal(round_to(x, "e4m3"), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    for element, (_, _, _, top) in ELEMENTS.items():
        codes = torch.arange(2 ** (8 if element == "e4m3" else 4 if element == "e2m1" else 6))
        if element == "e4m3":
            codes = codes[codes % 128 != 127]  # NaN
        values = from_codes(codes, element, torch.float32)
        assert torch.equal(to_codes(values, element), codes) and values.max() == top
        assert torch.equal(round_to(values, element), values)
        middle = round_to(x.clamp(-top, top), element)
        table = values.unique()
        distance = (x.clamp(-top, top)[:, None] - table).abs().amin(1)
        assert torch.equal((x.clamp(-top, top) - middle).abs(), distance)


def test_ties_go_to_the_even_code():
    assert round_to(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]), "e2m1").tolist() == \
        [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0]


# -- combinators ------------------------------------------------------------------------------------------------


def test_two_of_four_keeps_exactly_the_largest():
    w = weight(EVEN)
    w_hat = Sparse24().project(w, Sparse24().fit(w))
    kept = w_hat != 0
    assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    groups = w.abs().unflatten(1, (-1, 4)).sort(-1).values
    assert torch.allclose(w_hat.abs().unflatten(1, (-1, 4)).sort(-1).values[..., 2:], groups[..., 2:], rtol=2**-8)
    importance = torch.ones(EVEN[1])
    importance[::4] = 1e12
    important = Sparse24().project(w, Sparse24().fit(w, importance=importance), importance=importance)
    assert (important[:, ::4] != 0).all()


def test_low_rank_recovers_a_low_rank_matrix_and_corrects_a_quantized_one():
    torch.manual_seed(1)
    thin = torch.randn(64, 4) @ torch.randn(4, 96)
    lr = LowRank(4)
    assert (lr.project(thin, lr.fit(thin)) - thin).norm() < 0.01 * thin.norm()
    # three bits lose what a low-rank term then holds
    w = weight((64, 96)) + 0.3 * thin
    plain, fixed = Int(3, 32), Sum((Int(3, 32), LowRank(8)))
    error = [(f.project(w, f.fit(w)) - w).norm() for f in (plain, fixed)]
    assert error[1] < 0.97 * error[0]


def test_leading_vectors_by_iteration_are_as_good_as_the_decomposition():
    w = torch.randn(120, 200, generator=torch.Generator().manual_seed(3)) * torch.linspace(3, 0.5, 200)
    u = leading_vectors(w, 8)
    exact = torch.linalg.svdvals(w)[:8].square().sum()
    assert torch.allclose(u.T @ u, torch.eye(8), atol=1e-5)
    assert (u.T @ w).square().sum() > 0.985 * exact
    assert torch.equal(u, leading_vectors(w, 8))


def test_outliers_free_the_range_of_the_rest():
    w = weight(EVEN)
    plain, fixed = Int(3, 32), Sum((Int(3, 32), Outliers(0.02)))
    error = [(f.project(w, f.fit(w)) - w).norm() for f in (plain, fixed)]
    assert error[1] < 0.6 * error[0]


def test_outliers_refuse_more_than_fit_and_damaged_tables():
    fmt, w = Outliers(0.01), weight(EVEN)
    params = fmt.fit(w)
    tensors = fmt.pack(fmt.project(w, params), params)
    for name, value in (("columns", EVEN[1]), ("columns", -1), ("row_offsets", 10**6), ("row_offsets", -5)):
        damaged = {key: tensor.clone() for key, tensor in tensors.items()}
        damaged[name][-1 if name == "row_offsets" else 0] = value
        with pytest.raises(ValueError, match=name):
            fmt.unpack(damaged, EVEN)
    params["mask"][:] = True
    with pytest.raises(ValueError, match="outliers in a 64 x 160"):
        fmt.pack(w, params)


def test_beam_search_with_room_for_all_equals_brute_force():
    torch.manual_seed(0)
    fmt = AdditiveCodebook(2, 2, 4, beam=16)
    w = torch.randn(6, 16)
    params = fmt.fit(w)
    codes = fmt.encode(w, params)
    a, b = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    points = params["codebooks"][0][a.flatten()] + params["codebooks"][1][b.flatten()]
    distance = torch.cdist((w / params["scales"]).unflatten(1, (-1, 4)).flatten(0, 1), points)
    found = fmt.decode(codes, params, 16)
    error = ((found - w) / params["scales"]).unflatten(1, (-1, 4)).flatten(0, 1).norm(dim=1)
    assert torch.allclose(error, distance.amin(1), atol=1e-5)


def test_nesting_that_makes_no_sense_is_refused():
    for text, message in [("2:4/2x8", "together"), ("W4A16/W4A16", "nests"), ("AFP8/W4A8", "twice"),
                          ("AFP8", "another"),
                          ("bd30/2:4", "multiples"), ("W4A16+2x8", "together"), ("FP8A16[scale=row]", "scale"),
                          ("UNQUANTIZED", "keep"), ("lr0", "rank"), ("outliers2", "ratio"), ("bd32", "another")]:
        with pytest.raises(ValueError, match=message):
            resolve_format(text)
