"""Time of one linear layer: tersor's formats against torch, the installed peers and this machine's own limits.

    python bench/linear.py                      # the full table, about 12 minutes on 2 cores
    python bench/linear.py --quick              # about a minute
    python bench/linear.py --device cuda        # on a GPU
    python bench/linear.py --specs W4A16,W8A16 --shapes 1024x4096 --m 1,8 --threads 2 --peers onnxruntime

Every contender runs in a process of its own, in enough copies of the weight that a pass reads memory and not a cache,
and all take turns (A B C, then C B A), so that what disturbs one disturbs all. Ratios are of medians within one run.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field

import common
import figures
from contenders import Gone, Proxy, gather, together
from peers.base import Options

SETTLE = 0.02  # seconds between turns, for the threads of the last library to fall asleep
DISTURBED = 0.15  # cores that others may use before a turn is repeated
REPEATS = 2
LONG, VERY_LONG = 0.6, 2.5  # seconds a call: two calls are timed, or one
FULL = {"shapes": "4096x4096,4096x14336,14336x4096", "m": "1,4,16,64,512", "minutes": 12.0, "rounds": 3}
QUICK = {"shapes": "4096x4096", "m": "1,16,64", "minutes": 1.0, "rounds": 2}


@dataclass
class Turn:
    """What was seen of one contender in one cell."""

    products: int = 1  # products that one call computes
    medians: list[float] = field(default_factory=list)  # seconds a product, one entry per round
    best: float = float("inf")
    calls: int = 0
    own: list[float] = field(default_factory=list)  # cores that its process used
    other: list[float] = field(default_factory=list)  # cores that everything else used
    repeats: int = 0
    first: float = 0.0  # seconds of the first call
    over: bool = False  # no further call is worth its time


class Run:
    """A whole benchmark: settings, contenders, and rows as they come."""

    def __init__(self, arguments, proxies: list[Proxy]):
        self.shapes, self.ms = common.shapes(arguments.shapes), sorted(common.integers(arguments.m))
        self.threads, self.rounds = common.integers(arguments.threads), arguments.rounds
        self.call_limit, self.all_variants, self.out = arguments.call_limit, arguments.all_variants, arguments.out
        self.proxies, self.width = proxies, min(2, common.cores())
        self._told: set[tuple[str, str]] = set()  # reasons that were already printed
        self.started = time.monotonic()
        self.deadline = self.started + 60 * arguments.minutes
        self.cells_left = len(self.shapes) * len(self.threads) * len(self.ms)
        self.result = common.header("linear", {
            "shapes_KxN": [f"{k}x{n}" for k, n in self.shapes], "m": self.ms, "threads": self.threads,
            "specs": list(proxies[0].options.specs), "dtype": proxies[0].options.dtype, "rounds": self.rounds,
            "minutes": arguments.minutes, "bytes_per_contender": proxies[0].options.min_bytes, "peers": arguments.peers,
        })
        self.result.update({"complete": False, "floors": {}, "floors_measured": [], "contenders": [], "records": []})

    def whole(self) -> dict:
        try:
            self._start()
            self._floors("before")
            for index, (k, n) in enumerate(self.shapes):
                self._shape(k, n)
                if index == 0 and len(self.shapes) > 1 and not self.all_variants:
                    self._prune()
            self._floors("after")
            self.result["complete"] = True
            self._save()
        finally:
            for proxy in self.proxies:
                proxy.stop()
        return self.result

    # -- before and after -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        for proxy in self.proxies:
            proxy.start()
        for proxy, answer in together(self.proxies, "hello", self.width, 180).items():
            proxy.about, proxy.versions = answer["about"], answer["versions"]
        self._tell()

    def _floors(self, when: str) -> None:
        """Measure the machine's limits; of two measurements the better one counts, limits being limits."""
        own = next(proxy for proxy in self.proxies if proxy.role == "baseline")
        meter = Proxy("floors", "floors", "floors", own.python, own.options)
        meter.start()
        try:
            for threads in self.threads:
                found = meter.ask("floors", threads=threads, seconds=0.4)
                self.result["floors_measured"].append({"threads": threads, "when": when, **found})
                known = self.result["floors"].get(str(threads), {})
                self.result["floors"][str(threads)] = {
                    name: value if isinstance(value, str) else max(value, known.get(name, 0.0))
                    for name, value in found.items()}
                say(f"limits {when}, {threads} threads: " + ", ".join(
                    f"{name} {value:.0f}" for name, value in found.items() if not isinstance(value, str)))
        except Gone as error:
            say(f"limits: not measured: {error}")
        finally:
            meter.stop()

    # -- cells ----------------------------------------------------------------------------------------------------

    def _shape(self, k: int, n: int) -> None:
        start = time.monotonic()
        for proxy in self.proxies:
            proxy.error = None
        for proxy, answer in together(self.proxies, "make", self.width, 300, k=k, n=n).items():
            proxy.nbytes, proxy.copies, proxy.itemsize = answer["nbytes"], answer["copies"], answer["itemsize"]
            proxy.activations = answer["activations"]
        # One token and many take different kernels; the worse of both errors counts.
        for m in {1, min(16, max(self.ms))}:
            for proxy, answer in together(self.proxies, "check", self.width, 300, m=m,
                                          threads=self.threads[0]).items():
                proxy.error = max(answer["error"], proxy.error or 0.0)
        say(f"\nK={k} N={n}: weights made and checked in {time.monotonic() - start:.0f} s")
        for threads in self.threads:
            for proxy in self.proxies:
                proxy.last = None
            for m in self.ms:
                self._cell(k, n, threads, m)

    def _cell(self, k: int, n: int, threads: int, m: int) -> None:
        cell = {"K": k, "N": n, "M": m, "threads": threads}
        skipped = {proxy: reason for proxy in self.proxies if (reason := self._skip(proxy, m))}
        taking = [proxy for proxy in self.proxies if proxy.alive and proxy not in skipped]
        answers = together(taking, "bind", self.width, 300, m=m, threads=threads)
        turns = {proxy: Turn(answer["products"]) for proxy, answer in answers.items()}
        share = (self.deadline - time.monotonic()) / max(1, self.cells_left * len(turns))
        seconds = min(0.4, max(0.03, 0.4 * share / self.rounds))
        for index in range(self.rounds):
            for proxy in list(turns)[:: 1 if index % 2 == 0 else -1]:
                try:
                    self._turn(proxy, turns[proxy], index, seconds)
                except Gone:
                    continue
        self.cells_left -= 1
        for proxy in self.proxies:
            turn = turns.get(proxy)
            if turn and turn.medians and proxy.alive:
                self.result["records"].append({**cell, **self._row(proxy, turn)})
                proxy.last = m, self.result["records"][-1]["ms"] / 1e3
            else:
                reason = skipped.get(proxy) or proxy.reason
                self.result["records"].append({**cell, "contender": proxy.name, "skipped": reason})
        self._save()
        self._tell(skipped)
        contenders = {entry["name"]: entry for entry in self.result["contenders"]}
        left = self.deadline - time.monotonic()
        say(f"\nK={k} N={n} M={m} threads={threads} ({seconds * 1e3:.0f} ms a turn, {left:.0f} s of the budget left)")
        say(figures.cell_text(figures.cells(self.result)[k, n, threads, m], contenders))

    def _skip(self, proxy: Proxy, m: int) -> str:
        """Why a peer that is alive is not worth a call here, from its time with fewer tokens."""
        if proxy.role != "peer" or not proxy.alive or proxy.last is None:
            return ""
        expected = proxy.last[1] * m / proxy.last[0]
        if expected <= 2 * self.call_limit:  # many tokens usually cost less than in proportion
            return ""
        return (f"a product would take about {expected:.0f} s (from {proxy.last[1]:.2f} s at M={proxy.last[0]}), more "
                f"than the limit of {self.call_limit:g} s (--call-limit) twice over")

    def _turn(self, proxy: Proxy, turn: Turn, index: int, seconds: float) -> None:
        if turn.over:
            return
        if index == 0:
            time.sleep(SETTLE)
            watch, start = common.Watch(proxy.pid), time.perf_counter()
            turn.first = proxy.ask("probe")["seconds"] * turn.products
            if turn.first >= LONG:
                self._note(turn, [turn.first / turn.products], 1, watch.stop(time.perf_counter() - start))
                turn.over = turn.first >= VERY_LONG
                return
        if turn.first >= LONG:
            turn.over = True
            warm, seconds = 0, 0.0
        else:
            warm = 3 if turn.first < 0.005 else 1 if turn.first < 0.1 else 0
        best = None
        for attempt in range(1 + REPEATS):
            time.sleep(SETTLE)
            watch, start = common.Watch(proxy.pid), time.perf_counter()
            answer = proxy.ask("run", seconds=seconds, warm=warm, least=1)
            wall = time.perf_counter() - start
            used = watch.stop(wall)
            turn.repeats += attempt > 0
            if best is None or used[1] < best[2][1]:
                best = answer["seconds"], answer["calls"], used
            if used[1] <= DISTURBED + watch.resolution(wall) or wall > 1 or time.monotonic() > self.deadline:
                break
        self._note(turn, *best)

    @staticmethod
    def _note(turn: Turn, times: list[float], calls: int, used: tuple[float, float]) -> None:
        turn.medians.append(common.median(times))
        turn.best = min(turn.best, *times)
        turn.calls += calls
        turn.own.append(used[0])
        turn.other.append(used[1])

    def _row(self, proxy: Proxy, turn: Turn) -> dict:
        return {
            "contender": proxy.name, "ms": common.median(turn.medians) * 1e3, "ms_best": turn.best * 1e3,
            "rounds_ms": [value * 1e3 for value in turn.medians], "calls": turn.calls,
            "products_a_call": turn.products, "nbytes": proxy.nbytes, "copies": proxy.copies,
            "itemsize": proxy.itemsize, "error": proxy.error,
            "own_cores": round(max(turn.own), 2), "other_cpu": round(sum(turn.other) / len(turn.other), 2),
            "repeats": turn.repeats,
        }

    def _tell(self, skipped: dict[Proxy, str] | None = None) -> None:
        """Say who takes no part and why, each reason once."""
        for proxy in self.proxies:
            reason = proxy.reason or (skipped or {}).get(proxy, "")
            if reason and (proxy.name, reason) not in self._told:
                self._told.add((proxy.name, reason))
                say(f"  {proxy.name}: takes no part: {reason}")

    # -- the rest -------------------------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Of a peer's variants keep those that the first shape needs: within 5 % of its best in every cell."""
        contenders = {entry["name"]: entry for entry in self.result["contenders"]}
        files = {proxy.file: [] for proxy in self.proxies if proxy.role == "peer" and proxy.alive}
        for proxy in self.proxies:
            if proxy.file in files and proxy.alive:
                files[proxy.file].append(proxy)
        for variants in files.values():
            by_name = {proxy.name: proxy for proxy in variants}
            near: dict[str, set] = {name: set() for name in by_name}
            for cell, rows in figures.cells(self.result).items():
                for kind in (figures.EXACT, figures.INT8):
                    own = [row for row in rows if row["contender"] in by_name and "ms" in row]
                    best = figures.best_peer(own, contenders, kind)
                    for row in own:
                        if best and row["activations"] == kind and row["ms"] <= 1.05 * best["ms"]:
                            near[row["contender"]].add((cell, kind))
            kept, open_cells = [], set().union(*near.values())
            while open_cells:
                kept.append(max(near, key=lambda name: len(near[name] & open_cells)))
                open_cells -= near[kept[-1]]
            for name, proxy in by_name.items():
                if kept and name not in kept:
                    proxy.retire("measured on the first shape only, where other variants of this peer were as fast or "
                                 "faster in every cell (--all-variants measures it everywhere)")

    def _save(self) -> None:
        self.result["contenders"] = [proxy.described() for proxy in self.proxies]
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        common.write_json(self.out, figures.derive(self.result))


def say(text: str) -> None:
    print(text, flush=True)


def arguments_of(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: bench/linear_cuda.py")
    parser.add_argument("--shapes", help="K x N: input and output width, such as 4096x14336,14336x4096")
    parser.add_argument("--m", help="tokens of a call, such as 1,4,16")
    parser.add_argument("--specs", help="tersor specs (default W4A16,W4A8; on cuda W4A16,W8A16,W3A16)")
    parser.add_argument("--threads", help="such as 1,2 (default: 1 and all cores; with --quick all cores)")
    parser.add_argument("--peers", default="auto", help="auto (what is installed), none, or names: torch_int4, "
                        "torch_dyn4, bitsandbytes, onnxruntime, openvino, torchao")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python in which peers are installed")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32", "fp16"), help="of inputs (default bf16)")
    parser.add_argument("--quick", action="store_true", help="one shape, few cells, fewer variants of peers")
    parser.add_argument("--minutes", type=float, help="about how long; turns get shorter, cells are not dropped")
    parser.add_argument("--rounds", type=int, help="turns of each contender in a cell")
    parser.add_argument("--megabytes", type=float, help="of all copies of a weight together "
                        "(default 260, or eight times the last-level cache where that is more)")
    parser.add_argument("--call-limit", type=float, default=5.0, help="seconds that a peer's product may take; "
                        "a peer is left out of a cell where, in proportion to its last M, it would take twice as long")
    parser.add_argument("--all-variants", action="store_true", help="run every variant of a peer on every shape")
    parser.add_argument("--out", help="JSON file; the picture goes beside it (default bench/results/linear.json, "
                        "with --quick linear-quick.json)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda":
        arguments.out = arguments.out or common.RESULTS / "linear-cuda.json"
        arguments.specs = common.names("W4A16,W8A16,W3A16" if arguments.specs is None else arguments.specs)
        return arguments
    arguments.specs = arguments.specs or "W4A16,W4A8"
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    everything = sorted({1, common.cores()})
    arguments.threads = arguments.threads or ",".join(map(str, everything[-1:] if arguments.quick else everything))
    arguments.out = arguments.out or common.RESULTS / ("linear-quick.json" if arguments.quick else "linear.json")
    arguments.specs = tuple(common.names(arguments.specs))
    if arguments.rounds < 1 or arguments.minutes <= 0:
        parser.error("--rounds and --minutes are above 0")
    return arguments


def on_cuda(arguments) -> int:
    import torch

    if not torch.cuda.is_available():
        say("error: --device cuda: torch sees no GPU")
        return 2
    import linear_cuda

    linear_cuda.run(arguments)
    say(f"written: {arguments.out}")
    return 0


def main(argv=None) -> int:
    arguments = arguments_of(argv)
    if arguments.device == "cuda":
        return on_cuda(arguments)
    size = arguments.megabytes * 1e6 if arguments.megabytes else min(2e9, max(260e6, 8 * common.last_level_cache()))
    options = Options(arguments.dtype, int(size), arguments.specs, arguments.quick)
    try:
        proxies = gather(options, arguments.peers, sys.executable, arguments.peer_python)
        run = Run(arguments, proxies)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    result = run.whole()
    from roofline import draw
    from table import linear_table

    say("\n" + linear_table(result))
    say(f"\n{arguments.out}: {len(result['records'])} records in {result['seconds']:.0f} s")
    for path in draw(result, arguments.out):
        say(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
