"""Contexts over HTTP: chunks at several levels on any web server, and a loader that picks the level by what the network
gives (after CacheGen, arXiv 2310.07240).

    publish(cache, "contexts/manual", model, token_ids=ids)
    with ContextServer("contexts") as server:                       # or any server of static files
        loaded = stream_context(f"{server.url}/manual", model, "K4V4", deadline=0.5)
    model.generate(ids, past_key_values=loaded.cache)
"""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import nn

from .codec import LEVELS, ContextError, Level
from .contexts import (CHUNK_TOKENS, MAX_MANIFEST, Manifest, append, check_model, encode_context, new_cache,
                       write_beside)

MANIFEST = "manifest"
TEXT = "text"
PIECE = 1 << 16


class StreamError(RuntimeError):
    """A context could not be loaded to its end. ``cache`` holds its first ``tokens`` tokens, whole and usable: another
    call of `stream_context` with this cache goes on from there."""

    def __init__(self, message: str, cache=None, tokens: int = 0):
        super().__init__(message)
        self.cache, self.tokens = cache, tokens


# -- serving ----------------------------------------------------------------------------------------------------------


def chunk_name(level: str, chunk: int) -> str:
    return f"{level}/{chunk:06d}"


def publish(cache, directory: str | os.PathLike, model: nn.Module | None = None,
            levels: Sequence[str | Level] = tuple(LEVELS), token_ids=None, row: int = 0,
            chunk_tokens: int = CHUNK_TOKENS) -> Manifest:
    """Write the context that ``cache`` holds to a directory that any server of static files can serve: a manifest, and
    a file for each chunk at each of the ``levels``, given from the best to the smallest.

    ``token_ids``: what was read; loaders that are short of time compute from them. The manifest is written last.
    """
    manifest, data = encode_context(cache, model, levels, token_ids, row, chunk_tokens)
    directory = Path(directory)
    for level, chunks in zip(manifest.levels, data):
        (directory / level.name).mkdir(parents=True, exist_ok=True)
        for index, chunk in enumerate(chunks):
            write_beside(directory / chunk_name(level.name, index), [chunk])
    write_beside(directory / MANIFEST, [manifest.to_bytes()])
    return manifest


class ContextServer:
    """Serves the files under a directory over HTTP, for tests and small setups; a context manager.

    ``bytes_per_second`` limits what all connections send together; it may be changed while serving. ``url`` is where.
    """

    def __init__(self, directory: str | os.PathLike, host: str = "127.0.0.1", port: int = 0,
                 bytes_per_second: float | None = None):
        self.directory, self.bytes_per_second = Path(directory).resolve(), bytes_per_second
        self._lock, self._free_at = threading.Lock(), 0.0
        self._server = ThreadingHTTPServer((host, port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host}:{port}"

    def __enter__(self) -> "ContextServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _wait(self, count: int) -> None:
        """Until ``count`` more bytes may be sent."""
        if not self.bytes_per_second:
            return
        with self._lock:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + count / self.bytes_per_second
        time.sleep(max(0.0, self._free_at - time.monotonic()))

    def find(self, path: str) -> Path | None:
        """The file of a request's path; None where there is none under the directory."""
        target = (self.directory / unquote(urlsplit(path).path).lstrip("/")).resolve()
        return target if target.is_relative_to(self.directory) and target.is_file() else None

    def answer(self, request: BaseHTTPRequestHandler, target: Path) -> None:
        with open(target, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            request.send_response(200)
            request.send_header("Content-Type", "application/octet-stream")
            request.send_header("Content-Length", str(size))
            request.end_headers()
            while piece := file.read(min(PIECE, max(1024, int((self.bytes_per_second or 1e9) / 50)))):
                self._wait(len(piece))
                request.wfile.write(piece)

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                target = server.find(self.path)
                if target is None:
                    self.send_error(404)
                    return
                try:
                    server.answer(self, target)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_):
                pass

        return Handler


# -- fetching ---------------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """A transfer that did not give what it should have."""


class _Connection:
    """One kept-alive HTTP connection. What goes wrong, a status, a length, silence, is told as _Broken."""

    def __init__(self, url: str, timeout: float, limit: float):
        parts = urlsplit(url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"url: found {url!r}, accepted is http:// or https://")
        if not timeout > 0 or not limit > 0:
            raise ValueError(f"timeout, limit: found {timeout}, {limit}, accepted are more than 0 seconds")
        self.base, self.timeout, self.limit = parts.path.rstrip("/"), timeout, limit
        self.connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout)
        self.late = False

    def get(self, name: str, size: int | None = None) -> bytes:
        """A file of ``size`` bytes (None: as long as the server says, within reason)."""
        where = f"{self.connection.host}:{self.connection.port}{self.base}/{name}"
        self.late = False
        watch = threading.Timer(self.limit, self._give_up)  # also for a server that goes on, a byte at a time
        watch.daemon = True
        watch.start()
        try:
            data, stated = self._get(f"{self.base}/{name}", size)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            why = f"no data for {self.timeout:g} s" if isinstance(error, TimeoutError) else \
                f"{type(error).__name__}: {error}"
            raise _Broken(f"{where}: found {self._late() or why}, accepted is a server that goes on sending") from None
        finally:
            watch.cancel()
        wanted = size if size is not None else stated
        if isinstance(data, str) or wanted is not None and len(data) != wanted:
            self.close()  # what is left of the answer must not be taken for the next one
            found = data if isinstance(data, str) else f"{len(data)} bytes"
            raise _Broken(f"{where}: found {self._late() or found}, accepted are "
                          f"{f'{wanted} bytes' if wanted is not None else f'status 200 and to {MAX_MANIFEST} bytes'}")
        return data

    def _get(self, path: str, size: int | None) -> tuple[bytes | str, int | None]:
        """What came, or a word for what came instead; and the length that the server stated."""
        self.connection.request("GET", path)
        response = self.connection.getresponse()
        stated = response.length
        if response.status != 200:
            return f"status {response.status}", size
        if stated is not None and stated > MAX_MANIFEST or size is not None and stated not in (None, size):
            return f"{stated} bytes announced", size
        data, most = bytearray(), MAX_MANIFEST if size is None else size
        while len(data) <= most:
            piece = response.read1(min(PIECE, most + 1 - len(data)))
            if not piece:
                break
            data += piece
        response.close()  # the connection takes no other request before
        return f"more than {most} bytes" if len(data) > most else bytes(data), stated

    def _late(self) -> str:
        return f"a server that was not done after {self.limit:g} s" if self.late else ""

    def _give_up(self) -> None:
        self.late = True
        sock = self.connection.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed meanwhile

    def close(self) -> None:
        self.connection.close()


# -- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """How one chunk came: ``level`` is a name, or ``"text"`` where the model computed it; ``seconds`` of network or
    computation; ``bytes_per_second`` as it was measured when the level was picked (0: not yet)."""

    chunk: int
    level: str
    nbytes: int
    seconds: float
    bytes_per_second: float


@dataclass
class Loaded:
    """What `stream_context` gives."""

    cache: object
    manifest: Manifest
    seconds: float = 0.0
    chunks: list[Fetched] = field(default_factory=list)


@dataclass
class Pace:
    """What is known of the network and of the model, and which way it lets a chunk come.

    The best level is picked at which all that is left arrives by the deadline; where none does, text, if what is left
    can be computed sooner than the smallest level would arrive (or nothing is known of either); else the smallest
    level.
    """

    deadline: float
    bytes_per_second: float = 0.0
    tokens_per_second: float = 0.0

    def saw_bytes(self, count: int, seconds: float) -> None:
        self.bytes_per_second = count / max(seconds, 1e-9)

    def saw_tokens(self, count: int, seconds: float) -> None:
        self.tokens_per_second = count / max(seconds, 1e-9)

    def choose(self, manifest: Manifest, chunk: int, elapsed: float, text: bool) -> int | None:
        """Index of a level for ``chunk``, or None for text."""
        if not self.bytes_per_second:
            return len(manifest.levels) // 2
        left = self.deadline - elapsed
        times = [sum(e.size for e in entries[chunk:]) / self.bytes_per_second for entries in manifest.entries]
        for level, seconds in enumerate(times):
            if seconds <= left:
                return level
        if not text:
            return len(times) - 1
        tokens = manifest.tokens - manifest.span(chunk)[0]
        soon = not self.tokens_per_second or tokens / self.tokens_per_second < times[-1]
        return None if soon else len(times) - 1


def stream_context(url: str, model: nn.Module, spec: str | None = None, deadline: float = 1.0, cache=None,
                   text: bool = True, bytes_per_second: float = 0.0, tokens_per_second: float = 0.0,
                   timeout: float = 5.0, limit: float = 60.0) -> Loaded:
    """Load a published context into a cache, chunk by chunk, each at the level that the network allows.

    ``spec``: of the `tersor.Cache` to make; None makes a DynamicCache. ``deadline``: seconds in which all shall be
    there; it chooses levels, and is not enforced. ``cache``: one to go on with, of an earlier `StreamError`. ``text``:
    whether the model may compute chunks from the token ids, if they were published. ``bytes_per_second``,
    ``tokens_per_second``: what is known of the network and of the model beforehand; the first chunk comes at the middle
    level otherwise. ``timeout``: seconds without a byte after which a server has stalled; ``limit``: seconds that one
    file may take.

    A chunk is in the cache whole or not at all. StreamError, with the cache as far as it got, for a server that cannot
    be reached, stalls, or answers with other lengths or damaged bytes; ContextError for a manifest that is none;
    ValueError for a context of another model.
    """
    begin = time.monotonic()
    connection = _Connection(url, timeout, limit)
    try:
        try:
            manifest = Manifest.from_bytes(connection.get(MANIFEST), url)
        except _Broken as error:
            raise StreamError(str(error), cache, 0 if cache is None else cache.get_seq_length()) from None
        check_model(manifest.geometry, manifest.tokens, model, url)
        loaded = Loaded(new_cache(model, spec) if cache is None else cache, manifest)
        first = _resume(loaded.cache, manifest, url)
        pace = Pace(deadline, bytes_per_second, tokens_per_second)
        with ThreadPoolExecutor(1, "tersor-stream") as pool:
            _load(loaded, first, connection, model, pace, text and manifest.token_ids is not None, begin, pool)
        loaded.seconds = time.monotonic() - begin
        return loaded
    finally:
        connection.close()


def _resume(cache, manifest: Manifest, url: str) -> int:
    """The chunk to go on with."""
    held = cache.get_seq_length()
    if held % manifest.chunk_tokens and held != manifest.tokens or held > manifest.tokens:
        raise ValueError(f"{url}: cache: found {held} tokens, accepted are whole chunks of {manifest.chunk_tokens}, up "
                         f"to {manifest.tokens}")
    return -(-held // manifest.chunk_tokens)


def _load(loaded: Loaded, first: int, connection: _Connection, model: nn.Module, pace: Pace, text: bool, begin: float,
          pool: ThreadPoolExecutor) -> None:
    """Chunks in order; while one is decoded, the next one is under way."""
    manifest = loaded.manifest

    def fetch(chunk: int, level: int) -> tuple[bytes, float]:
        start = time.monotonic()
        data = connection.get(chunk_name(manifest.levels[level].name, chunk), manifest.entries[level][chunk].size)
        return data, time.monotonic() - start

    def pick(chunk: int) -> tuple[int | None, float, Future | None]:
        level = pace.choose(manifest, chunk, time.monotonic() - begin, text)
        return level, pace.bytes_per_second, None if level is None else pool.submit(fetch, chunk, level)

    ready = pick(first) if first < manifest.chunks else None
    for chunk in range(first, manifest.chunks):
        level, speed, coming = ready
        try:
            if level is None:
                start = time.monotonic()
                _compute(loaded.cache, manifest, chunk, model)
                seconds, size = time.monotonic() - start, 0
                pace.saw_tokens(manifest.span(chunk)[1], seconds)
                ready = pick(chunk + 1) if chunk + 1 < manifest.chunks else None
            else:
                data, seconds = coming.result()
                size = len(data)
                pace.saw_bytes(size, seconds)
                ready = pick(chunk + 1) if chunk + 1 < manifest.chunks else None
                append(loaded.cache, manifest.decode(data, level, chunk, model.dtype), model.device)
        except (ContextError, _Broken) as error:
            start = manifest.span(chunk)[0]
            raise StreamError(f"{error} (the cache holds the first {start} of {manifest.tokens} tokens)", loaded.cache,
                              start) from None
        name = TEXT if level is None else manifest.levels[level].name
        loaded.chunks.append(Fetched(chunk, name, size, seconds, speed))


def _compute(cache, manifest: Manifest, chunk: int, model: nn.Module) -> None:
    """A chunk's keys and values from its token ids, on top of the cache so far."""
    start, count = manifest.span(chunk)
    ids = torch.tensor([manifest.token_ids[start:start + count]])
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if int(ids.max()) >= vocabulary:
        raise ContextError(f"chunk {chunk}: found token {int(ids.max())}, accepted are to {vocabulary - 1}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        model.train(training)
