"""Renders measured results as markdown.

    python bench/table.py bench/results/*.json              # to the terminal
    python bench/table.py --refresh README.md docs/cache.md docs/lowbit.md     # every table of these files again

In a document, a table stands between two lines that only its source shows,

    <!-- figures: bench/results/gptq.json -->
    <!-- end of figures -->

and is made of the results named there (several with spaces between), whose paths start at the repository's root.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end of figures -->"
SECTION = re.compile(rf"(<!-- figures: (.+?) -->\n)(.*?)({re.escape(END)}|<!-- figures: |\Z)", re.DOTALL)


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
    text = [where(result)]
    if not result.get("complete"):
        text[-1] += " **This run was not completed.**"
    text += ["", f"Layers of {', '.join(result['settings']['shapes_KxN'])} (K x N). Time of the other over time of "
             "tersor; a range is over the shapes. *Of floor*: the time that this machine's measured limits (memory "
             "read, arithmetic) would allow, over the time taken.", ""]
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
    absent = defaultdict(list)
    for entry in result["contenders"]:
        if entry["status"] != "measured":
            absent[entry["status"]].append(entry["name"])
    if absent:
        text += ["", "Not measured, or not everywhere: "
                 + "; ".join(f"{', '.join(names)} ({status})" for status, names in absent.items()) + "."]
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
    settings = result["settings"]
    return "\n".join([
        where(result), f"Cost of a call, {settings['in_features']} x {settings['out_features']}, M = 1.", "",
        table(["mode", "dtype", "threads", "nn.Linear, us", "tersor.Linear, us", "difference, us",
               "torch.ops.tersor.int_linear, us", "kernel alone, us"], rows)])


def records_table(result: dict) -> str:
    """Any other result: its records' plain fields as columns."""
    records = result.get("records") or []
    columns = [key for key in dict.fromkeys(key for record in records for key in record)
               if not any(isinstance(record.get(key), (list, dict)) for record in records)]
    rows = [[_plain(record.get(key)) for key in columns] for record in records]
    return "\n".join([where(result), "", table([column.replace("_", " ") for column in columns], rows)])


def _plain(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def generate_table(result: dict) -> str:
    """Per model and contender: tokens a second over those of torch bf16, for the prompt too where that was timed."""
    prompt = f"prompt of {result['settings'].get('prefill')}, over torch bf16"
    header = ["model", "contender", "threads", "decoding, over torch bf16", prompt, "MB of weights"]
    rows = [[record["model"], record["contender"], str(record["threads"]), f"{record['ratio_to_torch_bf16']:.2f}",
             _ratio(record.get("prefill_ratio_to_torch_bf16")), f"{record['bytes'] / 1e6:.1f}"]
            for record in result["records"]]
    if all(row[4] == "-" for row in rows):
        header, rows = header[:4] + header[5:], [row[:4] + row[5:] for row in rows]
    return "\n".join([where(result), "", table(header, rows)])


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
        where(result),
        f"One {width} x {width} layer, {tokens} tokens, Hessian included; {settings['bits']} bits, groups of "
        f"{settings['group_size']}, {settings['threads']} threads; llm-compressor "
        f"{settings.get('llm_compressor') or 'not measured'}.", "",
        table(["contender", "inputs", "times faster than llm-compressor", "than torch", "share of the Hessian",
               "relative error of the output"], rows)])


# -- low-bit activations ----------------------------------------------------------------------------------------

OTHERS = {"torch bf16": "torch bf16", "torch fp32": "fp32", "torch linear_dynamic": "`linear_dynamic`",
          "onnxruntime b128 acc4": "ONNX Runtime", "openvino u4 dq": "OpenVINO"}
TRANSFORMS = {"+hadamard": "Hadamard", "+kronecker": "Kronecker"}


def _ratio(value: float | None) -> str:
    """Three digits, or two where more would only be noise."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def lowbit_table(result: dict) -> str:
    """Per spec and M: how much longer others take, one by one on the first shape and the best of them over all; what
    transforms add."""
    records = result["results"]
    shapes = list(dict.fromkeys((record["K"], record["N"]) for record in records))
    first = [record for record in records if (record["K"], record["N"]) == shapes[0]]
    specs = [name for name in first[0]["ways"] if name not in OTHERS and "torch" not in name and "+" not in name]
    header = ["", *(f"M = {record['M']}" for record in first)]
    k, n = shapes[0]
    text = [where(result), "", f"{k} x {n} (K x N), {result['settings']['threads']} threads: times of "
            f"{' / '.join(OTHERS.values())} over ours, rounding of activations included.", "",
            table(header, [[f"`{spec}`", *(_each_other(spec, record) for record in first)] for spec in specs])]
    if len(shapes) > 1:
        text += ["", f"The time of the fastest of them over ours, on {', '.join(f'{k} x {n}' for k, n in shapes)}:", "",
                 table(header, [[f"`{spec}`", *(_best_other(spec, [one for one in records if one["M"] == record["M"]])
                                                for record in first)] for spec in specs])]
    added = defaultdict(list)
    for record in records:
        for name, way in record["ways"].items():
            base, _, step = name.partition(" ")
            if step in TRANSFORMS and way.get("added") is not None:
                added[base, step].append((record, way["added"]))
    if added:
        measured = next(iter(added.values()))
        rows = [[f"{TRANSFORMS[step]}, `{base}`", *(f"{share:+.1%}" for _, share in found)]
                for (base, step), found in added.items()]
        text += ["", f"What a transform adds at M = {measured[0][0]['M']}:", "",
                 table(["", *(f"{record['K']} x {record['N']}" for record, _ in measured)], rows)]
    disturbed = [f"{record['K']} x {record['N']} at M = {record['M']}" for record in records if record["disturbed"]]
    if disturbed:
        text += ["", f"Something else used the machine during {', '.join(disturbed)}."]
    return "\n".join(text)


def _each_other(spec: str, record: dict) -> str:
    ways = record["ways"]
    return " / ".join(_ratio(ways[other]["ms"] / ways[spec]["ms"] if other in ways else None) for other in OTHERS)


def _best_other(spec: str, records: list[dict]) -> str:
    found = [min(ways[other]["ms"] for other in OTHERS if other in ways) / ways[spec]["ms"]
             for ways in (record["ways"] for record in records) if spec in ways]
    return f"{_ratio(min(found))} to {_ratio(max(found))}"


def lowbit_quality_table(result: dict) -> str:
    rows = [["16 bits", f"{result['perplexity']:.2f}", "", ""]]
    for record in result["results"]:
        share = "" if record["four_bits"] is None else f" ({record['four_bits']:.0%} in four bits)"
        rows.append([f"`{record['spec']}`{share}", f"{record['perplexity']:.2f}", f"{record['change']:+.1%}",
                     f"{record['of_weights']:+.1%}"])
    settings = result["settings"]
    return "\n".join([
        where(result), "",
        f"{settings['model']}, {settings['tokens']} tokens, calibration on {settings['calibration']} others.", "",
        table(["spec", "perplexity", "over 16 bits", "over the same weights, 16-bit inputs"], rows)])


# -- the cache --------------------------------------------------------------------------------------------------


def cache_quality_table(result: dict) -> str:
    rows = [[f"`{row['spec']}`", f"{row['bytes']:.0f}", f"{row['ratio']:.2f}", f"{row['perplexity_ratio'] - 1:+.2%}",
             f"{row['agree']:.1%}", f"{row['kl']:.4f}"] for row in result["results"]]
    settings = result["settings"]
    return "\n".join([
        where(result), "", f"{settings['model']}, {settings['sequences']} texts of {settings['length']} tokens, "
        f"teacher-forced in steps of {settings['step']} after a prompt of {settings['prompt']}.", "",
        table(["spec", "bytes a token", "times smaller", "perplexity", "same top token", "KL"], rows)])


def attention_table(result: dict) -> str:
    """Per layer: the time of the fastest of torch's paths over that of each cache."""
    records = result["results"]
    specs = [name for name in records[0]["ways"] if re.fullmatch(r"K\d+V\d+.*", name)]
    rows = [[record["shape"], record["dtype"], str(record["batch"]), str(record["tokens"]),
             *(_ratio(record["ways"][spec]["ratio_fastest"] if spec in record["ways"] else None) for spec in specs),
             "yes" if record["disturbed"] else ""] for record in records]
    header = ["layer of", "dtype", "batch", "tokens", *(f"`{spec}`" for spec in specs), "disturbed"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return "\n".join([where(result), "", f"{result['settings']['threads']} threads; the time of the fastest of torch's "
                      "paths over ours.", "", table(header, rows)])


RENDERERS = {"linear": linear_table, "overhead": overhead_table, "generate": generate_table, "gptq": gptq_table,
             "lowbit": lowbit_table, "lowbit_quality": lowbit_quality_table, "cache_quality": cache_quality_table,
             "attention": attention_table}


def render(path: Path) -> tuple[dict, str]:
    """A result and its table. ValueError for a file that holds none."""
    try:
        result = json.loads(path.read_text())
        return result, RENDERERS.get(result.get("bench"), records_table)(result)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: found no result of a benchmark ({type(error).__name__}: {error})") from error


def refreshed(text: str, root: Path = ROOT) -> str:
    """A document with every marked table rendered again from the results that its marker names. ValueError for a
    document without markers, a marker without its end, and results that are not there."""

    def again(found: re.Match) -> str:
        if found[4] != END:
            raise ValueError(f"found {found[1].strip()!r} without {END!r}")
        return found[1] + "\n\n".join(render(root / name)[1] for name in found[2].split()) + "\n" + END

    text, count = SECTION.subn(again, text)
    if not count:
        raise ValueError("found no line '<!-- figures: ... -->', which says where figures go and of what")
    return text


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of the benchmarks, to be printed")
    parser.add_argument("--refresh", type=Path, nargs="+", default=[], help="documents whose tables are made again")
    parser.add_argument("--cells", action="store_true", help="every measured time of bench/linear.py too")
    arguments = parser.parse_args(argv)
    if not arguments.results and not arguments.refresh:
        parser.error("found neither results nor --refresh")
    for path in arguments.results:
        try:
            result, text = render(path)
        except ValueError as error:
            print(error)
            return 2
        print(f"### {result['bench']}\n\n{text}\n")
        if arguments.cells and result["bench"] == "linear":
            print(f"```\n{linear_cells(result)}\n```\n")
    for path in arguments.refresh:
        try:
            text = refreshed(path.read_text())
        except (OSError, ValueError) as error:
            print(f"{path}: {error}")
            return 2
        beside = path.with_name(path.name + ".part")
        beside.write_text(text)
        beside.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
