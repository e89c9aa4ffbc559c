"""The codec of the cache: streams against a reader in Python, sizes against entropy, chunks and files, damage."""

import math
import random
import struct
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import tersor
from tersor import _C
from tersor.kv import codec, contexts
from tersor.kv.codec import (LEVELS, ContextError, Geometry, LayerShape, Level, decode_chunk, decode_streams,
                             encode_chunk, encode_streams, steps)
from tersor.kv.levels import tune_level
from tersor.kv.rotary import Rotary

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "stdlib-llama"
pytestmark = pytest.mark.usefixtures("one_thread")
PREDICTOR = (0, 2, 3, 4)


# -- a reader of streams, written from kv_codec.h alone ---------------------------------------------------------------


def tables():
    """Frequencies of symbol -> slots, in the order of symbols."""
    ratios = [math.floor(math.exp(-1 / (2 * (0.25 * 1.146**i)**2)) * 2**32) for i in range(40)] \
        + [math.floor(math.exp(-1 / (0.15 * 1.28**i)) * 2**32) for i in range(24)]
    found = []
    for i, ratio in enumerate(ratios):
        weights, square = [1 << 32], ratio * ratio >> 32
        for _ in range(127):
            weights.append(weights[-1] * ratio >> 32)
            ratio = ratio * square >> 32 if i < 40 else ratio
        total, last = 2 * sum(weights) - weights[0], 1
        while last < 127 and weights[last + 1] * 8192 >= total:
            last += 1
        total = 2 * sum(weights[:last + 1]) - weights[0]
        table = {k: max(1, weights[abs(k)] * 4094 // total) for k in range(-last, last + 1) if k}
        table |= {0: 4094 - sum(table.values()), -128: 2}
        found.append(dict(sorted(table.items())))
    return found


TABLES = tables()


def read_stream(data, tokens, dim):
    """The integers of a stream, ``[dim][tokens]`` in eighths of a step, and the step."""
    step, flags, zero, escaped = struct.unpack_from("<eBBI", data)
    assert flags < 4 and not zero
    at, lanes = 8, 32 if flags & 2 else 8
    means = struct.unpack_from(f"<{dim}{'h' if flags & 1 else 'b'}", data, at)
    at += dim * (2 if flags & 1 else 1)
    modes = data[at:at + dim]
    at += dim
    grouped = [c for c in range(dim) if modes[c] >> 6]
    anchor_tables = dict(zip(grouped, data[at:]))
    at += len(grouped)
    states = list(struct.unpack_from(f"<{lanes}I", data, at))
    at += 4 * lanes
    end = len(data) - escaped
    words, escapes = iter(struct.unpack(f"<{(end - at) // 2}H", data[at:end])), iter(data[end:])
    heads = -(-tokens // 10)
    rows = [(table, c, anchors) for c in range(dim) for anchors, table in
            ((1, anchor_tables.get(c)), (0, modes[c] & 63)) if table is not None]
    symbols = {}
    for table, c, anchors in sorted(rows, key=lambda row: row[0]):  # stable: by channel, anchors first
        slots = [(symbol, f, i) for symbol, f in TABLES[table].items() for i in range(f)]
        count = heads if anchors else tokens - (heads if modes[c] >> 6 else 0)
        out = symbols[c, anchors] = []
        for i in range(count):
            x = states[i % lanes]
            symbol, frequency, bias = slots[x % 4096]
            x = frequency * (x >> 12) + bias
            states[i % lanes] = x if x >= 1 << 16 else x << 16 | next(words)
            out.append(symbol)
        for i in range(count):
            if out[i] == -128:
                value, shift = 0, 0
                while True:
                    byte = next(escapes)
                    value |= (byte & 127) << shift
                    shift += 7
                    if not byte & 128:
                        break
                out[i] = value - (1 << shift) if byte & 64 else value
    assert states == [1 << 16] * lanes and next(words, None) is None and next(escapes, None) is None
    levels = []
    for c in range(dim):
        rest, a = iter(symbols[c, 0] if (c, 0) in symbols else ()), PREDICTOR[modes[c] >> 6]
        if not a:
            levels.append([8 * q + means[c] for q in rest])
            continue
        anchors = symbols[c, 1]
        levels.append([4 * anchors[t // 10] + means[c] if t % 10 == 0 else
                       8 * next(rest) + a * anchors[t // 10] + means[c] for t in range(tokens)])
    return torch.tensor(levels, dtype=torch.int32), step


def sample(kind, tokens, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "normal":
        return randn(1, tokens, dim) + 3 * randn(dim)
    if kind == "grouped":  # tokens resemble the first of their ten
        return 4 * randn(1, -(-tokens // 10), dim).repeat_interleave(10, 1)[:, :tokens] + 0.2 * randn(1, tokens, dim)
    if kind == "heavy":  # escapes
        return randn(1, tokens, dim)**5
    if kind == "shifted":  # means that need 16 bits
        return randn(1, tokens, dim) + 300 * torch.arange(dim) / dim
    return torch.full((1, tokens, dim), 2.5)


def one(dim, dtype=torch.float32):
    """A geometry whose only keys are of one head."""
    return Geometry((LayerShape(1, dim, 1),), dtype)


def decode_one(data, tokens, dim, levels=None, dtype=None):
    filler = encode_streams(torch.zeros(1, tokens, 1), torch.ones(1, dtype=torch.float16))[0]
    packed = torch.frombuffer(bytearray(data + filler), dtype=torch.uint8)
    return decode_streams(packed, [len(data), len(filler)], one(dim), 0, tokens, dtype, levels)[0][0][0]


@pytest.mark.parametrize("kind,tokens,dim", [
    ("normal", 1, 16), ("normal", 7, 20), ("normal", 40, 24), ("grouped", 40, 16), ("grouped", 93, 9),
    ("heavy", 100, 16), ("shifted", 33, 40), ("constant", 12, 16), ("grouped", 256, 48), ("heavy", 256, 33),
    ("normal", 256, 64)])
def test_streams_are_what_the_format_says(isa, kind, tokens, dim):
    x = sample(kind, tokens, dim)
    step = torch.tensor([0.375], dtype=torch.float16)
    data = encode_streams(x, step)[0]
    levels = []
    out = decode_one(data, tokens, dim, levels)
    expected, said = read_stream(data, tokens, dim)
    assert said == 0.375 and torch.equal(levels[0][0], expected), "lossless on symbols"
    assert torch.equal(out, expected.T.float() * (0.375 / 8))
    assert (out - x[0]).abs().max() <= 0.375 / 2 + 2e-7 * x.abs().max()
    if kind == "grouped":
        assert any(mode >> 6 for mode in data[8:8 + 3 * dim]), "anchors are used where they help"
    if kind == "heavy":
        assert struct.unpack_from("<I", data, 4)[0] > 0


def test_instruction_sets_agree():
    before, found = _C.isa(), []
    try:
        for name in _C.isas():
            _C.set_isa(name)
            data = [encode_streams(sample(kind, 111, 72), torch.tensor([0.5], dtype=torch.float16))[0]
                    for kind in ("normal", "grouped", "heavy")]
            found.append((data, [decode_one(d, 111, 72, dtype=t) for d in data
                                 for t in (torch.float32, torch.bfloat16, torch.float16)]))
    finally:
        _C.set_isa(before)
    for data, out in found[1:]:
        assert data == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(out, found[0][1]))


def test_tables():
    for i, table in enumerate(TABLES):
        frequencies = _C.kv_codec_table(i)
        assert sum(frequencies) == 4096 and max(frequencies) < 4096
        assert {s: frequencies[s & 255] for s in table} == table
        assert sum(f > 0 for f in frequencies) == len(table)
    with pytest.raises(ValueError, match="table is 64"):
        _C.kv_codec_table(64)


def test_size_is_close_to_entropy_and_never_under_it():
    x, step = sample("normal", 256, 128), torch.tensor([0.6], dtype=torch.float16)
    data = encode_streams(x, step)[0]
    levels, _ = read_stream(data, 256, 128)
    # The source's own entropy, not the sample's: each channel is a normal distribution on a grid of known offset.
    edges = torch.arange(-40.0, 41.0)
    offset = (x[0].mean(0) / 0.6).unsqueeze(1)
    p = torch.distributions.Normal(0.0, x[0].std(0).unsqueeze(1) / 0.6)
    p = (p.cdf(edges - offset + offset.round() + 0.5) - p.cdf(edges - offset + offset.round() - 0.5)).double()
    source = -(p * p.clamp_min(1e-12).log2()).sum(1).mean().item() * x.numel() / 8
    counted = sum(-math.log2(levels[c].eq(v).float().mean()) for c in range(128) for v in levels[c].tolist()) / 8
    assert counted <= len(data), "no code is shorter than the entropy of what it holds"
    assert len(data) < source * 1.02 + 8 + 2 * 128 + 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_round_as_torch_does(isa, dtype):
    x = sample("normal", 50, 40)
    data = encode_streams(x, torch.tensor([0.3], dtype=torch.float16))[0]
    assert torch.equal(decode_one(data, 50, 40, dtype=dtype), decode_one(data, 50, 40).to(dtype))


@pytest.mark.parametrize("rotary", [None, Rotary(tuple(10000**(-i / 16) for i in range(16))),
                                    Rotary(tuple(500**(-i / 8) for i in range(8)), True)])
def test_keys_are_coded_before_their_rotation(isa, rotary):
    generator = torch.Generator().manual_seed(1)
    still = torch.randn(2, 64, 32, generator=generator) * 0.3 + 4 * torch.randn(2, 1, 32, generator=generator)
    values = torch.randn(2, 64, 4, generator=generator)
    positions = torch.arange(100, 164)
    keys = still if rotary is None else rotary.turn(still.double(), positions).float()
    geometry = Geometry((LayerShape(2, 32, 4, rotary),))
    level = Level("test", (16,), (16,))
    data = encode_chunk([(keys, values)], geometry, level, 3, 100)
    (k, v), = decode_chunk(data, geometry, 3, 100, 64)
    step = steps(still, 16).double().view(2, 1, 1)
    back = k.double() if rotary is None else rotary.turn(k.double(), positions, back=True)
    assert ((back - still).abs() <= step / 2 + 1e-5).all()
    assert ((v - values).abs() <= steps(values, 16).double().view(2, 1, 1) / 2 + 1e-5).all()
    if rotary is not None:
        bins = 2 + 2 * round(7 * (steps(keys, 16) / steps(still, 16)).mean().item())  # steps as fine as before
        same = Level("same", (bins,), (16,))
        plain = encode_chunk([(keys, values)], Geometry((LayerShape(2, 32, 4),)), same, 3, 100)
        assert len(data) < 0.85 * len(plain), "what a rotation blurs takes more bits"


def test_many_threads_and_streams():
    x = torch.randn(40, 60, 16, generator=torch.Generator().manual_seed(2))
    assert encode_streams(x, steps(x, 16), threads=1) == encode_streams(x, steps(x, 16), threads=3)


def test_levels():
    level = Level("custom", (4, 8, 16), (32,))
    assert [level.bins(i, 6)[0] for i in range(6)] == [4, 4, 8, 8, 16, 16] and level.bins(3, 4) == (16, 32)
    for bad in ((), (5,), (2,), (258,), (8.0,)):
        with pytest.raises(ValueError, match="even numbers from 4 to 256"):
            Level("x", bad, (8,))
    with pytest.raises(ValueError, match="accepted are high, medium, low"):
        codec.find_level("best")
    with pytest.raises(ValueError, match="identifier"):
        Level("../x", (8,), (8,))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    x = torch.randn(1, 8, 16)
    x[0, 3, 5] = bad
    with pytest.raises(ValueError, match="layer 0: found numbers that are not finite"):
        encode_chunk([(x, x)], Geometry((LayerShape(1, 16, 16),)), LEVELS["high"], 0, 0)
    with pytest.raises(ValueError, match="not finite or too large"):
        encode_streams(x, torch.ones(1, dtype=torch.float16))


def test_extremes():
    for scale in (0.0, 1e-12, 1e4, 1e7):
        x = sample("heavy", 64, 16) * scale
        step = steps(x, 64)
        data = encode_streams(x, step)[0]
        assert ((decode_one(data, 64, 16) - x[0]).abs() <= step.float() / 2 + 1e-5 * x.abs().max()).all()
    with pytest.raises(ValueError, match="values of layer 0: found magnitudes"):
        encode_chunk([(torch.zeros(1, 8, 4), torch.full((1, 8, 4), 1e30))], Geometry((LayerShape(1, 4, 4),)),
                     LEVELS["low"], 0, 0)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_tokens_that_do_not_spread(tokens):
    x = sample("heavy", 1, 16).expand(1, tokens, 16).contiguous() * 3
    data = encode_streams(x, steps(x, 16))[0]
    assert ((decode_one(data, tokens, 16) - x[0]).abs() <= x.abs().max() / 2000).all()


# -- damage -----------------------------------------------------------------------------------------------------------


def test_any_bytes_are_safe_past_the_checksum(isa):
    random.seed(0)
    tokens, dim = 60, 40
    good = {kind: encode_streams(sample(kind, tokens, dim), torch.tensor([0.4], dtype=torch.float16))[0]
            for kind in ("grouped", "heavy")}
    refused = 0
    for kind, data in good.items():
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(random.choice((1, 1, 2, 8))):
                damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
            if random.random() < 0.4:
                del damaged[random.randrange(len(damaged)):]
            elif random.random() < 0.1:
                damaged += bytes(random.randrange(1, 70))
            try:
                out = decode_one(bytes(damaged), tokens, dim)
                assert out.shape == (tokens, dim) and torch.isfinite(out).all()
            except ValueError as error:
                refused += "stream 0" in str(error)
        for size in range(0, len(data), 7):
            with pytest.raises(ValueError, match="stream 0"):
                decode_one(data[:size], tokens, dim)
    assert refused > 200, "the coder's end state is a check of its own"
    for _ in range(50):
        noise = random.randbytes(random.randrange(400))
        try:
            decode_one(noise, tokens, dim)
        except ValueError as error:
            assert "stream 0" in str(error)


@pytest.fixture(scope="module")
def chunk():
    parts = [(torch.randn(2, 30, 16), torch.randn(2, 30, 16)) for _ in range(2)]
    geometry = Geometry((LayerShape(2, 16, 16),) * 2)
    return encode_chunk(parts, geometry, LEVELS["medium"], 1, 30), geometry


def test_every_flip_and_every_cut_is_refused(chunk):
    data, geometry = chunk
    decode_chunk(data, geometry, 1, 30, 30)
    for at in [*range(codec.HEADER_BYTES), *range(codec.HEADER_BYTES, len(data), 11)]:
        with pytest.raises(ContextError, match="chunk 1"):
            decode_chunk(data[:at] + bytes([data[at] ^ 16]) + data[at + 1:], geometry, 1, 30, 30)
        with pytest.raises(ContextError, match="chunk 1"):
            decode_chunk(data[:at], geometry, 1, 30, 30)
    with pytest.raises(ContextError, match="bytes after the header"):
        decode_chunk(data + b"\0", geometry, 1, 30, 30)


def test_a_chunk_says_what_it_is(chunk):
    data, geometry = chunk
    for wrong in ((0, 30, 30), (1, 0, 30), (1, 30, 29)):
        with pytest.raises(ContextError, match="found chunk 1 of 30 tokens from 30"):
            decode_chunk(data, geometry, *wrong)
    with pytest.raises(ContextError, match="found 8 streams, accepted are 4"):
        decode_chunk(data, Geometry(geometry.layers[:1]), 1, 30, 30)
    with pytest.raises(ContextError, match="chunk 1: stream"):  # the same number of streams, of other dimensions
        decode_chunk(data, Geometry((LayerShape(2, 32, 32),) * 2), 1, 30, 30)


def test_lying_sizes_are_refused(chunk):
    data, geometry = chunk
    payload = bytearray(data[codec.HEADER_BYTES:])
    for change in (1, -1, 2**31):
        lying = bytearray(payload)
        first, = struct.unpack_from("<I", lying)
        struct.pack_into("<I", lying, 0, (first + change) % 2**32)
        header = list(codec._CHUNK.unpack(data[:codec._CHUNK.size]))
        header[-1] = zlib.crc32(lying)
        header = codec._CHUNK.pack(*header)
        with pytest.raises(ContextError, match="sizes"):
            decode_chunk(header + struct.pack("<I", zlib.crc32(header)) + lying, geometry, 1, 30, 30)


# -- contexts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


def prompted(model, cache, tokens=150, batch=1):
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return ids


def go_on(model, ids, cache, count=12):
    ids = torch.cat([ids, ids[:, :1]], 1)
    return model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("spec", [None, "K16V16", "K8V8", "K4V4[group=32]"])
@pytest.mark.parametrize("source", [None, "K8V8"])
def test_a_loaded_context_goes_on_as_the_quantized_cache(small, tmp_path, spec, source):
    cache = DynamicCache(config=small.config) if source is None else tersor.Cache(small, source)
    ids = prompted(small, cache)
    path = tmp_path / "context"
    manifest = contexts.save_context(cache, path, small, "high", ids, chunk_tokens=64)
    assert contexts.read_manifest(path) == manifest and manifest.token_ids == tuple(ids[0].tolist())
    assert manifest.geometry.layers[0].rotary is not None and manifest.chunks == 3
    loaded = contexts.load_context(path, small, spec)
    expected = contexts.quantized(cache, small, "high", spec, chunk_tokens=64)
    assert type(loaded) is type(expected) and loaded.get_seq_length() == 150
    for mine, other in zip(contexts.read_cache(loaded)[0], contexts.read_cache(expected)[0]):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    assert torch.equal(go_on(small, ids, loaded), go_on(small, ids, expected))


def test_the_loaded_numbers_are_within_half_a_step(small, tmp_path):
    cache = DynamicCache(config=small.config)
    prompted(small, cache, batch=2)
    contexts.save_context(cache, tmp_path / "c", None, Level("fine", (128,), (128,)), row=1)
    loaded = contexts.load_context(tmp_path / "c", small)
    for mine, layer in zip(loaded.layers, cache.layers):
        for a, b in ((mine.keys, layer.keys), (mine.values, layer.values)):
            assert ((a[0] - b[1]).abs() <= steps(b[1], 128).float().view(-1, 1, 1) / 2 + 1e-5).all()


def test_files_that_are_damaged_are_refused(small, tmp_path):
    cache = DynamicCache(config=small.config)
    prompted(small, cache, 70)
    path = tmp_path / "c"
    contexts.save_context(cache, path, small, chunk_tokens=32)
    data = path.read_bytes()
    for at in [*range(0, 60, 3), *range(60, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        with pytest.raises(ContextError):
            contexts.load_context(path, small)
        path.write_bytes(data[:at])
        with pytest.raises(ContextError):
            contexts.load_context(path, small)
    path.write_bytes(data + b"\0")
    with pytest.raises(ContextError, match="cut short or damaged"):
        contexts.load_context(path, small)
    path.write_bytes(data)
    contexts.load_context(path, small)


def test_manifests_that_lie_are_refused():
    manifest = contexts.Manifest(one(16), 10, 4, (LEVELS["low"],), ((contexts.Entry(0, 1, 2),) * 3,), tuple(range(10)))
    data = manifest.to_bytes()
    assert contexts.Manifest.from_bytes(data) == manifest
    random.seed(1)
    for _ in range(300):  # with the right checksum, as an enemy would write it
        body = bytearray(data[:-4])
        for _ in range(random.choice((1, 2, 4))):
            body[random.randrange(16, len(body))] = random.choice((0, 1, 255, random.randrange(256)))
        try:
            contexts.Manifest.from_bytes(bytes(body) + struct.pack("<I", zlib.crc32(body)))
        except ContextError:
            pass


def test_another_model_is_refused(small, tmp_path):
    cache = DynamicCache(config=small.config)
    prompted(small, cache, 40)
    contexts.save_context(cache, tmp_path / "c", small)
    for change, message in ((dict(num_hidden_layers=2), "3 layers"), (dict(num_key_value_heads=4), "2 heads of 32"),
                            (dict(head_dim=16), "2 heads of 32"), (dict(max_position_embeddings=32), "40 tokens"),
                            (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rotary")):
        config = LlamaConfig(**{**small.config.to_diff_dict(), **change})
        with pytest.raises(ValueError, match=message):
            contexts.load_context(tmp_path / "c", LlamaForCausalLM(config))


def test_caches_that_cannot_be_saved(small, tmp_path):
    with pytest.raises(ValueError, match="layer 0: found DynamicLayer without tokens"):
        contexts.save_context(DynamicCache(config=small.config), tmp_path / "c", small)
    cache = DynamicCache(config=small.config)
    prompted(small, cache, 20)
    with pytest.raises(ValueError, match="row: found 1"):
        contexts.save_context(cache, tmp_path / "c", small, row=1)
    with pytest.raises(ValueError, match="token_ids: found 3"):
        contexts.save_context(cache, tmp_path / "c", small, token_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="chunk_tokens"):
        contexts.save_context(cache, tmp_path / "c", small, chunk_tokens=0)
    cache.layers[1].keys = cache.layers[1].keys[:, :, 1:]
    with pytest.raises(ValueError, match="layer 1: found 19 tokens"):
        contexts.save_context(cache, tmp_path / "c", small)
    assert not list(tmp_path.iterdir()), "no half a file"


def test_size_and_perplexity_on_the_reference_model():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = (MODEL / "heldout.txt").read_text()[:40000]
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids[0][:6 * 448].view(6, 448)
    losses, bits = {}, {}
    for row in ids:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(row[None, :256], past_key_values=cache, logits_to_keep=1)
            exact = {"exact": cache} | {name: contexts.quantized(cache, model, name) for name in LEVELS}
            for name in LEVELS:
                manifest, _ = contexts.encode_context(cache, model, [name])
                bits.setdefault(name, []).append(manifest.bits())
            for name, held in exact.items():
                logits = model(row[None, 256:], past_key_values=held).logits[0, :-1]
                losses.setdefault(name, []).append(torch.nn.functional.cross_entropy(logits, row[257:]).item())
    found = {name: (math.exp(sum(losses[name]) / 6 - sum(losses["exact"]) / 6), sum(bits[name]) / 6) for name in LEVELS}
    print(found)
    assert all(ratio < 1.01 for ratio, _ in found.values())
    assert found["medium"][1] < 8 / 3.5 and found["low"][1] < found["medium"][1] < found["high"][1]


def test_a_tuned_level_spends_bits_where_the_model_is_sensitive(small):
    ids = torch.randint(0, 97, (2, 96), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        small.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)  # nobody reads what this layer attends to
    try:
        level = tune_level(small, ids, 4.0)
    finally:
        with torch.no_grad():
            small.model.layers[1].self_attn.o_proj.weight.mul_(1e3)
    assert len(level.key_bins) == 3
    assert level.value_bins[1] < min(level.value_bins[0], level.value_bins[2])
    with pytest.raises(ValueError, match="bits: found 0.1"):
        tune_level(small, ids, 0.1)
