"""Models with fewer key and value heads, in plain transformers ("Effectively Compress KV Heads for LLM", arXiv
2406.07056)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .bases import Moments, key_heads, principal, refuse_latent
from .plan import token_batches
from .record import Seen, record
from .rotary import Rotary, find_rotary

PROJECTIONS, OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj", "dense")


@dataclass(frozen=True)
class SharedRow:
    """One layer: the share of the energy (sum of squares over the calibration data) of its cached keys and values that
    the fewer heads do not hold."""

    layer: int
    key_energy: float
    value_energy: float


@dataclass(frozen=True, eq=False)
class SharedModel:
    """``model``: a transformers model of the same class with ``kv_heads`` key heads; ``rows``: what each layer lost."""

    model: nn.Module
    kv_heads: int
    rows: tuple[SharedRow, ...]

    def __str__(self) -> str:
        lines = [f"{self.kv_heads} key heads; share of energy that is lost, keys and values"]
        return "\n".join(lines + [f"  layer {r.layer:3d}  {r.key_energy:.4f}  {r.value_energy:.4f}" for r in self.rows])


def share_heads(model: nn.Module, kv_heads: int, calibration: Sequence, tokenizer=None, *, length: int = 512,
                sequences: int = 16, progress: Callable[[str], None] | None = None) -> SharedModel:
    """A model whose neighbouring key heads are merged until ``kv_heads`` are left; the given one stays as it is.

    Values of a group, beside each other, are projected on their leading singular vectors; as attention's output is
    linear in them, ``v_proj`` and ``o_proj`` take the projection in exactly. A projection of keys must commute with
    rotary embedding, which turns a pair of channels as one complex number: each head and pair gets one complex
    coefficient, by principal components of the group's pairs, and ``k_proj`` takes it in, its conjugate ``q_proj``.
    Channels that are not rotated are projected as values are. What is lost comes back, in part, by fine-tuning the
    result, with LoRA for instance: it is a plain model.

    ``calibration`` as for `tersor.kv.calibrate`. Raises ValueError for a number of heads that does not divide the
    model's, latent attention, attention that normalises keys after their projection (the merge cannot pass through),
    projections that are fused, shared or not plain linear layers, and models without rotary embedding.
    """
    refuse_latent(model, "share_heads")
    before = key_heads(model)
    if kv_heads < 1 or before % kv_heads:
        raise ValueError(f"share_heads: kv_heads: found {kv_heads}, accepted are divisors of the model's {before}")
    layers = attention_layers(model)
    rotaries = {layer: find_rotary(model, layer) for layer in layers}
    together = before // kv_heads
    gathered = _gather(model, token_batches(calibration, tokenizer, length, sequences), rotaries, together, progress)
    missing = sorted(set(layers) - set(gathered))
    if missing:
        raise ValueError(f"share_heads: layers {missing}: found no keys of their own in attention, accepted are layers "
                         "that each compute their keys")
    state, rows = dict(model.state_dict()), []
    names = {id(module): name for name, module in model.named_modules()}
    for layer, module in sorted(layers.items()):
        changed, row = _merge(layer, module, gathered[layer], rotaries[layer], together)
        rows.append(row)
        state |= {f"{names[id(module)]}.{name}": tensor for name, tensor in changed.items()}
    config = copy.deepcopy(model.config)
    config.get_text_config(decoder=True).num_key_value_heads = kv_heads
    smaller = type(model)._from_config(config, dtype=model.dtype)
    smaller.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return SharedModel(smaller.to(model.device).train(model.training), kv_heads, tuple(rows))


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer; ValueError where one cannot take a merge of heads."""
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "layer_idx") or not hasattr(module, "head_dim"):
            continue
        for projection in (*PROJECTIONS, out_projection(module)):
            linear = getattr(module, projection, None)
            if type(linear) is not nn.Linear:
                raise ValueError(f"share_heads: {name}.{projection}: found {type(linear).__name__}, accepted are "
                                 f"separate linear layers {', '.join(PROJECTIONS)} and {' or '.join(OUT)}")
        norms = [child for child, part in module.named_children() if "norm" in child and list(part.parameters())]
        if norms:
            raise ValueError(f"share_heads: {name}: found {' and '.join(norms)} between projection and attention, "
                             "accepted is attention on keys as k_proj makes them; the cache method share_heads serves "
                             "this model")
        found[module.layer_idx] = module
    if not found:
        raise ValueError(f"share_heads: found no attention in {type(model).__name__}, accepted is a transformers "
                         "decoder")
    return found


class Complex:
    """Sums of outer products of complex rows ``[groups, pairs, rows, heads]``."""

    def __init__(self):
        self.square = 0

    def add(self, z: Tensor) -> None:
        z = z.to(torch.complex128)
        self.square = self.square + z.transpose(-1, -2) @ z.conj()


@dataclass
class GroupMoments:
    """Of one layer's groups of heads: of their keys' ``pairs`` that are rotated, the ``others``, and ``values``. A
    rotation turns the pairs of all heads of a token alike, so their covariance does not see it."""

    heads: int
    key_dim: int
    value_dim: int
    pairs: Complex = field(default_factory=Complex)
    others: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)


def out_projection(module: nn.Module) -> str:
    return next((name for name in OUT if hasattr(module, name)), OUT[0])


def _gather(model, batches, rotaries: dict[int, Rotary], together: int, progress) -> dict[int, GroupMoments]:
    gathered: dict[int, GroupMoments] = {}

    def take(seen: Seen) -> None:
        if seen.layer not in gathered:
            gathered[seen.layer] = GroupMoments(seen.key.shape[1], seen.key.shape[3], seen.value.shape[3])
        moments, rotary = gathered[seen.layer], rotaries[seen.layer]
        keys = _groups(seen.key.cpu().float(), together)  # [groups, rows, together, dim]
        moments.pairs.add(as_complex(keys[..., :rotary.dim], rotary).permute(0, 3, 1, 2))
        if rotary.dim < seen.key.shape[3]:
            moments.others.add(keys[..., rotary.dim:].flatten(2))
        moments.values.add(_groups(seen.value.cpu(), together).flatten(2))

    record(model, batches, take, progress)
    return gathered


def _groups(x: Tensor, together: int) -> Tensor:
    """``[batch, heads, tokens, dim]`` to ``[groups, batch * tokens, together, dim]``."""
    return x.unflatten(1, (-1, together)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def as_complex(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotated channels ``[..., dim]`` as complex pairs ``[..., dim / 2]``: rotation multiplies each by one number."""
    a, b = (x[..., 0::2], x[..., 1::2]) if rotary.interleaved else x.chunk(2, -1)
    return torch.complex(a.contiguous(), b.contiguous())


def as_real(z: Tensor, rotary: Rotary) -> Tensor:
    """The inverse of `as_complex`."""
    return torch.stack((z.real, z.imag), -1).flatten(-2) if rotary.interleaved else torch.cat((z.real, z.imag), -1)


def _merge(layer: int, module: nn.Module, moments: GroupMoments, rotary: Rotary,
           together: int) -> tuple[dict[str, Tensor], SharedRow]:
    """New weights (and biases) of a layer's projections."""
    groups, dim, rotated = moments.heads // together, moments.key_dim, rotary.dim
    square = moments.pairs.square  # complex [groups, pairs, together, together]
    energies, vectors = torch.linalg.eigh(square)
    pairs = vectors[..., -1].permute(0, 2, 1)  # [groups, together, pairs]
    lost, all_keys = energies[..., :-1].sum(), energies.sum()
    rest = None
    if rotated < dim:
        covariance = moments.others.covariance(centred=False)
        basis, more = principal(covariance)
        rest = basis[..., :dim - rotated].unflatten(1, (together, -1))  # [groups, together, dim, rank]
        count = moments.others.rows
        lost, all_keys = lost + more[:, dim - rotated:].sum() * count, all_keys + more.sum() * count
    values, value_energies = principal(moments.values.covariance(centred=False))
    values = values[..., :moments.value_dim].unflatten(1, (together, -1))  # [groups, together, value_dim, value_dim]
    changed = {}
    for name in ("weight", "bias"):
        tensor = getattr(module.k_proj, name)
        if tensor is not None:
            rows = tensor.detach().double().unflatten(0, (groups, together, dim))
            changed[f"k_proj.{name}"] = _turn(rows, pairs, rest, rotary).sum(1).flatten(0, 1)
        tensor = getattr(module.q_proj, name)
        if tensor is not None:
            rows = tensor.detach().double().unflatten(0, (groups, together, -1, dim))
            each = [None if t is None else t.unsqueeze(2) for t in (pairs, rest)]
            changed[f"q_proj.{name}"] = _turn(rows, *each, rotary).flatten(0, 3)
        tensor = getattr(module.v_proj, name)
        if tensor is not None:
            rows = tensor.detach().double().unflatten(0, (groups, together, moments.value_dim))
            merged = torch.einsum("gtdr,gtd...->gr...", values, rows)
            changed[f"v_proj.{name}"] = merged.flatten(0, 1)
    name = f"{out_projection(module)}.weight"
    out = module.get_parameter(name).detach().double().unflatten(1, (groups, together, -1, moments.value_dim))
    changed[name] = torch.einsum("ogtqd,gtdr->ogtqr", out, values).flatten(1)
    changed = {name: tensor.to(module.k_proj.weight.dtype) for name, tensor in changed.items()}
    value_lost = value_energies[:, moments.value_dim:].sum() / value_energies.sum()
    return changed, SharedRow(layer, (lost / all_keys).item(), value_lost.item())


def _turn(rows: Tensor, pairs: Tensor, rest: Tensor | None, rotary: Rotary) -> Tensor:
    """Rows of a projection, or its bias, ``[..., dim, (inputs)]``, whose rotated pairs are multiplied by the conjugates
    of ``pairs [..., dim / 2]`` and the others by ``rest [..., dim, rank]``."""
    flat = pairs.dim() == rows.dim() - 1  # a weight: the inputs come last
    x = rows.transpose(-1, -2) if flat else rows
    factor = pairs.conj().unsqueeze(-2) if flat else pairs.conj()
    turned = as_real(as_complex(x[..., :rotary.dim], rotary) * factor, rotary)
    if rest is not None:
        others = x[..., rotary.dim:]
        turned = torch.cat((turned, others @ rest if flat else (others.unsqueeze(-2) @ rest).squeeze(-2)), -1)
    return turned.transpose(-1, -2) if flat else turned


__all__ = ["SharedModel", "SharedRow", "share_heads"]
