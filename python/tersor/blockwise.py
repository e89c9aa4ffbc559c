"""What lies between the layers of an encoder in small integers: blockwise compression (BCT, arXiv 2304.01483).

    tersor.compress(model, {"*": "bct:W8A8[group=64,act_group=64]", "*embeddings*": "bct:W8A16[group=64]"})
    tersor.blockwise.convert(model, bits=8)

An intermediate result is integers of ``bits`` bits, each block of ``block`` neighbours under a power of two 2^-e of its
own. Normalisation works on integers of 16 bits, with sums in 64; GELU and the exponential are tables over all integers
of a block, one for each shift; the products of attention multiply integers, block by block. The abstract of the paper
gives the idea; block sizes, tables and the widths in between are ours. Computed by torch: exact, and no faster than
torch.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "tersor_blockwise"
_WIDE = 16  # bits of what normalisation computes with
_WIDEST = 1 << 16  # numbers that it takes: their sums of squares, times their number, are below 2^62
_FRACTION = 1 << 15  # of exponentials in fixed point
_SHIFTS = (-126, 126)
_CHANGING = ("softcap", "s_aux")  # options of attentions that would change its result


def shifts(largest: Tensor, bits: int) -> Tensor:
    """The largest e (int32) with ``largest * 2^e <= 2^(bits-1) - 1``; 0 for blocks of zeros."""
    fraction, exponent = torch.frexp(largest.float())  # largest = fraction * 2^exponent, 1/2 <= fraction < 1
    top = 2 ** (bits - 1) - 1
    e = bits - 1 - exponent.int()
    e = torch.where(torch.ldexp(fraction.float(), torch.full_like(e, bits - 1)) > top, e - 1, e)
    return torch.where(largest > 0, e, 0).clamp(*_SHIFTS).to(torch.int32)


@dataclass(frozen=True)
class Blocks:
    """Integers ``codes`` int32 ``[..., blocks, block]`` that stand for ``codes * 2^-shift``, ``shift`` int32
    ``[..., blocks, 1]``; ``width`` numbers of the last dimension are real, the rest is padding."""

    codes: Tensor
    shift: Tensor
    width: int

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers ``[..., width]``."""
        return torch.ldexp(self.codes.to(dtype), -self.shift).flatten(-2)[..., : self.width]


def quantize(x: Tensor, bits: int, block: int = 0) -> Blocks:
    """``x [..., width]`` in blocks of ``block`` (0: the whole last dimension) of ``bits`` bits, rounded to nearest
    even. A number with NaN or Inf in its block is refused with ValueError: integers have neither."""
    width = x.shape[-1]
    size = block or max(width, 1)
    blocks = F.pad(x.float(), (0, -width % size)).unflatten(-1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("blockwise: found NaN or Inf, accepted are finite numbers")
    e, top = shifts(largest, bits), 2 ** (bits - 1) - 1
    return Blocks(torch.ldexp(blocks, e).round().clamp(-top, top).to(torch.int32), e, width)


def matmul(a: Blocks, b: Blocks) -> Tensor:
    """``a [..., m, k] @ b[..., n, k]^T`` in float32: integer sums over each pair of blocks along k, shifted by both
    blocks' shifts, and added up."""
    total = None
    for i in range(a.codes.shape[-2]):
        # Sums of products of at most 16 bits each, over a block: exact in float64.
        dot = a.codes[..., i, :].double() @ b.codes[..., i, :].double().transpose(-1, -2)
        part = torch.ldexp(dot, -(a.shift[..., i, :] + b.shift[..., i, :].transpose(-1, -2)))
        total = part if total is None else total + part
    return total.float()


@functools.lru_cache(maxsize=512)
def table(function: str, shift: int, bits: int) -> Tensor:
    """A function at all integers of ``bits`` bits (from ``-2^(bits-1)`` on) times ``2^-shift``, float32."""
    x = torch.ldexp(torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64), torch.tensor(-shift))
    return {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
            "tanh": torch.tanh, "exp": torch.exp}[function](x).float()


def through_table(x: Blocks, function: str, bits: int) -> Tensor:
    """A function of each number, read from the table of its block's shift; ``[..., width]``."""
    out = torch.empty(x.codes.shape, dtype=torch.float32, device=x.codes.device)
    for shift in x.shift.unique().tolist():
        where = (x.shift == shift).expand_as(x.codes)
        out[where] = table(function, shift, bits).to(out.device)[x.codes[where].long() + 2 ** (bits - 1)]
    return out.flatten(-2)[..., : x.width]


def softmax(scores: Tensor, bits: int) -> Tensor:
    """Along the last dimension: differences to the maximum in ``bits + 1`` bits, exponentials by table in fixed point
    of 15 bits, an integer sum and one division. -inf is a weight of 0; a row of -inf gives zeros."""
    top = scores.amax(-1, keepdim=True)
    seen = torch.isfinite(scores)
    below = torch.where(seen, scores - torch.where(torch.isfinite(top), top, 0.0), 0.0)
    x = quantize(below.clamp_min(-16.0), bits + 1)  # exp(-16) is nothing in 15 bits
    weights = (through_table(x, "exp", bits + 1) * _FRACTION).round().to(torch.int64) * seen
    return weights.float() / weights.sum(-1, keepdim=True).clamp_min(1).float()


class LayerNorm(nn.LayerNorm):
    """Normalisation of integers of 16 bits: sums and squares in 64 bits, exact up to 65536 numbers; what leaves is
    rounded. ``blockwise`` is ``(bits, block)``."""

    blockwise = 8, 64

    def forward(self, x: Tensor) -> Tensor:
        wide, n = quantize(x, _WIDE), x.shape[-1]
        codes, e = wide.codes[..., 0, :].long(), wide.shift[..., 0, :].double()
        total = codes.sum(-1, keepdim=True)
        # n^2 times the codes' variance. Either term is at most n^2 * 2^30.
        square = n * codes.square().sum(-1, keepdim=True) - total.square()
        epsilon = n**2 * self.eps * torch.exp2(2 * e)
        y = ((codes * n - total).double() / (square.double() + epsilon).sqrt()).float()
        y = y * self.weight.float() + (0 if self.bias is None else self.bias.float())
        return quantize(y, *self.blockwise).values().to(x.dtype)


class Activation(nn.Module):
    """A function of one number by table; input and output in blocks. ``blockwise`` is ``(bits, block)``."""

    def __init__(self, function: str, bits: int, block: int):
        super().__init__()
        self.function, self.blockwise = function, (bits, block)

    def forward(self, x: Tensor) -> Tensor:
        y = through_table(quantize(x, *self.blockwise), self.function, self.blockwise[0])
        return quantize(y, *self.blockwise).values().to(x.dtype)

    def extra_repr(self) -> str:
        return "{}, bits={}, block={}".format(self.function, *self.blockwise)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None,
              position_bias=None, **options):
    """As transformers' interface has it, without dropout; operands and weights in integers of ``module.blockwise``
    ``(bits, block)``. Modules without it, which only share a configuration with converted ones, run as before."""
    if not hasattr(module, "blockwise"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, position_bias=position_bias, **options)
    if dropout:
        raise ValueError("blockwise attention: found dropout, accepted is model.eval()")
    other = next((name for name in _CHANGING if options.get(name) is not None), None)
    if other is not None:
        raise ValueError(f"blockwise attention: {type(module).__name__}: found {other}, accepted is plain softmax")
    bits, block = module.blockwise
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = matmul(quantize(query, bits, block), quantize(key, bits, block)) * scaling
    if position_bias is not None:
        scores = scores + position_bias.float()
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        lowest = torch.finfo(attention_mask.dtype).min / 2
        scores = torch.where(attention_mask <= lowest, float("-inf"), scores + attention_mask.float())
    elif getattr(module, "is_causal", False) if is_causal is None else is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~allowed.tril(scores.shape[-1] - scores.shape[-2]), float("-inf"))
    # Values have a shift for each token, so that no token's rounding depends on later or hidden ones.
    weights, held = quantize(softmax(scores, bits), bits, block), quantize(value, bits, block)
    out = (weights.values(torch.float64) @ held.values(torch.float64)).float()
    return out.transpose(1, 2).contiguous().to(query.dtype), None


_FUNCTIONS = {"GELUActivation": "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
              "FastGELUActivation": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "ReLU": "relu", "SiLU": "silu",
              "SiLUActivation": "silu", "Tanh": "tanh"}


_ACTIVATIONS = "torch.nn.modules.activation", "transformers.activations"
_ATTENTION = "attention in blocks"


def convert(model: nn.Module, bits: int = 8, block: int = 64, attention_bits: int | None = None) -> dict[str, str]:
    """Exchange normalisation, activation functions and attention of an encoder of transformers, in place; returns what
    became of each module, by name. ``attention_bits``: of attention's products and softmax (None: ``bits``). What was
    converted before is converted anew.

    Normalisations, activations and attentions that are not known stay as they are: the returned texts say "left as it
    is", and one UserWarning names them all. Functions that a model calls without a module are not seen.

    Linear layers and embeddings are compressed by `tersor.compress` with the method ``bct``. `tersor.save` keeps the
    conversion with them, `tersor.load` makes it again. ValueError for other than 4 to 8 bits, and for models with none
    of these modules.
    """
    attention_bits = bits if attention_bits is None else attention_bits
    for name, found, low, high in (("bits", bits, 4, 8), ("attention_bits", attention_bits, 4, 8),
                                   ("block", block, 1, _WIDEST)):
        if type(found) is not int or not low <= found <= high:
            raise ValueError(f"{name}: found {found}, accepted are {low} to {high}")
    kinds = {name: _kind(module) for name, module in model.named_modules(remove_duplicate=False)}
    made = exchange(model, {name: (attention_bits if kind == _ATTENTION else bits, block)
                            for name, kind in kinds.items() if kind})
    if not made:
        raise ValueError(f"blockwise: found nothing to exchange in {type(model).__name__}, accepted are models with "
                         "nn.LayerNorm, GELU-like modules or transformers' attention interface")
    left = {name: type(module).__name__ for name, module in model.named_modules()
            if name not in made and _unknown(module)}
    if left:
        warnings.warn("blockwise: left as they are: " + ", ".join(f"{name} ({kind})" for name, kind in left.items()),
                      stacklevel=2)
    return made | {name: f"left as it is: {kind}" for name, kind in left.items()}


def settings(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``(bits, block)`` of each module that was converted, by name."""
    return {name: module.blockwise for name, module in model.named_modules(remove_duplicate=False)
            if hasattr(module, "blockwise")}


def exchange(model: nn.Module, settings: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Exchange the modules that `settings` names, in place; returns what became of each. ValueError, before anything
    is changed, for names of no module that can be."""
    modules = dict(model.named_modules(remove_duplicate=False))
    made = {name: _kind(modules[name]) if name in modules else "" for name in settings}
    for name, kind in made.items():
        if not kind:
            found = type(modules[name]).__name__ if name in modules else "no module"
            raise ValueError(f"blockwise: {name!r}: found {found}, accepted are nn.LayerNorm, GELU-like modules and "
                             "attentions on transformers' interface")
    if _ATTENTION in made.values():
        _set_attention(modules.values())
    for name, (bits, block) in settings.items():
        module = modules[name]
        if isinstance(module, nn.LayerNorm):
            module.__class__ = LayerNorm
        elif made[name] == _ATTENTION:
            module.config._attn_implementation = ATTENTION  # parts of a model have no method that sets it
        elif not isinstance(module, Activation):
            model.set_submodule(name, Activation(_function(module), bits, block))
            continue
        module.blockwise = bits, block
    return made


def _set_attention(modules) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    for module in modules:
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(ATTENTION)


def _function(module: nn.Module) -> str | None:
    """The name of a module's function, where there is a table of it."""
    if isinstance(module, Activation):
        return module.function
    function = _FUNCTIONS.get(type(module).__name__)
    return "gelu_tanh" if function == "gelu" and getattr(module, "approximate", "none") == "tanh" else function


def _kind(module: nn.Module) -> str:
    """What becomes of a module; empty where it stays as it is."""
    if type(module) in (nn.LayerNorm, LayerNorm):
        fits = len(module.normalized_shape) == 1 and module.normalized_shape[0] <= _WIDEST
        return "normalisation in 16 bits, output in blocks" if fits and module.weight is not None else ""
    forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if forward is not None and "ALL_ATTENTION_FUNCTIONS" in forward.co_names:
        return _ATTENTION
    function = _function(module)
    return f"{function} by table" if function else ""


def _unknown(module: nn.Module) -> bool:
    """Whether a module is a normalisation, an activation function or the innermost attention, by its class."""
    kind = type(module)
    if "Attention" in kind.__name__:
        return not any("Attention" in type(inner).__name__ for inner in module.modules() if inner is not module)
    return kind.__module__ in _ACTIVATIONS or "Norm" in kind.__name__ and not module._modules
