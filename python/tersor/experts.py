"""Fused expert modules: `Experts` in the place of transformers' modules with 3-D parameters ``[experts, out, in]``."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats.base import Format, Shape
from .layer import _is_grad_enabled, _Multiply
from .ops import plain
from .ops_fused import eager_cuda

_UP = ("gate_up_proj", "up_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts the way transformers does: a 3-D ``gate_up_proj`` (or ``up_proj``) and a 3-D
    ``down_proj`` of as many experts, called with ``(hidden_states[, top_k_index, top_k_weights])``."""
    parameters = module._parameters
    up, down = next((parameters[name] for name in _UP if parameters.get(name) is not None), None), \
        parameters.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or len(up) != len(down):
        return False
    try:
        return _transposed(module) is not None and len(inspect.signature(module.forward).parameters) in (1, 2, 3)
    except (TypeError, ValueError):
        return False


def _up_name(module: nn.Module) -> str:
    return next(name for name in _UP if module._parameters.get(name) is not None)


def _transposed(module: nn.Module) -> bool | None:
    """Whether the parameters are ``[experts, in, out]``; None where their shapes fit neither way."""
    name = _up_name(module)
    (rows, columns), (down_rows, down_columns) = module._parameters[name].shape[1:], module.down_proj.shape[1:]
    fold = 2 if name == "gate_up_proj" else 1
    straight = columns == down_rows and rows == fold * down_columns
    turned = rows == down_columns and columns == fold * down_rows
    if straight and turned:
        return bool(getattr(module, "is_transposed", False))
    return turned if straight or turned else None


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The weights of an uncompressed expert module by projection, ``[experts, out, in]`` (views), up first."""
    names = (_up_name(module), "down_proj")
    turned = _transposed(module)
    return {name: module._parameters[name].detach().transpose(1, 2) if turned else module._parameters[name].detach()
            for name in names}


def expert_inputs(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor) -> Iterator[
        tuple[int, dict[str, Tensor]]]:
    """For each expert of an uncompressed module that tokens are routed to: its number, and by projection the inputs
    ``[tokens, in]`` of its matrices. ``hidden_states [tokens, hidden]``, ``top_k_index [tokens, k]``."""
    weights = matrices(module)
    up, down = weights
    count = len(weights[down])
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    for expert in top_k_index.unique().tolist():
        if 0 <= expert < count:
            rows = x[(top_k_index == expert).any(-1)]
            inner = F.linear(rows, weights[up][expert], _bias(module, up, expert))
            yield expert, {up: rows, down: _activate(module, inner)}


def _bias(module: nn.Module, projection: str, expert: int) -> Tensor | None:
    bias = module._parameters.get(projection + "_bias")
    return None if bias is None else bias[expert]


def _activate(module: nn.Module, inner: Tensor) -> Tensor:
    """Gate and activation between the two projections, by the module's own rule where it has one."""
    if module._parameters.get("gate_up_proj") is None and not getattr(module, "gated", False):
        return module.act_fn(inner)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(inner)
    if getattr(module, "is_concatenated", True):
        gate, up = inner.chunk(2, dim=-1)
    else:
        gate, up = inner[..., ::2], inner[..., 1::2]
    return module.act_fn(gate) * up


class Experts(nn.Module):
    """The experts of a mixture layer, every matrix of every expert stored in one format.

    Takes the place of a transformers expert module and is called like it: ``hidden_states [tokens, hidden]``,
    ``top_k_index`` and ``top_k_weights [tokens, k]`` give ``[tokens, hidden]``; indices beyond the last expert are
    skipped. Modules called with ``hidden_states`` alone (sorted by expert, as Llama 4 does) stay so. A format's
    tensors carry a leading expert dimension and the projection's name: ``gate_up_proj.qweight [experts, ...]``.
    Biases, activation and gating rule are the original's. Only the experts that were chosen are multiplied.
    """

    def __init__(self, module: nn.Module, format: Format, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        weights = matrices(module)
        self.projections: dict[str, Shape] = {name: tuple(w.shape[1:]) for name, w in weights.items()}
        self.num_experts = len(next(iter(weights.values())))
        self.format, self.weight_dtype = format, dtype or module.down_proj.dtype
        self.is_transposed = bool(_transposed(module))
        self.method = ""
        self._sorted = len(inspect.signature(module.forward).parameters) == 1
        device = module.down_proj.device if device is None else device
        self._names: dict[str, tuple[str, ...]] = {}
        self._bound: dict[str, tuple] = {}
        for projection, shape in self.projections.items():
            format.check(shape)
            spec = format.spec(shape, self.weight_dtype)
            self._names[projection] = tuple(spec)
            for name, tensor in spec.items():
                empty = torch.empty((self.num_experts, *tensor.shape), dtype=tensor.dtype, device=device)
                self.register_buffer(_buffer(projection, name), empty)
        for name, parameter in module._parameters.items():
            if name not in self.projections and parameter is not None:
                self.register_parameter(name, parameter)
        for name, child in module._modules.items():
            self.add_module(name, child)
        # The original without its matrices keeps the attributes that its gating rule reads; no part of the state.
        rule = copy.copy(module)
        rule._parameters = {k: p for k, p in module._parameters.items() if k not in self.projections}
        rule.__dict__["gated"] = "gate_up_proj" in self.projections
        self.__dict__["_rule"] = rule
        self.train(module.training)

    @classmethod
    def holding(cls, module: nn.Module, format: Format, device=None, dtype: torch.dtype | None = None) -> "Experts":
        """Experts like ``module``'s whose tensors wait for `load_tensors` or `load_expert`."""
        return cls(module, format, device, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(experts, rows, hidden)``: the up and down matrices of an expert, counted as one of ``rows`` rows."""
        hidden = self.projections["down_proj"][0]
        weights = sum(math.prod(shape) for shape in self.projections.values())
        return self.num_experts, weights // hidden, hidden

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, as ``projection.name``, each ``[experts, ...]``."""
        return {f"{projection}.{name}": self._buffers[_buffer(projection, name)]
                for projection, names in self._names.items() for name in names}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored tensors over (no copy). ValueError where a name, shape or dtype is not the format's."""
        held = self.tensors()
        if set(tensors) != set(held):
            raise ValueError(f"tensors of experts in {self.format}: found {sorted(tensors)}, accepted are "
                             f"{sorted(held)}")
        for name, tensor in tensors.items():
            if tensor.shape != held[name].shape or tensor.dtype != held[name].dtype:
                raise ValueError(f"tensor {name!r} of experts in {self.format}: found {tensor.dtype} "
                                 f"{list(tensor.shape)}, accepted is {held[name].dtype} {list(held[name].shape)}")
        self._bound.clear()
        for name, tensor in tensors.items():
            self._buffers[_buffer(*name.split(".", 1))] = tensor.contiguous()

    def load_expert(self, projection: str, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy what ``format.pack`` gave for one matrix of one expert into its place."""
        names = self._names[projection]
        self._bound.pop(projection, None)
        if set(tensors) != set(names):
            raise ValueError(f"tensors of {projection}[{expert}]: found {sorted(tensors)}, accepted are "
                             f"{sorted(names)}")
        for name in names:
            slot = self._buffers[_buffer(projection, name)][expert]
            if tensors[name].shape != slot.shape or tensors[name].dtype != slot.dtype:
                raise ValueError(f"tensor {name!r} of {projection}[{expert}]: found {tensors[name].dtype} "
                                 f"{list(tensors[name].shape)}, accepted is {slot.dtype} {list(slot.shape)}")
            slot.copy_(tensors[name])

    def weights(self, projection: str) -> Tensor:
        """The weights of a projection, ``[experts, out, in]`` in the model's dtype, computed at each call."""
        shape = self.projections[projection]
        return torch.stack([self.format.unpack(self._of(projection, e), shape, self.weight_dtype)
                            for e in range(self.num_experts)])

    def _of(self, projection: str, expert: int) -> dict[str, Tensor]:
        return {name: self._buffers[_buffer(projection, name)][expert] for name in self._names[projection]}

    def _linear(self, x: Tensor, projection: str, expert: int) -> Tensor:
        tensors, shape = self._of(projection, expert), self.projections[projection]
        bias = _bias(self, projection, expert)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        if _is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
            return _Multiply.apply(x, bias, self.format, shape, tuple(tensors), *tensors.values())
        return self.format.linear(x, tensors, bias, shape)

    def _linear_grouped(self, x: Tensor, ends: Tensor, projection: str) -> Tensor:
        bias = self._parameters.get(projection + "_bias")
        if bias is not None:
            bias = bias.detach().to(x.dtype).contiguous()
        held = {name: self._buffers[_buffer(projection, name)] for name in self._names[projection]}
        if (plain(x) or eager_cuda(x)) and (bound := self._bind_grouped(projection, held)) is not None:
            return bound(x, ends, bias)
        return self.format.linear_grouped(x, ends, held, bias, self.projections[projection])

    def _bind_grouped(self, projection: str, held: dict[str, Tensor]):
        """The format's short cut for the tensors that the buffers hold now, with the values that they have now."""
        bound, before = self._bound.get(projection, (None, ()))
        now = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in held.values()]
        if len(before) != len(now) or any(one is not other or version != then for (one, version), (other, then)
                                          in zip(now, before)):
            if now[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # what a graph makes has its values only when the graph runs
            bound = self.format.bind_grouped(held, self.projections[projection])
            self._bound[projection] = bound, now
        return bound

    def _grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """All experts on rows sorted by expert, one call for each projection."""
        up, down = self.projections
        y = self._linear_grouped(_activate(self._rule, self._linear_grouped(x, ends, up)), ends, down)
        return self.post_expert_norm(y) if getattr(self._rule, "has_post_expert_norm", False) else y

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        up, down = self.projections
        y = self._linear(_activate(self._rule, self._linear(x, up, expert)), down, expert)
        return self.post_expert_norm(y) if getattr(self._rule, "has_post_expert_norm", False) else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None,
                top_k_weights: Tensor | None = None) -> Tensor:
        hidden = self.projections["down_proj"][0]
        if hidden_states.shape[-1] != hidden:
            raise ValueError(f"input of experts of width {hidden}: found {list(hidden_states.shape)}, accepted is "
                             f"[tokens, {hidden}]")
        if not _is_grad_enabled() or not (hidden_states.requires_grad
                                          or any(parameter.requires_grad for parameter in self.parameters())):
            return self._inference(hidden_states, top_k_index, top_k_weights)
        if self._sorted:
            parts = hidden_states.view(self.num_experts, -1, hidden)
            return torch.stack([self._expert(part, e) for e, part in enumerate(parts)]).view(-1, hidden)
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue  # tokens that expert parallelism sends elsewhere
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            y = self._expert(hidden_states[token], expert) * top_k_weights[token, slot, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def _inference(self, x: Tensor, top_k_index: Tensor | None, top_k_weights: Tensor | None) -> Tensor:
        if self._sorted:
            each = x.shape[0] // self.num_experts
            ends = torch.arange(1, self.num_experts + 1, dtype=torch.int32, device=x.device) * each
            return self._grouped(x, ends)
        # Nothing here depends on values that would have to be read back, so a GPU's work can be captured in a graph.
        slots = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        experts, order = chosen.masked_fill(chosen < 0, self.num_experts).sort(stable=True)
        numbers = torch.arange(self.num_experts, dtype=experts.dtype, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        y = self._grouped(x[order // slots], ends) * top_k_weights.reshape(-1)[order, None]
        # Tokens that expert parallelism sends elsewhere come last; their rows may hold what post-processing made of 0.
        y = y.masked_fill((experts >= self.num_experts)[:, None], 0)
        restored = torch.empty_like(y)
        restored[order] = y
        return restored.view(*top_k_index.shape, restored.shape[-1]).sum(1).to(x.dtype)

    def _apply(self, fn, recurse=True):
        # Dtype casts of the model change the dtype of `weights`, never the stored tensors.
        stored = {id(tensor) for tensor in self.tensors().values()}
        device = next(iter(self.tensors().values())).device

        def keep(tensor):
            result = fn(tensor)
            return result if id(tensor) not in stored or result.dtype == tensor.dtype else tensor.to(result.device)

        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=device)).dtype
        return super()._apply(keep, recurse)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def kernel(self) -> str:
        """The kernel that runs for the chosen experts, or ``reference: why``."""
        device = next(iter(self.tensors().values())).device
        return self.format.kernel_grouped(self.projections["down_proj"], device)

    def __getstate__(self):
        return {**self.__dict__, "_bound": {}}

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in self.projections.items())
        return f"{self.num_experts} experts, {shown}, format={self.format}"


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``experts_implementation="tersor"`` runs (`transformers.integrations.moe.ExpertsInterface`): compressed
    experts grouped on their kernels, experts that were left as they are by transformers' own grouped product."""
    if isinstance(module, Experts):
        return module(hidden_states, top_k_index, top_k_weights)
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)


def _buffer(projection: str, name: str) -> str:
    return f"{projection}__{name.replace('.', '__')}"
