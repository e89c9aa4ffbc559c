"""Tiny models and random compressed weights for the tests of checkpoints."""

import json

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tersor import Int
from tersor.experts import Experts
from tersor.gate import fuse_gates
from tersor.norm import fuse_norms
from tersor.patch import LayerSpec, link_siblings, patch
from tersor.registry import resolve

TOKENS = torch.tensor([[3, 17, 40, 9, 2, 33]])


def llama(tie=False, dtype=torch.bfloat16, bias=False, seed=0, layers=2, hidden=64, vocab=96, **config):
    torch.manual_seed(seed)
    made = LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                       num_attention_heads=2, num_key_value_heads=1, vocab_size=vocab, tie_word_embeddings=tie,
                       attention_bias=bias, bos_token_id=1, eos_token_id=0, **config)
    model = LlamaForCausalLM._from_config(made, dtype=dtype).eval()
    if bias:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32, bos_token_id=1, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16).eval()


def moe(seed=0):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=3,
                            num_experts_per_tok=2, vocab_size=96, bos_token_id=1, eos_token_id=0)
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def linears(model, head=False):
    return [name for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and (head or name != "lm_head")]


def random_parts(format, out, width, dtype=torch.bfloat16, seed=0):
    """Codes, scales and zero points of a random weight; zero points at least 1, which every layout holds."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**format.num_bits, (out, width), dtype=torch.uint8, generator=generator)
    stored = format.spec((out, width), dtype)["scales"].dtype
    scales = (torch.rand(out, format.groups(width), generator=generator) * 0.03 + 0.005).to(stored)
    zero = torch.randint(1, 2**format.num_bits, scales.shape, dtype=torch.uint8, generator=generator)
    return codes, scales, None if format.symmetric else zero


def randomize(model, spec, names=None, pre=()):
    """Put layers of random weights in the place of the named modules (default: all but the head)."""
    format = resolve(spec).format
    dtype = next(model.parameters()).dtype
    made = patch(model, {name: LayerSpec(format, pre) for name in (names or linears(model))})
    for i, layer in enumerate(made.values()):
        if isinstance(layer, Experts):
            for projection, (out, width) in layer.projections.items():
                for expert in range(layer.num_experts):
                    layer.load_expert(projection, expert, _tensors(format, out, width, dtype, 10 * i + expert))
        else:
            layer.load_tensors(_tensors(format, *layer.shape, dtype, i))
    link_siblings(model)
    fuse_norms(model)  # as compress and load do: sums in another order are other last bits
    fuse_gates(model)
    return model


def _tensors(format, out, width, dtype, seed):
    if isinstance(format, Int):
        return format.pack_codes(*random_parts(format, out, width, dtype, seed))
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.1
    params = format.fit(w, dtype=dtype)
    return format.pack(format.project(w, params), params)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()


def compressed(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "format")}


def weights(model):
    return {name: module.dequantize() for name, module in compressed(model).items()}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]
