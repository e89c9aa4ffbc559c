"""Hardware replay: the host versions of the wrappers against what a GPU did (bench/record_ptx.py).

Without a recording every wrapper is unverified on hardware, and docs/emulation.md must say so.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from emulation import REPOSITORY, build, cases

RECORDING = REPOSITORY / "tests" / "data" / "ptx_replay.npz"
TABLE = REPOSITORY / "docs" / "emulation.md"
RECORDER = REPOSITORY / "bench" / "record_ptx.py"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the host run is compiled by g++")


@pytest.fixture(scope="module")
def wrappers():
    return build(["wrappers.cu"])


def host(library, case, words):
    out = np.zeros(case.words, np.uint32)
    library.call(f"case_{case.name}", words, out, case.n, names=["in", "out"], outputs=[out])
    return out


def mismatch(library, case, words, recorded) -> str | None:
    """How the host version differs from the record of one case; None when it does not."""
    out = host(library, case, words)
    if case.tolerance:
        expected = case.expected(words)
        # Both may be off by the tolerance, to either side.
        reference = np.stack([recorded.view(np.float32).astype(np.float64), expected[1]])
        error = cases.mma_error(out, reference)
        return None if error <= 2 * cases.MMA_TOLERANCE else f"{case.name}: {error:.1e} of the absolute products apart"
    different = np.flatnonzero(cases.canonical(case, out) != cases.canonical(case, recorded))
    if not len(different):
        return None
    i = different[0]
    return f"{case.name}: {len(different)} words differ, the first at {i}: host {out[i]:#x}, device {recorded[i]:#x}"


def load(path=RECORDING) -> tuple[dict, dict]:
    """(about, arrays) of a recording; an empty one where there is none."""
    if not path.exists():
        return {"cases": []}, {}
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    return json.loads(arrays.pop("about").tobytes()), arrays


def verified(recorded) -> set[str]:
    """Wrappers all of whose cases are recorded."""
    missing = {w for case in cases.CASES if case.name not in recorded for w in case.wrappers}
    return cases.wrappers() - missing


def table() -> dict[str, str]:
    """Wrapper to what docs/emulation.md says of it."""
    rows = re.findall(r"^\| `(\w+)` \| `ptx/\w+\.h` \| ([^|]+?) \|$", TABLE.read_text(), flags=re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a wrapper has two rows"
    return dict(rows)


def test_table_says_what_is_recorded():
    about, _ = load()
    expected = verified(about["cases"])
    rows = table()
    assert set(rows) == cases.wrappers()
    for name, state in rows.items():
        wanted = f"recorded on {about['device']}" if name in expected else "unverified on hardware"
        assert state == wanted, f"{name}: the table says {state!r}, the recording {wanted!r}"


def test_nothing_counts_as_verified_without_a_recording():
    assert verified([]) == set()
    assert verified([case.name for case in cases.CASES]) == cases.wrappers()
    # A wrapper with two cases needs both.
    assert "shuffle" not in verified([case.name for case in cases.CASES if case.name != "shuffle_wide"])


@needs_compiler
def test_replay_of_the_recording(wrappers):
    """With no recording there is nothing to replay, which the table's test then states of each wrapper."""
    about, arrays = load()
    if RECORDING.exists():
        assert RECORDING.stat().st_size <= 500 * 1024
    by_name = {case.name: case for case in cases.CASES}
    found = [mismatch(wrappers, by_name[name], arrays[f"{name}.in"], arrays[f"{name}.out"]) for name in about["cases"]]
    assert not [m for m in found if m]


@needs_compiler
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_replay_notices_one_wrong_bit(wrappers, case):
    """The comparison itself: a record made by numpy passes, and one changed bit does not."""
    words = case.draw()
    expected = case.expected(words)
    record = expected[0].astype(np.float32).view(np.uint32) if case.tolerance else expected.astype(np.uint32)
    assert mismatch(wrappers, case, words, record) is None
    wrong = record.copy()
    position = int(np.flatnonzero(wrong)[0]) if wrong.any() else 0
    wrong[position] ^= np.uint32(1 << 22 if case.tolerance else 1)
    assert mismatch(wrappers, case, words, wrong)


def test_recorder_compiles():
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("no nvcc")
    done = subprocess.run([sys.executable, str(RECORDER), "--compile-only"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sm_80 and sm_90a" in done.stdout
