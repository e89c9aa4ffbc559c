"""Gated feed-forward modules that run gate and down projection in one call."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_calibration import gemma, llama, logits, tokens

import tersor
from tersor.gate import FusedGate, fuse_gates
from tersor.transforms import definitions

pytestmark = pytest.mark.usefixtures("one_thread")


def modules(model):
    return [module for module in model.modules() if isinstance(module, FusedGate)]


@pytest.mark.parametrize("spec", ["rtn:W8A8", "quarot:W4A4[group=32]", "flatquant[steps=0]:W4A6[group=32]"])
def test_one_call_is_what_the_parts_compute(spec):
    model, batches = llama(), tokens(2)
    tersor.compress(model, spec, batches)
    assert len(modules(model)) == 3
    mlp, x = modules(model)[0], torch.randn(2, 5, 64)
    with torch.no_grad():
        found = mlp(x)
        gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
        made = definitions.silu_mul(gate.double(), up.double())
        for step in down.pre or ():
            made = step(made)
        seen = down.format.quantize_input(made.float())
        expected = F.linear(seen.double(), down.format.unpack(down.tensors(), down.shape, torch.float64))
        own = type(mlp).__mro__[2].forward(mlp, x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (own - found).norm() < 0.05 * found.norm()


def test_other_modules_keep_their_own_code():
    for make, spec in ((llama, "rtn:W4A16[group=32]"), (gemma, "rtn:W8A8")):  # exact inputs; GELU
        model = make()
        tersor.compress(model, spec)
        assert fuse_gates(model) == 0 and not modules(model)


def test_exchanged_parts_hooks_gradients_and_copies():
    model, batches = llama(), tokens(1)
    tersor.compress(model, "rtn:W8A8")
    mlp, x = modules(model)[0], torch.randn(3, 64)
    with torch.no_grad():
        expected = mlp(x)
        for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
            assert torch.equal(twin(x), expected) and isinstance(twin, FusedGate)
        seen = []
        handle = mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
        mlp(x)
        handle.remove()
        assert seen
        other = copy.deepcopy(mlp)
        other.down_proj.load_tensors({name: tensor.clone() if name != "scales" else 2 * tensor
                                      for name, tensor in other.down_proj.tensors().items()})
        assert torch.allclose(other(x), 2 * expected, rtol=1e-5)
        plain = torch.nn.Linear(96, 64, bias=False)
        other.down_proj = plain
        assert torch.allclose(other(x), plain(F.silu(other.gate_proj(x)) * other.up_proj(x)), rtol=1e-4, atol=1e-6)
    y = mlp(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(logits(model, batches[0])).all()
