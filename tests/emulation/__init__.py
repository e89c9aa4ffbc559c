"""Builds CUDA kernels for the host with g++ and runs them under the checks of cuda/emulation (docs/emulation.md).

    library = build(["cuda/kernels/sm80_x.cu"])
    counters = library.call("launch_x", x, w, y, m, n, k, names=["x", "w", "y"], outputs=[y], seeds=range(4))
"""

import concurrent.futures
import ctypes
import dataclasses
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
# Of the host run itself: without those checks that double the time of its compilation.
SANITIZE_RUNTIME = ["-fno-sanitize=null,alignment,object-size,vptr"]
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
        jobs += [(path, [*flags, *(["-O1", *SANITIZE_RUNTIME] if sanitize else ["-O3"])]) for path in RUNTIME]
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


def _offset(array) -> int:
    """Bytes from the start of the allocation, which on a device is aligned to 256 bytes."""
    if hasattr(array, "data_ptr"):
        return array.data_ptr() - array.untyped_storage().data_ptr()
    base = array
    while getattr(base, "base", None) is not None and hasattr(base.base, "__array_interface__"):
        base = base.base
    return _extent(array)[0] - base.__array_interface__["data"][0]


@dataclasses.dataclass
class Buffer:
    """An array as a kernel sees it: a copy, at the offset from its allocation that it has here."""

    name: str
    address: int
    size: int
    offset: int
    written: bool
    compared: bool
    copy: int = 0


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
        library.emulation_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.emulation_allocate.restype = ctypes.c_void_p
        return library

    def counters(self) -> dict:
        size = self.library.emulation_counters(None, 0)
        text = ctypes.create_string_buffer(size)
        self.library.emulation_counters(text, size)
        return json.loads(text.value)

    def call(self, name, *args, names=None, outputs=None, seeds=(0,), count=True, deterministic=True) -> dict:
        """Runs launcher `name` once per seed and returns the last run's counters.

        args: torch CPU tensors or numpy arrays (passed as pointers to copies that lie far apart, registered with the
        bytes they span), ints (int64), floats (float32), None (a null pointer), or ctypes values. names: of the
        arrays, in order of argument (default arg0, arg1, ... by position). outputs: the arrays that the kernel may
        write (default: all). Each seed starts from the same contents, and the outputs of all must agree bit for bit
        unless `deterministic` is false or a list of the arrays that must agree.
        Raises Violation, or RuntimeError when the launcher itself returns an error.
        """
        arrays = [(i, a) for i, a in enumerate(args) if _is_array(a)]
        names = list(names) if names is not None else [f"arg{i}" for i, _ in arrays]
        if len(names) != len(arrays):
            raise ValueError(f"{name}: {len(names)} names for {len(arrays)} arrays")
        written = [a for _, a in arrays] if outputs is None else list(outputs)
        if any(all(o is not a for _, a in arrays) for o in written):
            raise ValueError(f"{name}: an output is not among the arguments")
        compared = written if deterministic is True else list(deterministic or [])
        buffers = self._buffers(name, arrays, names, written, compared)
        before = [ctypes.string_at(b.address, b.size) for b in buffers]
        first = None
        seeds = list(seeds)
        for seed in seeds:
            status = self._run(name, args, buffers, before, seed, count)
            for buffer in buffers:
                if buffer.written:
                    ctypes.memmove(buffer.address, buffer.copy, buffer.size)
            error = self.library.emulation_error().decode()
            if error:
                raise Violation(f"{name}: {self._name_kernel(error)}")
            if status:
                raise RuntimeError(f"{name}: returned {status}")
            bits = {b.name: ctypes.string_at(b.address, b.size) for b in buffers if b.compared}
            if first is not None and bits != first:
                differ = ", ".join(n for n in bits if bits[n] != first[n])
                raise Violation(f"{name}: seeds {seeds[0]} and {seed} disagree on {differ}: "
                                "the result depends on the order of threads")
            first = bits
        return self.counters()

    def _buffers(self, name, arrays, names, written, compared) -> list:
        """One buffer for each distinct array; arrays that share some of their bytes are refused."""
        buffers = []
        for (_, array), label in zip(arrays, names):
            address, size = _extent(array)
            is_written, is_compared = (any(array is a for a in group) for group in (written, compared))
            same = next((b for b in buffers if (b.address, b.size) == (address, size)), None)
            if same:  # the same tensor twice
                same.written |= is_written
                same.compared |= is_compared
                continue
            for other in buffers:
                if address < other.address + other.size and other.address < address + size:
                    raise ValueError(f"{name}: {label} overlaps {other.name}; pass separate tensors")
            buffers.append(Buffer(label, address, size, _offset(array), is_written, is_compared))
        return buffers

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        """Offset to name of the library's symbols, those of unnamed namespaces included."""
        if not shutil.which("nm"):
            return {}
        lines = subprocess.run(["nm", "-C", str(self.path)], capture_output=True, text=True).stdout.splitlines()
        parts = (line.partition(" ") for line in lines)
        return {int(address, 16): symbol[2:] for address, _, symbol in parts if address}

    def _name_kernel(self, error: str) -> str:
        """The violation's sentence with the kernel's name where the library could give only its offset."""
        found = re.search(r"\[kernel \+0x([0-9a-f]+)", error)
        symbol = self._symbols.get(int(found[1], 16)) if found else None
        return error.replace(found[0], f"[kernel {symbol}") if symbol else error

    def _run(self, name, args, buffers, before, seed, count) -> int:
        self.library.emulation_clear()
        self.library.emulation_release()
        self.library.emulation_seed(seed)
        self.library.emulation_count(int(count))
        for buffer, content in zip(buffers, before):
            buffer.copy = self.library.emulation_allocate(buffer.size, buffer.offset)
            if not buffer.copy:
                raise MemoryError(f"{name}: no room for {buffer.name}, {buffer.size} bytes")
            ctypes.memmove(buffer.copy, content, buffer.size)
            self.library.emulation_register(buffer.copy, buffer.size, buffer.name.encode(), int(buffer.written))
        values = []
        for value in args:
            if _is_array(value):
                address, size = _extent(value)
                buffer = next(b for b in buffers if (b.address, b.size) == (address, size))
                values.append(ctypes.c_void_p(buffer.copy))
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
