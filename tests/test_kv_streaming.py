"""Contexts over HTTP: levels by bandwidth, text when it is the only way, and servers that stall, lie or break off."""

import socket
import threading
import time

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tersor
from tersor.kv import contexts, streaming
from tersor.kv.codec import LEVELS, ContextError
from tersor.kv.streaming import ContextServer, Pace, StreamError, publish, stream_context

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, CHUNK = 160, 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def exact(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.fixture
def published(model, ids, exact, tmp_path):
    """A directory with one context, its manifest, and chunks of about 3 to 9 kB."""
    return tmp_path, publish(exact, tmp_path / "book", model, token_ids=ids, chunk_tokens=CHUNK)


def go_on(model, ids, cache):
    return model.generate(torch.cat([ids, ids[:, :1]], 1), past_key_values=cache, max_new_tokens=10, do_sample=False)


def same(cache, other):
    return all(torch.equal(a, b) for mine, theirs in zip(contexts.read_cache(cache)[0], contexts.read_cache(other)[0])
               for a, b in zip(mine, theirs))


@pytest.mark.parametrize("spec", [None, "K4V4[group=32]"])
@pytest.mark.parametrize("level", list(LEVELS))
def test_a_streamed_context_goes_on_as_the_quantized_cache(model, ids, exact, published, spec, level):
    directory, manifest = published
    size = manifest.nbytes(list(LEVELS).index(level))
    with ContextServer(directory) as server:  # as fast as it can; the loader believes in what suits the level
        server.bytes_per_second = None
        loaded = stream_context(f"{server.url}/book", model, spec, deadline=1e9 if level == "high" else 1.0, text=False,
                                bytes_per_second=1e12 if level == "high" else 0.0)
        if level != "high":
            loaded = _only(level, server, model, spec)
    assert {fetched.level for fetched in loaded.chunks} == {level} and len(loaded.chunks) == 5
    assert sum(fetched.nbytes for fetched in loaded.chunks) == size
    expected = contexts.quantized(exact, model, level, spec, chunk_tokens=CHUNK)
    assert same(loaded.cache, expected)
    assert torch.equal(go_on(model, ids, loaded.cache), go_on(model, ids, expected))


def _only(level, server, model, spec):
    directory = server.directory / f"only_{level}"
    manifest = contexts.Manifest.from_bytes((server.directory / "book" / "manifest").read_bytes())
    at = [found.name for found in manifest.levels].index(level)
    (directory / level).mkdir(parents=True)
    for index in range(manifest.chunks):
        name = streaming.chunk_name(level, index)
        (directory / name).write_bytes((server.directory / "book" / name).read_bytes())
    lone = contexts.Manifest(manifest.geometry, manifest.tokens, manifest.chunk_tokens, manifest.levels[at:at + 1],
                             manifest.entries[at:at + 1], manifest.token_ids)
    (directory / "manifest").write_bytes(lone.to_bytes())
    return stream_context(f"{server.url}/only_{level}", model, spec, text=False)


def test_what_the_pace_allows(published):
    manifest = published[1]
    sizes = [manifest.nbytes(level) for level in range(3)]
    assert sizes[0] > sizes[1] > sizes[2]

    def pick(speed, tokens=0.0, elapsed=0.0, text=True, chunk=0):
        level = Pace(1.0, speed, tokens).choose(manifest, chunk, elapsed, text)
        return "text" if level is None else manifest.levels[level].name

    assert pick(0) == "medium", "nothing is known yet"
    assert [pick(size * 1.01) for size in sizes] == ["high", "medium", "low"]
    assert pick(sizes[2] * 0.9) == "text" and pick(sizes[2] * 0.9, text=False) == "low"
    assert pick(sizes[2] * 0.9, tokens=10.0) == "low", "the model would take even longer"
    assert pick(sizes[2] * 0.9, tokens=1e4) == "text"
    assert pick(sizes[0] * 1.01, elapsed=0.3) in ("medium", "low"), "time has passed"
    assert pick(sizes[0] * 0.5, chunk=3) == "high", "only what is left counts"


class Clock:
    """Time that passes only where the server waits to keep its rate: what is measured is the rate, exactly."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("share,expected", [(20.0, "high"), (1.0, "low"), (0.2, "text")])
def test_levels_follow_the_measured_bandwidth(model, ids, published, share, expected, monkeypatch):
    monkeypatch.setattr(streaming, "time", Clock())
    directory, manifest = published
    seconds = 1.0
    # What is left after the first chunk, which comes at the middle level, just about fits at the wanted level.
    low = sum(entry.size for entry in manifest.entries[2][1:]) + manifest.entries[1][0].size
    with ContextServer(directory, bytes_per_second=share * 1.12 * low / seconds) as server:
        loaded = stream_context(f"{server.url}/book", model, deadline=seconds)
    levels = [fetched.level for fetched in loaded.chunks]
    assert levels[0] == "medium" and expected in levels[1:], levels
    if expected == "low":
        assert "high" not in levels[1:]
    if expected == "text":
        assert levels[1:] == ["text"] * 4
        assert all(fetched.nbytes == 0 for fetched in loaded.chunks[1:])
    assert loaded.cache.get_seq_length() == TOKENS and loaded.seconds > 0
    go_on(model, ids, loaded.cache)


@pytest.mark.parametrize("spec", [None, "K8V8"])
def test_text_is_computed_on_what_has_come(model, ids, exact, published, spec):
    directory, manifest = published
    with ContextServer(directory) as server:
        loaded = stream_context(f"{server.url}/book", model, spec, deadline=0.0, bytes_per_second=1.0)
    assert [fetched.level for fetched in loaded.chunks] == ["text"] + [fetched.level for fetched in loaded.chunks[1:]]
    if spec is None:
        for mine, layer in zip(loaded.cache.layers, exact.layers):
            start = mine.keys[:, :, :CHUNK]
            torch.testing.assert_close(start, layer.keys[:, :, :CHUNK], rtol=1e-4, atol=1e-5)
    assert loaded.cache.get_seq_length() == TOKENS


def test_without_token_ids_there_is_no_text(model, exact, tmp_path):
    publish(exact, tmp_path / "book", model, chunk_tokens=CHUNK)
    with ContextServer(tmp_path) as server:
        loaded = stream_context(f"{server.url}/book", model, deadline=0.0, bytes_per_second=1.0)
    assert {fetched.level for fetched in loaded.chunks} == {"low"}


# -- servers that do not do what they should --------------------------------------------------------------------------


class Wicked(ContextServer):
    """Answers as it should, but for one chunk (or the manifest), where it does ``evil``."""

    def __init__(self, directory, evil, victim="/000002"):
        super().__init__(directory)
        self.evil, self.victim, self.done = evil, victim, threading.Event()

    def answer(self, request, target):
        if self.evil is None or not str(target).endswith(self.victim):
            return super().answer(request, target)
        data = target.read_bytes()
        size, body = len(data), data
        if self.evil == "short":
            body = data[:-5]
        elif self.evil == "lies":
            size, body = len(data) - 5, data[:-5]
        elif self.evil == "long":
            size, body = len(data) + 5, data + b"wrong"
        elif self.evil == "flip":
            body = data[:900] + bytes([data[900] ^ 1]) + data[901:]
        elif self.evil == "swap":
            body = (target.parent / "000001").read_bytes()
            size = len(body)
        elif self.evil == "status":
            request.send_error(503)
            return
        if self.evil == "silence":
            self.done.wait(20)
            return
        request.send_response(200)
        if self.evil != "endless":
            request.send_header("Content-Length", str(size))
        request.end_headers()
        if self.evil == "stall":
            request.wfile.write(data[:100])
            self.done.wait(20)
        elif self.evil == "drip":
            for byte in data:
                request.wfile.write(bytes([byte]))
                if self.done.wait(0.05):
                    break
        elif self.evil == "endless":
            while not self.done.is_set():
                request.wfile.write(bytes(1 << 16))
        else:
            request.wfile.write(body)
        request.close_connection = True

    def __exit__(self, *error):
        self.done.set()
        super().__exit__(*error)


EVIL = {"short": "bytes", "lies": "announced|bytes", "long": "announced", "flip": "checksum",
        "swap": "checksum|announced", "status": "status 503", "stall": "no data for 0.3 s",
        "silence": "no data for 0.3 s", "drip": "not done after 1 s", "endless": "more than"}


@pytest.mark.parametrize("evil", EVIL)
def test_what_a_bad_server_leaves_is_whole(model, ids, exact, published, evil):
    directory, manifest = published
    start = time.monotonic()
    with Wicked(directory, evil) as server:
        with pytest.raises(StreamError, match=EVIL[evil]) as error:
            stream_context(f"{server.url}/book", model, text=False, bytes_per_second=1e12, timeout=0.3, limit=1.0)
        assert time.monotonic() - start < 8, "no hang"
        assert error.value.tokens == 2 * CHUNK and "first 64 of 160 tokens" in str(error.value)
        cache = error.value.cache
        assert cache.get_seq_length() == 2 * CHUNK
        whole = contexts.quantized(exact, model, "high", chunk_tokens=CHUNK)
        for mine, layer in zip(cache.layers, whole.layers):
            assert torch.equal(mine.keys, layer.keys[:, :, :64]) and torch.equal(mine.values, layer.values[:, :, :64])
        server.evil = None  # it recovers: nothing is lost
        loaded = stream_context(f"{server.url}/book", model, cache=cache, text=False, bytes_per_second=1e12)
    assert [fetched.chunk for fetched in loaded.chunks] == [2, 3, 4] and loaded.cache is cache
    assert same(cache, whole) and torch.equal(go_on(model, ids, cache), go_on(model, ids, whole))


@pytest.mark.parametrize("evil", ["short", "status", "stall", "endless"])
def test_a_manifest_that_does_not_come(model, published, monkeypatch, evil):
    monkeypatch.setattr(streaming, "MAX_MANIFEST", 1 << 20)
    with Wicked(published[0], evil, "/manifest") as server, pytest.raises(StreamError, match=EVIL[evil]) as error:
        stream_context(f"{server.url}/book", model, timeout=0.3, limit=2.0)
    assert error.value.tokens == 0


def test_a_manifest_that_is_none(model, published):
    with Wicked(published[0], "flip", "/manifest") as server, pytest.raises(ContextError, match="damaged|contradicts"):
        stream_context(f"{server.url}/book", model)
    (published[0] / "page").mkdir()
    (published[0] / "page" / "manifest").write_text("<html>please log in to this network</html>")
    with ContextServer(published[0]) as server, pytest.raises(ContextError, match="this is no context"):
        stream_context(f"{server.url}/page", model)


def test_no_server_and_no_such_context(model, published):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StreamError, match="ConnectionRefusedError"):
        stream_context(f"http://127.0.0.1:{port}/book", model)
    with ContextServer(published[0]) as server:
        with pytest.raises(StreamError, match="status 404"):
            stream_context(f"{server.url}/film", model)
        assert server.find("/../../etc/passwd") is None and server.find("/%2e%2e/%2e%2e/etc/passwd") is None
        assert server.find("/book/manifest") is not None
    with pytest.raises(ValueError, match="http:// or https://"):
        stream_context("ftp://127.0.0.1/book", model)
    with pytest.raises(ValueError, match="timeout"):
        stream_context("http://127.0.0.1/book", model, timeout=0)


def test_a_context_of_another_model(model, published):
    config = LlamaConfig(**{**model.config.to_diff_dict(), "num_key_value_heads": 1})
    with ContextServer(published[0]) as server, pytest.raises(ValueError, match="found 2 heads of 32 channels"):
        stream_context(f"{server.url}/book", LlamaForCausalLM(config))


def test_a_cache_that_does_not_end_between_chunks(model, ids, published):
    cache = tersor.Cache(model, "K16V16")
    with torch.no_grad():
        model(ids[:, :33], past_key_values=cache)
    with ContextServer(published[0]) as server, pytest.raises(ValueError, match="found 33 tokens"):
        stream_context(f"{server.url}/book", model, cache=cache)
