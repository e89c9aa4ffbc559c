"""FlatQuant: learned invertible maps of each input, a Kronecker product of two small matrices, that flatten what is
quantized."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from ..formats.base import Params
from ..formats.integer import Int, fit_groups
from ..methods.base import Method
from ..registry import register_method
from .definitions import hadamard_matrix, kronecker
from .graph import turn_rows, value_rows
from .group import BlockView, Group
from .steps import KEY_TRANSFORM, HeadMix, Kronecker

if TYPE_CHECKING:
    from ..kv.record import Seen

_LEAST = 1e-5  # of magnitudes and scales: dead channels have none
_CLIP = 4.0  # where the logits of clip ratios start: sigmoid(4) = 0.982


@register_method("flatquant")
@dataclass(frozen=True)
class FlatQuant(Method):
    """Learned Kronecker-factored affine transforms (Sun et al. 2024, arXiv 2410.09426).

    Each input of a block's layers gets a matrix ``P = P1 kron P2``, run online and undone in the weights; each factor
    is ``U diag(d) V^T`` with orthogonal U and V (Cayley maps), so that its inverse is known. With them are learned how
    far activations (per input) and weights (per row) are clipped. A block is trained on its own: what it computes
    quantized against what it computes unquantized, on the inputs that the compressed blocks before it give.
    Beforehand, scales ``max|W|^(1-smooth) / max|X|^smooth`` move outliers into the operation before, where one can take
    them over.

    ``steps`` of AdamW with ``batch`` sequences each, at ``lr`` (ten times that for clipping), which falls to a
    thousandth along a cosine; ``steps=0`` leaves Hadamard or random rotations. ``smooth`` 0: no scales.

    ``kv``: bits of the cache that the model is for; below 16 each block also learns a map P of its keys (after rotary
    embedding; queries are multiplied by its inverse transpose) with keys and values rounded as ``K4V4`` does. It is a
    buffer ``key_transform [head_dim, head_dim]`` of the attention module, saved with the model; nothing but
    ``tersor.Cache(model, "flatquant:K4V4")`` uses it. ValueError for formats that are not integers, and with ``kv`` for
    blocks without one attention of transformers' interface.
    """

    steps: int = 60
    batch: int = 4
    lr: float = 5e-3
    smooth: float = 0.3
    seed: int = 0
    kv: int = 16

    needs = frozenset({"abs_max", "inputs"})
    transforms = True
    chooses = False

    def __post_init__(self):
        if self.steps < 0 or self.batch < 1 or not self.lr > 0:
            raise ValueError(f"options 'steps', 'batch' and 'lr': found {self.steps}, {self.batch} and {self.lr}, "
                             "accepted are 0 or more steps, 1 or more sequences and a positive rate")
        if self.kv not in (2, 3, 4, 8, 16):
            raise ValueError(f"option 'kv': found {self.kv}, accepted are 2, 3, 4, 8 bits, and 16 for no map of keys")
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"option 'smooth': found {self.smooth}, accepted are numbers from 0 to 1")

    def transform_block(self, block: BlockView) -> None:
        attention = None if self.kv == 16 else find_attention(block.module)
        for group in block.groups:
            for name, fmt in group.formats.items():
                if not isinstance(fmt, Int):
                    raise ValueError(f"flatquant: layer {name!r}: found format {fmt}, accepted are integer formats "
                                     "such as W4A4")
            if self.smooth and group.producer is not None:
                group.fold(self._scales(group))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            flats = make_flats(block.groups)
            keys = None if attention is None else Keys(attention, self.kv)
        if self.steps:
            train(block, flats, self, keys)
        for flat in flats:
            flat.fold()
        for flat in flats:
            flat.finish()
        if keys is not None:
            keys.finish(next(block.module.parameters()).dtype)

    def transform(self, group: Group) -> str:
        return "flatquant: transformed online"

    def _scales(self, group: Group) -> Tensor:
        largest = group.tie(self.require(group.stats, "abs_max").abs_max).clamp(min=_LEAST)
        weights = group.tie(torch.stack([group.weight(name).abs().amax(0) for name in group.names]).amax(0))
        weights = weights.clamp(min=_LEAST).to(largest)
        return (largest.pow(self.smooth) / weights.pow(1 - self.smooth)).clamp(min=_LEAST)


class Factor(nn.Module):
    """A square matrix ``U diag(d) V^T`` and its inverse's transpose."""

    def __init__(self, size: int):
        super().__init__()
        try:
            start = hadamard_matrix(size).float() / size**0.5
        except ValueError:
            start = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].float()
        for name, value in (("u", start), ("v", torch.eye(size))):
            linear = nn.Linear(size, size, bias=False)
            orthogonal(linear, orthogonal_map="cayley")
            linear.weight = value
            setattr(self, name, linear)
        self.d = nn.Parameter(torch.ones(size))

    def forward(self, inverse: bool = False) -> Tensor:
        return (self.u.weight * (1 / self.d if inverse else self.d)) @ self.v.weight.T


class Flat(nn.Module):
    """The transform of one input while it is trained, and the clip ratios that belong to it.

    ``head``: of so many channels are the heads of values that come in; the right factor is then folded where they are
    made, and the left one runs online alone. ``turned``: this group's layers that make such values for another, with
    their rows ``[kv_heads, head]`` and the factor.
    """

    def __init__(self, group: Group, head: int = 0):
        super().__init__()
        self.group, self.width, self.head = group, group.in_features, head
        self.turned: dict[str, tuple[Tensor, Factor]] = {}
        first, second = (self.width // head, head) if head else Kronecker.factors(self.width)
        self.left, self.right = Factor(first), Factor(second)
        self.input_clip = nn.Parameter(torch.tensor(_CLIP))
        self.weight_clips = nn.ParameterList(
            nn.Parameter(torch.full((group.weight(name).shape[0], 1), _CLIP)) for name in group.names)
        self.weights = {name: group.weight(name).float() for name in group.names}

    def clips(self) -> list[Tensor]:
        return [torch.sigmoid(clip) for clip in self.weight_clips]

    def quantized_weight(self, name: str) -> Tensor:
        w = kronecker(self.weights[name], self.left(inverse=True), self.right(inverse=True))
        w = self._turn(w, name)
        fmt = self.group.formats.get(name)
        if fmt is None:
            return w
        return fake_weight(w, fmt, torch.sigmoid(self.weight_clips[self.group.names.index(name)]))

    def bias(self, module: nn.Module, name: str) -> Tensor | None:
        bias = module._parameters.get("bias")
        return None if bias is None else self._turn(bias.float(), name)

    def _turn(self, values: Tensor, name: str) -> Tensor:
        if name not in self.turned:
            return values
        heads, factor = self.turned[name]
        return turn_rows(values, heads, factor())

    def quantized_input(self, x: Tensor, name: str) -> Tensor:
        y = kronecker(x, self.left(), None if self.head else self.right())
        fmt = self.group.formats.get(name)
        return y if fmt is None or fmt.activation == 16 else fake_input(y, fmt, torch.sigmoid(self.input_clip))

    @torch.no_grad()
    def fold(self) -> None:
        """Give the group the transform."""
        if self.head:
            self.group.turn_heads(self.right())
        self.group.insert(HeadMix(self.left()) if self.head else Kronecker(self.left(), self.right()))

    @torch.no_grad()
    def finish(self) -> None:
        """Give its layers' formats and parameters the clip ratios; what other groups fold into them is there."""
        group = self.group
        clip = round(float(torch.sigmoid(self.input_clip)), 4)
        for name, ratio in zip(group.names, self.clips()):
            fmt = group.formats.get(name)
            if fmt is None:
                continue
            if fmt.activation != 16:
                group.formats[name] = fmt = dataclasses.replace(fmt, act_clip=min(clip, fmt.act_clip))
            w = group.weight(name)
            params = fmt.fit(w * ratio.to(w), dtype=group.dtype)
            group.params[name] = Params(params)


def make_flats(groups: Sequence[Group]) -> list[Flat]:
    """The transforms of a block's inputs; what attention mixes of values that are made in one of the groups gets a map
    among heads, and one of each head's channels that is folded there."""
    made: dict[str, Flat] = {}
    flats = []
    for group in groups:
        producer = group.producer
        maker = made.get(producer.name) if producer is not None and producer.head else None
        flats.append(flat := Flat(group, producer.head if maker is not None else 0))
        if maker is not None:
            maker.turned[producer.name] = value_rows(producer), flat.right
        made.update(dict.fromkeys(group.names, flat))
    return flats


def find_attention(block: nn.Module) -> nn.Module:
    """The attention of a block: one module with a configuration, a layer's index and a head dimension."""
    found = [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)
             and isinstance(getattr(module, "head_dim", None), int)
             and getattr(getattr(module, "config", None), "_attn_implementation", None)]
    if len(found) != 1:
        raise ValueError(f"flatquant: kv: found {len(found)} attentions of transformers' interface in "
                         f"{type(block).__name__}, accepted are blocks with one; kv=16 leaves keys as they are")
    return found[0]


class Keys(nn.Module):
    """The map of a block's keys while it is trained, with what a cache of ``bits`` does to keys and values."""

    def __init__(self, attention: nn.Module, bits: int):
        from ..kv.store import value_group  # the cache is above layers and their transforms

        super().__init__()
        self.value_group = value_group(attention.head_dim, 64)
        self.factor, self.bits = Factor(attention.head_dim), bits
        self.held = [attention]  # not a part of this module

    def take(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention over a packed cache sees them."""
        turn, back = self.factor().to(seen.key), self.factor(inverse=True).to(seen.key)
        # a channel of keys over 64 tokens, a token's values over 64 channels or so: the defaults of K4V4
        keys = fake_cache(seen.key @ turn, self.bits, 2, 64)
        values = fake_cache(seen.value, self.bits, 3, self.value_group)
        return seen.query @ back, keys, values

    @torch.no_grad()
    def finish(self, dtype: torch.dtype) -> None:
        self.held[0].register_buffer(KEY_TRANSFORM, self.factor().detach().to(dtype))


def train(block: BlockView, flats: list[Flat], options: FlatQuant, keys: Keys | None = None) -> None:
    """Fit transforms and clip ratios of a block to what it computes unquantized."""
    expected = [block.run(b).float() for b in range(block.batches)]
    maps = [p for flat in flats for part in (flat.left, flat.right) for p in part.parameters()]
    maps += [] if keys is None else list(keys.parameters())
    clips = [p for flat in flats for p in (flat.input_clip, *flat.weight_clips)]
    optimizer = torch.optim.AdamW([{"params": maps, "lr": options.lr}, {"params": clips, "lr": 10 * options.lr}],
                                  weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, options.lr * 1e-3)
    order = torch.Generator().manual_seed(options.seed)
    seen = contextlib.nullcontext()
    if keys is not None:
        from ..kv.record import recording_block

        seen = recording_block(keys.held[0], keys.take)
    with torch.enable_grad(), _standing_in(block, flats) as refresh, seen:
        for _ in range(options.steps):
            picked = torch.randperm(block.batches, generator=order)[:options.batch].tolist()
            optimizer.zero_grad()
            with parametrize.cached():
                refresh()
                for b in picked:
                    error = F.mse_loss(block.run(b).float(), expected[b])
                    # Divided by its own value, so that blocks of any scale learn at one rate.
                    loss = error / error.detach().clamp_min(1e-30) / len(picked)
                    loss.backward(retain_graph=b != picked[-1], inputs=maps + clips)
            optimizer.step()
            schedule.step()


@contextlib.contextmanager
def _standing_in(block: BlockView, flats: list[Flat]) -> Iterator[Callable[[], None]]:
    """While it lasts, a block's layers compute with the transforms and quantizers in training; the function that it
    gives computes the quantized weights anew."""
    weights: dict[str, Tensor] = {}
    inputs: dict[Flat, tuple[Tensor, Tensor]] = {}  # the last input of each group, and what it was quantized to

    def refresh() -> None:
        inputs.clear()
        weights.update({name: flat.quantized_weight(name) for flat in flats for name in flat.group.names})

    def forward_of(flat: Flat, name: str, module: nn.Module):
        def forward(x: Tensor) -> Tensor:
            if flat not in inputs or inputs[flat][0] is not x:
                inputs[flat] = x, flat.quantized_input(x.float(), name)
            return F.linear(inputs[flat][1], weights[name], flat.bias(module, name)).to(x.dtype)

        return forward

    modules = []
    try:
        for flat in flats:
            for name in flat.group.names:
                modules.append(block.module.get_submodule(name))
                modules[-1].forward = forward_of(flat, name, modules[-1])
        yield refresh
    finally:
        for module in modules:
            del module.forward  # the class's own again


def round_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of ``x``."""
    return x + (x.round() - x).detach()


def fake_weight(w: Tensor, fmt: Int, clip: Tensor) -> Tensor:
    """``w [out, in]`` as ``fmt`` stores it from ranges of ``clip [out, 1]`` times the groups', differentiable."""
    size = fmt.group_size or w.shape[1]
    groups = F.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))
    with torch.no_grad():
        scale, zero = fit_groups(w, fmt.num_bits, fmt.group_size, fmt.symmetric, 1, torch.float32)
    high = groups.abs().amax(2) if fmt.symmetric else groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    step = clip * high * (2 if fmt.symmetric else 1) / fmt.levels
    step = torch.where(step > 0, step, scale)[..., None]
    q = (round_through(groups / step) + zero[..., None]).clamp(0, fmt.levels) - zero[..., None]
    return (q * step).flatten(1)[:, : w.shape[1]]


def fake_cache(x: Tensor, bits: int, axis: int, size: int) -> Tensor:
    """``x`` rounded to ``bits`` between the extremes of each ``size`` numbers along ``axis`` (fewer in the last group),
    as packed pages of a cache are, differentiable."""
    parts = []
    for part in x.split(size, axis):
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        parts.append(round_through((part - low) / step) * step + low)
    return torch.cat(parts, axis)


def fake_input(x: Tensor, fmt: Int, clip: Tensor) -> Tensor:
    """``x [..., in]`` as the kernels of ``fmt`` see it with ranges of ``clip`` times the groups', differentiable."""
    size = fmt.act_group or x.shape[-1]
    groups = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    if fmt.act_sym:
        top = 2 ** (fmt.activation - 1) - 1
        step = (clip * groups.abs().amax(-1, keepdim=True) / top).clamp_min(1e-30)
        q = round_through(groups / step).clamp(-top, top)
    else:
        levels = 2**fmt.activation - 1
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = (clip * (high - low) / levels).clamp_min(1e-30)
        zero = (-clip * low / step).detach().round().clamp(0, levels)
        q = (round_through(groups / step) + zero).clamp(0, levels) - zero
    return (q * step).flatten(-2)[..., : x.shape[-1]]
