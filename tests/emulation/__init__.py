"""Builds CUDA kernels for the host with g++ and runs them under the checks of cuda/emulation (docs/emulation.md).

    library = build(["cuda/kernels/sm80_x.cu"])
    counters = library.call("launch_x", x, w, y, m, n, k, names=["x", "w", "y"], outputs=[y], seeds=range(4))
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RUNTIME = sorted((REPOSITORY / "cuda" / "emulation").glob("*.cpp"))
COPIED = ["cuda", "cpp/common", "cpp/cpu", "cpp/tersor.h", "tests/emulation/kernels"]  # what edits may touch

FLAGS = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


class Violation(AssertionError):
    """A kernel did what no correct kernel does; the message says what, which thread, and where."""


class BuildError(RuntimeError):
    """g++ refused a source; the message is its own."""


def cache_folder() -> Path:
    folder = Path(os.environ.get("TERSOR_EMULATION_CACHE") or REPOSITORY / "build" / "emulation")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str], cwd: Path) -> bytes:
    done = subprocess.run(command, cwd=cwd, capture_output=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.decode(errors='replace')[-6000:]}")
    return done.stdout


def _resolve(source, root: Path) -> Path:
    for candidate in (root / source, root / "cuda" / source, root / "tests" / "emulation" / "kernels" / source):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"source {source}: not under {root}, its cuda/ or tests/emulation/kernels/")


def _compile(source: Path, flags: list[str], root: Path) -> Path:
    """The object of one source, from the cache when its preprocessed text and the flags are known."""
    compiler = [os.environ.get("CXX", "g++"), *flags, "-I", str(root / "cuda"), "-I", str(root / "cpp"),
                "-I", str(root / "tests" / "emulation" / "kernels")]
    if source.suffix == ".cu":
        compiler += ["-include", str(root / "cuda" / "emulation" / "cuda.h"), "-x", "c++"]
    if source in RUNTIME:  # includes nothing of the project but its own folder
        text = b"".join(path.read_bytes() for path in sorted(source.parent.iterdir()))
    else:
        text = _run([*compiler, "-E", "-P", str(source)], root)
    key = hashlib.sha256(text + "\0".join(flags).encode()).hexdigest()[:24]
    target = cache_folder() / f"{source.stem}-{key}.o"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=cache_folder(), suffix=".o", delete=False) as file:
            temporary = file.name
        try:
            _run([*compiler, "-c", str(source), "-o", temporary], root)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return target


def _edited_copy(edits, folder: Path) -> None:
    for name in COPIED:
        origin, target = REPOSITORY / name, folder / name
        if origin.is_dir():
            shutil.copytree(origin, target)
        elif origin.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, target)
    for file, old, new in edits:
        path = _resolve(file, folder)
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"edit of {file}: {old!r} occurs {text.count(old)} times; exactly once is accepted")
        path.write_text(text.replace(old, new))


def build(sources, defines=None, sanitize=False, edits=()) -> "Emulated":
    """Compiles `sources` (paths under the repository, its cuda/ or the test kernels) with the host run.

    defines: macro names to values (None: defined empty). edits: (file, old, new) replacements made in a copy
    of the tree; `old` must occur exactly once. Objects and libraries are cached by content.
    Raises BuildError with the compiler's message.
    """
    flags = FLAGS + (SANITIZE if sanitize else [])
    macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in (defines or {}).items()]
    with tempfile.TemporaryDirectory() as temporary:
        root = REPOSITORY
        if edits:
            root = Path(temporary)
            _edited_copy(edits, root)
        jobs = [(_resolve(source, root), [*flags, "-O1", *macros]) for source in sources]
        jobs += [(path, [*flags, "-O1" if sanitize else "-O3"]) for path in RUNTIME]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(
                lambda job: _compile(job[0], job[1], REPOSITORY if job[0] in RUNTIME else root), jobs))
    key = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:24]
    library = cache_folder() / f"library-{key}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=cache_folder(), suffix=".so", delete=False) as file:
            name = file.name
        try:
            _run([os.environ.get("CXX", "g++"), "-shared", "-Wl,-Bsymbolic", *(SANITIZE if sanitize else []),
                  *map(str, objects), "-o", name, "-ldl"], REPOSITORY)
            os.replace(name, library)
        finally:
            Path(name).unlink(missing_ok=True)
    return Emulated(library)


def _is_array(value) -> bool:
    return hasattr(value, "data_ptr") or hasattr(value, "__array_interface__")


def _extent(array) -> tuple[int, int]:
    """Address and size in bytes of what an array's elements span."""
    if hasattr(array, "data_ptr"):
        span = 1 + sum((n - 1) * s for n, s in zip(array.shape, array.stride())) if array.numel() else 0
        return array.data_ptr(), span * array.element_size()
    low = array.__array_interface__["data"][0]
    span = array.itemsize + sum((n - 1) * s for n, s in zip(array.shape, array.strides)) if array.size else 0
    return low, span


def _copy(array):
    return array.clone() if hasattr(array, "clone") else array.copy()


def _assign(array, value) -> None:
    if hasattr(array, "copy_"):
        array.copy_(value)
    else:
        array[...] = value


def _bytes(array) -> bytes:
    """The bits, so that NaNs compare."""
    if hasattr(array, "data_ptr"):
        return ctypes.string_at(array.contiguous().data_ptr(), array.numel() * array.element_size())
    return array.tobytes()


class Emulated:
    """A compiled library: its extern "C" launchers, run under the checks.

    Loaded at the first use: a sanitized one only loads where its runtime came first (LD_PRELOAD).
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self.path))
        library.emulation_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
        library.emulation_seed.argtypes = [ctypes.c_uint64]
        library.emulation_counters.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.emulation_counters.restype = ctypes.c_size_t
        library.emulation_error.restype = ctypes.c_char_p
        return library

    def counters(self) -> dict:
        size = self.library.emulation_counters(None, 0)
        text = ctypes.create_string_buffer(size)
        self.library.emulation_counters(text, size)
        return json.loads(text.value)

    def call(self, name, *args, names=None, outputs=None, seeds=(0,), count=True, deterministic=True) -> dict:
        """Runs launcher `name` once per seed and returns the last run's counters.

        args: torch CPU tensors or numpy arrays (passed as pointers, registered with the bytes they span), ints
        (int64), floats (float32), None (a null pointer), or ctypes values. names: of the arrays, in order of
        argument (default arg0, arg1, ... by position). outputs: the arrays that the kernel may write (default:
        all). Each seed starts from the same contents, and the outputs of all must agree bit for bit unless
        `deterministic` is false or a list of the arrays that must agree.
        Raises Violation, or RuntimeError when the launcher itself returns an error.
        """
        arrays = [(i, a) for i, a in enumerate(args) if _is_array(a)]
        names = list(names) if names is not None else [f"arg{i}" for i, _ in arrays]
        if len(names) != len(arrays):
            raise ValueError(f"{name}: {len(names)} names for {len(arrays)} arrays")
        if outputs is None:
            written = [a for _, a in arrays]
        else:
            written = list(outputs)
            strangers = [o for o in written if not any(o is a for _, a in arrays)]
            if strangers:
                raise ValueError(f"{name}: an output is not among the arguments")
        compared = written if deterministic is True else list(deterministic or [])
        before = [_copy(a) for a in written]
        first = None
        seeds = list(seeds)
        for seed in seeds:
            for array, value in zip(written, before):
                _assign(array, value)
            status = self._run(name, args, arrays, names, written, seed, count)
            error = self.library.emulation_error().decode()
            if error:
                raise Violation(f"{name}: {self._name_kernel(error)}")
            if status:
                raise RuntimeError(f"{name}: returned {status}")
            if len(seeds) > 1 and compared:
                bits = [_bytes(a) for a in compared]
                if first is not None and bits != first:
                    which = [n for (_, a), n in zip(arrays, names) if any(a is c and b != f for c, b, f in
                                                                          zip(compared, bits, first))]
                    raise Violation(f"{name}: seeds {seeds[0]} and {seed} disagree on {', '.join(which)}: "
                                    "the result depends on the order of threads")
                first = bits
        return self.counters()

    def _name_kernel(self, error: str) -> str:
        """Kernels of unnamed namespaces are known by their offset in the library; nm knows their names."""
        found = re.search(r"\[kernel \+0x([0-9a-f]+)", error)
        if not found or not shutil.which("nm"):
            return error
        for line in subprocess.run(["nm", "-C", str(self.path)], capture_output=True, text=True).stdout.splitlines():
            address, _, symbol = line.partition(" ")
            if address and int(address, 16) == int(found[1], 16):
                return error.replace(found[0], f"[kernel {symbol[2:].split('(unsigned')[0].strip()}")
        return error

    def _run(self, name, args, arrays, names, written, seed, count) -> int:
        self.library.emulation_clear()
        self.library.emulation_seed(seed)
        self.library.emulation_count(int(count))
        for (_, array), label in zip(arrays, names):
            address, size = _extent(array)
            writable = any(array is w for w in written)
            self.library.emulation_register(address, size, label.encode(), int(writable))
        values = []
        for value in args:
            if _is_array(value):
                values.append(ctypes.c_void_p(_extent(value)[0]))
            elif value is None:
                values.append(ctypes.c_void_p(None))
            elif isinstance(value, float):
                values.append(ctypes.c_float(value))
            elif isinstance(value, int):
                values.append(ctypes.c_int64(value))
            else:
                values.append(value)
        function = getattr(self.library, name)
        function.restype = ctypes.c_int
        return function(*values)
