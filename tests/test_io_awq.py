"""AWQ checkpoints, against files put together here from the published order."""

import json

import pytest
import torch
import torch.nn.functional as F
from io_models import compressed, config_of, linears, llama, logits, randomize, weights
from safetensors.torch import load_file, save_file

from tersor import Int
from tersor.io import CheckpointError, load, save

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_pack(values):
    """``[rows, out]`` to int32 ``[rows, out / 8]``: nibble i of a word is output ORDER[i] of its eight."""
    made = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for column in range(made.shape[1]):
        for i, offset in enumerate(ORDER):
            made[:, column] |= values[:, 8 * column + offset] << 4 * i
    return torch.where(made >= 2**31, made - 2**32, made).to(torch.int32)


def write(directory, model, group=32, zero_point=True, extra=None):
    generator = torch.Generator().manual_seed(7)
    state, expected = dict(model.state_dict()), {}
    for name in linears(model):
        out, width = state.pop(name + ".weight").shape
        size = group if group > 0 else width
        codes = torch.randint(0, 16, (width, out), generator=generator)
        scales = (torch.rand(width // size, out, generator=generator) * 0.03 + 0.005).half()
        zeros = torch.randint(0, 16, scales.shape, generator=generator) if zero_point else torch.full(scales.shape, 8)
        state |= {name + ".qweight": awq_pack(codes), name + ".qzeros": awq_pack(zeros), name + ".scales": scales}
        index = torch.arange(width) // size
        expected[name] = ((codes - zeros[index]).float() * scales.float()[index]).t()
    model.save_pretrained(directory)
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
                                     "zero_point": zero_point, "modules_to_not_convert": None, **(extra or {})}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_read(tmp_path, group, zero_point):
    expected = write(tmp_path, llama(layers=1), group, zero_point)
    model = load(tmp_path)
    for name, w in expected.items():
        layer = model.get_submodule(name)
        assert layer.format == Int(4, max(group, 0), not zero_point, scale_dtype="fp16")
        assert torch.equal(layer.format.unpack(layer.tensors(), layer.shape, torch.float32), w)
        x = torch.randn(3, w.shape[1])
        want = F.linear(x.double(), w.double())
        assert (layer(x) - want).norm() < 2e-6 * want.norm()
    assert compressed(model).keys() == expected.keys()


@pytest.mark.parametrize("spec", ["W4A16[group=32]", "W4A16[group=64,sym=false]"])
def test_written_files_read_back(tmp_path, spec):
    model = randomize(llama(bias=True), spec)
    assert save(model, tmp_path / "q", "awq") == "awq"
    again = load(tmp_path / "q")
    assert torch.equal(logits(again), logits(model))
    for name, w in weights(model).items():
        assert torch.equal(again.get_submodule(name).weight, w)
    assert config_of(tmp_path / "q")["modules_to_not_convert"] == ["lm_head"]
    layer = model.model.layers[0].mlp.up_proj
    codes = layer.format.unpack_codes(layer.tensors(), layer.shape)[0]
    raw = load_file(tmp_path / "q" / "model.safetensors")
    assert torch.equal(raw["model.layers.0.mlp.up_proj.qweight"], awq_pack(codes.t().long()))


@pytest.mark.parametrize("change,match", [
    ({"bits": 3}, "bits: found 3"), ({"bits": 99}, "bits: found 99"), ({"version": "gemv"}, "version: found 'gemv'"),
    ({"group_size": 0}, "group_size"), ({"group_size": 40}, "multiples of 32"), ({"zero_point": "x"}, "zero_point"),
    ({"group_size": 64}, "accepted is"),
])
def test_bad_configurations(tmp_path, change, match):
    write(tmp_path, llama(layers=1), extra=change)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


def test_scaled_activations_are_refused(tmp_path):
    write(tmp_path, llama(layers=1))
    state = load_file(tmp_path / "model.safetensors") | {"model.layers.0.mlp.act.scales": torch.ones(128)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="scaled activation"):
        load(tmp_path)
