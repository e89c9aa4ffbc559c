"""``tersor doctor``: what this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Annotated

import typer
from rich.text import Text

from .common import console, table
from .listing import kernel_text

_PACKAGES = ("tersor", "torch", "transformers", "compressed-tensors", "peft", "accelerate", "safetensors", "numpy")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """CPU, threads, CUDA, versions and the kernels that serve each format here, with hints."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    made = table("", "")
    made.show_header = False
    cpu, threads, cuda = facts["cpu"], facts["threads"], facts["cuda"]
    made.add_row("CPU", cpu["name"])
    made.add_row("kernels for", f"{cpu['isa']}; runnable here: {', '.join(cpu['isas'])}")
    made.add_row("threads", f"{threads['torch']} of {threads['cores']} cores, {threads['pool']}")
    made.add_row("CUDA", cuda["why_not"] or "; ".join(cuda["devices"]))
    made.add_row("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    console.print(made)
    console.print()
    kernels = table("format", "kernel on this CPU")
    for name, kernel in facts["kernels"].items():
        kernels.add_row(Text(name), kernel_text(kernel))
    console.print(kernels)
    for hint in facts["hints"]:
        console.print(f"\nhint: {hint}", style="yellow", markup=False)


def examine() -> dict:
    """Facts of this machine: ``cpu``, ``threads``, ``cuda``, ``versions``, ``kernels`` per format, ``hints``."""
    import torch

    import tersor

    from .. import _C
    from ..evaluate import cpu_has_bf16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = {"openmp": "torch's own OpenMP threads", "pool": "a thread pool of our own (torch's was not found)"}
    cuda = {"build": _C.has_cuda_build, "devices": [_device(device) for device in _C.cuda_devices()],
            "torch": torch.version.cuda, "why_not": ""}
    if not _C.has_cuda_build:
        cuda["why_not"] = "this build has the CPU core alone (no nvcc was found when it was built)"
    elif not cuda["devices"]:
        cuda["why_not"] = "the build has a CUDA part, but no device or driver was found"
    facts = {
        "cpu": {"name": cpu_name(), "isa": _C.isa(), "isas": list(_C.isas()), "bf16": cpu_has_bf16()},
        "threads": {"torch": torch.get_num_threads(), "cores": cores, "runtime": _C.threading(),
                    "pool": pool.get(_C.threading(), _C.threading())},
        "cuda": cuda,
        "versions": {"python": platform.python_version()} | _versions(),
        "kernels": {info.name: info.kernel for info in tersor.specs() if info.kind == "format"},
        "hints": [],
    }
    facts["hints"] = _hints(facts)
    return facts


def _hints(facts: dict) -> list[str]:
    cpu, threads, cuda = facts["cpu"], facts["threads"], facts["cuda"]
    hints = []
    if cpu["isa"] == "generic":
        hints.append("the kernels run in portable C++; on x86-64 a CPU with AVX2 and FMA is several times faster")
    if cpu["isas"] and cpu["isa"] != cpu["isas"][0]:
        hints.append(f"{cpu['isas'][0]} can run here but {cpu['isa']} was selected")
    if not cpu["bf16"]:
        hints.append("this CPU has no bf16 arithmetic: torch is faster here in float32, which tersor eval uses")
    if threads["torch"] > threads["cores"]:
        hints.append(f"{threads['torch']} threads share {threads['cores']} cores: set OMP_NUM_THREADS or --threads")
    if threads["runtime"] != "openmp":
        hints.append("two thread pools share the cores: decoding is slower than it could be")
    if cuda["devices"]:
        hints.append("no format has a CUDA kernel in this version: compressed layers run on the CPU")
    return hints


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _device(device: object) -> str:
    return device["name"] if isinstance(device, dict) and "name" in device else str(device)


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
