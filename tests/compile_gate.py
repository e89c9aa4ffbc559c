"""The compile gate: what the compiler made of every CUDA kernel, for every target, without a GPU.

    python tests/compile_gate.py                  # compile what changed since cuda/gate.json, check, update it
    python tests/compile_gate.py --all            # the full matrix
    python tests/compile_gate.py --all --nvcc PATH/TO/nvcc --no-record       # another compiler (13.5 is on PyPI)
    python tests/compile_gate.py --all --ptxas PATH/TO/ptxas --no-record     # an older assembler: all PyPI has of 12.8
    python tests/compile_gate.py --table          # the record as a markdown table

A kernel states its budget in its head comment, and each line is checked for each instance and target:

    // gate: defines TERSOR_BITS=2,3,4       one compilation for each value (optional)
    // gate: targets 89 90a 120a             where it is compiled (default: every target)
    // gate: registers 128 where <.*, 1>     at most so many, for instances whose name matches (or for all)
    // gate: shared 16                       static shared memory in bytes (default 0)
    // gate: wants HMMA.16816 LDGSTS         opcodes that each instance must have, by prefix (where ... as above)
    // gate: lacks IMMA                      opcodes that none may have; LDL and STL (local memory) never may

Spills and stack frames are never accepted. cuda/gate.json keeps what was found beside a digest of the sources, so a
kernel is compiled again only when it, or a header it includes, has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS, RECORD = ROOT / "cuda" / "kernels", ROOT / "cuda" / "gate.json"
DOCUMENT = ROOT / "docs" / "kernels.md"
INCLUDES = (ROOT / "cuda", ROOT / "cpp")
TARGETS = ("80", "86", "89", "90a", "100a", "120a")
NEVER = ("LDL", "STL")


class GateError(Exception):
    """A kernel broke its budget, or could not be compiled."""


# -- what a kernel asks for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    kind: str  # registers, shared, wants, lacks
    values: tuple[str, ...]
    where: str = ""


@dataclass(frozen=True)
class Kernel:
    path: Path
    variants: tuple[str, ...]  # -D options, one compilation each
    rules: tuple[Rule, ...]
    targets: tuple[str, ...] = TARGETS

    @property
    def name(self) -> str:
        return self.path.stem


def read_kernel(path: Path) -> Kernel:
    """The gate lines of one source. GateError where there are none, or one is not understood."""
    variants, rules, targets = ("",), [], TARGETS
    for line in re.findall(r"^// gate: (.*)$", path.read_text(encoding="utf-8"), re.M):
        found = re.fullmatch(r"(defines|targets|registers|shared|wants|lacks) (.+?)(?: where (.+))?", line.strip())
        if not found:
            raise GateError(f"{path.name}: gate line not understood: {line!r}")
        kind, values, where = found[1], tuple(found[2].split()), found[3] or ""
        if kind == "defines":
            name, _, choices = values[0].partition("=")
            variants = tuple(f"{name}={choice}" for choice in choices.split(","))
        elif kind == "targets":
            targets = values
            if unknown := set(targets) - set(TARGETS):
                raise GateError(f"{path.name}: targets {', '.join(sorted(unknown))}; accepted are {', '.join(TARGETS)}")
        else:
            rules.append(Rule(kind, values, where))
    if not rules:
        raise GateError(f"{path.name}: no '// gate:' line states what the compiler must make of it")
    return Kernel(path, variants, tuple(rules), targets)


def kernels() -> list[Kernel]:
    return [read_kernel(path) for path in sorted(KERNELS.glob("*.cu"))]


def digest(kernel: Kernel) -> str:
    """Of the source and all project headers that it includes, comments aside, and of the gate lines."""
    seen: dict[Path, bytes] = {}
    waiting = [kernel.path]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[path], re.M):
            for folder in (path.parent, *INCLUDES):
                if (folder / name.decode()).is_file():
                    waiting.append((folder / name.decode()).resolve())
                    break
    parts = [str(path.relative_to(ROOT)).encode() + b"\0" + re.sub(rb"\s*//[^\n]*", b"", seen[path])
             for path in sorted(seen)]
    parts.append(repr((kernel.variants, kernel.rules)).encode())
    if kernel.targets != TARGETS:
        parts.append(repr(kernel.targets).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


# -- what the compiler made -----------------------------------------------------------------------------------------


@dataclass
class Instance:
    """One kernel function of a cubin."""

    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)


def violations(kernel: Kernel, instance: Instance) -> list[str]:
    """What the instance does that the kernel does not allow."""
    found = []
    if instance.stack or instance.spills:
        found.append(f"{instance.stack} bytes of stack, {instance.spills} of spills")
    shared = 0
    for rule in kernel.rules:
        if rule.where and not re.search(rule.where, instance.name):
            continue
        if rule.kind == "registers" and instance.registers > int(rule.values[0]):
            found.append(f"{instance.registers} registers, allowed are {rule.values[0]}")
        elif rule.kind == "shared":
            shared = int(rule.values[0])
        elif rule.kind == "wants":
            found += [f"no {prefix}" for prefix in rule.values if not _count(instance, prefix)]
        elif rule.kind == "lacks":
            found += [f"{_count(instance, prefix)} {prefix}" for prefix in rule.values if _count(instance, prefix)]
    if instance.shared > shared:
        found.append(f"{instance.shared} bytes of static shared memory, allowed are {shared}")
    return found + [f"{_count(instance, name)} {name} (local memory)" for name in NEVER if _count(instance, name)]


def _count(instance: Instance, prefix: str) -> int:
    # Whole parts of a name: LDL is not LDLOCK, HMMA is HMMA.16816.F32.
    return sum(n for name, n in instance.opcodes.items() if name == prefix or name.startswith(prefix + "."))


_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill")
_OPCODE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def parse_ptxas(text: str) -> dict[str, Instance]:
    """What ``-Xptxas -v`` says, by mangled name."""
    instances: dict[str, Instance] = {}
    current = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)'", line):
            current = instances[found[1]] = Instance(found[1])
        elif found := re.search(r"Function properties for (\S+)", line):
            current = instances.get(found[1])
        elif current and (found := _SPILLS.search(line)):
            current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        elif current and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found[1])
            if found := re.search(r"(\d+) bytes smem", line):
                current.shared = int(found[1])
    return instances


def parse_sass(text: str) -> dict[str, dict[str, int]]:
    """Opcodes of a disassembly, by mangled name."""
    opcodes: dict[str, Counter] = {}
    current = None
    for line in text.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = opcodes.setdefault(found[1], Counter())
        elif current is not None and (found := _OPCODE.match(line)):
            current[found[1]] += 1
    return {name: dict(counter) for name, counter in opcodes.items()}


def demangle(names: list[str]) -> dict[str, str]:
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    # Without the namespace, the return type and the arguments: int_linear<BFloat16, 4, 1>.
    short = [re.sub(r"\(anonymous namespace\)::|tersor::|^void ", "", line) for line in shown.splitlines()]
    return dict(zip(names, (re.sub(r"\(.*", "", line) for line in short)))


def tool(name: str) -> str:
    """A CUDA tool from PyPI (nvidia-cuda-nvdisasm) or the path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else ()):
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    path = shutil.which(name)
    if path is None:
        raise GateError(f"{name}: not found; pip install nvidia-cuda-{name}")
    return path


class Nvcc:
    """A compiler; with ``ptxas`` it goes to PTX only, and that assembler does the rest.

    CUDA 12's wheels on PyPI hold the assembler but no front end. What may differ between releases is which instructions
    are known, and that is the assembler's part; the PTX is relabelled to the ISA version of CUDA 12.8.
    """

    def __init__(self, path: str | None = None, ptxas: str | None = None):
        self.ptxas = ptxas
        self.path = path or os.environ.get("CUDACXX") or shutil.which("nvcc")
        if not self.path:
            raise GateError("nvcc: not found; name one with --nvcc")
        said = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = "nvcc " + re.search(r"V([\d.]+)", said)[1]
        if ptxas:
            said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
            self.version += ", ptxas " + re.search(r"V([\d.]+)", said)[1]

    def compile(self, source: Path, define: str, target: str, cubin: Path) -> str:
        options = ["-std=c++17", "-O3", *(f"-I{folder}" for folder in INCLUDES), *([f"-D{define}"] if define else [])]
        what = f"{source.name} {define} sm_{target}"
        if not self.ptxas:
            options += [f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v"]
            return self._run([self.path, *options, "-o", cubin, source], what)
        ptx = cubin.with_suffix(".ptx")
        self._run([self.path, *options, f"-arch=compute_{target}", "-ptx", "-o", ptx, source], what)
        ptx.write_text(re.sub(r"^\.version \d+\.\d+", ".version 8.7", ptx.read_text(), flags=re.M))
        return self._run([self.ptxas, f"-arch=sm_{target}", "-v", "-o", cubin, ptx], what)

    def _run(self, command: list, what: str) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise GateError(f"{what}: {self.version} refused it\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout + done.stderr


# -- the matrix -------------------------------------------------------------------------------------------------------


def examine(kernel: Kernel, define: str, target: str, nvcc: Nvcc) -> list[Instance]:
    """Compile one variant for one target. GateError when the compiler refuses it or makes no kernel of it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        instances = parse_ptxas(nvcc.compile(kernel.path, define, target, cubin))
        sass = subprocess.run([tool("nvdisasm"), str(cubin)], capture_output=True, text=True, check=True).stdout
    opcodes, names = parse_sass(sass), demangle(list(instances))
    if not instances or set(opcodes) < set(instances):
        raise GateError(f"{kernel.name} {define} sm_{target}: found {len(instances)} kernels and {len(opcodes)} "
                        "sections of code, accepted is one section for each kernel")
    for mangled, instance in instances.items():
        instance.name, instance.opcodes = names[mangled], opcodes[mangled]
    return list(instances.values())


def summary(instance: Instance) -> dict:
    """What the record keeps: opcodes that say what kind of work is done, not all of them."""
    kept = Counter()
    for name, count in instance.opcodes.items():
        kept[name.split(".")[0]] += count
    shown = ("HMMA", "IMMA", "QMMA", "OMMA", "LDGSTS", "LDS", "LDSM", "LDG", "STG", "STS", "LDL", "STL", "LOP3",
             "PRMT", "BAR")
    return {**asdict(instance), "opcodes": {name: kept[name] for name in shown if kept[name]},
            "instructions": sum(kept.values())}


def gate(chosen: list[Kernel], nvcc: Nvcc, targets=TARGETS, jobs: int | None = None, say=print) -> dict:
    """Compile and check; returns the record's entries by kernel name. GateError lists every violation."""
    work = [(kernel, define, target) for kernel in chosen for define in kernel.variants for target in targets
            if target in kernel.targets]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        results = list(pool.map(lambda item: examine(*item, nvcc), work))
    found, broken = {}, []
    for (kernel, define, target), instances in zip(work, results):
        entry = found.setdefault(kernel.name, {"digest": digest(kernel), "compiler": nvcc.version, "variants": {}})
        entry["variants"].setdefault(define, {})[target] = [summary(instance) for instance in instances]
        for instance in instances:
            broken += [f"{instance.name} sm_{target}: {text}" for text in violations(kernel, instance)]
        say(f"{kernel.name} {define} sm_{target}: {len(instances)} kernels, at most "
            f"{max(i.registers for i in instances)} registers")
    if broken:
        raise GateError("\n".join(broken))
    return found


def read_record() -> dict:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


def written(record: dict) -> str:
    """As JSON, one line for each variant and target."""
    kernels_ = []
    for name, entry in sorted(record.items()):
        variants = ",\n".join(
            f"   {json.dumps(define)}: {{\n" + ",\n".join(
                f"    {json.dumps(target)}: {json.dumps(targets[target])}" for target in TARGETS if target in targets)
            + "\n   }" for define, targets in sorted(entry["variants"].items()))
        head = "".join(f"  {json.dumps(key)}: {json.dumps(entry[key])},\n" for key in ("compiler", "digest"))
        kernels_.append(f' {json.dumps(name)}: {{\n{head}  "variants": {{\n{variants}\n  }}\n }}')
    return "{\n" + ",\n".join(kernels_) + "\n}\n"


def stale(record: dict) -> list[Kernel]:
    """Kernels that changed since they were recorded, or whose record is not of all their variants and targets."""
    return [kernel for kernel in kernels()
            if (entry := record.get(kernel.name)) is None or entry["digest"] != digest(kernel)
            or set(entry["variants"]) != set(kernel.variants)
            or any(set(of) != set(kernel.targets) for of in entry["variants"].values())]


def table(record: dict) -> str:
    lines = ["| kernel | target | instances | registers | spills | local memory | tensor core opcodes |",
             "|---|---|---|---|---|---|---|"]
    for name, entry in sorted(record.items()):
        for target in TARGETS:
            instances = [one for of in entry["variants"].values() for one in of.get(target, ())]
            if not instances:
                continue
            registers = sorted({one["registers"] for one in instances})
            local = sum(one["opcodes"].get(op, 0) for one in instances for op in NEVER)
            mma = sum(one["opcodes"].get(op, 0) for one in instances for op in ("HMMA", "IMMA", "QMMA", "OMMA"))
            lines.append(f"| {name} | sm_{target} | {len(instances)} | {registers[0]} to {registers[-1]} | "
                         f"{sum(one['spills'] for one in instances)} | {local} | {mma} |")
    return "\n".join(lines)


def with_table(text: str, record: dict) -> str:
    """The document with the record's table between its markers."""
    return re.sub(r"(<!-- gate -->\n).*?(<!-- end of gate -->)", lambda m: m[1] + table(record) + "\n" + m[2], text,
                  flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every kernel, changed or not")
    parser.add_argument("--kernels", help="only kernels whose name matches this pattern")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--nvcc", help="a compiler other than CUDACXX or the one in PATH")
    parser.add_argument("--ptxas", help="an assembler other than the compiler's own")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--no-record", action="store_true", help="leave cuda/gate.json as it is")
    parser.add_argument("--table", action="store_true", help="print the record and do nothing else")
    args = parser.parse_args()
    record = read_record()
    if args.table:
        print(table(record))
        return
    targets = tuple(args.targets.split(","))
    if unknown := set(targets) - set(TARGETS):
        sys.exit(f"--targets: found {', '.join(sorted(unknown))}, accepted are {', '.join(TARGETS)}")
    try:
        chosen = kernels() if args.all else stale(record)
        if args.kernels:
            chosen = [kernel for kernel in chosen if re.search(args.kernels, kernel.name)]
        found = gate(chosen, Nvcc(args.nvcc, args.ptxas), targets, args.jobs)
    except GateError as error:
        sys.exit(f"compile gate: {error}")
    if not args.no_record and targets == TARGETS:
        names = {kernel.name for kernel in kernels()}
        # read again: others may have recorded theirs meanwhile
        record = {name: entry for name, entry in {**read_record(), **found}.items() if name in names}
        RECORD.write_text(written(record), encoding="utf-8")
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(f"compile gate: {len(found)} kernels pass")


if __name__ == "__main__":
    main()


