"""Transforms in the prelude of the integer kernels, against their float64 definitions."""

import math

import pytest
import torch

from tersor import ops
from tersor.formats.integer import activation_codes
from tersor.ops_fused import BoundIntLinearFused, Producer, int_linear_fused

pytestmark = pytest.mark.usefixtures("isa")


def stored(n, k, bits=4, group=32, identity=False):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    groups = -(-k // group) if group else 1
    scales = torch.rand(-(-n // 16), groups, 16) * 0.1 + 0.01
    if identity:
        codes = torch.full((k, k), 8, dtype=torch.uint8) + torch.eye(k, dtype=torch.uint8)
        scales = torch.ones_like(scales)
    return ops.int_pack(codes, bits), scales, None, (n, k), bits, group


def kron(n1, n2):
    return {"left": torch.randn(n1, n1) / math.sqrt(n1), "right": torch.randn(n2, n2) / math.sqrt(n2)}


def signs(k):
    return torch.randint(0, 2, (k,)) * 2.0 - 1


PRODUCERS = {
    "norm": (100, lambda k: Producer(norm_weight=torch.rand(k), epsilon=1e-5)),
    "gate": (100, lambda k: Producer(silu_mul=True)),
    "permute": (130, lambda k: Producer(index=torch.randperm(k).int())),
    "hadamard": (512, lambda k: Producer(hadamard=0)),
    "hadamard of 16": (16, lambda k: Producer(hadamard=0)),
    "hadamard of 32": (32, lambda k: Producer(hadamard=0)),
    "hadamard of blocks": (384, lambda k: Producer(hadamard=64, signs=signs(k))),
    "hadamard of blocks of 8": (40, lambda k: Producer(hadamard=8)),
    "hadamard 12 x 32": (384, lambda k: Producer(hadamard=0, signs=signs(k))),
    "hadamard 28 x 16, twice": (896, lambda k: Producer(hadamard=448)),
    "hadamard 36": (36, lambda k: Producer(hadamard=0, signs=signs(k))),
    "hadamard 20 x 2, thrice": (120, lambda k: Producer(hadamard=40)),
    "hadamard 172 x 16": (2752, lambda k: Producer(hadamard=0)),
    "hadamard 172 x 8": (1376, lambda k: Producer(hadamard=0, signs=signs(k))),
    "kronecker": (16 * 32, lambda k: Producer(**kron(16, 32))),
    "kronecker of odd sizes": (7 * 19, lambda k: Producer(**kron(7, 19))),
    "kronecker 1 x k": (50, lambda k: Producer(**kron(1, 50))),
    "kronecker k x 1": (50, lambda k: Producer(**kron(50, 1))),
    "heads": (8 * 32, lambda k: Producer(left=kron(8, 8)["left"])),
    "norm, hadamard": (256, lambda k: Producer(norm_weight=torch.rand(k), epsilon=1e-3, hadamard=0, signs=signs(k))),
    "gate, kronecker": (20 * 24, lambda k: Producer(silu_mul=True, **kron(20, 24))),
    "norm, permute": (200, lambda k: Producer(norm_weight=torch.rand(k), index=torch.randperm(k).int())),
}


ON_CPU = {
    "heads of odd sizes": (7 * 19, lambda k: Producer(left=kron(7, 7)["left"])),
    "heads of four": (6 * 4, lambda k: Producer(left=kron(6, 6)["left"])),
}


def inputs(producer, m, k, dtype=torch.float32):
    x = torch.randn(m, k).to(dtype)
    if producer.norm_weight is not None and dtype is not torch.float32:
        producer = Producer(producer.norm_weight.to(dtype), producer.epsilon, hadamard=producer.hadamard,
                            signs=producer.signs, index=producer.index)
    return producer, x, torch.randn(m, k).to(dtype) if producer.silu_mul else None


def wide(producer, x, other):
    return producer(x.double(), None if other is None else other.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*PRODUCERS, *ON_CPU])
def test_what_is_rounded_is_the_definition(name, dtype):
    """Through an identity: within half a step, and a rounding of fp32 sums, of the float64 definition."""
    torch.manual_seed(len(name))
    k, make = {**PRODUCERS, **ON_CPU}[name]
    producer, x, other = inputs(make(k), 5, k, dtype)
    if k > 1000:
        q, s, z, shape, bits, group = stored(64, k, 4, 0)
        y = BoundIntLinearFused([ops.BoundIntLinear(q, s, z, shape, bits, group, 8)], producer)(x, [None], other)[0]
        w = ops.int_dequantize(q, s, z, *shape, bits, group, torch.float32).double()
        wanted = wide(producer, x, other) @ w.T
        assert (y - wanted).norm() < 0.02 * wanted.norm()
        return
    weight = stored(k, k, identity=True)
    made = wide(producer, x, other)
    for act, options in ((8, (32, 1.0, True)), (4, (0, 1.0, True)), (8, (64, 1.0, False))):
        run = BoundIntLinearFused([ops.BoundIntLinear(*weight, act, *options)], producer)
        y = run(x, [None], other)[0]
        _, scales = activation_codes(made.float(), act, *options)
        step = scales.expand(-1, -1, options[0] or -(-k // 32) * 32).flatten(-2)[:, :k].double()
        error = (y.double() - made).abs() - (made.abs() * torch.finfo(dtype).eps if dtype is not torch.float32 else 0)
        assert (error <= step * 0.5 * (1 + 1e-3) + 1e-5 * made.abs().amax(1, keepdim=True)).all()
    # Most numbers are away from the middle between two integers: those are the very same.
    q, s = activation_codes(made.float(), 8, 32)
    exact = (q * s).flatten(-2)[:, :k]
    y = BoundIntLinearFused([ops.BoundIntLinear(*weight, 8)], producer)(x, [None], other)[0]
    if dtype is torch.float32:
        assert ((y - exact).abs() <= 1e-5 * exact.abs().amax(1, keepdim=True)).double().mean() > 0.995


@pytest.mark.parametrize("name", PRODUCERS)
def test_rows_stand_alone_and_the_bound_form_is_the_operation(name):
    torch.manual_seed(len(name))
    k, make = PRODUCERS[name]
    producer, x, other = inputs(make(k), 21, k)
    first, second = stored(33, k), stored(16, k)
    group = 64 if k > 64 else 32
    bound = BoundIntLinearFused([ops.BoundIntLinear(*w, 6, group, 0.9) for w in (first, second)], producer)
    biases = [torch.randn(33), torch.randn(16)]
    y = bound(x, biases, other)
    for rows in (slice(0, 1), slice(3, 7), slice(0, 16), slice(20, 21)):
        part = bound(x[rows], biases, None if other is None else other[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, y, strict=True))
    arguments = (x, other, [first[0], second[0]], [first[1], second[1]], [], biases, [33, 16], 4, 32, 6, group,
                 0.9, True, None, producer.norm_weight, producer.epsilon,
                 -1 if producer.hadamard is None else producer.hadamard, producer.signs, producer.left, producer.right,
                 producer.index, producer.block_bits)
    for a, b, c in zip(int_linear_fused(*arguments), y, int_linear_fused.reference(*arguments), strict=True):
        assert torch.equal(a, b) and (a - c).norm() < 5e-3 * c.norm()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert all(torch.equal(a, b) for a, b in zip(bound(x, biases, other), y, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_bits_of_blocks_after_a_permutation():
    """COMET: the channels come into the order in which the first blocks take eight bits."""
    torch.manual_seed(0)
    k = 300
    producer = Producer(index=torch.randperm(k).int(), block_bits=torch.tensor([8, 4, 4], dtype=torch.uint8))
    x = torch.randn(6, k)
    y = BoundIntLinearFused([ops.BoundIntLinear(*stored(k, k, identity=True), 4, 128)], producer)(x, [None])[0]
    q, s = activation_codes(x[:, producer.index.long()], 4, 128, block_bits=producer.block_bits)
    assert torch.equal(y, (q * s).flatten(-2)[:, :k])


def test_the_gate_at_its_ends():
    """SiLU of numbers from far below to far above: fp32 of the float64 one, nothing overflows."""
    k = 64
    x = torch.cat([torch.linspace(-120, 120, 60), torch.tensor([-1e30, 1e30, -3e38, 0.0])]).expand(1, k).clone()
    for at in range(k):  # a group of its own: one number at a time
        row = torch.zeros(1, k)
        row[0, at] = x[0, at]
        up = torch.ones(1, k)
        run = BoundIntLinearFused([ops.BoundIntLinear(*stored(k, k, identity=True), 8)], Producer(silu_mul=True))
        y = run(row, [None], up)[0]
        wanted = torch.nn.functional.silu(row.double())
        assert torch.allclose(y.double(), wanted, rtol=2e-6, atol=1e-35), (row[0, at], y[0, at])
    bad = torch.full((2, k), -float("inf"))
    bad[1] = 1
    y = run(bad, [None], torch.ones(2, k))[0]
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_zeros_and_what_is_not_finite_and_no_rows():
    k = 128
    producer = Producer(norm_weight=torch.ones(k), epsilon=1e-6, hadamard=0)
    run = BoundIntLinearFused([ops.BoundIntLinear(*stored(20, k), 4, 0)], producer)
    x, bias = torch.randn(4, k), torch.randn(20)
    x[1] = 0
    x[2, 5] = float("inf")
    y = run(x, [bias])[0]
    assert torch.equal(y[1], bias) and y[2].isnan().all() and y[[0, 3]].isfinite().all()
    assert run(x[:0], [bias])[0].shape == (0, 20)
    assert run(x.view(2, 2, k), [bias])[0].shape == (2, 2, 20)
    wide = torch.randn(4, 3 * k)
    assert torch.equal(run(wide[:, k : 2 * k], [bias])[0], run(wide[:, k : 2 * k].contiguous(), [bias])[0])


def test_matrices_that_change_are_noticed():
    torch.manual_seed(0)
    producer = Producer(**kron(8, 16))
    run = BoundIntLinearFused([ops.BoundIntLinear(*stored(16, 128), 8)], producer)
    x = torch.randn(2, 128)
    y = run(x, [None])[0]
    producer.left.copy_(torch.eye(8))
    again = run(x, [None])[0]
    assert not torch.equal(again, y)
    assert torch.equal(again, BoundIntLinearFused(run.members, producer)(x, [None])[0])


K = 96
BAD = {
    "norm dtype": (dict(norm_weight=torch.ones(K).bfloat16()), None, "norm_weight: found torch.bfloat16"),
    "norm width": (dict(norm_weight=torch.ones(K - 1)), None, "norm_weight"),
    "norm and gate": (dict(norm_weight=torch.ones(K), silu_mul=True), torch.ones(2, K), "no norm with them"),
    "gate alone": (dict(silu_mul=True), None, "both or none"),
    "other alone": ({}, torch.ones(2, K), "both or none"),
    "other width": (dict(silu_mul=True), torch.ones(2, K - 1), "other"),
    "other dtype": (dict(silu_mul=True), torch.ones(2, K).half(), "other"),
    "hadamard block": (dict(hadamard=64), None, "a divisor of the width 96"),
    "hadamard order": (dict(hadamard=6), None, "Hadamard transform: found width 6"),
    "signs width": (dict(hadamard=0, signs=torch.ones(8)), None, "signs"),
    "signs alone": (dict(signs=torch.ones(K)), None, "signs with hadamard"),
    "right alone": (dict(right=torch.eye(12)), None, "right with left"),
    "left that divides nothing": (dict(left=torch.eye(7)), None, "product is the width 96"),
    "kronecker": (dict(left=torch.eye(8), right=torch.eye(8)), None, "product is the width 96"),
    "kronecker dtype": (dict(left=torch.eye(8).double(), right=torch.eye(12)), None, "left"),
    "kronecker shape": (dict(left=torch.ones(8, 4), right=torch.eye(12)), None, "left"),
    "two": (dict(hadamard=0, left=torch.eye(8), right=torch.eye(12)), None, "one at most"),
    "index dtype": (dict(index=torch.arange(K)), None, "index: found torch.int64"),
    "index range": (dict(index=torch.full((K,), K, dtype=torch.int32)), None, "accepted: 0 to 95"),
    "block bits": (dict(block_bits=torch.tensor([5], dtype=torch.uint8)), None, "accepted: 4 and 8"),
    "block bits count": (dict(block_bits=torch.tensor([4, 4], dtype=torch.uint8)), None, "block_bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
    options, other, message = BAD[case]
    run = BoundIntLinearFused([ops.BoundIntLinear(*stored(16, K), 8)], Producer(**options))
    with pytest.raises(ValueError, match="accepted") as error:
        run(torch.randn(2, K), [None], other)
    assert message in str(error.value)


def test_exact_activations_and_whole_rows_of_blocks_are_refused():
    x = torch.randn(2, K)
    with pytest.raises(ValueError, match="act_bits: found 16, accepted is 4, 6 or 8"):
        BoundIntLinearFused([ops.BoundIntLinear(*stored(16, K), 16)], Producer(hadamard=0))(x, [None])
    bits = Producer(block_bits=torch.tensor([4], dtype=torch.uint8))
    with pytest.raises(ValueError, match="block_bits: found .* accepted"):
        BoundIntLinearFused([ops.BoundIntLinear(*stored(16, K), 4, 0)], bits)(x, [None])
