"""Tampered checkpoints: each is refused with the file and the tensor, and leaves nothing behind."""

import json
import shutil
import struct

import pytest
import torch
from io_models import llama, randomize
from safetensors.torch import load_file, save_file

from tersor.io import CheckpointError, load, save
from tersor.io.shards import open_directory, read_header

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One sound checkpoint of each kind, and one in shards."""
    base = tmp_path_factory.mktemp("sound")
    model = randomize(llama(layers=1), "W4A16[group=32,sym=false]")
    for container in ("compressed-tensors", "gptq", "awq", "tersor"):
        save(model, base / container, container)
    save(model, base / "shards", max_shard_size="10KB")
    save(randomize(llama(layers=1), "FP8"), base / "native")
    return base


@pytest.fixture
def copy(made, tmp_path):
    def take(name):
        return shutil.copytree(made / name, tmp_path / name)

    return take


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata={"format": "pt"})


def refused(directory, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(directory)
    assert isinstance(caught.value, ValueError)


# -- tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container,name,tensor,match", [
    ("compressed-tensors", "weight_shape", torch.tensor([1 << 40, 1 << 40]), "weight_shape: found"),
    ("compressed-tensors", "weight_shape", torch.tensor([-1, 64]), "weight_shape: found"),
    ("compressed-tensors", "weight_shape", torch.tensor([64]), "weight_shape.*accepted is torch.int64"),
    ("compressed-tensors", "weight_packed", torch.zeros(128, 7, dtype=torch.int32), r"found .*\[128, 7\].*\[128, 8\]"),
    ("compressed-tensors", "weight_packed", torch.zeros(128, 8, dtype=torch.int64), "found torch.int64"),
    ("compressed-tensors", "weight_packed", torch.zeros(0, dtype=torch.int32), "weight_packed"),
    ("compressed-tensors", "weight_scale", torch.zeros(128, 2, dtype=torch.float64), "found torch.float64"),
    ("compressed-tensors", "weight_zero_point", torch.zeros(15, 2, dtype=torch.int32), "weight_zero_point"),
    ("gptq", "qweight", torch.zeros(8, 127, dtype=torch.int32), "qweight"),
    ("gptq", "qzeros", torch.zeros(2, 16, dtype=torch.int16), "qzeros.*found torch.int16"),
    ("gptq", "scales", torch.zeros(2, 128, dtype=torch.int32), "scales.*found torch.int32"),
    ("gptq", "g_idx", torch.full((64,), 9, dtype=torch.int32), r"found groups in \[9, 9\], accepted are \[0, 1\]"),
    ("gptq", "g_idx", torch.full((64,), -3, dtype=torch.int32), "g_idx: found groups"),
    ("gptq", "g_idx", torch.zeros(64, dtype=torch.int32), "g_idx: found groups of"),
    ("awq", "qweight", torch.zeros(63, 16, dtype=torch.int32), "qweight"),
    ("awq", "qzeros", torch.zeros(2, 16), "qzeros.*found torch.float32"),
    ("tersor", "weight_packed", torch.zeros(128, 7, dtype=torch.int32), "weight_packed"),
])
def test_wrong_tensors(copy, container, name, tensor, match):
    directory = copy(container)
    edit_tensors(directory, lambda state: state.update({f"{UP}.{name}": tensor}))
    refused(directory, f"(?s)up_proj.*{match}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("container,name", [("compressed-tensors", "weight_scale"), ("gptq", "scales"),
                                            ("awq", "scales"), ("tersor", "weight_scale")])
def test_scales_that_are_not_finite(copy, container, name, value):
    directory = copy(container)
    edit_tensors(directory, lambda state: state[f"{UP}.{name}"].view(-1)[3:4].fill_(value))
    refused(directory, f"up_proj.*{name}: found NaN or infinite values, accepted are finite ones")


@pytest.mark.parametrize("spec", ["MXFP4A16", "MXFP8"])
def test_exponents_that_stand_for_nan(spec, tmp_path):
    save(randomize(llama(layers=1), spec), tmp_path)
    edit_tensors(tmp_path, lambda state: state[f"{UP}.weight_scale"][2, 1:].fill_(255))
    refused(tmp_path, r"up_proj.*weight_scale: found 255 \(NaN\) at \[2, 1\], accepted are exponents of 0 to 254")


@pytest.mark.parametrize("container,name", [
    ("compressed-tensors", "weight_packed"), ("compressed-tensors", "weight_scale"),
    ("compressed-tensors", "weight_shape"), ("compressed-tensors", "weight_zero_point"), ("gptq", "qzeros"),
    ("gptq", "scales"), ("awq", "qzeros"), ("tersor", "weight_packed"), ("gptq", "qweight"),
])
def test_missing_tensors(copy, container, name):
    directory = copy(container)
    edit_tensors(directory, lambda state: state.pop(f"{UP}.{name}"))
    refused(directory, "(?s)up_proj")


def test_missing_and_misshapen_dense_tensors(copy):
    directory = copy("compressed-tensors")
    edit_tensors(directory, lambda state: state.pop("model.norm.weight"))
    refused(directory, "model.norm.weight")
    directory = copy("gptq")
    edit_tensors(directory, lambda state: state.update({"lm_head.weight": torch.zeros(96, 63)}))
    refused(directory, r"lm_head.weight.*found torch.float32 \[96, 63\], accepted is .*\[96, 64\]")
    directory = copy("awq")
    edit_tensors(directory, lambda state: state.update({"lm_head.weight": torch.zeros(96, 64, dtype=torch.int8)}))
    refused(directory, "lm_head.weight.*found torch.int8")


def test_tensors_of_no_layout(copy):
    directory = copy("compressed-tensors")
    edit_tensors(directory, lambda state: state.update({f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}))
    refused(directory, "up_proj.*weight_g_idx.*no part of the layout")
    directory = copy("gptq")
    edit_tensors(directory, lambda state: state.update({
        f"model.layers.7.x.{key}": state[f"{UP}.{key}"].clone() for key in ("qweight", "qzeros", "scales")}))
    refused(directory, "model.layers.7.x.*no Linear of that name")
    directory = copy("shards")
    file = next(path for path in sorted(directory.glob("*.safetensors")) if any(UP in key for key in load_file(path)))
    state = load_file(file)
    assert f"{UP}.weight_packed" in state
    state |= {key.replace(UP, "model.layers.7.x"): value.clone() for key, value in state.items() if UP in key}
    save_file(state, file, metadata={"format": "pt"})
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {key: file.name for key in state}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "model.layers.7.x.*no Linear or Embedding of that name")


# -- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,match", [
    (b"", "config.json: not JSON"), (b"[1]", "found a JSON list, accepted is an object"), (b"{", "not JSON"),
    (b"\xff\xfe{}", "not JSON"), (b'{"a": 1, "a": 2}', "key 'a' is given twice"), (b"[" * 100_000, "not JSON"),
    (b'{"model_type": "llama"}', "quantization_config: not there"), (b"1" * 5000, "config.json"),
    (b'{"model_type": "nope", "quantization_config": {"quant_method": "nope"}}', "quant_method: found 'nope'"),
    (b'{"quantization_config": []}', "found list, accepted is an object"),
    (b'{"quantization_config": {"quant_method": ["gptq"]}}', "quant_method"),
])
def test_configs_that_are_not(copy, text, match):
    directory = copy("compressed-tensors")
    (directory / "config.json").write_bytes(text)
    refused(directory, match)


@pytest.mark.parametrize("container,change,match", [
    ("compressed-tensors", {"config_groups": {}}, "config_groups: found {}"),
    ("compressed-tensors", {"config_groups": {"group_0": 3}}, "group_0: found int"),
    ("compressed-tensors", {"ignore": [3]}, "ignore"),
    ("compressed-tensors", {"ignore": ["re:("]}, "not a regular expression"),
    ("compressed-tensors", {"ignore": ["re:.*"]}, "no group of the configuration covers it"),
    ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status: found 'frozen'"),
    ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("compressed-tensors", {"transform_config": {"config_groups": {}}}, "transform_config"),
    ("compressed-tensors", {"version": 3}, "version: found 3"),
    ("tersor", {"version": 99}, "version: found 99, accepted are 1 to 1"),
    ("tersor", {"config_groups": {"g": {"spec": "W99A16", "format": "pack-quantized", "targets": []}}}, "W99A16|99"),
    ("tersor", {"config_groups": {"g": {"spec": "W4A16", "format": "zip", "targets": []}}}, "format: found 'zip'"),
    ("tersor", {"config_groups": {"g": {"spec": "W4A16", "format": "pack-quantized", "targets": ["nope"]}}},
     "names module 'nope'"),
    ("tersor", {"config_groups": {"g": {"spec": "W4A16", "format": "pack-quantized", "targets": [UP], "pre": ["x"]}}},
     "pre: found"),
    ("tersor", {"config_groups": {"g": {"spec": ["W4A16"], "targets": []}}}, "spec: found"),
])
def test_bad_fields(copy, container, change, match):
    directory = copy(container)
    edit_json(directory / "config.json", lambda config: config["quantization_config"].update(change))
    refused(directory, match)


def test_config_of_another_model(copy):
    directory = copy("compressed-tensors")
    edit_json(directory / "config.json", lambda config: config.update(hidden_size=-5))
    refused(directory, "config.json")
    directory = copy("gptq")
    edit_json(directory / "config.json", lambda config: config.update(architectures=["NoSuchModel"]))
    refused(directory, "architectures: found \\['NoSuchModel'\\]")
    directory = copy("awq")
    edit_json(directory / "config.json", lambda config: config.update(intermediate_size=96))
    refused(directory, "accepted is")


# -- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", 7, None,
                                  "..", "..\\x.safetensors", ".hidden.safetensors", "x\0.safetensors"])
def test_index_names_outside_the_directory(copy, name):
    directory = copy("shards")
    index = directory / "model.safetensors.index.json"
    edit_json(index, lambda value: value["weight_map"].update({"lm_head.weight": name}))
    refused(directory, "index.json: tensor 'lm_head.weight': found file .*accepted is the plain name")


def test_index_and_shards_that_disagree(copy, tmp_path):
    directory = copy("shards")
    index = directory / "model.safetensors.index.json"
    good = index.read_text()
    edit_json(index, lambda value: value["weight_map"].update(absent=sorted(set(value["weight_map"].values()))[0]))
    refused(directory, "tensor 'absent': not in model-0")
    edit_json(index, lambda value: value.update(weight_map=[]))
    refused(directory, "weight_map: found list")
    index.write_text(good)
    first = sorted(directory.glob("model-*"))[0]
    first.rename(tmp_path / "gone")
    refused(directory, f"{first.name}: No such file")
    (tmp_path / "gone").rename(first)
    second = sorted(directory.glob("model-*"))[1]
    shutil.copy(first, directory / "model-00099-of-00099.safetensors")
    edit_json(index, lambda value: value["weight_map"].update(
        {next(iter(load_file(second))): "model-00099-of-00099.safetensors"}))
    refused(directory, "also in|not in")
    shutil.rmtree(directory)
    refused(directory, "found no such directory")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4000])
def test_truncated_shards(copy, keep):
    directory = copy("compressed-tensors")
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    refused(directory, "model.safetensors: ")


def test_overlong_file(copy):
    directory = copy("compressed-tensors")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(directory, "truncated or overlong")


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header,match", [
    ({"a": entry(), "b": entry()}, "starts at byte 0, accepted is 4"),
    ({"a": entry(), "b": entry(offsets=(2, 6))}, "starts at byte 2"),
    ({"a": entry(offsets=(4, 8))}, "starts at byte 4, accepted is 0"),
    ({"a": entry(shape=(5,))}, "found 4 bytes"),
    ({"a": entry(shape=(1 << 61, 1 << 61), offsets=(0, 1 << 60))}, "data_offsets"),
    ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 40))}, "tensors: found 8 bytes"),
    ({"a": entry(shape=(-4,))}, "shape: found"), ({"a": entry(shape=(True, 4))}, "shape: found"),
    ({"a": entry(shape=(2.0, 2))}, "shape: found"), ({"a": entry(offsets=(4, 0))}, "data_offsets"),
    ({"a": entry(offsets=(0, 4, 8))}, "data_offsets: found"), ({"a": entry(dtype="I4")}, "dtype: found 'I4'"),
    ({"a": entry(dtype=["U8"])}, "dtype: found"), ({"a": {}}, "header entry"), ({"a": 3}, "header entry"),
    ({"__metadata__": {"x": 1}}, "__metadata__"), ([], "found a JSON list"), (b"{", "not JSON"),
    (b'{"a": 1, "a": 2}', "key 'a' is given twice"), (b"", "not JSON"),
])
def test_bad_headers(tmp_path, header, match):
    path = header_file(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=match):
        read_header(path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 9])
def test_giant_header_lengths(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="header: found a length"):
        read_header(path)


def test_sound_files_are_read_as_the_library_reads_them(tmp_path, made):
    for name in ("compressed-tensors", "gptq", "awq", "tersor", "native"):
        expected = load_file(made / name / "model.safetensors")
        checkpoint = open_directory(made / name)
        assert checkpoint.entries.keys() == expected.keys()
        for key, tensor in expected.items():
            got = checkpoint.read(key)
            assert got.dtype == tensor.dtype and torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
    empty = header_file(tmp_path / "x.safetensors", {"a": entry(shape=(0, 3), offsets=(0, 0))})
    assert read_header(empty).keys() == {"a"}


def test_native_tensors_that_make_no_weight(copy):
    directory = copy("native")
    names = [key for key in load_file(directory / "model.safetensors") if key.startswith(UP) and "scale" in key]
    edit_tensors(directory, lambda state: state[names[0]].view(-1)[:1].fill_(float("inf")))
    refused(directory, "up_proj.*NaN or infinite")
