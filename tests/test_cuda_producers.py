"""Activations rounded by the CUDA kernels, compiled for the host: bit for bit, and through transforms."""

import dataclasses

import pytest
import torch
from cuda_rows import Launchers, emulated
from test_lowbit_fused import PRODUCERS, inputs, kron, signs, wide

from tersor.act_codes import code_sums, padded_channels, row_bytes, unpack_codes
from tersor.formats.integer import activation_codes
from tersor.ops_fused import Producer
from tersor.ops_lowbit_cuda import Rounding, fragments, produce, quantize_input, refusal

pytestmark = pytest.mark.usefixtures("one_thread")
# bits, group, clip, symmetric, stored width
OPTIONS = {
    "A8": (8, 32, 1.0, True, 8), "A6 in groups of 64": (6, 64, 0.9, True, 8), "A4": (4, 32, 1.0, True, 8),
    "A4 in nibbles": (4, 128, 0.8, True, 4), "A4 a token, nibbles": (4, 0, 1.0, True, 4),
    "A8 in groups of 256": (8, 256, 1.0, True, 8), "A8 in groups of 96": (8, 96, 1.0, True, 8),
    "A8 with zero points": (8, 32, 0.7, False, 8), "A8 with zero points, a token": (8, 0, 1.0, False, 8),
    "A6 with zero points": (6, 160, 1.0, False, 8), "A4 with zero points": (4, 64, 1.0, False, 8),
}


@pytest.fixture
def launchers():
    with emulated(Launchers(seeds=(0, 3))) as made:
        yield made


def integers(q):
    """Code minus zero point, ``[m, k]``; padding and sums are looked at on the way."""
    k, width = q.k, q.width or 4
    stored = unpack_codes(q.codes, padded_channels(k), width, q.block_bits)
    assert not stored[:, k:].any() and torch.equal(q.sums, code_sums(stored))
    if q.zero_points is None:
        return stored[:, :k].float()
    return stored[:, :k].float() - q.zero_points.repeat_interleave(q.act_group or k, 1)[:, :k]


def check_exact(q, x, *options, **rest):
    codes, scales = activation_codes(x, *options, **rest)
    valid = scales.isfinite()
    assert torch.equal(q.scales.isnan(), ~valid[..., 0])
    assert torch.equal(q.scales[valid[..., 0]], scales[valid])
    wanted = torch.where(valid, codes, 0.0).flatten(-2)[:, : x.shape[-1]]
    assert torch.equal(integers(q), wanted)


def rows(m, k, dtype):
    """Numbers of all sizes, ties, a row of zeros, tiny ones, and groups that are not finite."""
    x = torch.randn(m, k) * torch.exp2(torch.randint(-6, 6, (m, 1)).float())
    x[0] = torch.randint(-14, 15, (k,)) / 2
    x[0, ::32] = 7
    x[1] = 0
    x[2] *= 1e-40 if dtype is torch.float32 else 1e-7
    x[3, 3], x[3, k - 1] = float("nan"), -float("inf")
    x[4] = x[4].abs()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_rounding_is_the_definition_bit_for_bit(launchers, name, dtype):
    torch.manual_seed(1)
    *options, width = OPTIONS[name]
    for k in (64, 300, 517):
        x = rows(6, k, dtype)
        check_exact(quantize_input(x, *options, width=width), x, *options)


def test_static_scales(launchers):
    torch.manual_seed(2)
    for k, group in ((300, 64), (300, 0), (200, 96)):
        x = rows(6, k, torch.bfloat16)
        scale = torch.rand(-(-k // group) if group else 1) * 0.1
        scale[0] = 0.5
        check_exact(quantize_input(x, 8, group, input_scale=scale), x, 8, group, scale=scale)


@pytest.mark.parametrize("group", (32, 64, 128))
def test_bits_of_blocks(launchers, group):
    """Each 128 channels in the bytes of their own width, or in 8 bits throughout."""
    torch.manual_seed(group)
    k = 34 * 128 + 70  # more blocks than lanes
    bits = torch.randint(1, 3, (35,), dtype=torch.uint8) * 4
    x = rows(5, k, torch.bfloat16)
    for width in (4, 8):
        q = quantize_input(x, 4, group, 0.9, block_bits=bits, width=width)
        assert q.codes.shape[1] == (row_bytes(k, 4, bits) if width == 4 else padded_channels(k))
        check_exact(q, x, 4, group, 0.9, block_bits=bits)


def test_rows_wherever_they_lie(launchers):
    x = torch.randn(9, 700).bfloat16()
    for part in (x[1::2, 3:303], x[:, 8:308], x[2:3, 5:305], x.view(3, 3, 700)[..., :300]):
        flat = part.reshape(-1, 300)
        q = quantize_input(part, 8)
        assert q.m == flat.shape[0]
        check_exact(q, flat, 8)
    made = launchers.calls
    empty = quantize_input(x[:0], 4, 0, width=4)
    assert empty.codes.shape == (0, 384) and empty.scales.shape == (0, 1) and launchers.calls == made


MORE = {
    "hadamard of 4096": (4096, lambda k: Producer(hadamard=0, signs=signs(k))),
    "hadamard of 8192": (8192, lambda k: Producer(hadamard=0)),
    "hadamard 12 x 1024": (12288, lambda k: Producer(hadamard=0, signs=signs(k))),
    "kronecker 32 x 64": (2048, lambda k: Producer(**kron(32, 64))),
    "kronecker 6 x 150": (900, lambda k: Producer(**kron(6, 150))),
    "kronecker 136 x 8": (1088, lambda k: Producer(**kron(136, 8))),
    "32 heads of 80": (2560, lambda k: Producer(left=kron(32, 1)["left"])),
    "kronecker 20 x 76": (1520, lambda k: Producer(**kron(20, 76))),
}
ALL = {**PRODUCERS, **MORE}


def check_transformed(q, made, bits, group, near):
    """Codes are those of ``made`` (float64), but where that is within ``near`` of halfway between two."""
    k = made.shape[1]
    codes, scales = activation_codes(made.float(), bits, group)
    assert torch.allclose(q.scales, scales[..., 0], rtol=2e-5, atol=0)
    scaled = made / scales.expand(*codes.shape).flatten(-2)[:, :k].double()
    wrong = integers(q) != codes.flatten(-2)[:, :k]
    halfway = (scaled - scaled.floor() - 0.5).abs()
    assert (halfway[wrong] <= near).all() and wrong.double().mean() < 4 * near
    assert ((integers(q) - codes.flatten(-2)[:, :k]).abs() <= 1).all()


@pytest.mark.parametrize("name", ALL)
def test_transforms_are_the_definition_up_to_ties(launchers, name):
    torch.manual_seed(len(name))
    k, make = ALL[name]
    launchers.seeds = (0, 3) if k < 1000 else (5,)
    for dtype in (torch.float32, torch.bfloat16) if k < 1000 else (torch.bfloat16,):
        producer, x, other = inputs(make(k), 3 if k < 1000 else 2, k, dtype)
        made = wide(producer, x, other)
        # 2^-15 of the largest number are 4e-3 steps of 8 bits, 2e-4 of 4.
        products = producer.left is not None or producer.hadamard is not None
        check_transformed(produce(x, other, producer, 8, 32), made, 8, 32, 4e-3 if products else 1e-4)
        check_transformed(produce(x, other, producer, 4, 0, width=4), made, 4, 0, 1e-3)


@pytest.mark.parametrize("name", ["gate, kronecker", "norm, hadamard", "hadamard 12 x 32", "permute"])
def test_zeros_and_what_is_not_finite_and_no_rows(launchers, name):
    k, make = ALL[name]
    producer, x, other = inputs(make(k), 5, k)
    x[1], x[2, 5], x[3, k - 1] = 0, float("inf"), float("nan")
    x[4] *= 1e3
    for group in (0, 32):
        q = produce(x, other, producer, 8, group)
        assert not integers(q)[1].any() and not q.scales[1].any()
        bad = q.scales[2:4].isnan()
        assert bad.all() if producer.index is None else bad.any(1).all()
        assert not integers(q)[2:4][bad.repeat_interleave(group or k, 1)[:, :k]].any()
        assert q.scales[[0, 4]].isfinite().all() and (q.scales[[0, 4]] > 0).all()
    part = produce(x[4:], None if other is None else other[4:], producer, 8, 32)
    assert torch.equal(part.codes[0], q.codes[4]) and torch.equal(part.scales[0], q.scales[4])
    assert produce(x[:0], None if other is None else other[:0], producer, 8).codes.shape == (0, padded_channels(k))


@pytest.mark.parametrize("name, repeated", [("quantize", 0), ("hadamard of 4096", 0), ("kronecker 32 x 64", 0),
                                            ("hadamard 12 x 1024", 0), ("norm", 1), ("norm, hadamard", 1)])
def test_only_codes_scales_and_sums_are_written(launchers, name, repeated):
    """And a row is read once, with a norm twice; no bank conflicts."""
    torch.manual_seed(0)
    k, make = ALL.get(name, (1024, lambda k: Producer()))
    producer, x, other = inputs(make(k), 2, k, torch.bfloat16)
    q = produce(x, other, producer, 4, 64, width=4)
    total = launchers.counters["total"]
    stored = {key: found["stored"] for key, found in total["global"].items() if found["stored"]}
    assert stored == {key: getattr(q, key).nbytes for key in ("codes", "scales", "sums")}
    assert total["global"]["x"]["loaded"] == x.nbytes * (1 + repeated)
    if k % 256 == 0:
        assert [w for w, count in total["global"]["x"]["load_widths"].items() if count] == ["16"]
        assert [w for w, count in total["global"]["codes"]["store_widths"].items() if count] == ["4"]
    assert total["shared"]["extra_cycles"] == 0


def test_products_take_three_mma_for_each_tile(launchers):
    """Two in front of butterflies, whose matrix is exact."""
    q = produce(torch.randn(1, 2048).bfloat16(), None, Producer(**kron(32, 64)), 4, 0, width=4)
    assert q.codes.any()
    assert launchers.counters["total"]["mma"] == {"m16n8k16_bf16": 3 * (2 * 2 * 8 + 4 * 4 * 4)}
    produce(torch.randn(1, 28 * 64).bfloat16(), None, Producer(hadamard=0), 8)
    assert launchers.counters["total"]["mma"] == {"m16n8k16_bf16": 2 * (2 * 2 * 8)}


def test_numbers_of_products_in_two_parts(launchers):
    """What the small matrices lose: nothing of bfloat16 numbers, 2^-16 of others; and the order of fragments."""
    matrix = torch.randn(20, 20)
    parts = fragments(matrix, 2).view(torch.bfloat16).unflatten(-1, (4, 2))  # m, l, part, lane, register, element
    lane = torch.arange(32)
    padded = torch.zeros(32, 32)
    padded[:20, :20] = matrix
    for m in range(2):
        for tile in range(2):
            for register in range(4):
                for element in range(2):
                    row = 16 * m + lane // 4 + 8 * (register % 2)
                    column = 16 * tile + 2 * (lane % 4) + element + 8 * (register // 2)
                    found = parts[m, tile, :, :, register, element].float()
                    assert torch.equal(found[0], padded[row, column].bfloat16().float())
                    assert (found.sum(0) - padded[row, column]).abs().max() < 2.0**-15


def test_factors_that_change_are_noticed(launchers):
    producer = Producer(**kron(8, 16))
    x = torch.randn(2, 128)
    run = Rounding(128, producer, 8, 32, 1.0, True, None, None, 8, True)
    first = run(x)
    producer.left.copy_(torch.eye(8))
    again = run(x)
    assert not torch.equal(again.codes, first.codes)
    assert torch.equal(again.codes, produce(x, None, producer, 8).codes)
    bits = torch.tensor([4, 8], dtype=torch.uint8)
    mixed = Rounding(256, None, 4, 32, 1.0, True, None, bits, 4, False)
    assert mixed(torch.randn(2, 256)).codes.shape[1] == 192 and mixed(torch.randn(2, 256)).sums is None
    bits.fill_(8)
    assert mixed(torch.randn(2, 256)).codes.shape[1] == 256


def test_what_does_not_fit_is_named(launchers):
    x = torch.randn(2, 300)
    with pytest.raises(ValueError, match="index: found -1 to 298, accepted is 0 to 299"):
        produce(x, None, Producer(index=torch.arange(300).int() - 1), 8)
    with pytest.raises(ValueError, match="width: found 4"):
        quantize_input(x, 8, width=4)
    with pytest.raises(ValueError, match="block_bits: found .*accepted is dynamic symmetric groups"):
        quantize_input(x, 4, 0, block_bits=torch.full((3,), 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"block_bits: found \[4, 5\], accepted is 4 and 8"):
        quantize_input(x, 4, 32, block_bits=torch.tensor([4, 5, 4], dtype=torch.uint8), width=4)
    with pytest.raises(ValueError, match="act_clip: found 0"):
        quantize_input(x, 4, 32, 0.0)
    with pytest.raises(ValueError, match="x: found torch.int32"):
        quantize_input(x.int(), 8)
    assert not launchers.calls


def test_widths_beyond_the_shared_memory_are_refused(launchers):
    device = torch.device("cuda", 0)
    launchers.room = 99 * 1024
    wide_ = Producer(hadamard=0)
    assert refusal(wide_, 14336, 4, 0, 4, device) is None
    assert "takes 13" in (said := refusal(wide_, 28672, 4, 0, 4, device)) and "this GPU has 101376" in said
    with pytest.raises(ValueError, match="28672 channels takes .* bytes of shared memory; accepted are up to 101376"):
        produce(torch.zeros(1, 28672), None, wide_, 8)
    assert refusal(None, 1 << 20, 8, 32, 8, device) is None and refusal(Producer(), 28672, 8, 32, 8, device) is None
    launchers.room = 163 * 1024
    assert refusal(wide_, 28672, 4, 0, 4, device) is None
    large = Producer(left=torch.eye(2), right=torch.eye(500))
    assert "matrices of 2 and 500" in refusal(large, 1000, 8, 32, 8, device)
    assert "heads of 12 channels" in refusal(Producer(left=torch.eye(8)), 96, 8, 32, 8, device)
    with pytest.raises(ValueError, match="rows, columns are 8, 12; accepted"):
        produce(torch.zeros(1, 96), None, Producer(left=torch.eye(8)), 8)
    with pytest.raises(ValueError, match="matrices of 2 and 500, accepted is sizes up to 256"):
        produce(torch.zeros(1, 1000), None, large, 8)


def test_a_norm_of_another_epsilon_and_the_ends_of_the_gate(launchers):
    x = torch.full((1, 64), 1e-3)
    producer = Producer(norm_weight=torch.linspace(0.5, 1, 64), epsilon=1.0)
    q = produce(x, None, producer, 8, 0)
    assert torch.allclose(q.scales[0, 0] * 127, torch.tensor(1e-3), rtol=1e-5)
    ends = torch.tensor([[-3e38, -120.0, -88.0, -20.0, 0.0, 20.0, 88.0, 3e38]]).repeat(1, 8)
    for i in range(8):  # alone in its group
        row = torch.zeros(1, 32)
        row[0, 0] = ends[0, i]
        q = produce(row, torch.ones(1, 32), Producer(silu_mul=True), 8)
        found = (q.scales * integers(q))[0, 0].double()
        assert torch.isclose(found, torch.nn.functional.silu(ends[0, i].double()), rtol=3e-6, atol=1e-35)
    bad = dataclasses.replace(producer, norm_weight=None, silu_mul=True)
    q = produce(torch.full((1, 32), -float("inf")), torch.ones(1, 32), bad, 8)
    assert q.scales.isnan().all()
