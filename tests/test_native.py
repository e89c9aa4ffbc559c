"""The extension: what it links, what it reports, how it refuses bad arguments."""

import pathlib
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from tersor import _C

EXTENSION = pathlib.Path(_C.__file__)


def dynamic_symbols(path):
    """Names in the dynamic symbol table, as (name, defined) pairs, read from the ELF file itself."""
    data = path.read_bytes()
    assert data[:4] == b"\x7fELF" and data[4] == 2, f"{path} is not a 64-bit ELF file"
    section_offset = struct.unpack_from("<Q", data, 0x28)[0]
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * entry_size) for i in range(count)]
    symbols = []
    for _, kind, _, _, offset, size, link, _, _, step in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, step):
            name, _, _, index = struct.unpack_from("<IBBH", data, at)
            end = data.index(b"\0", strings + name)
            symbols.append((data[strings + name : end].decode(), index != 0))
    return symbols


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_no_torch_and_no_openmp_symbol():
    symbols = dynamic_symbols(EXTENSION)
    undefined = [name for name, defined in symbols if not defined and name]
    assert "memcpy" in undefined, "the symbol table was not read"
    for name in undefined:
        assert not any(part in name for part in ("c10", "torch", "3at", "omp_", "GOMP", "cuda")), name
    exported = [name for name, defined in symbols if defined and "tersor" in name]
    assert exported == [], f"only the module's init function is exported, but also {exported[:5]}"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_nm_agrees():
    text = subprocess.run(["nm", "-D", str(EXTENSION)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in text.splitlines()}
    assert {name for name, _ in dynamic_symbols(EXTENSION) if name} == names
    assert any(name.startswith("PyInit_") for name in names)


def test_imports_without_torch_and_uses_a_pool_then():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {str(EXTENSION)!r})\n"
        "c = importlib.util.module_from_spec(spec); spec.loader.exec_module(c)\n"
        "assert 'torch' not in sys.modules\n"
        "import ctypes\n"
        "codes = (ctypes.c_uint8 * (40 * 50))(*[i % 8 for i in range(2000)])\n"
        "packed = (ctypes.c_uint8 * (3 * 2 * 192))(); back = (ctypes.c_uint8 * 2000)()\n"
        "c.int_pack(ctypes.addressof(codes), 40, 50, 3, ctypes.addressof(packed), 3)\n"
        "c.int_unpack(ctypes.addressof(packed), 40, 50, 3, ctypes.addressof(back), 3)\n"
        "assert bytes(back) == bytes(codes)\n"
        "print(c.threading())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "pool"


def test_threads_are_torchs_own():
    assert torch.get_num_threads() >= 1
    assert _C.threading() == "openmp"


def test_isas():
    names = _C.isas()
    assert "generic" in names and _C.isa() in names
    assert names[0] != "avx512_emulated"
    before = _C.isa()
    try:
        for name in names:
            _C.set_isa(name)
            assert _C.isa() == name
        with pytest.raises(ValueError, match="sse9.*accepted: .*generic"):
            _C.set_isa("sse9")
        assert _C.isa() == names[-1]
    finally:
        _C.set_isa(before)


def test_floors_are_positive():
    floors = _C.machine_floors(1, 0.005)
    assert floors["read_gbs"] > 0 and floors["fp32_gflops"] > 0
    assert floors["int8_gops"] >= 0 and floors["bf16_gflops"] >= 0
    with pytest.raises(ValueError, match="threads is 0"):
        _C.machine_floors(0)


def test_cuda_report():
    assert isinstance(_C.has_cuda_build, bool)
    devices = _C.cuda_devices()
    assert isinstance(devices, list)
    if not _C.has_cuda_build:
        assert devices == []
    for device in devices:
        assert device["memory_bytes"] > 0 and len(device["capability"]) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 9}, "bits is 9; accepted: 2 to 8"),
        ({"bits": 1}, "bits is 1"),
        ({"x_dtype": 3}, r"dtype codes are 3 \(x\)"),
        ({"scale_dtype": -1}, r"-1 \(scales\)"),
        ({"m": -1}, "m is -1"),
        ({"n": -5}, "n is -5"),
        ({"k": 0}, "k is 0"),
        ({"ldx": 10}, "ldx is 10"),
        ({"ldy": 3}, "ldy is 3"),
        ({"group_size": 48}, "group_size is 48; accepted: a multiple of 32"),
        ({"group_size": -32}, "group_size is -32"),
        ({"act_bits": 5}, "act_bits is 5; accepted: 16 .exact., 8, 6 or 4"),
        ({"threads": 0}, "threads is 0"),
        ({"x": 0}, "x is absent"),
        ({"qweight": 0}, "qweight is absent"),
        ({"scales": 0}, "scales is absent"),
        ({"y": 0}, "y is absent"),
    ],
)
def test_bad_arguments(change, message):
    x, y = torch.zeros(2, 64), torch.zeros(2, 16)
    qweight, scales = torch.zeros(1, 2, 256, dtype=torch.uint8), torch.ones(1, 2, 16)
    arguments = dict(
        x=x.data_ptr(), x_dtype=0, m=2, k=64, ldx=64, qweight=qweight.data_ptr(), scales=scales.data_ptr(),
        scale_dtype=0, zero_points=0, bias=0, y=y.data_ptr(), n=16, ldy=16, bits=4, group_size=32, act_bits=16,
        threads=1,
    )  # fmt: skip
    _C.int_linear(**arguments)
    with pytest.raises(ValueError, match=message):
        _C.int_linear(**{**arguments, **change})


def test_empty_sizes_return_at_once():
    for m, n in ((0, 16), (3, 0)):
        _C.int_linear(0, 0, m, 64, 64, 0, 0, 0, 0, 0, 0, n, n, 4, 32, 16, 1)
    _C.int_linear_multi(0, 0, 3, 64, 64, [], 0, 4, 32, 16, 1)


def test_huge_pages_leave_memory_as_it_is():
    values = torch.arange(5 << 18)  # 10 MB
    wanted = values.clone()
    found = _C.huge_pages(values.data_ptr(), values.nbytes)
    assert found % (1 << 21) == 0 and found <= values.nbytes
    assert torch.equal(values, wanted)
    assert _C.huge_pages(values.data_ptr(), 100) == 0
