"""`int_linear_fused` on CUDA, and the layers that call it: what reaches the launchers, run on CPU tensors with the
host-compiled kernels."""

import copy
from types import SimpleNamespace

import cuda_lowbit
import cuda_rows
import pytest
import torch
from cuda_rows import emulated
from test_lowbit_fused import inputs, kron, signs

from tersor import ops, ops_cuda, ops_fused, ops_lowbit_cuda
from tersor.formats.integer import Int, quantize_activations
from tersor.formats.mixed import MixedInputs
from tersor.gate import FusedGate, fuse_gates
from tersor.layer import _UNBOUND, Linear, Siblings
from tersor.ops_fused import BoundFusedCuda, BoundLowbitCuda, Producer
from tersor.transforms.steps import ChannelScale, Hadamard, Kronecker, Permute

pytestmark = pytest.mark.usefixtures("one_thread")
quantize_input = ops_lowbit_cuda.quantize_input


@pytest.fixture
def launchers(monkeypatch):
    products = cuda_lowbit.Launchers()
    products.install(monkeypatch)
    monkeypatch.setattr(ops_lowbit_cuda, "quantize_input", quantize_input)  # the kernel, not its definition
    with emulated(cuda_rows.Launchers()) as rows:
        yield SimpleNamespace(rows=rows, products=products)


@pytest.fixture
def on_gpu(launchers, monkeypatch):
    """CPU tensors pass for tensors on a GPU."""
    monkeypatch.setattr(ops, "plain", lambda x: False)
    monkeypatch.setattr(ops_fused, "eager_cuda", lambda x: True)
    monkeypatch.setattr(Int, "bind", lambda self, tensors, shape: BoundLowbitCuda(
        tensors["qweight"], tensors["scales"], tensors.get("zero_points"), shape, self.num_bits, self.group_size,
        *self._input_arguments(tensors)))
    return launchers


def weights(k, sizes, group=64, zeros=False):
    made = [cuda_lowbit.Weight(n, k, 4, group, not zeros, torch.bfloat16, n) for n in sizes]
    return made, [w.qweight for w in made], [w.scales for w in made], [w.zeros for w in made] if zeros else []


def truth(x, weight, bias):
    return x.double() @ weight.truth.T + (0 if bias is None else bias.double())


CASES = {
    "hadamard": (256, lambda k: Producer(hadamard=0, signs=signs(k)), {}),
    "hadamard 12 x 16": (192, lambda k: Producer(hadamard=0), {}),
    "kronecker": (240, lambda k: Producer(**kron(12, 20)), {}),
    "norm, hadamard": (128, lambda k: Producer(norm_weight=torch.rand(k), epsilon=1e-5, hadamard=0), {}),
    "gate": (200, lambda k: Producer(silu_mul=True), {}),
    "permutation, mixed": (300, lambda k: Producer(index=torch.randperm(k).int(), block_bits=torch.tensor(
        [8, 4, 4], dtype=torch.uint8)), {"group": 128}),
    "nothing": (200, lambda k: Producer(), {}),
}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_the_operation_is_its_definition(launchers, monkeypatch, name, capability):
    torch.manual_seed(len(name))
    monkeypatch.setattr(ops_cuda, "capability", lambda index: capability)
    k, make, more = CASES[name]
    producer, x, other = inputs(make(k), 3, k, torch.bfloat16)
    group = more.get("group", 0)
    for zeros in (False, True):
        held, *lists = weights(k, (40, 24), zeros=zeros)
        biases = [torch.randn(40).bfloat16(), torch.randn(24).bfloat16()]
        outputs = ops_fused._fused_cuda(
            x, other, *lists, biases, [40, 24], 4, 64, 4, group, 1.0, True, None, producer.norm_weight,
            producer.epsilon, -1 if producer.hadamard is None else producer.hadamard, producer.signs, producer.left,
            producer.right, producer.index, producer.block_bits)
        made = producer(x.double(), None if other is None else other.double())
        seen = quantize_activations(made.float(), 4, group, block_bits=producer.block_bits)
        for y, weight, bias in zip(outputs, held, biases, strict=True):
            wanted = truth(seen, weight, bias)
            assert y.dtype is torch.bfloat16 and y.shape == (3, weight.n)
            assert (y.double() - wanted).norm() < 5e-3 * wanted.norm()
    assert launchers.rows.calls == 2 and launchers.products.calls == 4, "one rounding for all projections"


def test_a_step_that_no_kernel_takes_is_run_by_torch(launchers):
    torch.manual_seed(0)
    launchers.rows.room = 1 << 10
    held, *lists = weights(512, (24,))
    x = torch.randn(3, 512).bfloat16()
    producer = Producer(hadamard=0)
    y = ops_fused._fused_cuda(x, None, *lists, [], [24], 4, 64, 8, 64, hadamard=0)[0]
    wanted = truth(quantize_activations(producer(x.float()), 8, 64), held[0], None)
    assert (y.double() - wanted).norm() < 5e-3 * wanted.norm() and launchers.rows.calls == 1
    bound = BoundFusedCuda([BoundLowbitCuda(*lists[0], *lists[1], None, (24, 512), 4, 64, 8, 64)], producer)
    assert torch.equal(bound(x, [None])[0], y)
    assert "shared memory; this GPU has 1024" in bound.rounding.refusal


def test_zeros_what_is_not_finite_and_no_rows(launchers):
    """A row of zeros gives the bias, one that is not finite NaN; no row changes another."""
    torch.manual_seed(0)
    for zeros, (bits, group, symmetric) in ((True, (8, 0, False)), (False, (4, 64, True)), (True, (6, 32, True))):
        held, *lists = weights(192, (24,), zeros=zeros)
        bound = BoundFusedCuda([BoundLowbitCuda(held[0].qweight, held[0].scales, held[0].zeros, (24, 192), 4, 64, bits,
                                                group, 1.0, symmetric)], Producer(hadamard=0))
        x, bias = torch.randn(5, 192).bfloat16(), torch.randn(24).bfloat16()
        y = bound(x, [bias])[0]
        x[1], x[2, 191], x[3, 0] = 0, float("inf"), float("nan")
        z = bound(x, [bias])[0]
        assert torch.equal(z[1], bias) and z[2:4].isnan().all()
        assert torch.equal(z[[0, 4]], y[[0, 4]])
        assert bound(x[:0], [bias])[0].shape == (0, 24) and bound(x[None, :2], [None])[0].shape == (1, 2, 24)


def test_checks_come_before_launches(launchers):
    held, *lists = weights(256, (24,))
    x = torch.randn(3, 256).bfloat16()
    for change, message in (({"biases": [torch.randn(24)]}, "bias: found"), ({"sizes": [40]}, "qweight: found"),
                            ({"act_bits": 16}, "act_bits: found 16, accepted is 4, 6 or 8"),
                            ({"hadamard": 6}, "hadamard: found 6, accepted is 0, or a divisor")):
        with pytest.raises(ValueError, match=message):
            ops_fused._fused_cuda(x, None, *lists, change.get("biases", []), change.get("sizes", [24]), 4, 64,
                                  change.get("act_bits", 8), hadamard=change.get("hadamard", 0))
    bound = BoundLowbitCuda(*lists[0], *lists[1], None, (24, 256), 4, 64, 8)
    with pytest.raises(ValueError, match=r"x: found \[3, 200\] on cpu, accepted is \[..., 256\] on cpu"):
        bound(x[:, :200], None)
    with pytest.raises(ValueError, match="on meta"):
        bound(x.to("meta"), None)
    other = BoundLowbitCuda(*lists[0], *lists[1], None, (24, 256), 4, 64, 4)
    with pytest.raises(ValueError, match="projection 1: found .* those of the first"):
        BoundFusedCuda([bound, other], Producer())
    assert not launchers.rows.calls and not launchers.products.calls


def layer(k, n, format="W4A8", pre=(), seed=0):
    torch.manual_seed(seed)
    held = Linear.from_linear(torch.nn.Linear(k, n, dtype=torch.bfloat16).requires_grad_(False), f"rtn:{format}")
    held.pre = torch.nn.ModuleList(pre) if pre else None
    if isinstance(held.format, MixedInputs):
        held.tensors()["block_bits"][0] = 8
    return held


STEPS = {"none": lambda k: (), "hadamard": lambda k: (Hadamard.random(k),), "permute": lambda k: (
    Permute(torch.randperm(k)),), "kronecker": lambda k: (Kronecker(torch.randn(16, 16), torch.randn(16, 16)),)}


@pytest.mark.parametrize("format", ("W4A8", "W4A4[act_group=0]", "W4Ax[act_group=128]"))
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_on_a_gpu_is_the_layer_on_a_cpu(launchers, monkeypatch, step, format):
    torch.manual_seed(1)
    held = layer(256, 40, format, STEPS[step](256))
    x = torch.randn(2, 3, 256).bfloat16()
    wanted = held(x).double()
    held._bound, held._fused = _UNBOUND, (None, ())
    with monkeypatch.context() as patched:
        patched.setattr(ops, "plain", lambda x: False)
        patched.setattr(ops_fused, "eager_cuda", lambda x: True)
        patched.setattr(Int, "bind", lambda self, tensors, shape: BoundLowbitCuda(
            tensors["qweight"], tensors["scales"], None, shape, self.num_bits, self.group_size,
            *self._input_arguments(tensors)))
        for _ in range(2):
            y = held(x)
            assert y.shape == wanted.shape and (y.double() - wanted).norm() < 5e-3 * wanted.norm()
        assert launchers.rows.calls == 2 and launchers.products.calls == 2
        assert isinstance(getattr(held._bind(), "weights", held._bind()), BoundLowbitCuda)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("format", ("W4A8", "W4A4[act_group=0]", "W6A6[act_group=128]", "W4Ax[act_group=128]"))
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_on_hardware_is_the_layer_on_a_cpu(step, format):
    torch.manual_seed(1)
    held = layer(256, 40, format, STEPS[step](256))
    there = copy.deepcopy(held).cuda()
    assert there.kernel == "quantize_rows cuda, lowbit_linear cuda"
    for rows in (0, 1, 5, 200):
        x = torch.randn(rows, 256).bfloat16()
        wanted, y = held(x).double(), there(x.cuda()).cpu().double()
        assert y.shape == wanted.shape and (y - wanted).norm() <= 5e-3 * wanted.norm()


def test_a_step_without_a_kernel_leaves_the_layer_right(on_gpu):
    held = layer(256, 40, pre=(ChannelScale(torch.rand(256) + 0.5),))
    x = torch.randn(3, 256).bfloat16()
    weight = SimpleNamespace(truth=held.dequantize().double())
    wanted = truth(quantize_activations(held.pre[0](x), 8), weight, held.bias)
    assert (held(x).double() - wanted).norm() < 8e-3 * wanted.norm()
    assert held.kernel.endswith("; scale step by torch: no kernel runs it")
    on_gpu.rows.room = 512
    assert "has 512" in layer(256, 40, pre=(Hadamard.random(256),)).kernel
    on_gpu.rows.room = 99 * 1024
    assert "torch" not in layer(256, 40, pre=(Hadamard.random(256),)).kernel


def test_projections_of_one_input_share_its_rounding(on_gpu):
    step = Hadamard.random(256)
    for pre in ((), (step,)):
        layers = [layer(256, n, pre=pre, seed=n) for n in (40, 24)]
        x = torch.randn(3, 256).bfloat16()
        with torch.no_grad():
            alone = [one(x) for one in layers]
            before = on_gpu.rows.calls
            assert Siblings.fit_together(layers)
            group = Siblings(layers)
            assert all(torch.equal(one(x), y) for one, y in zip(layers, alone, strict=True))
        assert on_gpu.rows.calls == before + 1 and layers[0].siblings is group


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = layer(128, 256, seed=1), layer(128, 256, seed=2)
        self.down_proj = layer(256, 40, pre=(Hadamard.random(256),), seed=3)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_gate_is_part_of_the_rounding(on_gpu):
    module = FeedForward()
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        apart = module(x).double()
        before = on_gpu.rows.calls
        assert fuse_gates(module) == 1 and isinstance(module, FusedGate)
        together = module(x).double()
    assert on_gpu.rows.calls == before + 3 and (together - apart).norm() < 2e-2 * apart.norm()
    assert not torch.equal(together, apart), "SiLU(gate) * up was rounded to 16 bits in between"


def test_formats_bind_where_a_kernel_runs(monkeypatch):
    there = SimpleNamespace(device=torch.device("cuda", 0))
    tensors = {"qweight": there, "scales": None}
    for format, shape, kind in ((Int(4, 128, True, 8), (64, 256), BoundLowbitCuda), (Int(4), (64, 256), type(None)),
                                (Int(4, 128, True, 8), (64, 1 << 20), type(None))):
        monkeypatch.setattr(ops.int_linear, "cuda", ops_cuda.int_linear)
        assert type(format.bind(tensors, shape)) is kind
        monkeypatch.setattr(ops.int_linear, "cuda", None)
        assert format.bind(tensors, shape) is None
    monkeypatch.setattr(ops.int_linear, "cuda", ops_cuda.int_linear)
    name = MixedInputs(Int(4, 128, True, 4)).kernel((64, 256), "cuda")
    assert name == Int(4, 128, True, 4).kernel((64, 256), "cuda") == "quantize_rows cuda, lowbit_linear cuda"
