"""Layers and whole models on a GPU: the same results as on the CPU. Skipped where there is none."""

import copy

import pytest
import torch
from torch import nn

import tersor

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.parametrize("spec", ("W4A16", "W4A16[sym=false]", "W3A16", "W8A16", "W6A16[group=32]"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_cuda_layer_equals_the_cpu_layer(spec, dtype):
    torch.manual_seed(0)
    layer = tersor.Linear.from_linear(nn.Linear(328, 208, dtype=dtype), f"rtn:{spec}")
    there = copy.deepcopy(layer).cuda()
    assert "int_linear cuda" in there.kernel
    for rows in (1, 5, 64, 300):
        x = torch.randn(2, rows, 328, dtype=dtype)
        with torch.no_grad():
            here, gpu = layer(x).double(), there(x.cuda()).cpu().double()
        assert (here - gpu).norm() < 5e-3 * here.norm()


@cuda
def test_cuda_gradient_reaches_the_input():
    layer = tersor.Linear.from_linear(nn.Linear(256, 128, dtype=torch.bfloat16), "rtn:W4A16").cuda()
    x = torch.randn(4, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    w = layer.weight.double()
    wanted = 2 * (x.detach().double() @ w.T + layer.bias.detach().double()) @ w
    assert (x.grad.double() - wanted).norm() < 2e-2 * wanted.norm()


@cuda
def test_cuda_model_generates_what_the_cpu_does():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=199, max_position_embeddings=128)
    model = LlamaForCausalLM(config).eval()
    tersor.compress(model, "rtn:W8A16")
    ids = torch.randint(0, 199, (1, 9))
    with torch.no_grad():
        here = model(ids).logits
        there = copy.deepcopy(model).cuda()(ids.cuda()).logits.cpu()
        assert (here - there).norm() < 1e-3 * here.norm()
        half = copy.deepcopy(model).to("cuda", torch.bfloat16)
        assert half.generate(ids.cuda(), max_new_tokens=8, do_sample=False).shape == (1, 17)


@cuda
def test_cuda_layer_compiles_whole():
    layer = tersor.Linear.from_linear(nn.Linear(256, 64, dtype=torch.bfloat16), "rtn:W4A16").cuda()
    x = torch.randn(3, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@cuda
def test_cuda_layer_under_compiled_graphs():
    """Graph trees allow no memory kept between calls."""
    layer = tersor.Linear.from_linear(nn.Linear(4096, 256, dtype=torch.bfloat16), "rtn:W4A16").cuda()
    x = torch.randn(3, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, mode="reduce-overhead")
        for _ in range(4):
            torch.testing.assert_close(compiled(x).clone(), expected)


def test_without_a_gpu_the_extension_says_so():
    devices = tersor._C.cuda_devices()
    assert bool(devices) == (tersor._C.has_cuda_build and torch.cuda.is_available())
