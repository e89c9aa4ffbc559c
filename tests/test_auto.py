"""``import tersor.auto``: plain ``from_pretrained`` keeps packed what our layers hold, and hands over the rest."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from io_models import TOKENS, compressed, config_of, linears, llama, logits, moe, randomize, weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers import auto as host

import tersor
from tersor.io import CheckpointError, load, save


@pytest.fixture(autouse=True)
def auto():
    """The module installed, for one test."""
    kept = dict(host.AUTO_QUANTIZER_MAPPING), dict(host.AUTO_QUANTIZATION_CONFIG_MAPPING)
    import tersor.auto

    tersor.auto._install()
    yield tersor.auto
    host.AUTO_QUANTIZER_MAPPING.update(kept[0])
    host.AUTO_QUANTIZATION_CONFIG_MAPPING.update(kept[1])


def generate(model):
    return model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()


def reachable(root):
    """Bytes of every storage that can be reached from an object, whatever holds it."""
    storages, seen, stack = {}, set(), [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, str, int, float, bytes)) or type(item).__name__ == "module":
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        elif callable(item) and not isinstance(item, nn.Module):
            stack += [cell.cell_contents for cell in getattr(item, "__closure__", None) or () if cell != type(cell)()]
            stack += [getattr(item, "__self__", None)]
        stack += [getattr(item, "__dict__", None)]
    return sum(storages.values())


def new_tensors(before):
    """Bytes of the storages of all live tensors that were not there before."""
    storages = {}
    for item in gc.get_objects():
        try:
            if isinstance(item, torch.Tensor) and id(item) not in before and item.device.type == "cpu":
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError):
            continue
    return sum(storages.values())


def promised(model):
    """What the bits promise: each format's bits a weight, and the parameters that were left alone."""
    inside = {id(t) for layer in compressed(model).values() for t in layer.tensors().values()}
    held = sum(layer.format.bits(layer.shape, layer.weight_dtype) * layer.shape[0] * layer.shape[1] / 8
               for layer in compressed(model).values())
    rest = {t.untyped_storage().data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]
            if id(t) not in inside}
    return held + sum(rest.values())


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("how", ["auto", "load"])
def test_same_tokens_and_still_packed(tmp_path, container, how):
    model = randomize(llama(hidden=256, layers=2), "W4A16[group=64,sym=false]")
    tokens = generate(model)
    save(model, tmp_path / "q", container)
    gc.collect()
    before = {id(item) for item in gc.get_objects() if isinstance(item, torch.Tensor)}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q") if how == "auto" else load(tmp_path / "q")
    assert generate(again) == tokens
    gc.collect()
    want = promised(again)
    assert compressed(again).keys() == set(linears(model))
    assert want < 0.5 * sum(t.nbytes for t in llama(hidden=256, layers=2).parameters())
    for got in (reachable(again), new_tensors(before)):
        assert 0.99 * want <= got <= 1.05 * want, (got, want)
    for name, w in weights(model).items():
        assert torch.equal(again.get_submodule(name).weight, w)


def test_saved_again_in_its_own_container(tmp_path):
    model = randomize(llama(), "W4A16[group=32,sym=false]")
    for container in ("compressed-tensors", "gptq", "awq"):
        save(model, tmp_path / container, container)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / container)
        again.save_pretrained(tmp_path / "again")
        assert config_of(tmp_path / "again") == config_of(tmp_path / container)
        first, second = (load_file(tmp_path / d / "model.safetensors") for d in (container, "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_dequantize_true_is_theirs(tmp_path, caplog):
    model = randomize(llama(), "W4A16[group=32]")
    save(model, tmp_path / "q")
    with pytest.warns(UserWarning):
        dense = AutoModelForCausalLM.from_pretrained(
            tmp_path / "q", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert "dequantize=True asks for dense weights" in caplog.text
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    for name, w in weights(model).items():
        assert torch.equal(dense.get_submodule(name).weight, w)


def edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_what_our_layers_do_not_hold_is_delegated(tmp_path, caplog):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    model = llama(layers=1)
    scheme = QuantizationScheme(targets=["Linear"], format="float-quantized", weights={
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"})
    state, expected = dict(model.state_dict()), {}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    for name in linears(model):
        w = state.pop(name + ".weight")
        packed = compressor.compress({"weight": w, "weight_scale": w.abs().amax(1, keepdim=True) / 448}, scheme)
        expected[name] = compressor.decompress(packed, scheme)["weight"]
        state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    model.save_pretrained(tmp_path)
    save_file({key: t.contiguous() for key, t in state.items()}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(
        config_groups={"group_0": scheme}, format="float-quantized", ignore=["lm_head"],
        quantization_status="compressed").model_dump()
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "leaves this checkpoint to CompressedTensorsHfQuantizer" in caplog.text and "float-quantized" in caplog.text
    logits(loaded)
    for name, w in expected.items():
        assert torch.equal(loaded.get_submodule(name).weight, w)
    with pytest.raises(CheckpointError, match="float-quantized"):
        load(tmp_path)


def test_experts_stored_one_by_one_are_delegated(tmp_path, caplog):
    """What the files hold shows after the quantizer was made; it then becomes the original one."""
    model = randomize(moe(), "W4A16[group=32]")
    save(model, tmp_path / "q")
    state = load_file(tmp_path / "q" / "model.safetensors")
    for key in [key for key in state if ".experts." in key]:
        w = state.pop(key)
        name = key.removesuffix(".weight")
        format = tersor.Int(4, 32)
        params = format.fit(w.float(), dtype=w.dtype)
        from tersor.io.compressed_tensors import pack

        codes = format.codes(w.float(), params).to(torch.uint8)
        state |= {f"{name}.{local}": t for local, t in pack(codes, params["scales"].to(w.dtype), None, 4).items()}
    save_file(state, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "q", lambda config: config.update(ignore=["lm_head", "model.layers.0.mlp.gate"]))
    with pytest.raises(CheckpointError, match="experts.0.* is stored compressed"):
        load(tmp_path / "q")
    quantizer = host.AUTO_QUANTIZER_MAPPING["compressed-tensors"].original
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    except Exception:  # whether theirs can load it is theirs to say
        loaded = None
    assert "leaves this checkpoint to CompressedTensorsHfQuantizer" in caplog.text
    if loaded is not None:
        assert type(loaded.hf_quantizer) is quantizer


def test_tampered_files_are_refused_here_too(tmp_path):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    save(model, tmp_path / "q")
    state = load_file(tmp_path / "q" / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight_scale"][3, 0] = float("nan")
    save_file(state, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj.*weight_scale: found NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    del state["model.layers.0.mlp.up_proj.weight_packed"]
    save_file(state, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj.*weight_packed.*not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


_PROCESS = """
import sys
import tersor
assert "transformers" not in sys.modules or {eager}
from transformers.quantizers import auto as host
before = dict(host.AUTO_QUANTIZER_MAPPING)
assert "tersor" in before and before["gptq"].__module__.startswith("transformers")
import tersor.auto
assert host.AUTO_QUANTIZER_MAPPING["gptq"].__module__ == "tersor.auto"
changed = {{k for k in before if host.AUTO_QUANTIZER_MAPPING[k] is not before[k]}}
assert changed == {{"compressed-tensors", "gptq", "awq"}}, changed
print("fine")
"""


def test_import_tersor_registers_its_own_method_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", _PROCESS.format(eager=False)], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


_BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("compressed_tensors", "optimum", "gptqmodel"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import importlib.metadata as metadata
version = metadata.version
def hidden(name):
    if name.replace("_", "-") == "compressed-tensors":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hidden
import tersor.auto, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    print(type(model.model.layers[0].mlp.up_proj).__module__)
    print(model.config.quantization_config.to_dict()["quant_method"])
"""


def test_their_packages_are_not_needed(tmp_path):
    model = randomize(llama(layers=1), "W4A16[group=32]")
    containers = ["compressed-tensors", "gptq", "awq"]
    for container in containers:
        save(model, tmp_path / container, container)
    done = subprocess.run([sys.executable, "-c", _BARE, *(str(tmp_path / container) for container in containers)],
                          capture_output=True, text=True)
    expected = [word for container in containers for word in ("tersor.layer", container)]
    assert done.stdout.split() == expected, done.stderr[-2000:]
