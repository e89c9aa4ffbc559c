"""The host run of CUDA kernels itself: wrappers against numpy, planted defects, counters, sanitizers."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from emulation import REPOSITORY, BuildError, Violation, build, cases

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host run is compiled by g++")
SEEDS = range(8)


@pytest.fixture(scope="module")
def wrappers():
    return build(["wrappers.cu"])


@pytest.fixture(scope="module")
def banks():
    return build(["banks.cu"])


@pytest.fixture(scope="module")
def scenarios():
    return build(["scenarios.cu"])


# ---- wrappers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.name)
def test_wrapper_against_numpy(wrappers, case):
    words, out = case.draw(), np.zeros(case.words, np.uint32)
    wrappers.call(f"case_{case.name}", words, out, case.n, names=["in", "out"], outputs=[out], seeds=range(3))
    expected = case.expected(words)
    if case.tolerance:
        assert cases.mma_error(out, expected) < cases.MMA_TOLERANCE
    else:
        np.testing.assert_array_equal(cases.canonical(case, out), cases.canonical(case, expected))


def test_every_wrapper_has_a_case():
    assert cases.wrappers() == {w for case in cases.CASES for w in case.wrappers}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_unpack_of_all_patterns(wrappers, kind):
    """All 65536 patterns, and back: conversion to float32 is exact."""
    words = (np.arange(65536, dtype=np.uint32) | np.arange(65536, dtype=np.uint32)[::-1] << 16).astype(np.uint32)
    out = np.zeros(2 * len(words), np.uint32)
    wrappers.call(f"case_unpack_{kind}x2", words, out, len(words), count=False)
    halves = np.stack([words & 0xFFFF, words >> 16], 1).reshape(-1)
    expected = cases.decode(halves, kind)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        np.testing.assert_array_equal(out.view(np.float32).astype(np.float64), expected)
    both = np.concatenate([out[0::2], out[1::2], out[0::2]])
    packed = np.zeros(len(words), np.uint32)
    wrappers.call(f"case_pack_{kind}x2", both, packed, len(words), count=False)
    for shift in (0, 16):
        nan = np.isnan(cases.decode(words >> shift & 0xFFFF, kind))
        np.testing.assert_array_equal(packed >> shift & 0xFFFF, np.where(nan, 0x7FFF, words >> shift & 0xFFFF))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_mma_of_special_values(wrappers, kind):
    """An infinity and a NaN reach exactly the row and the column that they are in."""
    one, infinity, nan = (0x3C00, 0x7C00, 0x7E00) if kind == "f16" else (0x3F80, 0x7F80, 0x7FC0)
    p = np.zeros(416, np.uint32)
    p[:256] = one | one << 16
    p[:128].reshape(32, 4)[9, 1] = infinity | one << 16  # row 2 + 8, by the layout
    p[128:256].reshape(32, 4)[12, 0] = nan | one << 16   # column 3
    out = np.zeros(128, np.uint32)
    wrappers.call(f"case_mma_m16n8k16_{kind}", p, out, 1)
    d = cases.fragment_d(out.reshape(32, 4).view(np.float32))
    expected = np.full((16, 8), 16.0)
    expected[10] = np.inf
    expected[:, 3] = np.nan
    np.testing.assert_array_equal(d, expected)


def test_integer_mma_wraps(wrappers):
    p = np.zeros(416, np.uint32)
    p[:256] = 0x7F7F7F7F
    p[256:384] = 0x7FFFFFFF
    out = np.zeros(128, np.uint32)
    wrappers.call("case_mma_m16n8k32_s8", p, out, 1)
    assert (out == (0x7FFFFFFF + 32 * 127 * 127) % 2**32).all()


# ---- planted defects -----------------------------------------------------------------------------------------
M, N, K = 13, 64, 96
PLANTED = {
    "missing barrier before use": ([("ptx::barrier();  // the tile is there", "")],
                                   "race|in flight|nothing has written"),
    "missing barrier after use": ([("ptx::barrier();  // the tile may be overwritten", "")], "race"),
    "missing wait": ([("    ptx::cp_async_wait<1>();\n", "")], "in flight"),
    "wrong wait count": ([("cp_async_wait<1>", "cp_async_wait<2>")], "in flight"),
    "out-of-bounds read": ([("row < m ? row * k + k0 + half * 8 : 0", "row * k + k0 + half * 8"),
                            ("row < m ? 16 : 0);", "16);")], "out of bounds"),
    "overlapping write": ([("(blockIdx.x * warps + warp) * 8", "(blockIdx.x * warps + warp / 2) * 8")], "race"),
    "uninitialised shared read": ([("if (threadIdx.x < 32) {", "if (threadIdx.x < 2 * m) {")], "nothing has written"),
    "out-of-bounds write": ([("if (g + 8 * i < m)", "if (g + 8 * i < m + 1)")], "out of bounds"),
    "misaligned copy": ([("row * 48 + half * 16, x", "row * 40 + half * 16, x")], "not aligned"),
    "wrong fragment lane": ([("int g = lane / 4, t = lane % 4", "int g = lane / 4, t = (lane + 1) % 4")], None),
    "wrong fragment row": ([("lane % 16 * 48 + lane / 16 * 16", "lane / 16 * 16 + lane % 8 * 48")], None),
    "no defect": ([], None),
}


def gemm_inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, K)).astype(np.float16)
    w = rng.standard_normal((N, K)).astype(np.float16)
    return x, w, np.zeros((M, N), np.float32), x.astype(np.float64) @ w.astype(np.float64).T


@pytest.fixture(scope="module")
def gemms():
    def compile_one(edits):
        return build(["gemm.cu"], edits=[("tests/emulation/kernels/gemm.cu", old, new) for old, new in edits])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(PLANTED, pool.map(compile_one, [edits for edits, _ in PLANTED.values()])))


@pytest.mark.parametrize("defect", PLANTED)
def test_planted_in_a_gemm(gemms, defect):
    """Strict checks catch a defect with every seed; a wrong layout shows in the result with every seed."""
    x, w, y, expected = gemm_inputs()
    sentence = PLANTED[defect][1]
    for seed in SEEDS:
        arguments = dict(names=["x", "w", "y"], outputs=[y], seeds=[seed])
        if sentence:
            with pytest.raises(Violation, match=sentence):
                gemms[defect].call("launch_gemm", x, w, y, M, N, K, **arguments)
        else:
            gemms[defect].call("launch_gemm", x, w, y, M, N, K, **arguments)
            error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
            assert error < 1e-6 if defect == "no defect" else error > 0.1


def test_edits_must_match_once():
    with pytest.raises(ValueError, match="occurs 0 times"):
        build(["gemm.cu"], edits=[("gemm.cu", "no such text", "")])


SCENARIOS = {
    ("hand_over", 1): "no fence, atomic and fence",
    ("hand_over", 2): "no fence, atomic and fence",
    ("wait_for_block", 1): "deadlock.*volatile loads",
    ("wait_for_block", 2): "no fence, atomic and fence",
    ("neighbours", 1): "race.*sync_warp|nothing has written",
    ("neighbours", 2): "race|nothing has written",
    ("neighbours", 3): "race",
    ("neighbours", 4): "race",
    ("bytes", 1): "race: .*shared memory",
    ("bytes", 2): "race: .*of out",
    ("copies", 1): "race|in flight|nothing has written",
    ("copies", 2): "writes .*in flight",
    ("copies", 3): "reads .*in flight",
    ("copies", 4): "reads .*in flight",
    ("copies", 5): "race|in flight|nothing has written",
    ("accesses", 1): "2 modulo 4: not aligned",
    ("accesses", 2): "shared bytes out of bounds",
    ("accesses", 3): "nothing has written",
    ("accesses", 4): r"end \d+ bytes past the end of buffer in \(1024 bytes\)",
    ("accesses", 5): "start 4 bytes before buffer in",
    ("accesses", 6): "buffer in, which is read-only",
    ("accesses", 7): "4 modulo 16: not aligned",
    ("accesses", 8): "4 modulo 16: not aligned",
    ("accesses", 9): "17 of 16 bytes",
    ("accesses", 10): "constant path",
    ("accesses", 11): "race: .*byte 0 of out",
    ("accesses", 12): "race: .*byte 0 of out",
    ("divergence", 1): "lane 5.* ended",
    ("divergence", 2): "divergent",
    ("divergence", 3): "deadlock.*sync_warp",
    ("divergence", 4): None,
    ("divergence", 5): "multiple of 32",
    ("divergence", 6): "others wait for",
    ("divergence", 7): "only lanes of mask 0x0000ffff",
    ("divergence", 8): "named barrier 0",
    ("divergence", 9): r"deadlock.*threads 0 to 63 at barrier 4 \(64 of 96 threads there\)",
    ("metadata", 1): "strictly ascending",
    ("pipeline", 1): r"deadlock.*at barrier 2 \(64 of 128 threads there\)",
    ("pipeline", 2): "race|nothing has written",
    ("source", 1): "race|source changed",
    ("source", 2): "source changed",
}


def scenario_arguments():
    words = np.arange(256, dtype=np.uint32) * 3 + 1
    out, counter = np.zeros(256, np.uint32), np.zeros(4, np.uint32)
    return words, out, counter, dict(names=["in", "out", "counter"], outputs=[out, counter])


@pytest.mark.parametrize("name,planted", [key for key, sentence in SCENARIOS.items() if sentence])
def test_planted_scenario(scenarios, name, planted):
    words, out, counter, arguments = scenario_arguments()
    for seed in SEEDS:
        with pytest.raises(Violation, match=SCENARIOS[name, planted]):
            scenarios.call(f"scenario_{name}", words, out, counter, planted, seeds=[seed], **arguments)


@pytest.mark.parametrize("name", sorted({name for name, _ in SCENARIOS} | {"first_come"}))
def test_right_twin(scenarios, name):
    """The same protocol without its defect passes with all seeds and gives one result."""
    words, out, counter, arguments = scenario_arguments()
    scenarios.call(f"scenario_{name}", words, out, counter, 0, seeds=range(24), deterministic=[out], **arguments)
    i = np.arange(64)
    if name == "hand_over":
        np.testing.assert_array_equal(out[128:160], words[:128].reshape(4, 32).sum(0))
        assert counter[0] == 0
    elif name == "wait_for_block":
        np.testing.assert_array_equal(out[128:160], words[:32] + 1)
    elif name == "neighbours":
        np.testing.assert_array_equal(out[:64], words[i ^ 33 ^ 1] + words[i ^ 33 ^ 32])
    elif name == "bytes":
        np.testing.assert_array_equal(out.view(np.uint8)[:64], i)
    elif name == "pipeline":
        np.testing.assert_array_equal(out, words)
    elif name == "first_come":
        assert (out[:64] == 1).all()
    elif name == "copies":
        np.testing.assert_array_equal(out[:64], words[(i ^ 32) % 32 * 4 + 1])


@pytest.mark.parametrize("name", ["neighbours", "bytes", "copies", "divergence", "metadata", "pipeline", "hand_over"])
def test_counters_do_not_depend_on_the_order_of_threads(scenarios, name):
    """Warp-wide accesses are put together alike, also while other warps pass barriers of their own."""
    found = []
    for seed in SEEDS:
        words, out, counter, arguments = scenario_arguments()
        found.append(scenarios.call(f"scenario_{name}", words, out, counter, 0, seeds=[seed], **arguments))
    assert all(counters == found[0] for counters in found)
    if name == "pipeline":
        total = found[0]["total"]
        assert [total["shared"][kind]["requests"] for kind in ("store", "load")] == [8, 8]
        assert total["global"]["in"]["requests"] == 8 and total["barriers"] == 6


def test_all_threads_of_a_named_barrier_suffice(scenarios):
    words, out, counter, arguments = scenario_arguments()
    scenarios.call("scenario_divergence", words, out, counter, 4, seeds=SEEDS, **arguments)


def test_a_wait_between_blocks_needs_them_resident(scenarios):
    """Without the promise some order of blocks deadlocks, and the message names the remedy."""
    words, out, counter, arguments = scenario_arguments()
    messages = []
    for seed in range(24):
        counter[:] = 0
        try:
            scenarios.call("scenario_not_resident", words, out, counter, 0, seeds=[seed], **arguments)
        except Violation as error:
            messages.append(str(error))
    assert messages and all("launch_resident" in m for m in messages)


def test_harness_refuses_what_it_cannot_check(scenarios):
    words, out, counter, _ = scenario_arguments()
    with pytest.raises(ValueError, match="names"):
        scenarios.call("scenario_bytes", words, out, counter, 0, names=["in"])
    with pytest.raises(ValueError, match="not among"):
        scenarios.call("scenario_bytes", words, out, counter, 0, outputs=[np.zeros(1)])


@pytest.mark.parametrize("threads,shared,sentence", [(1056, 0, "1056 threads"), (0, 0, "0 threads"),
                                                     (32, 240 * 1024, "232448"), (40, 0, "has only 8 threads")])
def test_launches_that_no_device_accepts(scenarios, threads, shared, sentence):
    words, out, counter, arguments = scenario_arguments()
    with pytest.raises(Violation, match=sentence):
        scenarios.call("scenario_shape", words, out, counter, threads, shared, **arguments)
    scenarios.call("scenario_shape", words, out, counter, 64, 227 * 1024, **arguments)


def test_shared_arrays_do_not_compile():
    """They would be unchecked; the compiler names what to use."""
    with pytest.raises(BuildError, match="dynamic_shared"):
        build(["banks.cu"], edits=[("banks.cu", "  uint32_t value;\n", "  __shared__ uint32_t value;\n")])


def test_buffers_lie_far_apart(scenarios):
    """Neighbours in memory here, yet a read past the one is no read of the other."""
    both = np.zeros(512 + 256, np.uint32)
    words, out, counter = both[:256], both[256:512], np.zeros(4, np.uint32)
    for seed in SEEDS:
        with pytest.raises(Violation, match="past the end of buffer in"):
            scenarios.call("scenario_accesses", words, out, counter, 4, names=["in", "out", "counter"], seeds=[seed])
    with pytest.raises(ValueError, match="out overlaps in"):
        scenarios.call("scenario_accesses", words, both[128:384], counter, 0, names=["in", "out", "counter"])


def test_views_keep_their_alignment(gemms):
    """A view 4 bytes into its allocation cannot be read 16 bytes at a time, wherever the host has put it."""
    x, w, y, _ = gemm_inputs()
    shifted = np.zeros(x.size + 2, np.float16)[2:].reshape(x.shape)
    with pytest.raises(Violation, match="4 modulo 16: not aligned"):
        gemms["no defect"].call("launch_gemm", shifted, w, y, M, N, K)


def test_results_that_depend_on_the_order_of_threads(scenarios):
    """No race, but which thread comes first decides: the seeds disagree."""
    words, out, counter, arguments = scenario_arguments()
    with pytest.raises(Violation, match="seeds 0 and . disagree on out"):
        scenarios.call("scenario_first_come", words, out, counter, 1, seeds=SEEDS, **arguments)


# ---- counters ------------------------------------------------------------------------------------------------
def test_counters_of_a_gemm(gemms):
    x, w, y, _ = gemm_inputs()
    for seed in SEEDS:  # the counts do not depend on the order of threads
        counters = gemms["no defect"].call("launch_gemm", x, w, y, M, N, K, names=["x", "w", "y"], outputs=[y],
                                           seeds=[seed])
        loop, total = counters["regions"]["main loop"], counters["total"]
        blocks, steps = N // 32, K // 16
        assert total["barriers"] == loop["barriers"] == 2 * blocks * steps
        assert total["mma"] == {"m16n8k16_f16": blocks * 4 * steps}
        weights = loop["global"]["w"]
        assert weights["loaded"] == weights["load_widths"]["4"] == w.nbytes and weights["repeated"] == 0
        # A lane's 4 bytes of 8 rows: half of every sector goes unused, once for each of the two loads.
        assert (weights["requests"], weights["sectors"], weights["minimum_sectors"]) == (
            blocks * 4 * steps * 2, blocks * 4 * steps * 16, blocks * 4 * steps * 8)
        assert total["global"]["x"]["loaded"] == blocks * x.nbytes
        assert total["global"]["x"]["repeated"] == (blocks - 1) * x.nbytes
        assert total["global"]["y"]["stored"] == total["global"]["y"]["store_widths"]["8"] == y.nbytes
        assert "y" not in loop["global"]
        assert loop["shared"]["matrix"] == {"requests": blocks * 4 * steps, "cycles": blocks * 16 * steps,
                                            "extra_cycles": 0, "bytes": blocks * 4 * steps * 512}
        # 16 rows 48 bytes apart, two pieces of 16 in each: in every quarter warp two pieces share banks.
        copies = total["shared"]["copy"]
        assert copies == {"requests": blocks * steps, "cycles": 8 * blocks * steps, "extra_cycles": 4 * blocks * steps,
                          "bytes": 512 * blocks * steps}


@pytest.mark.parametrize("stride,width,cycles", [(1, 4, 1), (2, 4, 2), (32, 4, 32), (33, 4, 1), (0, 4, 1), (2, 8, 2),
                                                 (4, 8, 4), (4, 16, 4), (8, 16, 8), (32, 16, 32), (36, 16, 4),
                                                 (0, 16, 4)])
def test_bank_conflicts(banks, stride, width, cycles):
    """One warp loads `width` bytes at a distance of `stride` words from lane to lane."""
    out = np.zeros(32, np.uint32)
    counters = banks.call("launch_banks", out, stride, width)
    loads = counters["regions"]["measured"]["shared"]["load"]
    assert (loads["requests"], loads["cycles"]) == (1, cycles)
    assert loads["extra_cycles"] == cycles - max(1, width // 4)
    off = banks.call("launch_banks", out, stride, width, count=False)
    assert off["total"]["shared"]["cycles"] == 0


# ---- sanitizers ----------------------------------------------------------------------------------------------
SANITIZED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np
from emulation import Emulated, Violation
library, out = Emulated(Path({library!r})), np.zeros(64, np.uint32)
for seed in range(3):
    library.call("launch_sanitized", out, 0, seeds=[seed])
    lanes = np.arange(64) % 32
    assert (out == (lanes + 1) % 32 * 8 + lanes % 8).all()
    try:  # abandons its fibers: the next launch uses their stacks
        library.call("launch_sanitized", out[:40], 0, seeds=[seed])
    except Violation:
        pass
print("clean", flush=True)
library.call("launch_sanitized", out, {planted})
"""


@pytest.mark.parametrize("planted,report", [(0, None), (1, "stack-buffer-overflow"), (2, "shift exponent 32")])
def test_sanitizers(planted, report):
    """The same sources under AddressSanitizer and UBSan: local arrays of fibers are checked too."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    library = build(["sanitized.cu"], sanitize=True)
    script = SANITIZED.format(tests=str(REPOSITORY / "tests"), library=str(library.path), planted=planted)
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]
    if report is None:
        assert done.returncode == 0 and not done.stderr
    else:
        assert done.returncode != 0 and report in done.stderr, done.stderr[-3000:]
