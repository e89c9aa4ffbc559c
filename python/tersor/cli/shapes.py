"""Models of a known shape with random weights: what speed is measured on where no checkpoint is at hand."""

from __future__ import annotations

import torch
from torch import nn

# Embeddings are looked up, so they stay; the tied output matrix is read whole for every token: eight bits.
QWEN3_RECIPE = {"*": "rtn[search=false]:W4A16", "lm_head": "rtn[search=false]:W8A16"}


def qwen3_0_6b(layers: int = 28) -> nn.Module:
    """A causal language model of Qwen3-0.6B's shape in bf16 (596 million parameters), filled with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
        rope_theta=1_000_000.0, bos_token_id=151643, eos_token_id=151645, dtype=torch.bfloat16)
    return _filled(Qwen3ForCausalLM, config, Qwen3RotaryEmbedding)


def llama_3_8b(layers: int = 32, stored: int | None = None) -> nn.Module:
    """A causal language model of Llama-3-8B's shape in bf16 (8.0 billion parameters), filled with random weights.

    ``stored``: only so many layers have linear layers of their own, and the others use theirs in turn. A step reads
    as many bytes as ever, and none from a cache as long as those of ``stored`` layers are more than caches hold
    (a layer has 436 MB), in a fraction of the memory.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=8192,
        rope_theta=500_000.0, bos_token_id=128000, eos_token_id=128001, dtype=torch.bfloat16)
    return _filled(LlamaForCausalLM, config, LlamaRotaryEmbedding, stored or layers)


def _filled(kind: type, config, rotary: type, stored: int | None = None) -> nn.Module:
    """Weights are repeated from one random block, which takes a second instead of an initialisation's minutes; what a
    matrix product costs does not depend on its values."""
    with torch.device("meta"):
        model = kind(config)
    layers = model.model.layers
    for index in range(stored or len(layers), len(layers)):
        for name, linear in list(layers[index].named_modules()):
            if isinstance(linear, nn.Linear):
                layers[index].set_submodule(name, layers[index % stored].get_submodule(name))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = rotary(config)  # its frequencies are computed, not learned
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)  # norms
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                piece = flat[start : start + block.numel()]
                piece.copy_(block[: piece.numel()])
    return model.eval()
