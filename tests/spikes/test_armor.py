"""Spike: ARMOR (Liu et al. 2025, arXiv 2510.05528) on `BlockDiagonal(Sparse24())`, by the public interface."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from problem import output_error, problem
from torch import Tensor, nn

from tersor.formats import BlockDiagonal, Sparse24
from tersor.formats.bits import rounded
from tersor.layer import Linear
from tersor.methods import RTN, Choice, Method, Statistics
from tersor.registry import register_method, resolve

MASKS = torch.tensor(list(itertools.combinations(range(4), 2)))  # [6, 2]


@register_method("armor")
@dataclass(frozen=True)
class ARMOR(Method):
    """Wrappers and kept values by Adam, and after each step one exact re-choice of a group of four in every pair of
    blocks. The best point seen is kept, so the loss is at most that of pruning alone."""

    iterations: int = 150
    lr: float = 3e-3
    seed: int = 0

    needs = frozenset({"hessian"})

    def choose(self, w: Tensor, fmt, stats: Statistics | None, previous: Choice | None = None, *, dtype=None) -> Choice:
        if not isinstance(fmt, BlockDiagonal) or not isinstance(fmt.core, Sparse24):
            raise ValueError(f"armor: found format {fmt}, accepted are 2:4 cores between wrappers such as bd32/2:4")
        diagonal = self.require(stats, "hessian").hessian.diagonal().to(w)
        params = fmt.fit(w, importance=diagonal, dtype=dtype)
        task = Task(fmt, w, params, diagonal)
        point = task.start()
        generator = torch.Generator().manual_seed(self.seed)
        least, best = task.loss(*point).item(), [part.clone() for part in point]
        leaves = [part.clone().requires_grad_() for part in point]
        optimizer = torch.optim.Adam(leaves, lr=self.lr)
        for _ in range(self.iterations):
            optimizer.zero_grad()
            loss = task.loss(*leaves)
            loss.backward()
            gradient = leaves[1].grad.clone()
            leaves[1].grad.mul_(leaves[1] != 0)
            kept = leaves[1].detach() != 0
            optimizer.step()
            with torch.no_grad():
                leaves[1].mul_(kept)
                task.sparse_step(*leaves, gradient, generator)
                now = task.loss(*leaves).item()
            if now < least:
                least, best = now, [part.detach().clone() for part in leaves]
        a, core, b = (rounded(part, params["dtype"]) for part in best)
        params["a"], params["b"] = a, b
        params["noted"] = fmt.core.project(join(core), params["core"])
        return Choice(fmt.wrap(params["noted"], params), params, least)


class Task:
    """``sum h (Wn - A S B)^2`` in tiles: ``a [I, s, s]``, ``core [I, J, s, s]``, ``b [J, s, s]``."""

    def __init__(self, fmt: BlockDiagonal, w: Tensor, params, diagonal: Tensor):
        self.fmt, self.params = fmt, params
        self.normal = tile(w / params["columns"] / params["rows"], fmt.size)
        self.importance = diagonal * params["columns"][0].square()
        self.root = self.importance.view(-1, 1, fmt.size).sqrt()  # [J, 1, s]
        self.total = (self.normal * self.root).square().sum()

    def start(self):
        """Identity wrappers around plain pruning (NoWag-P)."""
        flat = join(self.normal)
        positions = self.fmt.core.positions(flat, self.importance)
        core = self.fmt.core.scatter(self.fmt.core.gather(flat, positions), positions, flat.shape[1])
        return self.params["a"].clone(), tile(core, self.fmt.size), self.params["b"].clone()

    def loss(self, a, core, b):
        return ((a[:, None] @ core @ b - self.normal) * self.root).square().sum() / self.total

    def sparse_step(self, a, core, b, gradient, generator):
        """In every pair of blocks choose one group of four anew, in place; the loss cannot rise."""
        blocks_i, blocks_j, size, _ = core.shape
        weight = gradient.unflatten(-1, (-1, 4)).abs().sum(-1).flatten(2).flatten(0, 1) + 1e-20
        pick = torch.multinomial(weight, 1, generator=generator)[:, 0].view(blocks_i, blocks_j)
        row, group = pick // (size // 4), pick % (size // 4)
        i, j = torch.meshgrid(torch.arange(blocks_i), torch.arange(blocks_j), indexing="ij")
        columns = group[..., None] * 4 + torch.arange(4)
        core[i[..., None], j[..., None], row[..., None], columns] = 0
        left = (a[:, None] @ core @ b - self.normal) * self.root  # [I, J, s, s]
        side = a[i, :, row]  # [I, J, s], the column of A that the row meets
        lines = b[j[..., None], columns] * self.root[j]  # [I, J, 4, s]
        _, values, mask = best_of_masks(left.flatten(0, 1), side.flatten(0, 1), lines.flatten(0, 1))
        filled = torch.zeros(len(values), 4, dtype=core.dtype).scatter(1, mask, values).view(blocks_i, blocks_j, 4)
        core[i[..., None], j[..., None], row[..., None], columns] = filled


def best_of_masks(left: Tensor, side: Tensor, lines: Tensor):
    """For each of n: what each mask would change of ``|side v^T lines_m + left|^2``, ``[n, 6]``, and the best mask's
    values ``[n, 2]`` and positions ``[n, 2]``. ``left [n, s, s]``, ``side [n, s]``, ``lines [n, 4, s]``."""
    gram = lines @ lines.transpose(1, 2)
    g = (lines @ left.transpose(1, 2) @ side[..., None])[..., 0]  # [n, 4]
    square = side.square().sum(-1).clamp_min(1e-30)
    grams = gram[:, MASKS[:, :, None], MASKS[:, None, :]] + 1e-9 * torch.eye(2, dtype=left.dtype)
    gs = g[:, MASKS]  # [n, 6, 2]
    solved = torch.linalg.solve(grams, gs[..., None])[..., 0]
    cost = -(gs * solved).sum(-1) / square[:, None]
    best = cost.argmin(1)
    rows = torch.arange(len(best))
    return cost, -solved[rows, best] / square[:, None], MASKS[best]


def tile(w: Tensor, size: int) -> Tensor:
    return w.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2).contiguous()


def join(tiles: Tensor) -> Tensor:
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1)


def test_the_closed_form_is_the_minimum_over_all_masks():
    generator = torch.Generator().manual_seed(0)
    left, side, lines = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                         for shape in ((3, 8, 8), (3, 8), (3, 4, 8)))
    cost, values, mask = best_of_masks(left, side, lines)
    for n in range(3):
        base = left[n].square().sum()
        every = []
        for m, pair in enumerate(MASKS):
            # least squares over the two values, by the normal equations of the flattened problem
            design = torch.stack([torch.outer(side[n], line).flatten() for line in lines[n, pair]], 1)
            solution = torch.linalg.lstsq(design, -left[n].flatten()[:, None]).solution
            every.append((design @ solution + left[n].flatten()[:, None]).square().sum())
            assert (every[-1] - base).item() == pytest.approx(cost[n, m].item(), rel=1e-6)
        found = (torch.outer(side[n], values[n] @ lines[n, mask[n]]) + left[n]).square().sum()
        assert found.item() == pytest.approx(min(every).item(), rel=1e-6)


def task(size=16):
    w, x, stats = problem(64, 64)
    fmt = BlockDiagonal(Sparse24(), size)
    diagonal = stats.hessian.diagonal()
    params = fmt.fit(w, importance=diagonal)
    return Task(fmt, w, params, diagonal)


def test_core_steps_never_raise_the_loss_and_keep_two_of_four():
    problem_ = task()
    generator = torch.Generator().manual_seed(1)
    a, core, b = problem_.start()
    a = a + 0.05 * torch.randn(a.shape, generator=generator)
    b = b + 0.05 * torch.randn(b.shape, generator=generator)
    losses = [problem_.loss(a, core, b).item()]
    for _ in range(60):
        leaf = core.clone().requires_grad_()
        problem_.loss(a, leaf, b).backward()
        problem_.sparse_step(a, core, b, leaf.grad, generator)
        losses.append(problem_.loss(a, core, b).item())
    assert all(after <= before * (1 + 1e-5) for before, after in zip(losses, losses[1:]))
    assert losses[-1] < 0.98 * losses[0]
    assert ((join(core) != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


def test_no_iterations_are_plain_pruning():
    w, _, stats = problem(64, 64)
    fmt = BlockDiagonal(Sparse24(), 16)
    choice = ARMOR(iterations=0).choose(w, fmt, stats, dtype=torch.bfloat16)
    importance = stats.hessian.diagonal() * choice.params["columns"][0].square()
    normal = w / choice.params["columns"] / choice.params["rows"]
    core = Sparse24()
    wanted = core.project(normal, core.fit(normal, dtype=torch.bfloat16), importance=importance)
    assert torch.equal(choice.params["noted"], wanted)
    assert torch.equal(choice.params["a"], torch.eye(16).expand(4, 16, 16))


def test_wrappers_recover_part_of_what_pruning_loses():
    w, x, stats = problem(64, 64)
    fmt = BlockDiagonal(Sparse24(), 16)
    shape = tuple(w.shape)
    pruned = ARMOR(iterations=0).choose(w, fmt, stats, dtype=torch.bfloat16)
    found = resolve("armor:bd16/2:4").methods[0].choose(w, fmt, stats, dtype=torch.bfloat16)
    assert found.loss < 0.9 * pruned.loss
    tensors = fmt.pack(found.w_hat, found.params)
    assert torch.allclose(fmt.unpack(tensors, shape), found.w_hat, atol=1e-7)
    direct = fmt.linear(x, tensors, None, shape)
    assert (direct - x @ found.w_hat.T).norm() < 1e-4 * direct.norm()
    difference = (w - found.w_hat).square() / found.params["rows"].square() * stats.hessian.diagonal()
    scale = (w / found.params["rows"]).square() * stats.hessian.diagonal()
    assert float(difference.sum() / scale.sum()) == pytest.approx(found.loss, rel=0.02), "16-bit storage costs little"


def test_other_formats_are_refused_and_a_layer_from_the_spec_alone():
    w, x, stats = problem(64, 64)
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(w)
    with pytest.raises(ValueError, match="bd32/2:4"):
        Linear.from_linear(linear, "armor:2:4", inputs=x)
    layer = Linear.from_linear(linear, "armor:bd16/2:4", inputs=x)
    assert layer.method == "armor" and layer.kernel.startswith("reference")
    rounded_ = RTN().choose(w, Sparse24(), None)
    assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.95 * output_error(rounded_.w_hat, w, x)
