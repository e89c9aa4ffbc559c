"""RMSNorm in one call: against float64, against the models' own code, and taken only where it is the same."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tersor import ops
from tersor.norm import FusedRMSNorm, fuse_norms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 64), (3, 16), (2, 5, 100), (7, 1), (2, 4097)))
def test_against_float64(isa, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.rand(shape[-1], generator=torch.Generator().manual_seed(2)).to(dtype) + 0.5
    y = ops.rms_norm(x, weight, 1e-6)
    wide = x.double()
    truth = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    # Two roundings of half an ulp; below 2^-14 float16 has fixed steps.
    limit = {torch.float32: 1e-6, torch.bfloat16: 1.05 * 2**-7, torch.float16: 1.05 * 2**-10}[dtype]
    assert ((y.double() - truth).abs() <= limit * truth.abs() + (2e-7 if dtype is torch.float16 else 1e-12)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", (LlamaRMSNorm, Qwen3RMSNorm))
def test_same_as_the_model(kind, dtype):
    module = kind(128, eps=1e-5).to(dtype)
    nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(2, 3, 4, 128).to(dtype)
    theirs = module(x)
    assert fuse_norms(nn.ModuleList([module])) == 1
    assert isinstance(module, kind) and isinstance(module, FusedRMSNorm)
    with torch.no_grad():
        ours = module(x.transpose(1, 2)).transpose(1, 2)
    # The order in which squares are summed differs: now and then a value rounds the other way.
    torch.testing.assert_close(ours, theirs, rtol={torch.float32: 1e-6, torch.bfloat16: 2**-7,
                                                   torch.float16: 2**-9}[dtype], atol=1e-6)
    assert torch.equal(theirs, ours) or dtype is torch.float32 or (theirs != ours).float().mean() < 0.01


def test_variants_keep_their_code():
    gemma, layer_norm = GemmaRMSNorm(64), nn.LayerNorm(64)
    before = type(gemma)
    nn.init.uniform_(gemma.weight, 0.1, 0.2)
    assert fuse_norms(nn.ModuleList([gemma, layer_norm])) == 0
    assert type(gemma) is before and type(layer_norm) is nn.LayerNorm


def test_gradients_compile_and_copies():
    module = LlamaRMSNorm(64)
    plain = copy.deepcopy(module)
    fuse_norms(nn.ModuleList([module]))
    twin = copy.deepcopy(module)
    assert isinstance(twin, FusedRMSNorm) and twin.weight is not module.weight
    assert list(twin.state_dict()) == list(plain.state_dict())
    results = []
    for norm in (plain, twin):
        x = torch.linspace(-1, 1, 64).reshape(1, 64).requires_grad_()
        norm(x).square().sum().backward()
        results.append((x.grad, norm.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    x = torch.randn(2, 64)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="eager")(x), plain(x))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"rms_norm: weight: found torch.float32 \[3\]"):
        ops.rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="rms_norm: x: found torch.int64"):
        ops.rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,k", ((1, 1), (3, 7), (321, 100), (700, 257)))
def test_gram(isa, dtype, tokens, k):
    x = torch.randn(tokens, k + 3, generator=torch.Generator().manual_seed(3)).to(dtype)[:, :k]
    gram = torch.full((k, k), 2.0)
    ops.add_gram(gram, x)
    truth = x.double().t() @ x.double() + 2
    upper = torch.ones(k, k, dtype=torch.bool).triu()
    assert (gram.double() - truth)[upper].norm() <= 1e-6 * truth[upper].norm()


def test_gram_does_not_depend_on_threads():
    x, threads = torch.randn(900, 300), torch.get_num_threads()
    grams = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grams.append(torch.zeros(300, 300))
            ops.add_gram(grams[-1], x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grams[0].triu(), grams[1].triu()) and torch.equal(grams[0].triu(), grams[2].triu())


def test_gram_bad_input_is_named():
    with pytest.raises(ValueError, match=r"add_gram: gram: found torch.float32 \[3, 3\]"):
        ops.add_gram(torch.zeros(3, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="add_gram: x: found torch.float64"):
        ops.add_gram(torch.zeros(4, 4), torch.zeros(5, 4, dtype=torch.float64))


def test_neither_default_devices_nor_hooks_are_met():
    module, seen = LlamaRMSNorm(64), []
    module.register_forward_hook(lambda *given: seen.append(1))
    with torch.device("meta"):
        assert fuse_norms(nn.ModuleList([module])) == 1
    assert not seen
