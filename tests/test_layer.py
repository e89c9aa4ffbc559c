"""Linear and Embedding against float64 of their own dequantized weights, and as citizens of torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor import Embedding, Int, Linear
from tersor.formats.integer import quantize_activations
from tersor.layer import Siblings

SHAPES = [(1, 1), (16, 32), (33, 97), (64, 256), (130, 384), (257, 130)]


def linear(n, k, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_activations(bits, shape, dtype):
    group = {0: 32, 1: 64, 2: 128, 3: 0}[(bits + shape[0]) % 4]
    sym = "true" if (bits + shape[1]) % 2 else "false"
    layer = Linear.from_linear(linear(*shape, dtype), f"rtn:W{bits}A16[group={group},sym={sym}]")
    w = layer.format.unpack(layer.tensors(), layer.shape, torch.float64)
    for m in (1, 5, 19):
        x = (torch.randn(m, shape[1]) + 0.3).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (m, shape[0])
        error = relative(y, F.linear(x.double(), w, layer.bias.double()))
        assert error < (2e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_activations(bits, dtype):
    torch.manual_seed(bits)
    for shape in SHAPES[1:]:
        symmetric = "true" if bits % 2 else "false"
        layer = Linear.from_linear(linear(*shape, dtype), f"rtn:W{bits}A8[group=32,sym={symmetric}]")
        w = layer.format.unpack(layer.tensors(), layer.shape, torch.float64)
        for m in (1, 6, 17):
            x = torch.randn(m, shape[1]).to(dtype)
            y = layer(x)
            exact = F.linear(x.double(), w, layer.bias.double())
            seen = F.linear(quantize_activations(x.double(), 8), w, layer.bias.double())
            assert relative(y, seen) < (1e-5 if dtype == torch.float32 else 4e-3)  # the kernel does what it says
            if m > 1:  # and what it says is close to the unquantized product
                assert relative(y, exact) < 8e-3
    # The spec's own bound, on enough values for the norm to be a norm.
    layer = Linear.from_linear(linear(256, 1024, dtype), f"rtn:W{bits}A8")
    x = torch.randn(64, 1024).to(dtype)
    w = layer.format.unpack(layer.tensors(), layer.shape, torch.float64)
    assert relative(layer(x), F.linear(x.double(), w, layer.bias.double())) < 6e-3


def test_weight_is_the_dequantized_tensor_and_cannot_be_assigned():
    source = linear(64, 128, torch.bfloat16)
    layer = Linear.from_linear(source, "rtn:W8A16")
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (64, 128)
    assert relative(layer.weight, source.weight.double()) < 0.01
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(source.weight)
    with pytest.raises(AttributeError, match="stored compressed"):
        layer.weight = source.weight.detach()
    assert isinstance(layer, nn.Linear) and not [n for n, p in layer.named_parameters() if "weight" in n]


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_gradient_to_the_input_and_bias(dtype, bound):
    layer = Linear.from_linear(linear(48, 96, dtype), "rtn:W4A16[group=32]")
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 96, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 3, 48, dtype=dtype)
    layer(x).backward(g)
    w = layer.format.unpack(layer.tensors(), layer.shape, torch.float64)
    assert relative(x.grad, g.double() @ w) < bound
    assert relative(layer.bias.grad, g.double().sum((0, 1))) < bound


@pytest.mark.parametrize("spec", ["rtn:W4A16", "rtn:W3A8[sym=false]"])
def test_compiles_as_one_graph(spec):
    layer = Linear.from_linear(linear(64, 256, torch.bfloat16), spec)
    model = nn.Sequential(layer, nn.ReLU(), Linear.from_linear(linear(32, 64, torch.bfloat16, seed=1), spec))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sum().backward()
    model(b).sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_dtype_casts_leave_the_stored_tensors_alone():
    layer = Linear.from_linear(linear(64, 128, torch.bfloat16), "rtn:W4A16")
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    layer.half()
    assert layer.weight.dtype == torch.float16 and layer.bias.dtype == torch.float16
    assert all(torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype
               for name, tensor in layer.tensors().items())
    assert layer(torch.randn(2, 128, dtype=torch.float16)).dtype == torch.float16


def test_wrong_width_and_tensors_are_refused():
    layer = Linear.from_linear(linear(64, 128), "rtn:W4A16")
    with pytest.raises(ValueError, match=r"found \[2, 100\].*\[..., 128\]"):
        layer(torch.randn(2, 100))
    tensors = layer.tensors()
    with pytest.raises(ValueError, match="qweight"):
        layer.load_tensors({"qweight": tensors["qweight"]})
    with pytest.raises(ValueError, match="scales"):
        layer.load_tensors({**tensors, "scales": tensors["scales"].double()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    source = linear(32, 64)
    with torch.no_grad():
        source.weight[3, 5] = value
    with pytest.raises(ValueError, match="finite"):
        Linear.from_linear(source, "rtn:W4A16")


class Attention(nn.Module):
    def __init__(self, spec="rtn:W4A16[group=32]", bias=False):
        super().__init__()
        for i, (name, n) in enumerate((("q_proj", 64), ("k_proj", 32), ("v_proj", 48))):
            setattr(self, name, Linear.from_linear(linear(n, 96, torch.bfloat16, bias and name != "k_proj", i), spec))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", ["rtn:W4A16[group=32]", "rtn:W5A8[group=32,sym=false]"])
def test_siblings_run_as_one_call_with_equal_results(bias, spec, monkeypatch):
    from tersor import ops

    alone = Attention(spec, bias)
    together = copy.deepcopy(alone)
    layers = [together.q_proj, together.k_proj, together.v_proj]
    assert Siblings.fit_together(layers)
    group = Siblings(layers)
    calls, inner = [], ops.BoundIntLinearMulti.__call__
    monkeypatch.setattr(ops.BoundIntLinearMulti, "__call__", lambda *given: calls.append(1) or inner(*given))
    with torch.no_grad():
        for m in (1, 3):
            x = torch.randn(m, 96, dtype=torch.bfloat16)
            for got, expected in zip(together(x), alone(x)):
                assert torch.equal(got, expected)
        assert len(calls) == 2 and not group._ready and group._input is None
        x = torch.randn(2, 96, dtype=torch.bfloat16)
        together.q_proj(x)
        x.mul_(2)  # modified in place between the calls: the stored results are stale
        assert torch.equal(together.k_proj(x), alone.k_proj(x))
        assert torch.equal(copy.deepcopy(together)(x)[2], alone.v_proj(x))
        # Other tensors in a layer are seen at the next call.
        other = Linear.from_linear(nn.Linear(96, together.k_proj.out_features, bias=bias, dtype=torch.bfloat16), spec)
        for module in (together.k_proj, alone.k_proj):
            module.load_tensors(other.tensors())
        y = torch.randn(2, 96, dtype=torch.bfloat16)
        for got, expected in zip(together(y), alone(y)):
            assert torch.equal(got, expected)
        with pytest.raises(ValueError, match="int_linear"):
            together(torch.randn(2, 96, dtype=torch.float64))
    with torch.inference_mode():
        y = torch.randn(2, 96, dtype=torch.bfloat16)
        together.q_proj(y)
        y.mul_(2)
        assert torch.equal(together.v_proj(y), alone.v_proj(y))
    x = torch.randn(2, 96, dtype=torch.bfloat16, requires_grad=True)
    sum(y.sum() for y in together(x)).backward()
    assert x.grad is not None


def test_siblings_called_alone_dissolve():
    model = Attention()
    group = Siblings([model.q_proj, model.k_proj, model.v_proj])
    with torch.no_grad():
        for _ in range(4):
            model.q_proj(torch.randn(1, 96, dtype=torch.bfloat16))
    assert model.q_proj.siblings is None and not group._ready


def test_embedding_rows():
    torch.manual_seed(0)
    source = nn.Embedding(100, 96, dtype=torch.bfloat16)
    layer = Embedding.from_embedding(source, "rtn:W8A16[group=32]")
    w = layer.weight
    for ids in (torch.tensor([0, 99, 17, 17]), torch.randint(0, 100, (2, 5)), torch.tensor(3)):
        assert torch.equal(layer(ids), F.embedding(ids, w))
    assert relative(w, source.weight.double()) < 0.01
    with pytest.raises(IndexError):
        layer(torch.tensor([100]))
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))
    with pytest.raises(ValueError, match="integer formats"):
        Embedding(10, 32, "lr4")


def test_state_dict_round_trip_and_meta():
    layer = Linear.from_linear(linear(64, 128, torch.bfloat16), "rtn:W4A16")
    twin = Linear(128, 64, Int(4, 128), bias=True, device="meta").to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))


def test_pickled_layers_work(tmp_path):
    import io

    layer = Linear.from_linear(linear(64, 128, torch.bfloat16), "rtn:W4A16")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
