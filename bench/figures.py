"""What follows from the measured times of bench/linear.py: rates, ratios, the fraction of the machine's floor."""

from __future__ import annotations

from collections import defaultdict

EXACT, INT8 = "exact", "int8"
BASELINES = {"x_bf16": "torch bf16", "x_fp32": "torch fp32"}

# |y - x w^T| / |x w^T| against the contender's own dequantized weights. Rounding to bf16 costs up to 3e-3 and int8
# activations 5e-3 and more, so a result between the two limits tells that activations were quantized.
ERROR_EXACT, ERROR_WRONG = 4.5e-3, 3e-2


def cell_of(row: dict) -> tuple[int, int, int, int]:
    return row["K"], row["N"], row["threads"], row["M"]


def cells(result: dict) -> dict[tuple, list[dict]]:
    """Rows by (K, N, threads, M), in the order measured."""
    grouped = defaultdict(list)
    for row in result["records"]:
        grouped[cell_of(row)].append(row)
    return dict(grouped)


def derive(result: dict) -> dict:
    """Fill in every derived field of the rows, in place: a pure function of times, bytes, errors and floors."""
    contenders = {entry["name"]: entry for entry in result["contenders"]}
    for (k, n, threads, m), rows in cells(result).items():
        measured = {row["contender"]: row for row in rows if "ms" in row}
        for row in measured.values():
            entry = contenders[row["contender"]]
            row["activations"], row["usable"] = _activations(entry, row)
            seconds = row["ms"] / 1e3
            moved = row["nbytes"] + row["itemsize"] * m * (k + n)
            row["gbs"], row["gflops"] = row["nbytes"] / seconds / 1e9, 2 * m * k * n / seconds / 1e9
            row.update(_floor(result["floors"].get(str(threads)), moved, 2 * m * k * n, seconds, row["activations"]))
            for field, baseline in BASELINES.items():
                if baseline in measured:
                    row[field] = measured[baseline]["ms"] / row["ms"]
                    row[field + "_range"] = _range(measured[baseline], row)
        best = {kind: best_peer(measured.values(), contenders, kind) for kind in (EXACT, INT8)}
        for row in measured.values():
            for kind, peer in best.items():
                if contenders[row["contender"]]["role"] == "tersor" and peer:
                    row[f"x_best_{kind}_peer"] = peer["ms"] / row["ms"]
                    row[f"best_{kind}_peer"] = peer["contender"]
    return result


def best_peer(rows, contenders: dict[str, dict], kind: str) -> dict | None:
    """The fastest peer of one class among the rows of a cell, of those whose numbers are right."""
    peers = [row for row in rows if contenders[row["contender"]]["role"] == "peer"
             and row["activations"] == kind and row["usable"]]
    return min(peers, key=lambda row: row["ms"], default=None)


def _activations(entry: dict, row: dict) -> tuple[str, bool]:
    error = row.get("error")
    if error is None:
        return entry["activations"], True
    kind = entry["activations"]
    if entry["role"] == "peer":  # what it did counts: options to quantize, or not to, are not honoured everywhere
        kind = INT8 if error > ERROR_EXACT else EXACT
    return kind, error <= ERROR_WRONG


def _range(baseline: dict, row: dict) -> list[float]:
    """Smallest and largest ratio of neighbouring rounds; of the medians where only one round was run."""
    pairs = list(zip(baseline["rounds_ms"], row["rounds_ms"]))
    ratios = [base / own for base, own in pairs]
    return [min(ratios), max(ratios)]


def _floor(floors: dict | None, nbytes: float, operations: float, seconds: float, kind: str) -> dict:
    """Time at the measured limits over time taken. The limits: reading what is stored and passing inputs and outputs,
    and arithmetic, with int8 operations for int8 activations and the faster of fp32 and bf16 for exact ones."""
    if not floors or not floors["read_gbs"]:
        return {}
    float_peak = max(floors["fp32_gflops"], floors["bf16_gflops"])
    peak = floors["int8_gops"] if kind == INT8 and floors["int8_gops"] else float_peak
    memory, arithmetic = nbytes / floors["read_gbs"] * 1e-9, operations / peak * 1e-9 if peak else 0.0
    return {"of_floor": max(memory, arithmetic) / seconds, "bound": "memory" if memory >= arithmetic else "arithmetic"}


# -- text -------------------------------------------------------------------------------------------------------


def cell_text(rows: list[dict], contenders: dict[str, dict]) -> str:
    """One cell as a table for the terminal, fastest first. `*` marks tersor, `!` a contender with wrong numbers."""
    lines = [f"  {'contender':30} {'acts':5} {'ms':>9} {'GB/s':>6} {'GFLOP/s':>8} {'x bf16':>7} {'x fp32':>7} "
             f"{'x peer exact':>12} {'x peer int8':>11} {'of floor':>8} {'error':>8} {'others':>6}"]
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"]):
        mark = "*" if contenders[row["contender"]]["role"] == "tersor" else " " if row["usable"] else "!"
        lines.append(
            f"{mark} {row['contender']:30} {row['activations']:5} {row['ms']:9.3f} {row['gbs']:6.1f} "
            f"{row['gflops']:8.1f} {_number(row, 'x_bf16', 7)} {_number(row, 'x_fp32', 7)} "
            f"{_number(row, 'x_best_exact_peer', 12)} {_number(row, 'x_best_int8_peer', 11)} "
            f"{_percent(row.get('of_floor'), 8)} {_error(row.get('error'), 8)} {row['other_cpu']:6.2f}")
    return "\n".join(lines)


def _number(row, field, width):
    return f"{row[field]:{width}.2f}" if field in row else " " * (width - 1) + "-"


def _percent(value, width):
    return " " * (width - 1) + "-" if value is None else f"{100 * value:{width - 1}.0f}%"


def _error(value, width):
    return " " * (width - 1) + "-" if value is None else f"{value:{width}.1e}"
