"""Models of a known shape with random weights: what speed is measured on where no checkpoint is at hand."""

from __future__ import annotations

import torch
from torch import nn

# Embeddings are looked up, so they stay; the tied output matrix is read whole for every token: eight bits.
QWEN3_RECIPE = {"*": "rtn[search=false]:W4A16", "lm_head": "rtn[search=false]:W8A16"}


def qwen3_0_6b(layers: int = 28) -> nn.Module:
    """A causal language model of Qwen3-0.6B's shape in bf16 (596 million parameters), filled with random weights.

    Weights are repeated from one random block, which takes a second instead of an initialisation's minutes; what a
    matrix product costs does not depend on its values.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
        rope_theta=1_000_000.0, bos_token_id=151643, eos_token_id=151645, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = Qwen3RotaryEmbedding(config)  # its frequencies are computed, not learned
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
