"""GPTQ checkpoints, against files put together here bit by bit from the published layout."""

import json

import pytest
import torch
import torch.nn.functional as F
from io_models import compressed, config_of, gpt2, linears, llama, logits, randomize, weights
from safetensors.torch import load_file, save_file

from tersor import Int
from tersor.io import CheckpointError, load, save
from tersor.io.gptq import column_order
from tersor.transforms.steps import Permute


def put(row, index, value, bits):
    """Set code ``index`` of a list of Python words."""
    for bit in range(bits):
        at = index * bits + bit
        row[at // 32] |= (value >> bit & 1) << at % 32


def signed(words):
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in words], dtype=torch.int32)


def gptq_tensors(codes, scales, zeros, g_idx, bits, v2):
    """``codes [in, out]``, ``zeros`` and ``scales [groups, out]``: tensors as the format's authors write them."""
    width, out = codes.shape
    columns = [[0] * (width * bits // 32) for _ in range(out)]
    for o in range(out):
        for i in range(width):
            put(columns[o], i, int(codes[i, o]), bits)
    rows = [[0] * (out * bits // 32) for _ in range(len(zeros))]
    for g in range(len(zeros)):
        for o in range(out):
            put(rows[g], o, int(zeros[g, o]) - (0 if v2 else 1), bits)
    return {"qweight": signed(columns).t().contiguous(), "qzeros": signed(rows), "scales": scales.half(),
            "g_idx": g_idx.to(torch.int32)}


def write(directory, model, bits, group, v2=False, desc_act=False, sym=False, extra=None, zeros_of=None):
    """A GPTQ checkpoint of random weights; returns the weights ``[out, in]`` that it stands for, in float32."""
    generator = torch.Generator().manual_seed(bits)
    state = dict(model.state_dict())
    expected = {}
    for name in linears(model):
        w = state.pop(name + ".weight")
        out, width = w.shape if type(model.get_submodule(name)).__name__ != "Conv1D" else w.shape[::-1]
        size = group if group > 0 else width
        groups = -(-width // size)
        codes = torch.randint(0, 2**bits, (width, out), generator=generator)
        scales = (torch.rand(groups, out, generator=generator) * 0.03 + 0.005).half()
        zeros = torch.randint(1, 2**bits, (groups, out), generator=generator)
        if sym:
            zeros.fill_(2 ** (bits - 1))
        g_idx = torch.arange(width) // size
        if desc_act:
            g_idx = g_idx[torch.randperm(width, generator=generator)]
        tensors = gptq_tensors(codes, scales, zeros, g_idx, bits, v2)
        if zeros_of is not None:
            tensors["qzeros"] = zeros_of(tensors["qzeros"])
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        expected[name] = ((codes - zeros[g_idx]).float() * scales.float()[g_idx]).t()
    model.save_pretrained(directory)
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": sym,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", "lm_head": False, **(extra or {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return expected


def check(model, expected):
    """Layers hold the expected weights, and multiply with them."""
    for name, w in expected.items():
        layer = model.get_submodule(name)
        x = torch.randn(3, w.shape[1])
        pre = layer.pre[0] if layer.pre else None
        held = layer.format.unpack(layer.tensors(), layer.shape, torch.float32)
        assert torch.equal(held if pre is None else pre.fold(held), w)
        bias = None if layer.bias is None else layer.bias.double()
        want = F.linear(x.double(), w.double(), bias)
        assert (layer(x) - want).norm() < 2e-6 * want.norm()


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_versions_widths_and_orders(tmp_path, bits, v2, desc_act):
    expected = write(tmp_path, llama(layers=1), bits, 32, v2, desc_act)
    model = load(tmp_path)
    check(model, expected)
    assert all((layer.pre is not None) == desc_act for layer in compressed(model).values())
    assert all(layer.format == Int(bits, 32, False, scale_dtype="fp16") for layer in compressed(model).values())


def test_one_group_per_row_and_missing_g_idx(tmp_path):
    expected = write(tmp_path, llama(layers=1), 4, -1)
    state = {key: t for key, t in load_file(tmp_path / "model.safetensors").items() if not key.endswith("g_idx")}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check(load(tmp_path), expected)


def test_biases_of_zeros_are_dropped_and_others_kept(tmp_path):
    """Older writers give every layer a bias."""
    expected = write(tmp_path, llama(layers=1), 4, 32)
    state = load_file(tmp_path / "model.safetensors")
    for name, w in expected.items():
        state[name + ".bias"] = torch.full((w.shape[0],), 0.25 if "up_proj" in name else 0.0, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    check(model, expected)
    assert {name for name, layer in compressed(model).items() if layer.bias is not None} == \
        {"model.layers.0.mlp.up_proj"}


def test_symmetric_files_drop_their_zero_points(tmp_path):
    check_model = llama(layers=1)
    expected = write(tmp_path, check_model, 4, 32, sym=True)
    model = load(tmp_path)
    check(model, expected)
    assert all(layer.format.symmetric for layer in compressed(model).values())


@pytest.mark.parametrize("sym", [True, False])
def test_three_bit_words_of_gptqmodel(tmp_path, sym):
    """GPTQModel subtracts other words than everyone else from 3-bit zero points (and says who wrote the file)."""
    subtracted = torch.tensor([0x24924924, 0x92492492, 0x49249249])

    def theirs(qzeros_v2):
        words = (qzeros_v2.long() & 0xFFFFFFFF) - subtracted.repeat(qzeros_v2.shape[1] // 3)
        return ((words + 2**31 & 0xFFFFFFFF) - 2**31).to(torch.int32)

    expected = write(tmp_path, llama(layers=1), 3, 32, v2=True, sym=sym, zeros_of=theirs,
                     extra={"checkpoint_format": "gptq", "meta": None if sym else {"quantizer": ["gptqmodel:2.2.0"]}})
    check(load(tmp_path), expected)


def test_overrides_per_module(tmp_path):
    model = llama(layers=2)
    expected = write(tmp_path, model, 4, 32, extra={"bits": 8, "dynamic": {"+:.*layers\\.": {"bits": 4}}})
    check(load(tmp_path), expected)


def test_conv1d(tmp_path):
    expected = write(tmp_path, gpt2(), 4, 32)
    check(load(tmp_path), expected)


@pytest.mark.parametrize("spec", ["W4A16[group=32]", "W2A16[group=64,sym=false]", "W3A16[group=32,sym=false]",
                                  "W8A16[group=0]"])
def test_written_files_read_back(tmp_path, spec):
    model = randomize(llama(hidden=64, bias=True), spec)
    assert save(model, tmp_path / "q", "gptq") == "gptq"
    again = load(tmp_path / "q")
    assert torch.equal(logits(again), logits(model))
    for name, w in weights(model).items():
        assert torch.equal(again.get_submodule(name).weight, w)
    v2 = config_of(tmp_path / "q")["checkpoint_format"] == "gptq_v2"
    assert v2 == spec.startswith("W3")
    # by the definition, from the file
    raw = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    bits = int(spec[1])
    qweight = raw[name + ".qweight"]
    first = [sum((int(qweight[(i * bits + b) // 32, 5]) >> (i * bits + b) % 32 & 1) << b for b in range(bits))
             for i in range(16)]
    layer = model.get_submodule(name)
    assert first == layer.format.unpack_codes(layer.tensors(), layer.shape)[0][5, :16].tolist()


def test_activation_order_is_written(tmp_path):
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    model = randomize(llama(layers=1), "W4A16[group=32]", ["model.layers.0.self_attn.q_proj"], [Permute(index)])
    assert save(model, tmp_path / "q") == "gptq"
    assert config_of(tmp_path / "q")["desc_act"] is True
    again = load(tmp_path / "q")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.model.layers[0].self_attn.q_proj.pre[0].index, index) or torch.equal(
        again.model.layers[0].self_attn.q_proj.pre[0].fold(again.model.layers[0].self_attn.q_proj.weight.clone()),
        model.model.layers[0].self_attn.q_proj.pre[0].fold(model.model.layers[0].self_attn.q_proj.weight.clone()))


def test_zero_points_of_zero_go_to_version_two(tmp_path):
    model = randomize(llama(layers=1), "W4A16[group=32,sym=false]")
    model.model.layers[0].mlp.up_proj.tensors()["zero_points"].zero_()
    save(model, tmp_path / "q", "gptq")
    assert config_of(tmp_path / "q")["checkpoint_format"] == "gptq_v2"
    assert torch.equal(logits(load(tmp_path / "q")), logits(model))


@pytest.mark.parametrize("g_idx,match", [
    ([0] * 32 + [9] * 32, r"found groups in \[0, 9\], accepted are \[0, 1\]"),
    ([0] * 32 + [-1] * 32, "found groups in"),
    ([0] * 40 + [1] * 24, "accepted are 32 in each"),
])
def test_bad_group_indices(g_idx, match):
    with pytest.raises(CheckpointError, match=match):
        column_order(torch.tensor(g_idx, dtype=torch.int32), 2, 32)


@pytest.mark.parametrize("change,match", [
    ({"bits": 5}, "bits: found 5"), ({"bits": 99}, "bits: found 99"), ({"bits": "4"}, "bits"),
    ({"group_size": 0}, "group_size"), ({"group_size": 48}, "multiples of 32"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format"), ({"dynamic": {"+:(": {}}}, "not a regular expression"),
    ({"dynamic": {"-:.*": {}}}, "the configuration says that it is not"), ({"sym": 1}, "sym"),
    ({"group_size": 64}, "accepted is"),
])
def test_bad_configurations(tmp_path, change, match):
    write(tmp_path, llama(layers=1), 4, 32, extra=change)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)
