"""compressed-tensors checkpoints, against compressed-tensors' own code in both directions."""

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from io_models import compressed, config_of, linears, llama, logits, randomize, random_parts, weights
from safetensors.torch import load_file, save_file

import tersor
from tersor import Int
from tersor.io import CheckpointError, load, save
from tersor.io.compressed_tensors import PackQuantized, pack, unpack
from tersor.io.packing import pack_words, unpack_words


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 70, 257])
def test_words_are_theirs(bits, count):
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    packed = pack_words(codes, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(packed, bits, count), codes)
    assert torch.equal(unpack_from_int32(packed, bits, (5, count)), signed)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("width", [64, 20])
def test_older_padded_words(bits, width):
    format = Int(bits, 0, False)
    codes, scales, zero = random_parts(format, 40, width)
    each = 32 // bits

    def padded(rows):  # codes that do not cross words, written out by hand
        made = torch.zeros(rows.shape[0], -(-rows.shape[1] // each), dtype=torch.int64)
        for r in range(rows.shape[0]):
            for i in range(rows.shape[1]):
                made[r, i // each] |= int(rows[r, i]) << bits * (i % each)
        return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)

    tensors = {"weight_packed": padded(codes), "weight_scale": scales, "weight_zero_point": padded(zero.t()).t()}
    got = unpack(tensors, codes.shape, bits, False, padded=True)
    assert torch.equal(got[0], codes) and torch.equal(got[2], zero)


@pytest.mark.parametrize("spec", ["W2A16[group=32]", "W3A16[group=64,sym=false]", "W4A16[group=32,sym=false]",
                                  "W5A16[group=0]", "W6A16[group=0,sym=false]", "W7A16[group=64]", "W8A16", "W4A8",
                                  "W8A8", "W4A8[act_group=0]", "W8A8[group=64,act_group=64]"])
def test_they_read_ours(tmp_path, spec):
    model = randomize(llama(hidden=128), spec)
    assert save(model, tmp_path / "q") == "compressed-tensors"
    raw = config_of(tmp_path / "q")
    theirs = QuantizationConfig.model_validate(raw)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    scheme = theirs.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for name, w in weights(model).items():
        state = {key.removeprefix(name + "."): tensor for key, tensor in stored.items() if key.startswith(name + ".")}
        assert set(state) == set(compressor.compression_param_names(scheme))
        assert torch.equal(compressor.decompress(state, scheme)["weight"], w)
    again = load(tmp_path / "q")
    assert torch.equal(logits(again), logits(model))
    assert {name: layer.format for name, layer in compressed(again).items()} == \
        {name: layer.format for name, layer in compressed(model).items()}


@pytest.mark.parametrize("bits,symmetric,strategy", [(4, True, "group"), (3, False, "group"), (8, True, "channel"),
                                                     (6, False, "channel")])
def test_we_read_theirs(tmp_path, bits, symmetric, strategy):
    model = llama(hidden=64)
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": 32 if strategy == "group" else None}
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {}
    for name in linears(model):
        w = state.pop(name + ".weight")
        groups = w.shape[1] // 32 if strategy == "group" else 1
        local = {"weight": w, "weight_scale": (torch.rand(w.shape[0], groups) * 0.01 + 0.01).bfloat16()}
        if not symmetric:
            low = -(2 ** (bits - 1))
            local["weight_zero_point"] = torch.randint(low, -low, (w.shape[0], groups), dtype=torch.int8)
        packed = compressor.compress(local, scheme)
        expected[name] = compressor.decompress(packed, scheme)["weight"]
        state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    theirs = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"],
                                quantization_status="compressed")
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = theirs.model_dump() | {"version": "0.20.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = weights(load(tmp_path))
    assert got.keys() == expected.keys()
    for name, w in expected.items():
        assert torch.equal(got[name], w)


def test_configuration_is_written_as_they_write_it(tmp_path):
    model = randomize(randomize(llama(hidden=128), "W4A16"), "W8A8", ["lm_head"])
    save(model, tmp_path / "q")
    raw = config_of(tmp_path / "q")
    theirs = QuantizationConfig.model_validate(raw).model_dump()
    assert {key: theirs[key] for key in theirs} == {key: raw[key] for key in theirs}
    assert set(raw) - set(theirs) == {"version", "sparsity_config", "transform_config"}
    assert raw["format"] == "mixed-precision"
    assert sorted(group["format"] for group in raw["config_groups"].values()) == ["int-quantized", "pack-quantized"]
    assert torch.equal(logits(load(tmp_path / "q")), logits(model))


_ALONE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model(torch.arange(5)[None])  # decompresses
    for name, w in load_file(directory + "/expected.tensors").items():
        assert torch.equal(model.get_submodule(name).weight, w), (directory, name)
assert not any(name.split(".")[0] == "tersor" for name in sys.modules)
print("equal")
"""


def test_process_without_tersor_loads_equal_weights(tmp_path):
    models = {
        "w4": randomize(llama(hidden=128), "W4A16"),
        "w3-head-and-embedding": randomize(randomize(llama(hidden=64), "W3A16[group=32]", linears(llama(), head=True)),
                                           "W8A16[group=32]", ["model.embed_tokens"]),
        "w8a8": randomize(llama(hidden=64, bias=True), "W8A8"),
    }
    for name, model in models.items():
        assert save(model, tmp_path / name) == "compressed-tensors"
        save_file(weights(model), tmp_path / name / "expected.tensors")
    done = subprocess.run([sys.executable, "-c", _ALONE, *(str(tmp_path / name) for name in models)],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]


def test_a_model_in_their_hands_can_be_accelerated(tmp_path):
    from transformers import AutoModelForCausalLM

    model = randomize(llama(hidden=64), "W4A16[group=32]")
    save(model, tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    before = sum(tensor.nbytes for tensor in [*theirs.parameters(), *theirs.buffers()])
    report = tersor.accelerate(theirs, strict=True)
    assert len(report.rows) == len(linears(model)) and set(report.kept) == {"lm_head", "model.embed_tokens"}
    assert torch.equal(logits(theirs), logits(model))  # this forward would decompress, were the hook still there
    assert sum(tensor.nbytes for tensor in [*theirs.parameters(), *theirs.buffers()]) <= before
    for name, w in weights(model).items():
        assert torch.equal(theirs.get_submodule(name).weight, w)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_accelerate_refuses_what_is_not_packed():
    with pytest.raises(ValueError, match="found no packed module"):
        tersor.accelerate(llama())


@pytest.mark.parametrize("change,match", [
    ({"num_bits": 99}, "num_bits: found 99, accepted is 2 to 8"),
    ({"num_bits": True}, "num_bits"),
    ({"symmetric": "no"}, "symmetric"),
    ({"group_size": 48}, "multiples of 32"),
    ({"group_size": -7}, "group_size"),
    ({"strategy": "block"}, "strategy"),
    ({"type": "float"}, "type"),
    ({"actorder": "group"}, "actorder"),
])
def test_bad_schemes_name_the_field(tmp_path, change, match):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    save(model, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / "q")


def test_shape_that_is_not_the_models(tmp_path):
    layout = PackQuantized(4, 32)
    codes, scales, _ = random_parts(Int(4, 32), 64, 64)
    tensors = pack(codes, scales, None, 4)
    tensors["weight_shape"] = torch.tensor([1 << 40, 1 << 40])
    from tersor.io.layout import Site

    with pytest.raises(CheckpointError, match="weight_shape"):
        layout.decode(tensors, Site("x", "linear", (64, 64), torch.bfloat16))
