"""A small decoder block in plain torch, exact in float64, for tests of transforms."""

import torch
import torch.nn.functional as F
from torch import nn

from tersor.formats import Int
from tersor.methods import Collector
from tersor.transforms.graph import shared_inputs
from tersor.transforms.group import Group, Weights

WIDTH, HEADS, KV_HEADS, HEAD, INNER = 64, 4, 2, 16, 96


class Norm(nn.Module):
    """Root mean square norm; the gain is ``weight + offset``."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width) + 0.5 - offset), offset

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (self.weight + self.offset)


class Block(nn.Module):
    """Attention with grouped queries and a gated feed-forward, or variants that cannot be folded."""

    def __init__(self, offset=0.0, residual_from_norm=False, kv_heads=KV_HEADS, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head_dim, self.kv_heads, self.residual_from_norm = HEAD, kv_heads, residual_from_norm
        self.norm1, self.norm2 = Norm(WIDTH, offset), Norm(WIDTH, offset)
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(WIDTH, kv_heads * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, kv_heads * HEAD, bias=True)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)
        for norm in (self.norm1, self.norm2):
            norm.weight.data[::16] += 15  # a few channels are much larger, as in language models
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.weight.data = torch.randn(module.weight.shape) * 0.1
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = (h if self.residual_from_norm else x) + self.o_proj(attended)
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def batch(tokens=24, seed=5, dtype=torch.float64):
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group_of(block, name, fmt=Int(3, 32), x=None):
    """The group of a block that ``name`` belongs to, with statistics of one batch."""
    x = batch(dtype=next(block.parameters()).dtype) if x is None else x
    shared = next(s for s in shared_inputs(block, (x[:, :8],), {}, folds=True) if name in s.names)
    collector = Collector(shared.in_features)
    handle = block.get_submodule(shared.names[0]).register_forward_pre_hook(lambda m, args: collector.add(args[0]))
    block(x)
    handle.remove()
    stats = collector.finish()
    return Group(shared.names, {n: fmt for n in shared.names}, stats, Weights(block), shared.producer, shared.why,
                 next(block.parameters()).dtype)


def names_of(group):
    return list(group.names)
