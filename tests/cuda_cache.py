"""The cache's GPU path over kernels compiled for the host: `tersor.kv.devices.on_cuda` says yes to CPU tensors, and the
functions of `_C` run the emulated launchers on whatever tensors are alive."""

import contextlib
import ctypes
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from cuda_kv import Launchers, fields, ints
from emulation import build
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tersor import ops_kv_cuda as ops
from tersor.kv import devices


class LiveMemory(TorchDispatchMode):
    """Knows each storage that was made while it is active, and whether it still is."""

    def __init__(self):
        super().__init__()
        self.storages, self.kept = {}, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.know(tensor)
                if self.kept is not None:
                    self.kept.append(tensor)
        return result

    def know(self, *tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()

    def alive(self):
        self.storages = {at: entry for at, entry in self.storages.items() if not entry[0].expired()}
        return {at: nbytes for at, (_, nbytes) in self.storages.items()}


@dataclasses.dataclass
class Graph:
    launches: list
    memory: list

    def replay(self):
        """The same again, with the same arguments."""
        for function, arguments in self.launches:
            function(*arguments)

    @property
    def names(self):
        return [function.__name__ for function, _ in self.launches]


@functools.cache
def advance_library():
    return build(["cuda/kernels/kv_advance.cu", "cuda/dispatch/kv_advance.cu", "cpp/common/status.cpp"])


class Device(Launchers):
    """Launchers whose launches may touch all live memory, and nothing that was freed."""

    def __init__(self):
        super().__init__()
        self.memory = LiveMemory()
        self.launches = []

    def run(self, library, name, arguments):
        native = library.library
        native.tersor_last_error.restype = ctypes.c_char_p
        native.emulation_clear()
        for at, nbytes in self.memory.alive().items():
            native.emulation_register(at, nbytes, b"live memory", 1)
        status = getattr(native, name)(*arguments)
        error = native.emulation_error().decode()
        if error:
            raise AssertionError(error)
        if status:
            raise ValueError(native.tersor_last_error().decode())
        self.calls.append(name.removeprefix("tersor_cuda_kv_"))

    def advance(self, cache, tokens, stream):
        self.run(advance_library(), "tersor_cuda_kv_advance", [fields(*cache), *ints(tokens, stream)])

    def functions(self):
        """Each launch with what it was given, for `capture`."""
        def noted(function):
            def launch(*arguments):
                self.launches.append((function, arguments))
                return function(*arguments)
            return launch

        made = super().functions() | {"cuda_kv_advance": self.advance}
        return {name: function if name.endswith("plan") else noted(function) for name, function in made.items()}

    @contextlib.contextmanager
    def capture(self):
        """As a graph: the launches in it, whose memory is theirs from now on."""
        self.memory.kept = kept = []
        self.launches.clear()
        graph = Graph([], kept)
        yield graph
        graph.launches[:] = self.launches
        self.memory.kept = None

    def install(self, monkeypatch):
        monkeypatch.setattr(ops, "_C", SimpleNamespace(**self.functions()))
        monkeypatch.setattr(ops, "_device", lambda index: (8, 100 * 1024))
        monkeypatch.setattr(ops, "_on", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(ops, "_stream", lambda device: 0)
        monkeypatch.setattr(devices, "on_cuda", lambda device: True)
        ops._plan.cache_clear()
        ops._rotary.cache_clear()


@pytest.fixture
def device(monkeypatch, one_thread):
    """CPU tensors count as a GPU's until the test ends."""
    made = Device()
    made.install(monkeypatch)
    with made.memory:
        yield made
    ops._plan.cache_clear()
