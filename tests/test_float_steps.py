"""Steps that run in float32 while activations are rounded to small floats, and what layers say of them."""

import copy

import pytest
import torch
from test_lowbit_fused import ON_CPU, PRODUCERS, inputs, signs, wide

from tersor import Linear, ops_round
from tersor.formats.inputs import _ROUNDING
from tersor.gate import fuse_gates
from tersor.ops_float_steps import BoundFloatFused, SteppedRound
from tersor.ops_fused import Producer
from tersor.ops_round import float_round
from tersor.transforms.steps import ChannelScale, Hadamard, HeadMix, Kronecker, Permute

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
reference = ops_round._float_round_reference


def small(*shape):
    return torch.randint(-3, 4, shape).float()


# Steps whose results on small integers are exact in float32, whatever the order of their sums.
EXACT = {
    "permute": (130, lambda k: Producer(index=torch.randperm(k).int())),
    "hadamard": (256, lambda k: Producer(hadamard=0, signs=signs(k))),
    "hadamard of blocks": (384, lambda k: Producer(hadamard=64, signs=signs(k))),
    "hadamard of blocks of 4": (40, lambda k: Producer(hadamard=4)),
    "kronecker": (16 * 32, lambda k: Producer(left=small(16, 16), right=small(32, 32))),
    "kronecker of odd sizes": (7 * 19, lambda k: Producer(left=small(7, 7), right=small(19, 19))),
    "heads": (8 * 32, lambda k: Producer(left=small(8, 8))),
}


@pytest.mark.parametrize("kind", _ROUNDING)
@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(isa, name, kind):
    """The definition's rounding of the transform in float32, and not of the transform in x's dtype."""
    torch.manual_seed(len(name))
    k, make = EXACT[name]
    producer = make(k)
    run, differs = SteppedRound(producer, *_ROUNDING[kind]), 0
    for m, dtype in ((1, torch.bfloat16), (7, torch.float16), (9, torch.float32), (12, torch.bfloat16)):
        x = torch.randint(-128, 129, (m, k)) * 2.0 ** torch.randint(-9, -3, (m, 1))
        x[m // 3] = 0
        if m == 12:
            x[5, 3], x[6, k - 1] = torch.nan, torch.inf
        x = x.to(dtype)
        made = wide(producer, x, None).float()
        wanted = reference(made, *_ROUNDING[kind])
        got = run(x)
        assert got.dtype is dtype and got.shape == x.shape
        assert torch.equal(got.nan_to_num(9e9), wanted.to(dtype).nan_to_num(9e9)), (m, dtype)
        differs += not torch.equal(got.nan_to_num(), reference(made.to(dtype), *_ROUNDING[kind]).nan_to_num())
    assert differs or name in ("permute", "hadamard of blocks of 4")  # exact in any dtype, or nearly always
    strided = x.repeat(2, 2)[::2, :k]
    assert torch.equal(run(strided).nan_to_num(9e9), run(strided.contiguous()).nan_to_num(9e9))
    assert run(x[:0]).shape == (0, k) and run(x[None]).shape == (1, *x.shape)


@pytest.mark.parametrize("name", [*PRODUCERS, *ON_CPU])
def test_all_steps_of_the_integer_kernels(name):
    """Near the float64 definition: only what lies within the sums' errors of a tie may go to the other neighbour."""
    torch.manual_seed(len(name))
    k, make = {**PRODUCERS, **ON_CPU}[name]
    for kind, how in _ROUNDING.items():
        producer, x, other = inputs(make(k), 6, k)
        got, wanted = SteppedRound(producer, *how)(x, other), reference(wide(producer, x, other).float(), *how)
        near = (got - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6 * wanted.abs().amax()
        assert near.double().mean() > 0.99 and (got - wanted).norm() < 0.05 * wanted.norm(), kind


@pytest.mark.parametrize("kind", [kind for kind, how in _ROUNDING.items() if how[1] in ("largest", "power")])
def test_rows_stand_alone_and_threads_change_nothing(kind):
    torch.manual_seed(0)
    run = SteppedRound(Producer(hadamard=0, signs=signs(896)), *_ROUNDING[kind])
    x = torch.randn(90, 896).bfloat16()
    y, threads = run(x), torch.get_num_threads()
    assert torch.equal(run(x[:1]), y[:1]) and torch.equal(run(x[31:63]), y[31:63])
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(run(x), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", _ROUNDING)
def test_what_float16_cannot_hold_is_not_finite(isa, kind):
    """The first channel of the transform is sixteen times the others' 60000; only its group is lost."""
    x = torch.full((3, 256), 60000.0, dtype=torch.float16)
    x[1] = 1.0
    got, group = SteppedRound(Producer(hadamard=0), *_ROUNDING[kind])(x), _ROUNDING[kind][2] or 256
    assert got[0, :group].isnan().all() and got[2, :group].isnan().all()
    assert not got[::2, group:].any() and got[1, 0] == 16 and not got[1, 1:].any()


def test_arguments_are_checked():
    x = torch.randn(2, 32)
    for producer in (Producer(signs=torch.ones(32)), Producer(hadamard=0, signs=torch.ones(16)),
                     Producer(index=torch.arange(32)), Producer(silu_mul=True), Producer(left=torch.ones(3, 3))):
        with pytest.raises(ValueError, match="found .*accepted"):
            SteppedRound(producer, "e4m3", "largest", 0)(x)
    with pytest.raises(ValueError, match=r"index\[3\] is 32; accepted: 0 to 31"):
        SteppedRound(Producer(index=torch.tensor([0, 1, 2, 32] * 8, dtype=torch.int32)), "e4m3", "largest", 0)(x)
    with pytest.raises(ValueError, match="meta, accepted is the CPU"):
        SteppedRound(Producer(hadamard=0), "e4m3", "largest", 0)(x.to("meta"))
    gate = SteppedRound(Producer(silu_mul=True), "e4m3", "largest", 0)
    assert gate(x, x).shape == x.shape
    for other in (None, x[:1], x.double()):
        with pytest.raises(ValueError, match="found .*accepted"):
            gate(x, other)


# -- layers -----------------------------------------------------------------------------------------------------------

FORMATS = ("NVFP4", "MXFP4", "MXFP8", "FP8", "W4AFP8", "AFP8/W4A16[group=32]", "AFP8/W4A16[group=32,scale=e4m3]",
           "AFP8[scale=tensor]/W4A16")
STEPS = {
    "hadamard": lambda k: Hadamard.random(k),
    "kronecker": lambda k: Kronecker(*(torch.eye(n) + 0.2 * torch.randn(n, n) for n in Kronecker.factors(k))),
    "permute": lambda k: Permute(torch.randperm(k)),
    "head_mix": lambda k: HeadMix(torch.eye(8) + 0.2 * torch.randn(8, 8)),
}


def made(format, steps, n=40, k=256, post=()):
    linear = torch.nn.Linear(k, n)
    held = Linear.holding(linear, Linear(k, n, format).format, pre=steps, post=post)
    params = held.format.fit(linear.weight.detach())
    held.load_tensors(held.format.pack(held.format.project(linear.weight.detach(), params), params))
    return held.requires_grad_(False)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("format", FORMATS)
def test_layers_run_the_step_while_they_round(format, step):
    torch.manual_seed(3)
    layer = made(format, [STEPS[step](256)])
    plain = made(format, ())
    assert isinstance(layer._bind_fused(), BoundFloatFused) and "torch" not in layer.kernel
    assert layer.kernel == plain.kernel and "float_round" in layer.kernel
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        x = torch.randn(2, 3, 256).to(dtype)
        seen = SteppedRound(Producer(**layer.pre[0].producer()), *layer.format.rounding)(x)
        wanted = seen.double() @ layer.dequantize().double().T + layer.bias
        y = layer(x)
        assert y.dtype is dtype and (y.double() - wanted).norm() <= bound * wanted.norm()
    by_torch = layer.format.linear(layer.pre[0](x.float()), layer.tensors(), layer.bias, layer.shape)
    assert (y - by_torch).norm() < 0.02 * by_torch.norm()
    with torch.enable_grad():  # through torch, with the gradient of what runs above
        again = layer(x.float().requires_grad_(True))
    assert again.requires_grad and (again - by_torch).norm() < 0.02 * by_torch.norm()
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_a_step_and_tensors_that_are_exchanged_are_seen():
    torch.manual_seed(0)
    layer, other = (made("W4AFP8", [Hadamard.random(256, seed)]) for seed in (1, 2))
    x = torch.randn(3, 256)
    first = layer(x)
    layer.load_tensors(other.tensors())
    layer.bias, layer.pre = other.bias, other.pre
    assert not torch.equal(first, other(x)) and torch.equal(layer(x), other(x))


def test_float64_inputs_go_through_torch():
    torch.manual_seed(0)
    layer = made("FP8", [Hadamard.random(256)])
    x = torch.randn(3, 256).double()
    wanted = float_round(layer.pre[0](x), *layer.format.rounding) @ layer.dequantize().double().T + layer.bias
    assert (layer(x) - wanted).norm() < 1e-6 * wanted.norm()


def test_layers_name_the_steps_that_torch_runs():
    hadamard, scale, permute = Hadamard.random(256), ChannelScale(torch.rand(256) + 0.5), Permute(torch.randperm(256))
    for format in ("W4A16", "NVFP4A16", "FP8A16"):
        kernel = made(format, [hadamard]).kernel
        assert kernel == made(format, ()).kernel + "; hadamard step by torch: no kernel runs it"
    assert made("NVFP4", [scale]).kernel.endswith("; scale step by torch: no kernel runs it")
    assert made("W4A8", [scale]).kernel.endswith("; scale step by torch: no kernel runs it")
    assert made("FP8", [scale, hadamard]).kernel.endswith("; scale, hadamard step by torch: no kernel runs it")
    for format in ("W4A8", "W4A4", "NVFP4"):
        assert made(format, [hadamard]).kernel == made(format, ()).kernel
    assert made("W4A8", (), n=256, post=[permute]).kernel.endswith(
        "; permute step behind it by torch: no kernel runs it")


class MLP(torch.nn.Module):
    def __init__(self, down):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(32, 256), torch.nn.Linear(32, 256)
        self.down_proj, self.act_fn = down, torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
@pytest.mark.parametrize("format", ["NVFP4", "W4AFP8"])
def test_gates_run_in_the_same_pass(format):
    torch.manual_seed(0)
    model = torch.nn.Sequential(MLP(made(format, [Hadamard.random(256)], n=32)))
    x = torch.randn(5, 32)
    wanted = model(x)
    assert fuse_gates(model) == 1
    y = model(x)
    assert isinstance(model[0].__dict__["_gate"][0], BoundFloatFused) and (y - wanted).norm() < 0.02 * wanted.norm()
