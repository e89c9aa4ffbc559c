"""The benchmarks' arithmetic and their handling of contenders that fail; nothing here is timed."""

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("the checkout's bench/ is not here", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import common  # noqa: E402
import contenders  # noqa: E402
import figures  # noqa: E402
import linear  # noqa: E402
import roofline  # noqa: E402
import table  # noqa: E402
from peers.base import Options  # noqa: E402


def record(contender, ms, error, nbytes=1000, rounds=None, **cell):
    return {"K": 128, "N": 64, "M": 1, "threads": 2, **cell, "contender": contender, "ms": ms,
            "rounds_ms": rounds or [ms], "nbytes": nbytes, "itemsize": 2, "error": error, "other_cpu": 0.0}


@pytest.fixture
def result():
    entries = [("torch bf16", "baseline", "exact"), ("torch fp32", "baseline", "exact"),
               ("tersor W4A16", "tersor", "exact"), ("tersor W4A8", "tersor", "int8"), ("a", "peer", "exact"),
               ("b", "peer", "int8"), ("c", "peer", "exact"), ("d", "peer", "int8"), ("gone", "peer", "exact")]
    return {
        "bench": "linear", "date": "2026-01-02T00:00:00", "complete": True,
        "machine": {"cpu": "a CPU", "cores": 2, "flags": ["avx2"]}, "versions": {"torch": "1"},
        "settings": {"shapes_KxN": ["128x64"], "m": [1], "threads": [2]},
        "floors": {"2": {"read_gbs": 1e-3, "fp32_gflops": 1e-3, "bf16_gflops": 2e-3, "int8_gops": 8e-3, "by": "x"}},
        "contenders": [{"name": name, "role": role, "activations": kind, "status": "measured"}
                       for name, role, kind in entries],
        "records": [
            record("torch bf16", 80.0, 1e-3, rounds=[80.0, 90.0]), record("torch fp32", 40.0, 1e-7),
            record("tersor W4A16", 10.0, 1e-3, rounds=[10.0, 9.0]), record("tersor W4A8", 5.0, 4e-3),
            record("a", 20.0, 1e-3), record("b", 8.0, 7e-3), record("c", 6.0, 8e-3), record("d", 1.0, 0.5),
            {"K": 128, "N": 64, "M": 1, "threads": 2, "contender": "gone", "skipped": "it is not installed"},
        ],
    }


def rows_of(result):
    return {row["contender"]: row for row in figures.derive(result)["records"]}


def test_ratios_are_other_over_own(result):
    row = rows_of(result)["tersor W4A16"]
    assert row["x_bf16"] == 8 and row["x_fp32"] == 4
    assert row["x_bf16_range"] == [8, 10]  # round by round, not of medians
    assert row["gflops"] == pytest.approx(2 * 128 * 64 / 0.01 / 1e9)


def test_peers_are_classed_by_what_they_did(result):
    rows = rows_of(result)
    assert rows["c"]["activations"] == "int8"  # said exact, but its error is that of int8 activations
    assert rows["tersor W4A8"]["activations"] == "int8"  # ours are what the spec says
    assert rows["tersor W4A16"]["best_exact_peer"] == "a" and rows["tersor W4A16"]["x_best_exact_peer"] == 2
    assert rows["tersor W4A8"]["best_int8_peer"] == "c"  # not d, which is faster and wrong
    assert not rows["d"]["usable"] and "x_best_exact_peer" not in rows["a"]


def test_fraction_of_the_floor(result):
    rows = rows_of(result)
    moved = 1000 + 2 * (128 + 64)
    exact = max(moved / 1e6, 2 * 128 * 64 / 2e6)  # bf16 is the faster float peak
    assert rows["tersor W4A16"]["of_floor"] == pytest.approx(exact / 0.01)
    assert rows["tersor W4A16"]["bound"] == "arithmetic"
    assert rows["tersor W4A8"]["of_floor"] == pytest.approx(max(moved / 1e6, 2 * 128 * 64 / 8e6) / 0.005)
    result["floors"] = {}
    result["records"] = [record("tersor W4A16", 10.0, 1e-3)]
    assert "of_floor" not in rows_of(result)["tersor W4A16"]


def test_tables_say_what_is_missing(result):
    result["contenders"][-1]["status"] = "it is not installed"
    text = table.linear_table(figures.derive(result))
    assert "gone (it is not installed)" in text and "| W4A16 | 2 | 1 | 8.00 | 4.00 | 2.00 | 0.60 | a | c |" in text
    assert "tersor W4A16" in table.linear_cells(result)
    result["complete"] = False
    assert "not completed" in table.linear_table(result)


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    written = roofline.draw(figures.derive(result), tmp_path / "linear.json")
    assert [path.name for path in written] == ["linear.svg", "linear.png"]
    assert "<svg" in written[0].read_text()
    empty = copy.deepcopy(result)
    empty["floors"] = {}
    assert roofline.draw(empty, tmp_path / "none.json") == []


def test_documents_show_the_committed_results():
    """README and docs are what bench/table.py makes of bench/results."""
    shown = [path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
             if "<!-- figures:" in path.read_text()]
    assert {path.name for path in shown} >= {"README.md", "cache.md", "lowbit.md"}
    for path in shown:
        assert table.refreshed(path.read_text()) == path.read_text(), f"python bench/table.py --refresh {path}"


def test_tables_go_between_their_markers(tmp_path, capsys):
    common.write_json(tmp_path / "a.json", {**common.header("a", {}), "records": [{"speed": 1.25}]})
    common.write_json(tmp_path / "b.json", {**common.header("b", {}), "records": [{"speed": 2.5}]})
    text = f"one\n<!-- figures: a.json -->\nold\n{table.END}\n" \
           f"two\n<!-- figures: b.json a.json -->\n{table.END}\nthree\n"
    found = table.refreshed(text, tmp_path)
    assert "old" not in found and found.count("| 1.25 |") == 2 and found.count("| 2.5 |") == 1
    assert found.startswith("one\n<!-- figures: a.json -->\n") and found.endswith(f"{table.END}\nthree\n")
    assert table.refreshed(found, tmp_path) == found
    for bad, message in (("no marker", "which says where figures go"),
                         ("<!-- figures: a.json -->\nold\n", "without '<!-- end of figures -->'"),
                         (f"<!-- figures: a.json -->\n<!-- figures: b.json -->\n{table.END}", "without '<!-- end"),
                         (f"<!-- figures: gone.json -->\n{table.END}", "gone.json: found no result")):
        with pytest.raises(ValueError, match=message):
            table.refreshed(bad, tmp_path)
    document = tmp_path / "document.md"
    document.write_text("no marker")
    assert table.main(["--refresh", str(document)]) == 2
    assert str(document) in capsys.readouterr().out and document.read_text() == "no marker"


def test_records_of_earlier_runs_are_kept(tmp_path):
    path = tmp_path / "a.json"
    first = {"date": "1", "commit": "a", "records": [{"K": 1, "ms": 1}, {"K": 2, "ms": 2}]}
    assert common.keeping(first, path, "records", ("K",)) is first
    common.write_json(path, first)
    second = {"date": "2", "commit": "b", "records": [{"K": 3, "ms": 6}, {"K": 1, "ms": 5}]}
    joined = common.keeping(second, path, "records", ("K",))
    assert joined == {"date": "2", "commit": "b", "records": [
        {"K": 1, "ms": 5}, {"date": "1", "commit": "a", "K": 2, "ms": 2}, {"K": 3, "ms": 6}]}
    common.write_json(path, joined)
    third = {"date": "3", "commit": "c", "records": [{"K": 1, "ms": 7}]}
    assert common.keeping(third, path, "records", ("K",))["records"] == [
        {"K": 1, "ms": 7}, {"date": "1", "commit": "a", "K": 2, "ms": 2}, {"date": "2", "commit": "b", "K": 3, "ms": 6}]


def lowbit_record(m, disturbed=False, **ways):
    made = {name.replace("_", " "): {"ms": ms} for name, ms in ways.items()}
    made["W4A4 +hadamard"] = {"ms": 1.1, "added": 0.031}
    return {"K": 64, "N": 32, "M": m, "disturbed": disturbed, "ways": made}


def test_low_bit_tables():
    result = {**common.header("lowbit", {"threads": 2}), "results": [
        lowbit_record(1, torch_bf16=4.0, torch_fp32=8.0, W4A4=2.0),
        lowbit_record(64, torch_bf16=9.0, torch_fp32=0.5, W4A4=1.0, disturbed=True)]}
    text = table.lowbit_table(result)
    assert "| `W4A4` | 2.0 / 4.0 / - / - / - | 9.0 / 0.50 / - / - / - |" in text
    assert "Hadamard, `W4A4` | +3.1%" in text and "during 64 x 32 at M = 64" in text
    assert "fastest of them" not in text
    other = {**lowbit_record(1, torch_bf16=1.0, torch_fp32=3.0, W4A4=4.0), "K": 128}
    text = table.lowbit_table(result | {"results": [*result["results"], other]})
    assert "| `W4A4` | 0.25 to 2.0 | 0.50 to 0.50 |" in text
    rows = [{"spec": "comet:W4Ax", "perplexity": 13.5, "change": 0.05, "of_weights": 0.01, "four_bits": 0.5}]
    settings = {"model": "m", "tokens": 10, "calibration": 5}
    text = table.lowbit_quality_table({**common.header("q", settings), "perplexity": 13.0, "results": rows})
    assert "| `comet:W4Ax` (50% in four bits) | 13.50 | +5.0% | +1.0% |" in text


def test_any_result_renders(tmp_path, capsys):
    path = tmp_path / "other.json"
    common.write_json(path, {**common.header("other", {}), "records": [{"speed": 1.25, "name": "x", "rounds": [1]}]})
    assert table.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "| 1.25 | x |" in out and "rounds" not in out
    assert json.loads(path.read_text())["machine"]["cores"] == common.cores()
    path.write_text("{")
    assert table.main([str(path)]) == 2


def test_arguments():
    assert common.shapes("256x64, 128x32") == [(256, 64), (128, 32)]
    for wrong in ("100x64", "128", "128x0", ""):
        with pytest.raises(ValueError, match="accepted is KxN"):
            common.shapes(wrong)
    assert common.names("W4A16[group=64,sym=false], W4A8") == ["W4A16[group=64,sym=false]", "W4A8"]
    with pytest.raises(ValueError, match="accepted are positive"):
        common.integers("1,0")
    with pytest.raises(ValueError, match="accepted are auto, none"):
        contenders.gather(Options(), "nothing", sys.executable, sys.executable)
    assert linear.main(["--shapes", "100x100", "--peers", "none"]) == 2


def test_contenders_that_fail_keep_their_reason():
    proxy = contenders.Proxy("floors", "floors", "floors", sys.executable, Options())
    proxy.start()
    with pytest.raises(contenders.Gone, match="AttributeError"):
        proxy.ask("nonsense", limit=60)
    assert not proxy.alive and "do_nonsense" in proxy.reason and proxy.pid == 0

    dead = contenders.Proxy("no_such_file", "x", "peer", sys.executable, Options())
    dead.start()
    assert contenders.together([dead], "hello", 1, 60) == {}
    assert "ended (exit status 1)" in dead.reason and "no_such_file" in dead.reason

    slow = contenders.Proxy("floors", "floors", "floors", sys.executable, Options())
    slow.start()
    with pytest.raises(contenders.Gone, match="no answer within 0 s"):
        slow.ask("hello", limit=0)
