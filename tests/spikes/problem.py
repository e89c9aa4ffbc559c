"""A layer with correlated inputs, for the spikes."""

import torch
from torch import Tensor

from tersor.methods import Statistics


def problem(out: int = 64, width: int = 64, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, Statistics]:
    """Weight ``[out, width]``, inputs ``[tokens, width]`` and their statistics."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, width) @ normal(width, width) * torch.rand(width, generator=generator).exp()
    w = normal(out, width) * 0.02
    w.view(-1)[::97] *= 4
    return w, x, Statistics(tokens, 2 / tokens * x.T @ x)


def output_error(w_hat: Tensor, w: Tensor, x: Tensor) -> float:
    """``|x (W - W_hat)^T| / |x W^T|``."""
    return float((x @ (w - w_hat).T).norm() / (x @ w.T).norm())
