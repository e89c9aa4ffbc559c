"""What the benchmarks share: the machine and its versions in words, a watch on foreign CPU use, JSON files."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"

# Instruction sets on which the kernels compared here differ.
_FLAGS = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
          "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "hypervisor")
_PACKAGES = ("torch", "tersor", "numpy", "transformers", "bitsandbytes", "onnx", "onnxruntime", "openvino", "torchao",
             "matplotlib")


# -- the machine ------------------------------------------------------------------------------------------------


def _read(path: str | Path, default: str = "") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else ""


def cpu_flags() -> list[str]:
    """Those of the CPU's feature flags that decide which kernels run."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in _FLAGS if flag in flags]


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def caches() -> dict[str, int]:
    """Bytes of each cache of core 0, such as ``{"L1 Data": 32768, "L3 Unified": 33554432}``."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size:
            factor = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
            found[f"L{_read(index / 'level')} {_read(index / 'type')}"] = int(size[1]) * factor
    return found


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    return max(caches().values(), default=32 << 20)


def machine() -> dict:
    """The machine as the results name it."""
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "none visible")
    thp = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "family_model_stepping": " ".join(_cpuinfo(f) for f in ("cpu family", "model", "stepping")).strip(),
        "flags": cpu_flags(),
        "cores": cores(),
        "caches": caches(),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "transparent_huge_pages": thp[1] if thp else "unknown",
        "frequency_governor": governor,
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }


def versions(names=_PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that matter here; those that are missing are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with ``+changes`` when tracked files differ; empty outside a checkout."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(BENCH), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        revision = git("rev-parse", "--short=12", "HEAD").strip()
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def header(bench: str, settings: dict) -> dict:
    """The fields every result file begins with."""
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


# -- foreign CPU use --------------------------------------------------------------------------------------------

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _machine_seconds() -> float:
    fields = [int(value) for value in _read("/proc/stat").split("\n")[0].split()[1:9]]
    if len(fields) < 8:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICK


def process_seconds(pid: int) -> float:
    """CPU seconds that a process and its threads have used."""
    text = _read(f"/proc/{pid}/stat")
    fields = text[text.rfind(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICK if len(fields) > 12 else 0.0


class Watch:
    """CPU time between `start` and `stop`: what one process used, and what everything else did (stolen time too)."""

    def __init__(self, pid: int):
        self.pid = pid
        self.start()

    def start(self) -> None:
        self._machine, self._own = _machine_seconds(), process_seconds(self.pid)

    def stop(self, wall: float) -> tuple[float, float]:
        """``(own, other)`` in cores, given ``wall`` seconds since `start`."""
        own = process_seconds(self.pid) - self._own
        other = max(0.0, _machine_seconds() - self._machine - own)
        return own / wall, other / wall

    @staticmethod
    def resolution(wall: float) -> float:
        """What the clock ticks of a single spell of ``wall`` seconds can amount to, in cores."""
        return 2 / _TICK / wall


# -- small things -----------------------------------------------------------------------------------------------


def release_memory() -> None:
    """Give freed heap pages back to the system (glibc keeps them otherwise)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: nothing to trim


def median(values) -> float:
    return float(statistics.median(values))


def integers(text: str) -> list[int]:
    """``"1,4,16"`` as integers, each at least 1."""
    values = [int(part) for part in text.split(",") if part.strip()]
    if not values or min(values) < 1:
        raise ValueError(f"found {text!r}, accepted are positive integers such as 1,4,16")
    return values


def shapes(text: str) -> list[tuple[int, int]]:
    """``"4096x14336,..."`` as (K, N): input and output width."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if not match or int(match[1]) % 128 or int(match[2]) % 32 or not int(match[1]) or not int(match[2]):
            raise ValueError(f"found {part!r}, accepted is KxN with K a multiple of 128 and N of 32 (what every peer "
                             "can run), such as 4096x14336")
        found.append((int(match[1]), int(match[2])))
    return found


def names(text: str) -> list[str]:
    """Split at commas outside brackets: specs such as ``W4A16[group=64,sym=false]`` hold some."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def keeping(result: dict, path: str | Path, field: str, key: tuple[str, ...]) -> dict:
    """``result`` with those records of an earlier run in ``path`` that it did not measure: ``field`` holds them,
    ``key`` tells them apart. Each of them names its run by ``date`` and ``commit``."""
    try:
        before = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return result
    new = {tuple(record[name] for name in key): record for record in result[field]}
    run = {name: before[name] for name in ("date", "commit")}
    joined = [new.pop(tuple(record[name] for name in key), None) or run | record for record in before[field]]
    return result | {field: joined + list(new.values())}


def write_json(path: str | Path, data: dict) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(beside, path)
