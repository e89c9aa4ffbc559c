"""Records what every wrapper of cuda/ptx does on a GPU, for tests/test_replay.py.

    python bench/record_ptx.py                 # compiles with nvcc, runs, writes tests/data/ptx_replay.npz
    python bench/record_ptx.py --compile-only  # for sm_80 and sm_90a; needs no GPU

Inputs are drawn from seeds (tests/emulation/cases.py); the file holds inputs, outputs, the device's name and its
compute capability. A case that the device refuses is named and left out, and stays unverified.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulation import cases  # noqa: E402

SOURCES = [ROOT / "tests/emulation/kernels/wrappers.cu", ROOT / "bench/native/record_device.cu"]
LIMIT = 500 * 1024  # bytes of the written file


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and str(Path(home) / "bin" / "nvcc"), shutil.which("nvcc"),
                  "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).exists()), None)


def compile_library(architectures: list[str], target: Path) -> None:
    """The wrappers' kernels and a few memory calls as one shared library; raises with nvcc's message."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc: looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [nvcc, "-std=c++17", "-O2", "--threads", "2", *codes, "-shared", "-Xcompiler", "-fPIC", "-cudart",
               "static", "-I", str(ROOT / "cuda"), "-I", str(ROOT / "cpp"), *map(str, SOURCES), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")


class Device:
    """The recording library on the present GPU."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.record_run.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
                                            ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int]
        self.library.record_message.restype = ctypes.c_char_p

    def describe(self) -> dict:
        name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        if self.library.record_device(name, ctypes.byref(major), ctypes.byref(minor)):
            raise RuntimeError(f"no GPU: {self.library.record_message().decode()}")
        return {"device": name.value.decode(), "capability": f"{major.value}.{minor.value}"}

    def run(self, case: cases.Case, words: np.ndarray) -> np.ndarray:
        out = np.zeros(case.words, np.uint32)
        launcher = ctypes.cast(getattr(self.library, f"case_{case.name}"), ctypes.c_void_p)
        status = self.library.record_run(case.name.encode(), words.ctypes.data, words.nbytes, out.ctypes.data,
                                         out.nbytes, launcher, case.n)
        if status:
            raise RuntimeError(self.library.record_message().decode())
        return out


def capability() -> str | None:
    query = shutil.which("nvidia-smi")
    if query is None:
        return None
    done = subprocess.run([query, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def architecture(cc: str) -> str:
    """What to compile for: the arch-specific target from 9.0 on."""
    number = cc.replace(".", "")
    return number + "a" if int(number) >= 90 else number


def record(target: Path) -> None:
    cc = capability()
    if cc is None:
        raise SystemExit("record_ptx: no GPU (nvidia-smi finds none); --compile-only needs none")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "record.so"
        compile_library([architecture(cc)], library)
        device = Device(library)
        about = device.describe()
        arrays, refused = {}, {}
        for case in cases.CASES:
            words = case.draw()
            try:
                out = device.run(case, words)
            except RuntimeError as error:
                refused[case.name] = str(error)
                print(f"{case.name}: not recorded: {error}")
                continue
            arrays[f"{case.name}.in"], arrays[f"{case.name}.out"] = words, out
        about["refused"] = refused
        about["cases"] = [case.name for case in cases.CASES if f"{case.name}.in" in arrays]
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("partial.npz")
    np.savez_compressed(partial, **arrays)
    if partial.stat().st_size > LIMIT:
        raise SystemExit(f"record_ptx: {partial} has {partial.stat().st_size} bytes; at most {LIMIT} are kept")
    partial.replace(target)
    print(f"{target}: {len(about['cases'])} cases on {about['device']}, {target.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/data/ptx_replay.npz")
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.compile_only:
        with tempfile.TemporaryDirectory() as folder:
            compile_library(["80", "90a"], Path(folder) / "record.so")
        print("compiled for sm_80 and sm_90a")
    else:
        record(arguments.out)


if __name__ == "__main__":
    main()
