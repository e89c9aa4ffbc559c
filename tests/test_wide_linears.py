"""16-bit layers that are calibrated in float32: the same dtypes, the class's own forward again afterwards."""

import pytest
import torch
import torch.nn.functional as F
from test_calibration import llama, logits, tokens

import tersor
from tersor import wide_linears


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(wide_linears, "slow", lambda dtype: dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_rounded_once(slow, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=bias).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad(), wide_linears.widened(layer):
        assert "forward" in vars(layer)
        found = layer(x)
        assert layer(x.float().to(torch.bfloat16)).dtype is torch.bfloat16
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert torch.equal(found, exact.bfloat16())
    assert "forward" not in vars(layer)


def test_gradients_and_other_layers_are_left_alone(slow):
    block = torch.nn.Sequential(torch.nn.Linear(8, 8).bfloat16(), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    with pytest.raises(RuntimeError, match="once"), wide_linears.widened(block):
        assert [("forward" in vars(module)) for module in block] == [True, False, False]
        x = torch.randn(2, 8).bfloat16().requires_grad_()
        block[0](x).float().sum().backward()
        assert x.grad.abs().sum() > 0 and block[0].weight.grad is not None
        raise RuntimeError("once")
    assert not any("forward" in vars(module) for module in block)


@pytest.mark.parametrize("spec", ["gptq:W4A16[group=32]", "quarot:W4A4[group=32]"])
def test_calibrated_models_are_as_good(monkeypatch, spec):
    batches, found = tokens(4), []
    for is_slow in (False, True):
        monkeypatch.setattr(wide_linears, "slow", lambda dtype: is_slow and dtype is torch.bfloat16)
        model = llama().bfloat16()
        expected = logits(model, batches[0]).float()
        tersor.compress(model, spec, batches)
        found.append(float((logits(model, batches[0]).float() - expected).norm() / expected.norm()))
        assert not any("forward" in vars(module) for module in model.modules())
    assert found[1] < 1.1 * found[0]
