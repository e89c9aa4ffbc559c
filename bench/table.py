"""Renders measured results as markdown.

    python bench/table.py bench/results/*.json                  # to the terminal
    python bench/table.py bench/results/*.json --into README.md # between the file's markers
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import figures

BEGIN = "<!-- figures: rendered from bench/results by bench/table.py -->"
END = "<!-- end of figures -->"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def where(result: dict) -> str:
    """One sentence: machine, date, versions."""
    machine = result.get("machine", {})
    told = [str(machine["cpu"])] if "cpu" in machine else []
    if "cores" in machine:
        told.append(f"{machine['cores']} cores")
    if machine.get("flags"):
        told.append(", ".join(flag for flag in machine["flags"] if flag.startswith(("avx", "amx", "i8mm", "sve"))))
    found = result.get("versions") or machine.get("versions") or {}
    told += [f"{name} {found[name]}" for name in ("tersor", "torch") if name in found]
    return f"{'; '.join(part for part in told if part)}. Measured {str(result.get('date', 'at an unknown date'))[:10]}."


# -- linear -----------------------------------------------------------------------------------------------------


def _span(values: list[float], digits: int = 2) -> str:
    """Smallest and largest over the shapes, or the one value."""
    if not values:
        return "-"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def linear_table(result: dict) -> str:
    """Per tersor spec, threads and M: ratios over the shapes (above 1: tersor is faster)."""
    text = ["### Linear layers, " + ", ".join(result["settings"]["shapes_KxN"]) + " (K x N)", "", where(result)]
    if not result.get("complete"):
        text[-1] += " **This run was not completed.**"
    text += ["", "Time of the other over time of tersor; a range is over the shapes. *Of floor*: the time that this "
             "machine's measured limits (memory read, arithmetic) would allow, over the time taken.", ""]
    rows = []
    specs = [entry["name"] for entry in result["contenders"] if entry["role"] == "tersor"]
    for spec in specs:
        for threads in result["settings"]["threads"]:
            for m in result["settings"]["m"]:
                own = [row for row in result["records"] if row["contender"] == spec and row["threads"] == threads
                       and row["M"] == m and "ms" in row]
                if own:
                    rows.append([spec.split(" ", 1)[1], str(threads), str(m), *(
                        _span([row[field] for row in own if field in row]) for field in (
                            "x_bf16", "x_fp32", "x_best_exact_peer", "x_best_int8_peer")),
                        ", ".join(sorted({row["best_exact_peer"] for row in own if "best_exact_peer" in row})) or "-",
                        ", ".join(sorted({row["best_int8_peer"] for row in own if "best_int8_peer" in row})) or "-",
                        _span([100 * row["of_floor"] for row in own if "of_floor" in row], 0) + " %",
                        f"{max(row['error'] for row in own if row['error'] is not None):.1e}",
                        f"{max(row['other_cpu'] for row in own):.2f}"])
    text.append(table(["spec", "threads", "M", "x torch bf16", "x torch fp32", "x best peer, exact activations",
                       "x best peer, int8 activations", "best exact", "best int8", "of floor", "error",
                       "others' cores"], rows))
    limits = [f"{threads} thread{'s' if threads != '1' else ''}: {found['read_gbs']:.0f} GB/s, fp32 "
              f"{found['fp32_gflops']:.0f}, bf16 {found['bf16_gflops']:.0f}, int8 {found['int8_gops']:.0f} G/s"
              for threads, found in result["floors"].items()]
    text += ["", "Limits of this machine: " + "; ".join(limits) + " (0: no such instruction)." if limits else ""]
    absent = [f"{entry['name']} ({entry['status']})" for entry in result["contenders"] if entry["status"] != "measured"]
    if absent:
        text += ["", "Not measured, or not everywhere: " + "; ".join(absent) + "."]
    return "\n".join(text)


def linear_cells(result: dict) -> str:
    """Every measured time, a table per cell."""
    contenders = {entry["name"]: entry for entry in result["contenders"]}
    return "\n\n".join(
        f"K={k} N={n} M={m} threads={threads}\n" + figures.cell_text(rows, contenders)
        for (k, n, threads, m), rows in figures.cells(result).items())


# -- overhead, and anything else --------------------------------------------------------------------------------


def overhead_table(result: dict) -> str:
    rows = [[row["mode"], row["dtype"], str(row["threads"]), f"{row['nn_linear_us']:.2f}", f"{row['tersor_us']:.2f}",
             f"{row['overhead_us']:+.2f}", f"{row['dispatcher_us']:.2f}", f"{row['kernel_us']:.2f}"]
            for row in result["records"]]
    return "\n".join([
        f"### Cost of a call, {result['settings']['in_features']} x {result['settings']['out_features']}, M = 1", "",
        where(result), "", table(["mode", "dtype", "threads", "nn.Linear, us", "tersor.Linear, us", "difference, us",
                                  "torch.ops.tersor.int_linear, us", "kernel alone, us"], rows)])


def records_table(result: dict) -> str:
    """Any other result: its records' plain fields as columns."""
    records = result.get("records") or []
    columns = [key for key in dict.fromkeys(key for record in records for key in record)
               if not any(isinstance(record.get(key), (list, dict)) for record in records)]
    rows = [[_plain(record.get(key)) for key in columns] for record in records]
    return "\n".join([f"### {result.get('bench', 'result')}", "", where(result), "",
                      table([column.replace("_", " ") for column in columns], rows)])


def _plain(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def generate_table(result: dict) -> str:
    rows = [[record["model"], record["contender"], str(record["threads"]), f"{record['ratio_to_torch_bf16']:.2f}",
             f"{record['bytes'] / 1e6:.1f}"] for record in result["records"]]
    return "\n".join(["### Decode speed in plain `generate`, one sequence", "", where(result), "",
                      table(["model", "contender", "threads", "speed over torch bf16", "MB of weights"], rows)])


def gptq_table(result: dict) -> str:
    settings, rows = result["settings"], []
    for dtype, contenders in result["results"].items():
        for name, found in contenders.items():
            seconds = found["seconds"]
            rows.append([name, dtype, *(f"{found.get(f'times_faster_than_{peer}', float('nan')):.2f}"
                                        for peer in ("llm-compressor", "torch")),
                         f"{seconds['hessian'] / seconds['total']:.0%}", f"{found['relative_error']:.4f}"])
    width, tokens = settings["width"], f"{settings['sequences']} x {settings['length']}"
    return "\n".join([
        f"### GPTQ of one {width} x {width} layer, {tokens} tokens, Hessian included", "", where(result),
        f"{settings['bits']} bits, groups of {settings['group_size']}, {settings['threads']} threads; llm-compressor "
        f"{settings.get('llm_compressor') or 'not measured'}.", "",
        table(["contender", "inputs", "times faster than llm-compressor", "than torch", "share of the Hessian",
               "relative error of the output"], rows)])


RENDERERS = {"linear": linear_table, "overhead": overhead_table, "generate": generate_table, "gptq": gptq_table}


def insert(text: str, rendered: str) -> str:
    """``text`` with what is between its markers replaced. ValueError where the first marker is missing."""
    before, found, after = text.partition(BEGIN)
    if not found:
        raise ValueError(f"found no line {BEGIN!r}, which says where the figures go")
    if END in after:
        after = after.partition(END)[2]
    return f"{before}{BEGIN}\n{rendered.strip()}\n{END}{after}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the benchmarks")
    parser.add_argument("--into", type=Path, help="markdown file with the marker")
    parser.add_argument("--cells", action="store_true", help="every measured time of bench/linear.py too")
    arguments = parser.parse_args(argv)
    parts = []
    for path in arguments.results:
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            print(f"{path}: {error}")
            return 2
        parts.append(RENDERERS.get(result.get("bench"), records_table)(result))
        if arguments.cells and result.get("bench") == "linear":
            parts.append("```\n" + linear_cells(result) + "\n```")
    rendered = "\n\n".join(parts)
    if arguments.into is None:
        print(rendered)
        return 0
    try:
        text = insert(arguments.into.read_text(), rendered)
    except (OSError, ValueError) as error:
        print(f"{arguments.into}: {error}")
        return 2
    beside = arguments.into.with_name(arguments.into.name + ".part")
    beside.write_text(text)
    beside.replace(arguments.into)
    return 0


if __name__ == "__main__":
    sys.exit(main())
