"""The ``.weight`` of a compressed layer: a tensor to everyone who reads it, computed when its values are asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_IN_PLACE = {"__setitem__"} | {f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")}

# What is known without the values. Adapter libraries and model code look at these often.
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "is_cuda",
               "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "names")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex",
            "__len__", "get_device")
_KNOWN = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
_KNOWN |= {getattr(Tensor, name) for name in _METHODS}


class StoredWeight(Tensor):
    """``[out, in]`` in the model's dtype. Shape, dtype and device cost nothing; any operation first computes the
    values, into a plain tensor. Changing it raises AttributeError: the change would be lost."""

    _is_hf_initialized = True  # transformers' initialisers leave it alone

    @staticmethod
    def __new__(cls, layer):
        device = next(iter(layer.tensors().values())).device
        made = Tensor._make_wrapper_subclass(cls, tuple(layer.shape), dtype=layer.weight_dtype, device=device)
        made.layer = layer
        return made

    def values(self) -> Tensor:
        """The dequantized weight."""
        return self.layer.dequantize()

    def _refuse(self, what: str):
        raise AttributeError(
            f"{what} of a weight in format {self.layer.format}: found an attempt to change it, and it is stored "
            "compressed; accepted are unmerged adapters, or merging into the original model and compressing that"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        written = args[:1]
        if name.endswith("_") and not name.startswith("_"):
            written += tuple(kwargs.values())
        elif name != "__set__" and name not in _IN_PLACE:
            written = (kwargs.get("out"),)
        for target in written:
            if isinstance(target, cls):
                target._refuse("assignment" if name == "__set__" else name)
        return func(*tree_map(_values, args), **tree_map(_values, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))


def _values(item):
    return item.values() if isinstance(item, StoredWeight) else item
