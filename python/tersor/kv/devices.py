"""Where a cache lives: what the host reads and writes itself, and what kernels of a GPU do.

Everything that differs asks `on_cuda`, so that tests can run the GPU's path over kernels compiled for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op_checks import CODE, FLOATS

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)


def on_cuda(device: torch.device) -> bool:
    """Whether a cache of tensors on ``device`` is one of CUDA pages."""
    return device.type == "cuda"


def check_device(where: str, x: Tensor) -> None:
    """ValueError that begins with ``where`` for keys that no cache holds."""
    if on_cuda(x.device):
        if x.dtype not in HALVES:
            raise ValueError(f"{where}: found {x.dtype} on {x.device}, accepted on CUDA is bfloat16, float16")
    elif x.device.type != "cpu" or x.dtype not in CODE:
        raise ValueError(f"{where}: found {x.dtype} on {x.device}, accepted is {FLOATS} on cpu, and bfloat16, float16 "
                         "on cuda")


def capturing(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph, to be run again without Python."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def staged(numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``numbers`` on the device, by a copy from pinned memory that nothing waits for."""
    made = torch.tensor(numbers, dtype=dtype)
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def chosen(x: Tensor, sequences: list[int]) -> Tensor:
    """Those of the first dimension of ``x``, wherever it is."""
    return x.index_select(0, staged(sequences, torch.int64, x.device))


def host_like(x: Tensor) -> Tensor:
    """Memory of the host for a copy of ``x``, pinned where it is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
