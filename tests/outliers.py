"""The reference model with outliers, as large language models have them: the same function, hard to quantize.

Its residual stream is turned to the principal axes of what flows through it, so that a few channels hold most of the
energy; some rows of the up projections are made larger and the down projections' columns smaller, and some channels
of each value head likewise. The norms' gains have a few large channels as well, which alone would test nothing: they
vanish where gains are folded.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tersor.transforms.rotation import rotate_residual

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "stdlib-llama"


def text_tokens(count, start=0, model=MODEL):
    """``[count]`` tokens of the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = (Path(model) / "heldout.txt").read_text()
    return tokenizer(text, return_tensors="pt").input_ids[0][start:start + count]


@torch.no_grad()
def with_outliers(dtype=torch.float32, factor=40.0, channels=4, path=MODEL):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    ids = text_tokens(2048, 100_000).view(8, 256)
    moments = []

    def see(module, args, kwargs):
        moments.append((args[0] if args else kwargs["hidden_states"]).flatten(0, 1))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in model.model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    x = torch.cat([m / m.norm(dim=1, keepdim=True) for m in moments])
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    rotate_residual(model, ids[:1, :32], lambda rows: rows @ axes)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        large = torch.randperm(config.hidden_size, generator=generator)[:channels]
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in ((layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                              (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            norm.weight[large] *= factor / 2
            for reader in readers:
                reader.weight[:, large] /= factor / 2
        rows = torch.randperm(config.intermediate_size, generator=generator)[:channels]
        layer.mlp.up_proj.weight[rows] *= factor
        layer.mlp.down_proj.weight[:, rows] /= factor
        for head in range(config.num_key_value_heads):
            row = head * config.head_dim + int(torch.randint(config.head_dim, (), generator=generator))
            layer.self_attn.v_proj.weight[row] *= factor
            for query in range(head * group, (head + 1) * group):
                layer.self_attn.o_proj.weight[:, query * config.head_dim + row % config.head_dim] /= factor
    return model.to(dtype)
