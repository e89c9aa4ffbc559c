"""One contender in a process of its own: reads requests from stdin, a JSON object a line, and answers likewise.

    python -m peers.worker FILE VARIANT OPTIONS      # OPTIONS: base.Options as JSON
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

import common

from . import base
from .floors import floors

KEPT = 400  # times of single calls that an answer carries at most


class Server:
    def __init__(self, file: str, variant: str, options: base.Options):
        self.file, self.variant, self.options = file, variant, options
        self.module = None if file == "floors" else importlib.import_module(f"peers.{file}")
        self.contender: base.Contender | None = None
        self._bound, self._calls, self._products, self._next = None, (), 1, 0

    def do_hello(self):
        found = self.module.available() if self.module else {}
        return {"about": self.module.ABOUT if self.module else "", "versions": found}

    def do_floors(self, threads, seconds):
        return floors(threads, seconds)

    def do_make(self, k, n):
        self.contender, self._bound, self._calls = None, None, ()
        common.release_memory()
        self.contender = self.module.make(self.variant, k, n, self.options)
        common.release_memory()
        return {"nbytes": self.contender.nbytes, "copies": self.contender.copies,
                "activations": self.contender.activations, "itemsize": self.contender.itemsize}

    def do_check(self, m, threads):
        self._bound, self._calls = None, ()
        return {"error": base.relative_error(*self.contender.sample(m, threads))}

    def do_bind(self, m, threads):
        if self._bound != (m, threads):
            self._bound, self._calls = None, ()
            self._calls, self._products = self.contender.calls(m, threads)
            self._bound, self._next = (m, threads), 0
            common.release_memory()  # what building a graph left behind
        return {"products": self._products}

    def do_probe(self):
        """The first call, timed: tells how many more to ask for."""
        return {"seconds": self._once() / self._products}

    def do_run(self, seconds, warm, least):
        """Calls for about ``seconds`` (at least ``least``), after ``warm`` that are not counted."""
        for _ in range(warm):
            self._once()
        times, end = [], time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            times.append(self._once())
        step = -(-len(times) // KEPT)
        return {"seconds": [spent / self._products for spent in times[::step]], "calls": len(times)}

    def _once(self) -> float:
        call = self._calls[self._next % len(self._calls)]
        self._next += 1
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def main() -> None:
    # Libraries print: what they write to stdout goes to stderr, and the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    file, variant, options = sys.argv[1:4]
    fields = json.loads(options)
    server = Server(file, variant, base.Options(**{**fields, "specs": tuple(fields["specs"])}))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, "do_" + request.pop("do"))(**request)
        except base.Unavailable as error:
            answer = {"failed": str(error), "unavailable": True}
        except Exception as error:  # whatever a library raises is an answer
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
