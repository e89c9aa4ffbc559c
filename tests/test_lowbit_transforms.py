"""The online transforms: their definitions."""

import math

import pytest
import torch

from tersor.transforms.definitions import (
    hadamard, hadamard_base, hadamard_matrix, kronecker, permute, rms_norm, silu_mul,
)

# Widths of models: 4 Llama-3-8B, 28 x 512 its MLP, 172 x 64 Llama-2-7B's, 148 x 128 Qwen2.5-7B's, 20 x 256 14B ...
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 52, 56, 60, 68, 72, 76, 80, 84, 88, 100, 104, 108, 120, 124,
          128, 140, 148, 152, 156, 172, 180, 192, 224, 256, 300, 340, 512, 924, 1024, 1536]


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_hadamard(order):
    h = hadamard_matrix(order)
    assert h.shape == (order, order) and (h.abs() == 1).all()
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_every_usable_width_of_known_models_has_one():
    for width in (896, 1024, 1536, 2048, 2560, 2880, 3072, 3584, 4096, 4864, 5120, 5632, 6656, 6912, 8192, 8960, 9728,
                  11008, 12288, 13824, 14336, 16384, 17408, 17920, 18944, 25600, 27648, 28672, 29568):
        m = hadamard_base(width)
        assert width % m == 0 and (width // m) & (width // m - 1) == 0


@pytest.mark.parametrize("width", [0, -4, 3, 6, 7 * 2, 13, 999, 4 * 47 * 2])
def test_widths_without_one_are_refused(width):
    with pytest.raises(ValueError, match="found width .* accepted"):
        hadamard_base(width)


@pytest.mark.parametrize("width,size", [(64, 0), (96, 0), (96, 48), (240, 20), (224, 0), (128, 32), (36, 36), (5, 1)])
def test_hadamard_is_its_matrix(width, size):
    torch.manual_seed(width)
    x, signs = torch.randn(3, 2, width, dtype=torch.float64), torch.randn(width).sign().double()
    block = size or width
    matrix = torch.block_diag(*[hadamard_matrix(block) / math.sqrt(block)] * (width // block))
    assert torch.allclose(hadamard(x, size), x @ matrix.T, atol=1e-12)
    y = hadamard(x, size, signs)
    assert torch.allclose(y, (x * signs) @ matrix.T, atol=1e-12)
    assert torch.allclose(hadamard(y, size, signs, inverse=True), x, atol=1e-12)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


def test_kronecker_is_the_kronecker_product():
    torch.manual_seed(0)
    x = torch.randn(4, 6 * 10, dtype=torch.float64)
    left, right = torch.randn(6, 6, dtype=torch.float64), torch.randn(10, 10, dtype=torch.float64)
    assert torch.allclose(kronecker(x, left, right), x @ torch.kron(left, right))
    with pytest.raises(ValueError, match="found factors .* accepted"):
        kronecker(x, right, right)
    with pytest.raises(ValueError, match="found factors .* accepted"):
        kronecker(x, left[:, :5], right)


def test_blocks_and_signs_that_do_not_fit_are_refused():
    x = torch.randn(2, 96)
    with pytest.raises(ValueError, match="found blocks of 64 .* accepted"):
        hadamard(x, 64)
    with pytest.raises(ValueError, match="found signs .* accepted"):
        hadamard(x, 0, torch.ones(48))


def test_the_small_ones():
    x, up = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(rms_norm(x, weight, 0.5), torch.tensor([[3.0, 8.0]], dtype=torch.float64) / math.sqrt(13))
    assert torch.allclose(silu_mul(x, up), torch.tensor([[6 / (1 + math.exp(-3)), -4 / (1 + math.exp(-4))]]).double())
    assert torch.equal(permute(x, torch.tensor([1, 0])), torch.tensor([[4.0, 3.0]], dtype=torch.float64))
