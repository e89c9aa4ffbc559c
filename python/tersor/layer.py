"""The layers that hold a format's tensors: `Linear` in the place of ``nn.Linear``, `Embedding` of ``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, ops_fused
from .formats.base import Format, Shape
from .formats.byte_scales import ByteScales
from .formats.inputs import Bound as BoundRounded
from .formats.integer import TILE_ROWS, Int
from .formats.mixed import MixedInputs
from .ops_float_steps import BoundFloatFused
from .ops_fused import BoundFusedCuda, BoundIntLinearFused, BoundLowbitCuda, Producer
from .registry import Resolved, resolve, resolve_format
from .stored_weight import StoredWeight
from .transforms.steps import Step

_is_grad_enabled = torch.is_grad_enabled
_UNBOUND = (None, (("", None, None),))  # holds nothing that a layer could hold


class _Multiply(torch.autograd.Function):
    """``format.linear`` with the exact gradient to the input, through the compressed weight."""

    @staticmethod
    def forward(ctx, x, bias, format, shape, names, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.format, ctx.shape, ctx.names = format, shape, names
        return format.linear(x, dict(zip(names, tensors)), bias, shape)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            w = ctx.format.unpack(dict(zip(ctx.names, ctx.saved_tensors)), ctx.shape, grad.dtype)
            grad_x = grad @ w
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, None, None, *([None] * len(ctx.names))


class _Compressed:
    """What `Linear` and `Embedding` share: a format's tensors as buffers, and a weight that is computed from them."""

    format: Format
    shape: Shape

    def _hold(self, format: Format, shape: Shape, dtype: torch.dtype, device) -> None:
        format.check(shape)
        self.format, self.shape, self.weight_dtype = format, shape, dtype
        spec = format.spec(shape, dtype)
        self._names = tuple(spec)
        for name, tensor in spec.items():
            self.register_buffer(_buffer(name), torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, under the format's names."""
        return {name: self._buffers[_buffer(name)] for name in self._names}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored tensors over (no copy). ValueError where a name, shape or dtype is not the format's."""
        spec = self.format.spec(self.shape, self.weight_dtype)
        if set(tensors) != set(spec):
            raise ValueError(f"tensors of {self.format}: found {sorted(tensors)}, accepted are {sorted(spec)}")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != tuple(spec[name].shape) or tensor.dtype != spec[name].dtype:
                raise ValueError(
                    f"tensor {name!r} of {self.format} for a {self.shape[0]} x {self.shape[1]} weight: found "
                    f"{tensor.dtype} {list(tensor.shape)}, accepted is {spec[name].dtype} {list(spec[name].shape)}"
                )
        for name, tensor in tensors.items():
            self._buffers[_buffer(name)] = tensor.contiguous()

    @property
    def weight(self) -> Tensor:
        """The weight that the stored tensors stand for, ``[out, in]`` in the model's dtype. Its values are computed
        each time they are used; writing to it raises AttributeError."""
        return self.dequantize() if torch.compiler.is_compiling() else StoredWeight(self)

    def dequantize(self) -> Tensor:
        """The weight as a new plain tensor, ``[out, in]`` in the model's dtype."""
        return self.format.unpack(self.tensors(), self.shape, self.weight_dtype)

    @weight.setter
    def weight(self, value) -> None:
        raise AttributeError(
            f"the weight of a layer in format {self.format} is stored compressed and cannot be assigned; compress a "
            "new nn.Linear with tersor.Linear.from_linear, and leave adapters unmerged"
        )

    def _apply(self, fn, recurse=True):
        # Dtype casts of the model change what `.weight` returns, never the stored tensors.
        stored = {id(self._buffers[_buffer(name)]) for name in self._names}
        probe = torch.empty(0, dtype=self.weight_dtype, device=next(iter(self._buffers.values())).device)

        def keep(tensor):
            result = fn(tensor)
            return result if id(tensor) not in stored or result.dtype == tensor.dtype else tensor.to(result.device)

        self.weight_dtype = fn(probe).dtype
        return super()._apply(keep, recurse)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _buffer(name: str) -> str:
    return name.replace(".", "__")


class Linear(_Compressed, nn.Linear):
    """``y = post(pre(x) @ W.T + bias)`` with ``W [out_features, in_features]`` stored in a format.

    A subclass of ``nn.Linear``, so adapters and model code treat it as one. ``x`` is ``[..., in_features]`` in
    float32, bfloat16 or float16; ``y`` has its dtype. The gradient to ``x`` is exact; the weight has none.
    """

    def __init__(self, in_features: int, out_features: int, format: Format | str, bias: bool = False,
                 dtype: torch.dtype = torch.bfloat16, device=None, pre: Sequence[Step] = (),
                 post: Sequence[Step] = ()):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        if isinstance(format, str):
            format = resolve_format(format)
        self._hold(format, (out_features, in_features), dtype, device)
        bias_values = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", nn.Parameter(bias_values, requires_grad=False) if bias else None)
        self.pre = nn.ModuleList(pre) if pre else None
        self.post = nn.ModuleList(post) if post else None
        self.siblings: Siblings | None = None
        self._bound, self._fused = _UNBOUND, (None, ())
        self.method = ""

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: str | Resolved, inputs: Tensor | None = None) -> "Linear":
        """Compress one ``nn.Linear``.

        ``spec``: such as ``rtn:W4A16``; ``inputs [..., in_features]``: samples of the layer's input, for methods that
        need statistics. ValueError for weights that are not finite, missing inputs, and unknown specs.
        """
        from .methods import compress_weight  # methods sit above layers' formats and below this constructor's users

        resolved = spec if isinstance(spec, Resolved) else resolve(spec)
        choice = compress_weight(linear.weight.detach(), resolved, inputs)
        layer = cls.holding(linear, resolved.format, pre=choice.pre)
        layer.load_tensors(resolved.format.pack(choice.w_hat, choice.params))
        layer.method = resolved.method_text
        return layer

    @classmethod
    def holding(cls, linear: nn.Linear, format: Format, device=None, pre: Sequence[Step] = (),
                post: Sequence[Step] = ()) -> "Linear":
        """A layer of ``linear``'s shape, dtype and bias (shared) whose tensors wait for `load_tensors`."""
        layer = cls(linear.in_features, linear.out_features, format, False, _dtype(linear),
                    device if device is not None else _device(linear), pre, post)
        bias = linear._parameters.get("bias")
        if bias is not None:
            layer.bias = bias
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.siblings is not None and self.siblings.usable(x):
            return self.siblings(self, x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input of a layer {self.in_features} -> {self.out_features}: found {list(x.shape)}, "
                             f"accepted is [..., {self.in_features}]")
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        differentiates = _is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
        if self.pre is not None:
            if not differentiates and self._direct(x) and (fused := self._bind_fused()) is not None:
                return self._after(fused(x, [bias])[0])
            for step in self.pre:
                x = step(x)
        if differentiates:
            tensors = self.tensors()
            y = _Multiply.apply(x, bias, self.format, self.shape, self._names, *tensors.values())
        elif self._direct(x) and (bound := self._bind()) is not None:
            y = bound(x, bias)
        else:
            y = self.format.linear(x, self.tensors(), bias, self.shape)
        return self._after(y)

    def _direct(self, x: Tensor) -> bool:
        """Whether a bound call may take ``x``: nothing watches it, and what is bound runs on its device."""
        return ops.plain(x) or ops_fused.eager_cuda(x) and _on_cuda(self._bind())

    def _after(self, y: Tensor) -> Tensor:
        if self.post is not None:
            for step in self.post:
                y = step(y)
        return y

    def _bind(self):
        """The format's short cut for the tensors that the buffers hold now."""
        bound, held = self._bound
        buffers = self._buffers
        for name, tensor, version in held:
            if buffers.get(name) is not tensor or tensor is None or version is not None and tensor._version != version:
                break
        else:
            return bound
        tensors = self.tensors()
        bound = self.format.bind(tensors, self.shape)
        # What is bound mostly reads the stored tensors; copies of them must not outlive their values.
        self._bound = bound, tuple(
            (_buffer(name), tensor, tensor._version if self.format.bind_copies and not tensor.is_inference() else None)
            for name, tensor in tensors.items())
        return bound

    def _bind_fused(self) -> BoundIntLinearFused | BoundFloatFused | BoundFusedCuda | None:
        """One call for the online step and the multiplication, where a kernel does both."""
        bound = self._bind()
        held = bound, *(tensor for step in self.pre for tensor in step._buffers.values())
        fused, before = self._fused
        if len(held) != len(before) or any(one is not other for one, other in zip(held, before)):
            fused = None if bound is None else fuse([bound], self.pre, self.format.producer(self.tensors()))
            self._fused = fused, held
        return fused

    @property
    def kernel(self) -> str:
        """The kernel that runs here, or ``reference: why``; then the online steps that torch runs beside it, and why.
        What runs inside the kernel is not named."""
        name = self.format.kernel(self.shape, _device(self))
        if self.pre is not None:
            fused = self._bind_fused()
            why = "no kernel runs it" if fused is None else \
                fused.rounding.refusal if isinstance(fused, BoundFusedCuda) else None
            name += f"; {_kinds(self.pre)} step by torch: {why}" if why is not None else ""
        return name if self.post is None else f"{name}; {_kinds(self.post)} step behind it by torch: no kernel runs it"

    def __getstate__(self):
        return {**self.__dict__, "_bound": _UNBOUND, "_fused": (None, ())}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def _kinds(steps: Sequence[Step]) -> str:
    return ", ".join(step.kind for step in steps)


def _on_cuda(bound) -> bool:
    """Whether a format's short cut runs on a GPU."""
    return isinstance(getattr(bound, "weights", bound), BoundLowbitCuda)


def fuse(bound: list, steps: Sequence[Step] | None, own: dict | None) \
        -> BoundIntLinearFused | BoundFloatFused | BoundFusedCuda | None:
    """Bound multiplications of one input with the step before them in one call; None where no kernel does that.
    ``own``: what the format adds (`Format.producer`)."""
    steps = steps or ()
    bound = [getattr(member, "weights", member) for member in bound]
    kinds = {type(member) for member in bound}
    if own is None or len(steps) > 1 or kinds not in ({ops.BoundIntLinear}, {BoundLowbitCuda}, {BoundRounded}):
        return None
    made = steps[0].producer() if steps else {}
    if steps and not made or not (made or own):
        return None
    return (BoundFloatFused if kinds == {BoundRounded} else ops_fused.bound_fused)(bound, Producer(**made, **own))


class Siblings:
    """Projections of one input (q/k/v, gate/up) that run as one kernel call.

    The first one called multiplies for all; the others pick their result up when called with the very same,
    unmodified tensor. When they are not called so (twice in a row), the group dissolves.
    """

    def __init__(self, layers: Sequence[Linear]):
        self.layers = tuple(layers)
        self._input: Tensor | None = None
        self._version = 0
        self._ready: dict[int, Tensor] = {}
        self._misses = 0
        self._members: list = []
        self._call: ops.BoundIntLinearMulti | BoundIntLinearFused | BoundFusedCuda | None = None
        self._fused = False
        for layer in self.layers:
            layer.siblings = self

    @staticmethod
    def fit_together(layers: Sequence[nn.Module]) -> bool:
        """Whether these layers can share a call: same integer format, input width, dtype and online steps."""
        first = layers[0]
        return len(layers) > 1 and all(
            type(layer) is Linear and _is_integer(layer.format) and layer.format == first.format
            and layer.in_features == first.in_features
            and layer._buffers["scales"].dtype == first._buffers["scales"].dtype
            and _same_bits(layer, first) and _same_steps(layer.pre, first.pre) and layer.post is None
            for layer in layers
        )

    def usable(self, x: Tensor) -> bool:
        # Without a version counter (inference mode) a modified input could not be told from the same one.
        return (self.layers[0]._direct(x) and not x.is_inference() and not (_is_grad_enabled() and x.requires_grad)
                and x.shape[-1] == self.layers[0].in_features)

    def __call__(self, layer: Linear, x: Tensor) -> Tensor:
        if self._input is x and self._version == x._version:
            ready = self._ready.pop(id(layer), None)
            if not self._ready:
                self._input = None
            if ready is not None:
                self._misses = 0
                return ready
        elif self._ready:
            self._misses += 1
        self._ready, self._input = {}, None
        if self._misses >= 2:
            self.dissolve()
            return layer(x)
        biases = [member._parameters["bias"] for member in self.layers]
        if any(bias is not None and (bias.requires_grad and _is_grad_enabled()) for bias in biases):
            self.dissolve()
            return layer(x)
        bound = [member._bind() for member in self.layers]
        if None in bound:  # not where x is: the layer says so
            self.dissolve()
            return layer(x)
        first = self.layers[0]
        held = [*bound, *(tensor for step in first.pre or () for tensor in step._buffers.values())]
        if len(held) != len(self._members) or any(one is not other for one, other in zip(held, self._members)):
            # tensors were exchanged, or this is the first call
            if not self.fit_together(self.layers):
                self.dissolve()
                return layer(x)
            own = first.format.producer(first.tensors())
            fused = fuse(bound, first.pre, own)
            self._members, self._fused = held, fused is not None
            self._call = fused or fuse(bound, (), own) or (
                BoundFusedCuda(bound, Producer()) if isinstance(bound[0], BoundLowbitCuda)
                else ops.BoundIntLinearMulti(bound))
        biases = [bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype) for bias in biases]
        stepped = x
        for step in () if self._fused else first.pre or ():
            stepped = step(stepped)
        outputs = self._call(stepped, biases)
        self._ready = {id(member): y for member, y in zip(self.layers, outputs)}
        mine = self._ready.pop(id(layer))
        self._input, self._version = x, x._version
        return mine

    def dissolve(self) -> None:
        """Let the layers run on their own again."""
        self._ready, self._input = {}, None
        for layer in self.layers:
            layer.siblings = None

    def __deepcopy__(self, memo):
        import copy

        twin = Siblings.__new__(Siblings)
        memo[id(self)] = twin
        twin.layers = tuple(copy.deepcopy(layer, memo) for layer in self.layers)
        twin._input, twin._version, twin._ready, twin._misses = None, 0, {}, 0
        twin._members, twin._call, twin._fused = [], None, False
        return twin

    def __reduce__(self):
        return _no_siblings, ()


def _is_integer(format: Format) -> bool:
    """Whether layers of a format may share what is done to their input: integer weights without scales of their own
    for it."""
    codes = format.inner if isinstance(format, (ByteScales, MixedInputs)) else format
    return isinstance(codes, Int) and codes.act_scale == "dynamic"


def _same_bits(one: Linear, other: Linear) -> bool:
    """Whether two layers of one format round the blocks of their inputs to the same bits."""
    return not isinstance(one.format, MixedInputs) or torch.equal(one._buffers["block_bits"],
                                                                  other._buffers["block_bits"])


def _same_steps(one: nn.ModuleList | None, other: nn.ModuleList | None) -> bool:
    """Whether two layers run equal steps on their inputs."""
    if one is other or one is None or other is None:
        return one is other
    return len(one) == len(other) and all(
        type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))
        for a, b in zip(one, other))


def _no_siblings() -> None:
    return None


class Embedding(_Compressed, nn.Embedding):
    """Token embedding whose rows are stored in an integer format; only the rows looked up are dequantized.

    With ``scale`` rows are multiplied by it, as Gemma's and BART's word embeddings do (`lookup_scale`)."""

    scale: LookupScale | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, format: Format | str, padding_idx: int | None = None,
                 dtype: torch.dtype = torch.bfloat16, device=None, scale: LookupScale | None = None):
        nn.Module.__init__(self)
        if scale is not None:
            self.scale = scale
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        if isinstance(format, str):
            format = resolve_format(format)
        if not isinstance(format, Int):
            raise ValueError(f"embedding: found format {format}, accepted are integer formats such as W8A16")
        self._hold(format, (num_embeddings, embedding_dim), dtype, device)
        self.method = ""

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, spec: str | Resolved) -> "Embedding":
        """Compress an ``nn.Embedding`` with a data-free method. ValueError for weights that are not finite, and for
        lookups that this class does not do (`lookup_scale`)."""
        from .methods import compress_weight

        resolved, scale = spec if isinstance(spec, Resolved) else resolve(spec), lookup_scale(embedding)
        choice = compress_weight(embedding.weight.detach(), resolved, None)
        if choice.pre:
            raise ValueError(f"embedding: found {resolved.text}, accepted are methods without online steps")
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, resolved.format, embedding.padding_idx,
                    _dtype(embedding), _device(embedding), scale)
        layer.load_tensors(resolved.format.pack(choice.w_hat, choice.params))
        layer.method = resolved.method_text
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``[..., embedding_dim]`` of integer ``ids [...]``, in the model's dtype. IndexError out of range."""
        format, flat = self.format, ids.flatten().long()
        # Rows of the last tile's padding exist in storage: a lookup of the right height refuses them.
        nn.functional.embedding(flat, self._buffers["scales"].new_zeros(1, 1).expand(self.num_embeddings, 1))
        tiles = flat // TILE_ROWS
        zero = self._buffers.get("zero_points")
        w = ops.int_dequantize(
            self._buffers["qweight"][tiles], self._buffers["scales"][tiles], None if zero is None else zero[tiles],
            TILE_ROWS * flat.numel(), self.embedding_dim, format.num_bits, format.group_size, self.weight_dtype,
        )
        index = torch.arange(flat.numel(), device=flat.device) * TILE_ROWS + flat % TILE_ROWS
        rows = w.index_select(0, index).reshape(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * self.scale.of(rows.dtype)

    @property
    def embed_scale(self) -> float | Tensor:
        """As the classes that have one call it."""
        if self.scale is None:
            raise AttributeError("embed_scale")
        return self.scale.of(torch.float32)

    @property
    def kernel(self) -> str:
        """The kernel that runs here, or ``reference: why``."""
        return ops.int_dequantize.kernel(_device(self))

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale.value:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}{scale}"


class LookupScale(NamedTuple):
    """What a word embedding multiplies its rows by; ``rounded``: as a number of the rows' dtype (Gemma)."""

    value: float
    rounded: bool

    def of(self, dtype: torch.dtype) -> float | Tensor:
        return torch.tensor(self.value, dtype=dtype) if self.rounded else self.value


def lookup_scale(module: nn.Embedding) -> LookupScale | None:
    """What the lookups of ``module`` multiply rows by; None for a plain ``nn.Embedding``.

    ValueError where lookups do something else, which a compressed layer would not do: embeddings of positions,
    embeddings with max_norm."""
    if isinstance(module, Embedding):
        return module.scale
    if module.max_norm is not None:
        raise ValueError("embedding: found max_norm, accepted are embeddings that lookups do not rescale")
    if type(module).forward is nn.Embedding.forward:
        return None
    held = module._buffers.get("embed_scale")
    value = getattr(module, "embed_scale", None) if held is None else \
        getattr(module, "scalar_embed_scale", None) if held.is_meta else held.item()
    if type(module).__name__.endswith("ScaledWordEmbedding") and isinstance(value, (int, float)) \
            and all(name.startswith("weight") for name in module._parameters):
        return LookupScale(float(value), held is not None)
    raise ValueError(f"embedding: found {type(module).__name__}, whose lookups are its own; accepted are nn.Embedding "
                     "and word embeddings with a scale")


def _dtype(module: nn.Module) -> torch.dtype:
    return module.weight_dtype if isinstance(module, _Compressed) else module.weight.dtype


def _device(module: nn.Module) -> torch.device:
    if isinstance(module, _Compressed):
        return next(iter(module._buffers.values())).device
    return module.weight.device
