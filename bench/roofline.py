"""The roofline picture of a result of bench/linear.py: operations per second over operations per stored byte.

    python bench/roofline.py bench/results/linear.json          # writes linear.svg and linear.png beside it
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import figures

COLORS = ("#0b6e4f", "#d1495b", "#3d5a98", "#edae49", "#7a5195", "#00798c")
MARKERS = "osD^vP"
GREY = {"torch bf16": "#888888", "torch fp32": "#bbbbbb"}


def draw(result: dict, json_path: str | Path) -> list[Path]:
    """Write the picture as SVG and PNG beside the JSON file; an empty list, and a line that says so, where matplotlib
    is missing or there is nothing to draw."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no roofline picture: matplotlib is not installed")
        return []
    threads = [count for count in result["floors"] if any(
        str(row["threads"]) == count and "ms" in row for row in result["records"])]
    if not threads:
        print("no roofline picture: there is no measured limit to draw it under")
        return []
    # A fixed salt for element ids: the same result gives the same file.
    pyplot.rcParams.update({"svg.hashsalt": "tersor", "svg.fonttype": "path", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(threads), figsize=(6.4 * len(threads), 5.2), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads):
        _panel(axis, result, count)
    axes[0][0].set_ylabel("GFLOP/s (2 M K N / time)")
    axes[0][-1].legend(fontsize=7, loc="lower right", framealpha=0.9)
    figure.suptitle(f"Linear layers on {result['machine']['cpu']}, {result['date'][:10]}: one point per shape and M",
                    fontsize=10)
    figure.tight_layout()
    written = []
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        path = Path(json_path).with_suffix(suffix)
        figure.savefig(path, dpi=130, metadata=metadata)
        written.append(path)
    pyplot.close(figure)
    return written


def _panel(axis, result: dict, threads: str) -> None:
    floors = result["floors"][threads]
    rows = [row for row in result["records"] if str(row["threads"]) == threads and "ms" in row]
    points = [2 * row["M"] * row["K"] * row["N"] / row["nbytes"] for row in rows]
    low, high = min(points) / 2, max(points) * 2
    for name, label, style in (("fp32_gflops", "fp32 FMA", "-"), ("bf16_gflops", "bf16", "--"),
                               ("int8_gops", "int8", ":")):
        if floors[name]:
            ridge = floors[name] / floors["read_gbs"]
            axis.plot([low, ridge, high], [low * floors["read_gbs"], floors[name], floors[name]], style,
                      color="#333333", linewidth=1, label=f"limit: {label}, {floors[name]:.0f} G/s")
    for name, xs, ys, style in _series(result, rows):
        axis.plot(xs, ys, linestyle="none", label=name, **style)
    axis.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per stored byte of weights",
             title=f"{threads} thread{'s' if threads != '1' else ''}, memory read at {floors['read_gbs']:.0f} GB/s")
    axis.grid(True, which="major", color="#e5e5e5")


def _series(result: dict, rows: list[dict]):
    """``(label, x, y, style)`` of tersor's specs, the baselines, and the best peer of each class in each cell."""
    contenders = {entry["name"]: entry for entry in result["contenders"]}
    own = [name for name, entry in contenders.items() if entry["role"] == "tersor"]
    for name, color in GREY.items():
        yield name, *_points(row for row in rows if row["contender"] == name), dict(marker="x", color=color)
    for kind, marker in ((figures.EXACT, "2"), (figures.INT8, "1")):
        best = [figures.best_peer(group, contenders, kind) for group in figures.cells({"records": rows}).values()]
        best = [row for row in best if row]
        if best:
            yield f"best peer, {kind} activations", *_points(best), dict(marker=marker, color="#555555", markersize=9)
    for index, name in enumerate(own):
        yield (name, *_points(row for row in rows if row["contender"] == name),
               dict(marker=MARKERS[index % len(MARKERS)], color=COLORS[index % len(COLORS)], markersize=5))


def _points(rows) -> tuple[list[float], list[float]]:
    rows = list(rows)
    return [2 * row["M"] * row["K"] * row["N"] / row["nbytes"] for row in rows], [row["gflops"] for row in rows]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON of bench/linear.py")
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.result.read_text())
    if result.get("bench") != "linear":
        print(f"{arguments.result}: found a result of {result.get('bench')!r}, accepted is one of bench/linear.py")
        return 2
    written = draw(result, arguments.result)
    print("\n".join(map(str, written)))
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
