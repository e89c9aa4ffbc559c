"""Spike: AQLM (Egiazarian et al. 2024, arXiv 2401.06118) as a method on `AdditiveCodebook`, by the public interface."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from problem import output_error, problem
from torch import Tensor, nn

from tersor.formats import AdditiveCodebook
from tersor.formats.bits import rounded
from tersor.layer import Linear
from tersor.methods import GPTQ, RTN, Choice, Method, Statistics
from tersor.registry import register_method, resolve


@register_method("aqlm")
@dataclass(frozen=True)
class AQLM(Method):
    """Additive codebooks fitted to the layer's output: by turns Adam on codebooks and scales, and beam search."""

    rounds: int = 3
    steps: int = 40
    lr: float = 3e-3
    beam: int = 4

    needs = frozenset({"hessian"})

    def choose(self, w: Tensor, fmt, stats: Statistics | None, previous: Choice | None = None, *, dtype=None) -> Choice:
        hessian = self.require(stats, "hessian").hessian.to(w)
        params = fmt.fit(w, dtype=dtype) if previous is None else previous.params
        params["codes"] = fmt.encode(w, params)
        store = params["dtype"]
        for _ in range(self.rounds):
            continuous(w, fmt, params, hessian, self.steps, self.lr)
            for name in ("codebooks", "scales"):
                params[name] = rounded(params[name], store)
            params["codes"] = beam_search(w, fmt, params, hessian, self.beam)
        w_hat = fmt.decode(params["codes"], params, w.shape[1])
        return Choice(w_hat, params, layer_loss(w - w_hat, hessian).sum().item())


def layer_loss(difference: Tensor, hessian: Tensor) -> Tensor:
    """``dW H dW^T`` per row ``[out]``."""
    return (difference @ hessian * difference).sum(-1)


def continuous(w, fmt, params, hessian, steps, lr):
    """Adam on what is continuous; leaves the best that was seen."""
    leaves = {name: params[name].clone().requires_grad_() for name in ("codebooks", "scales")}
    optimizer = torch.optim.Adam([{"params": [leaf], "lr": lr * float(leaf.detach().abs().mean())}
                                  for leaf in leaves.values()], betas=(0.0, 0.95), amsgrad=True)
    least, best = None, None
    for _ in range(steps + 1):
        loss = layer_loss(w - fmt.decode(params["codes"], leaves, w.shape[1]), hessian).sum()
        if least is None or loss.item() < least:
            least, best = loss.item(), {name: leaf.detach().clone() for name, leaf in leaves.items()}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    params.update(best)


def beam_search(w: Tensor, fmt, params, hessian: Tensor, beam: int, seed: int = 0) -> Tensor:
    """Better codes ``[out, groups, codebooks]`` for the whole rows' loss, one codebook of one group after another."""
    out, width = w.shape
    size, rows = 2**fmt.nbits, torch.arange(out)[:, None]
    codes = params["codes"][:, None].clone()  # [out, beam, groups, codebooks]
    left = (w - fmt.decode(params["codes"], params, width))[:, None]
    loss = layer_loss(left, hessian)
    order = torch.randperm(fmt.groups(width), generator=torch.Generator().manual_seed(seed)).tolist()
    for j, m in itertools.product(order, range(fmt.num_codebooks)):
        columns = slice(j * fmt.group, (j + 1) * fmt.group)
        book = params["codebooks"][m]
        old = book[codes[..., j, m].long()]
        change = params["scales"][:, None, None] * (old[:, :, None] - book)  # [out, beam, entries, group]
        gradient = left @ hessian[:, columns]
        gain = 2 * (change @ gradient[..., None])[..., 0] + (change @ hessian[columns, columns] * change).sum(-1)
        best = (loss[..., None] + gain).flatten(1)
        loss, index = best.topk(min(beam, best.shape[1]), largest=False)
        parent, entry = index // size, index % size
        codes, left = codes[rows, parent], left[rows, parent]
        left[..., columns] += change[rows, parent, entry]
        codes[..., j, m] = entry.to(codes.dtype)
    return codes[:, 0]


def test_the_loss_is_the_mean_squared_output_error():
    w, x, stats = problem()
    difference = 0.1 * w.flip(0)
    direct = (x @ difference.T).double().square().sum(0) / len(x)
    assert torch.allclose(layer_loss(difference, stats.hessian).double() / 2, direct, rtol=1e-4)


def test_a_beam_of_all_combinations_is_brute_force():
    w, _, stats = problem(5, 8)
    fmt = AdditiveCodebook(2, 2, 4)
    params = fmt.fit(w)
    found = beam_search(w, fmt, params, stats.hessian, beam=4**4)
    loss = layer_loss(w - fmt.decode(found, params, 8), stats.hessian)
    every = torch.stack([
        layer_loss(w - fmt.decode(torch.tensor(codes).view(1, 2, 2).expand(5, 2, 2), params, 8), stats.hessian)
        for codes in itertools.product(range(4), repeat=4)
    ])
    assert torch.allclose(loss, every.amin(0), rtol=1e-4)


def test_beam_search_never_loses():
    w, _, stats = problem()
    fmt = AdditiveCodebook(2, 5)
    params = fmt.fit(w)
    params["codes"] = fmt.encode(w, params)
    before = layer_loss(w - fmt.decode(params["codes"], params, 64), stats.hessian)
    after = layer_loss(w - fmt.decode(beam_search(w, fmt, params, stats.hessian, 2), params, 64), stats.hessian)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.8 * before.sum()


def test_closer_than_the_column_loop_and_rounding_on_the_same_format():
    w, x, stats = problem()
    fmt = AdditiveCodebook(2, 6)
    rtn = RTN().choose(w, fmt, None, dtype=torch.bfloat16)
    gptq = GPTQ().choose(w, fmt, stats, dtype=torch.bfloat16)
    aqlm = resolve("aqlm:2x6").methods[0].choose(w, fmt, stats, dtype=torch.bfloat16)
    assert torch.equal(fmt.unpack(fmt.pack(aqlm.w_hat, aqlm.params), tuple(w.shape)), aqlm.w_hat)
    errors = [output_error(choice.w_hat, w, x) for choice in (rtn, gptq, aqlm)]
    assert errors[2] < 0.8 * errors[1] and errors[2] < 0.7 * errors[0]


def test_one_codebook_of_sixteen_bits_holds_every_vector_of_a_small_layer():
    w, _, _ = problem(32, 64)
    fmt = resolve("1x16").format
    params = fmt.fit(w, dtype=torch.bfloat16)
    w_hat = fmt.project(w, params)
    tensors = fmt.pack(w_hat, params)
    assert torch.equal(fmt.unpack(tensors, (32, 64)), w_hat)
    assert tensors["codes"].shape == (32, 16) and tensors["codebooks"].shape == (1, 65536, 8)
    assert (w_hat - w).norm() < 4e-3 * w.norm()
    assert fmt.bits((4096, 4096)) == pytest.approx(2 + 16 * 65536 * 8 / 4096**2 + 16 / 4096)


def test_a_layer_from_the_spec_alone():
    w, x, _ = problem()
    linear = nn.Linear(64, 64, bias=True)
    linear.weight.data.copy_(w)
    layer = Linear.from_linear(linear, "aqlm[rounds=2,steps=20]:2x6", inputs=x)
    assert layer.method == "aqlm" and layer.kernel.startswith("reference")
    y, wanted = layer(x), linear(x)
    assert (y - wanted).norm() < 0.27 * (wanted - linear.bias).norm()
