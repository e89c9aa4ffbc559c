"""10,000 mutated checkpoints through the code that `load` verifies and decodes with: each is read to layers of the
model's shapes, or refused with a CheckpointError. None raises anything else, none crashes."""

import json
import random
import struct

import pytest
import torch
from io_models import llama, randomize

from tersor import Embedding, Linear
from tersor.io import CheckpointError, load, save
from tersor.io.plan import Names, read_layers, read_manifest
from tersor.io.shards import open_directory, read_json

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
INPUTS = 10_000
CASES = [("compressed-tensors", "W3A16[group=32,sym=false]"), ("gptq", "W4A16[group=32,sym=false]"),
         ("awq", "W4A16[group=32]"), ("tersor", "W4A16[group=32]"), ("shards", "W8A8"), ("native", "W3A16+lr4")]
VALUES = [0, 1, -1, 2, 3, 8, 31, 33, 64, 99, 255, 1 << 31, -(1 << 31), 1 << 40, 1 << 63, 1 << 70, 0.5, 1e308, True,
          False, None, "", "x", "..", "re:(", "re:.*", "Linear", "int", "group", "channel", "W4A16", "W2A16[group=32]",
          "FP8", "2:4/W4A16", "permute", "pack-quantized", "tersor-native", "int-quantized", "gptq", "gptq_v2", [], {},
          [0], [[]], {"a": 1}, "gptq:W4A16", "I64", "F16", "BF16", "U8", "I32"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of one tiny checkpoint per case, and the model on ``meta`` that they are read for."""
    base = tmp_path_factory.mktemp("fuzz")
    made = {}
    for name, spec in CASES:
        model = llama(layers=1, hidden=32, vocab=16, tie=True)
        half = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
        randomize(model, spec, half)
        container = name if name not in ("shards", "native") else "auto"
        save(model, base / name, container, max_shard_size="1KB" if name == "shards" else "1GB")
        files = {path.name: path.read_bytes() for path in (base / name).iterdir()
                 if path.name != "generation_config.json"}
        with torch.device("meta"):
            made[name] = files, llama(layers=1, hidden=32, vocab=16, tie=True), base / name
    return made


def read(directory, model, names):
    """Verify and decode everything, as `load` does."""
    config = read_json(directory / "config.json")
    manifest = read_manifest(config.get("quantization_config"), "quantization_config")
    return read_layers(model, open_directory(directory), manifest, names)


def spots(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from spots(item, (*path, key))


def any_value(rng):
    return json.loads(json.dumps(rng.choice(VALUES)))  # never shared: mutations change values in place


def mutate_json(rng, value):
    """A copy with a few places changed, dropped, doubled or exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(list(spots(value)))
        if not path:
            return any_value(rng)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = rng.random()
        if action < 0.6:
            parent[path[-1]] = any_value(rng)
        elif action < 0.75:
            del parent[path[-1]]
        elif action < 0.9 and isinstance(parent, dict):
            parent[rng.choice(("x", "num_bits", "weight", "__metadata__", str(path[-1]) + "x"))] = parent[path[-1]]
        elif isinstance(parent[path[-1]], int):
            parent[path[-1]] += rng.choice((-1, 1, 8, -64))
    return value


def mutate_bytes(rng, raw):
    """A copy with bytes flipped, cut, doubled or overwritten."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not raw:
            break
        at, action = rng.randrange(len(raw)), rng.random()
        if action < 0.6:
            raw[at] ^= 1 << rng.randrange(8)
        elif action < 0.7:
            del raw[at:]
        elif action < 0.8:
            del raw[at : at + rng.randrange(1, 9)]
        elif action < 0.9:
            raw[at:at] = raw[: rng.randrange(1, 9)]
        else:
            raw[at : at + 2] = rng.choice((b"\x00\x7c", b"\x80\x7f", b"\xff\xff", b"\x00\x00"))
    return bytes(raw)


def mutate_safetensors(rng, raw):
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length], raw[8 + length :]
    action = rng.random()
    if action < 0.35:  # values
        return raw[: 8 + length] + mutate_bytes(rng, data)[: len(data)].ljust(len(data), b"\xff")
    if action < 0.65:  # the header as JSON, with a length that fits
        text = json.dumps(mutate_json(rng, json.loads(header))).encode()
        return struct.pack("<Q", len(text)) + text + data
    if action < 0.8:  # the header's bytes
        text = mutate_bytes(rng, header)
        return struct.pack("<Q", len(text)) + text + data
    if action < 0.9:  # the length
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 1 << 32, 1 << 63, (1 << 64) - 1))) + raw[8:]
    return mutate_bytes(rng, raw)


def mutate(rng, files):
    name = rng.choice(sorted(files))
    if name.endswith(".safetensors"):
        return name, mutate_safetensors(rng, files[name])
    if name.endswith("index.json"):
        return name, json.dumps(mutate_json(rng, json.loads(files[name]))).encode()
    if rng.random() < 0.1:
        return name, mutate_bytes(rng, files[name])
    config = json.loads(files[name])
    config["quantization_config"] = mutate_json(rng, config["quantization_config"])
    return name, json.dumps(config).encode()


@pytest.mark.parametrize("case", [name for name, _ in CASES])
def test_mutated_checkpoints(sound, case):
    files, model, directory = sound[case]
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))}
    names = Names(model)
    assert read(directory, model, names)  # unharmed, it is read
    rng = random.Random(case)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(-(-INPUTS // len(CASES))):
        name, changed = mutate(rng, files)
        (directory / name).write_bytes(changed)
        try:
            layers = read(directory, model, names)
        except CheckpointError as error:
            assert str(error)
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            for key, layer in layers.items():
                assert isinstance(layer, (Linear, Embedding)) and tuple(layer.shape) == shapes[key]
                assert all(t.isfinite().all() for t in layer.tensors().values() if t.is_floating_point())
        (directory / name).write_bytes(files[name])
    assert min(outcomes.values()) > 50, outcomes  # both ends are exercised


def test_mutated_model_configs(sound):
    """The rest of ``config.json``, through `load` itself."""
    files, model, directory = sound["compressed-tensors"]
    rng = random.Random("config")
    config = json.loads(files["config.json"])
    quantization = config.pop("quantization_config")
    loaded = 0
    for _ in range(60):
        changed = mutate_json(rng, config)
        if isinstance(changed, dict):
            changed["quantization_config"] = quantization
        (directory / "config.json").write_text(json.dumps(changed))
        try:
            read_model = load(directory)
        except CheckpointError:
            continue
        loaded += 1
        for name, parameter in model.named_parameters():
            assert tuple(read_model.get_submodule(name.rpartition(".")[0]).weight.shape) == tuple(parameter.shape)
            assert read_model.get_submodule(name.rpartition(".")[0]).weight.device.type == "cpu"
    (directory / "config.json").write_bytes(files["config.json"])
    assert 5 < loaded < 55
