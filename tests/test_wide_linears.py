"""16-bit layers that are calibrated in float32: the same dtypes, the class's own forward again afterwards."""

from collections import Counter

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


def counted(monkeypatch):
    """How often each layer's forward in float32 is entered from now on."""
    entered, original = Counter(), wide_linears._forward

    def counting(module):
        forward = original(module)

        def enter(x):
            entered[module] += not torch.is_grad_enabled()
            return forward(x)

        return enter

    monkeypatch.setattr(wide_linears, "_forward", counting)
    return entered


def test_layers_that_stay_run_wide_towards_the_next_block(monkeypatch, slow):
    batches, entered, model = tokens(4), counted(monkeypatch), llama().bfloat16()
    tersor.compress(model, {"*.down_proj": "gptq:W4A16[group=32]", "*": "keep"}, batches)
    first, last = model.model.layers[0], model.model.layers[-1]
    assert entered[first.mlp.up_proj] == 2 * len(batches), "once for statistics, once for what the next block sees"
    assert entered[last.mlp.up_proj] == len(batches)


@pytest.mark.parametrize("spec", ["gptq:W4A16[group=32]", "quarot:W4A4[group=32]"])
def test_calibrated_models_are_as_good(monkeypatch, spec):
    batches, found, entered = tokens(4), [], counted(monkeypatch)
    for is_slow in (False, True):
        monkeypatch.setattr(wide_linears, "slow", lambda dtype: is_slow and dtype is torch.bfloat16)
        model = llama().bfloat16()
        expected = logits(model, batches[0]).float()
        linears = [module for name, module in model.named_modules()
                   if type(module) is torch.nn.Linear and name != "lm_head"]
        tersor.compress(model, spec, batches)
        found.append(float((logits(model, batches[0]).float() - expected).norm() / expected.norm()))
        assert not any("forward" in vars(module) for module in model.modules())
        assert set(entered) == (set(linears) if is_slow else set()), "each layer of the blocks ran in float32"
        assert not is_slow or min(entered.values()) >= len(batches)
    assert found[1] < 1.1 * found[0]
