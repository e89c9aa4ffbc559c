"""The driver's side of a contender: a process, its questions and answers, and what became of it."""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict

import common
from peers import BASELINES, OWN, PEERS
from peers.base import Options


class Gone(Exception):
    """A contender that failed; the message is the reason that the results carry."""


class Proxy:
    """One contender. After a failure it stays in the list, with its reason, and is asked nothing more."""

    def __init__(self, file: str, variant: str, role: str, python: str, options: Options):
        self.file, self.name, self.role, self.python, self.options = file, variant, role, python, options
        self.about, self.versions, self.activations = "", {}, "exact"
        self.reason = ""  # why it takes no part any more
        self.nbytes = self.copies = self.itemsize = 0
        self.error: float | None = None  # relative error of the sample of the present shape
        self.last: tuple[int, float] | None = None  # (m, seconds) of the present shape and threads
        self._process: subprocess.Popen | None = None

    @property
    def alive(self) -> bool:
        return not self.reason

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self.python, "-m", "peers.worker", self.file, self.name, json.dumps(asdict(self.options))],
            cwd=common.BENCH, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def send(self, do: str, **arguments) -> None:
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # the process is gone: `receive` finds its last words

    def receive(self, limit: float) -> dict:
        """The answer. Gone where the contender says it failed, died, or took longer than ``limit`` seconds."""
        line, end, source = b"", time.monotonic() + limit, self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise self._gone(f"no answer within {limit:.0f} s")
            part = os.read(source, 1 << 16)
            if not part:
                code = self._process.wait()
                how = f"signal {-code}" if code < 0 else f"exit status {code}"
                raise self._gone(f"the process ended ({how}): {self._last_words()}")
            line += part
        answer = json.loads(line)
        if "failed" in answer:
            raise self._gone(answer["failed"])
        return answer

    def ask(self, do: str, limit: float = 300, **arguments) -> dict:
        self.send(do, **arguments)
        return self.receive(limit)

    def retire(self, reason: str) -> None:
        """Take no part any more."""
        self._gone(reason)

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._process = None

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"

    def _gone(self, reason: str) -> Gone:
        self.reason = reason
        if self._process:
            self._process.kill()
        self.stop()
        return Gone(reason)

    def described(self) -> dict:
        return {"name": self.name, "role": self.role, "activations": self.activations, "about": self.about,
                "versions": self.versions, "status": self.reason or "measured"}


def gather(options: Options, peers: str, python: str, peer_python: str) -> list[Proxy]:
    """The contenders that are asked for: the baselines, tersor's specs, then peers (``auto``, ``none``, or names of
    files or libraries). ValueError for a name that matches none."""
    if peers == "auto":
        files = PEERS
    elif peers == "none":
        files = ()
    else:
        wanted = [name.strip() for name in peers.split(",")]
        for name in wanted:
            if not any(file.startswith(name) for file in PEERS):
                raise ValueError(f"--peers: found {name!r}, accepted are auto, none, and of {', '.join(PEERS)}")
        files = tuple(file for file in PEERS if any(file.startswith(name) for name in wanted))
    roles = [(file, "baseline", python) for file in BASELINES] + [(OWN, "tersor", python)]
    roles += [(file, "peer", python if file.startswith("torch_") else peer_python) for file in files]
    return [Proxy(file, variant, role, executable, options) for file, role, executable in roles
            for variant in importlib.import_module(f"peers.{file}").variants(options)]


def together(proxies: Iterable[Proxy], do: str, width: int, limit: float, **arguments) -> dict[Proxy, dict]:
    """The same question to all, ``width`` of them working at a time; those that fail are retired."""
    answers, waiting, working = {}, [proxy for proxy in proxies if proxy.alive], []
    while waiting or working:
        while waiting and len(working) < width:
            working.append(waiting.pop(0))
            working[-1].send(do, **arguments)
        proxy = working.pop(0)
        try:
            answers[proxy] = proxy.receive(limit)
        except Gone:
            continue
    return answers
