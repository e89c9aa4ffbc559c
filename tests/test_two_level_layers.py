"""``W4A8[scale=int8]`` in models: compress, save and load, what refuses it, and what it costs."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from io_models import compressed, config_of, logits, moe
from test_compress import LINEARS, TOKENS, llama
from test_gptq import correlated, output_error, statistics, weight
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from tersor import evaluate, gate, norm, ops
from tersor.formats import Int
from tersor.gate import FusedGate
from tersor.io import load, save
from tersor.io.errors import CheckpointError, Unsupported
from tersor.methods import GPTQ, RTN
from tersor.norm import FusedRMSNorm
from tersor.ops_fused import BoundIntLinearFused
from tersor.registry import resolve_format

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "stdlib-llama"
SPEC = "W4A8[group=32,scale=int8,act_group=0]"
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("recipe", [f"rtn:{SPEC}", "gptq:W4A8[group=32,sym=false,scale=int8]", f"quarot+gptq:{SPEC}",
                                    f"awq:{SPEC}", "rtn:W4Ax[group=32,scale=int8]",
                                    "smoothquant+gptq:W3A8[group=64,scale=int8,act_group=0,act_sym=false]"])
def test_compress(recipe):
    model = llama(dtype=torch.float32)
    before = model(TOKENS).logits
    report = tersor.compress(model, recipe, calibration=TOKENS)
    assert len(report.rows) >= LINEARS and not any(row.kernel.startswith("reference") for row in report.rows)
    after = model(TOKENS).logits
    assert 0 < (after - before).norm() / before.norm() < 0.5
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.siblings is not None and attention.q_proj.siblings is attention.v_proj.siblings
    twin = copy.deepcopy(model)
    for layer in compressed(twin).values():
        layer.siblings = None
    assert torch.equal(twin(TOKENS).logits, after), "alone as together"


@torch.no_grad()
@pytest.mark.parametrize("recipe", [f"rtn:{SPEC}", f"quarot:{SPEC}"])
def test_norms_and_gates_run_in_one_call(monkeypatch, recipe):
    model, used = llama(dtype=torch.float32), Counter()
    tersor.compress(model, recipe, calibration=TOKENS)
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, (FusedGate, FusedRMSNorm)):
            module.__class__ = type(module).__mro__[2]  # the model's own code
    one_norm, one_gate = norm.rms_norm.cpu, gate._call

    def gate_call(module):
        call = one_gate(module)
        used["gate"] += isinstance(call, BoundIntLinearFused) and call.producer.silu_mul
        return call

    monkeypatch.setattr(norm, "rms_norm", SimpleNamespace(cpu=lambda *args: used.update(["norm"]) or one_norm(*args)))
    monkeypatch.setattr(gate, "_call", gate_call)
    expected = apart(TOKENS).logits
    assert not used
    found = model(TOKENS).logits
    assert used == {"gate": 2, "norm": 5}, "both layers' gates and norms, and the last norm"
    assert (found - expected).norm() < 0.005 * expected.norm(), "to the rounding of inputs"
    calls = [layer.siblings._call for layer in compressed(model).values() if layer.siblings is not None]
    assert calls and all(call is not None for call in calls)
    stepped = [layer for name, layer in compressed(model).items() if layer.pre is not None and "o_proj" in name]
    assert len(stepped) == (2 if "quarot" in recipe else 0)
    assert all(isinstance(layer._fused[0], BoundIntLinearFused) for layer in stepped)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_to_nearest(symmetric):
    x, w = correlated(400, 160, dtype=torch.float32), weight(24, 160, dtype=torch.float32)
    fmt = Int(3, 32, symmetric, 8, "int8")
    nearest = RTN(search=False).choose(w, fmt)
    chosen = GPTQ(search=False).choose(w, fmt, statistics(x))
    assert output_error(w, chosen.w_hat, x) < 0.75 * output_error(w, nearest.w_hat, x)
    stored = fmt.unpack(fmt.pack(chosen.w_hat, chosen.params), (24, 160))
    assert torch.allclose(stored, chosen.w_hat, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_save_and_load(tmp_path, symmetric):
    model = llama()
    tersor.compress(model, f"rtn:W4A8[group=64,sym={symmetric},scale=int8]")
    assert save(model, tmp_path / "q") == "tersor"
    group = config_of(tmp_path / "q")["config_groups"]["group_0"]
    assert "scale=int8" in group["spec"] and group["format"] == "tersor-native"
    again = load(tmp_path / "q")
    assert torch.allclose(logits(again), logits(model), atol=0.02)  # torch's sums of bfloat16 differ in last bits
    for name, layer in compressed(model).items():
        for key, tensor in layer.tensors().items():
            assert torch.equal(again.get_submodule(name).tensors()[key], tensor)
    with pytest.raises(Unsupported, match="compressed-tensors cannot hold .*scale=int8.*accepted are scales in one"):
        save(model, tmp_path / "p", "compressed-tensors")


@pytest.mark.parametrize("name, place, value, words", [
    ("scales", (0, slice(-4, None)), 255, "channel scales: found nan, accepted are positive finite"),
    ("scales", (0, slice(-4, None)), 0, "channel scales: found 0, accepted are positive finite"),
    ("scales", (0, 0, 3), 0, "group scales: found 0 to .* accepted are 1 to 15"),
    ("scales", (0, 1, 3), 16, "group scales: found .* to 16, accepted are 1 to 15"),
    ("zero_points", (0, 0, 3), 200, r"\(code - zero point\) \* group scale: found .* accepted are up to 127"),
])  # fmt: skip
def test_files_that_leave_what_kernels_hold_are_refused(tmp_path, name, place, value, words):
    model = llama()
    tersor.compress(model, f"rtn:{SPEC.replace('scale', 'sym=false,scale')}")
    tensors = model.model.layers[0].mlp.up_proj.tensors()
    tensors[name][place] = value
    save(model, tmp_path / "q")
    with pytest.raises(CheckpointError, match=f"up_proj.*{words}"):
        load(tmp_path / "q")


def test_padding_is_verified_as_well():
    n, k = 40, 232  # rows to 48, columns to 256
    for symmetric in (True, False):
        fmt = Int(4, 64, symmetric, 8, "int8")
        params = fmt.fit(w := torch.randn(n, k) + 2)
        tensors = fmt.pack(fmt.project(w, params), params)
        fmt.verify(tensors, (n, k))
        tensors["scales"][2, 1, 12] = 200  # row 44
        with pytest.raises(ValueError, match="found a size of 1600, accepted are up to 127"):
            fmt.verify(tensors, (n, k))
    fmt.verify(tensors := fmt.pack(fmt.project(w, params), params), (n, k))
    # Row 5: codes up to 8 from zero point 0 under group scale 15 are in range, those of the last group's padding not.
    tensors["scales"][0, :4, 5], tensors["zero_points"][0, :, 5] = 15, 0
    padded = torch.zeros(n, 256, dtype=torch.uint8)
    padded[5, 240:] = 9
    tensors["qweight"] = ops.int_pack(padded, 4)
    with pytest.raises(ValueError, match="found a size of 135, accepted are up to 127"):
        fmt.verify(tensors, (n, k))
    padded[5, 240:] = 8
    fmt.verify({**tensors, "qweight": ops.int_pack(padded, 4)}, (n, k))


def test_formats_around_two_levels_verify_them():
    for text in ("W4Ax[group=32,scale=int8]", f"{SPEC}+lr4", f"2:4/{SPEC}", f"bd32/{SPEC}"):
        fmt = resolve_format(text)
        params = fmt.fit(w := torch.randn(32, 64))
        tensors = fmt.pack(fmt.project(w, params), params)
        fmt.verify(tensors, (32, 64))
        next(tensor for name, tensor in tensors.items() if name.endswith("scales"))[0, 0, 0] = 0
        with pytest.raises(ValueError, match="group scales: found 0 to"):
            fmt.verify(tensors, (32, 64))


@pytest.mark.parametrize("recipe, words", [
    ("rtn:W4A16[scale=int8]", "found scale=int8 with W4A16"), ("bct:W4A8[group=32,scale=int8]", "scales in one level"),
    ("rtn:W8A8[group=128,scale=int8]", "2 to 6 weight bits"),
])  # fmt: skip
def test_recipes_that_are_refused(recipe, words):
    with pytest.raises(ValueError, match=words):
        tersor.compress(llama(), recipe)


@torch.no_grad()
def test_perplexity_is_near_that_of_one_level():
    """The reference model, 4-bit weights in groups of 128, 8-bit activations."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = evaluate.windows(evaluate.token_ids(tokenizer, (MODEL / "heldout.txt").read_text()[:12000]), 256, 12)
    found = {}
    for options in ("", "act_group=0", "scale=int8,act_group=0", "scale=int8,sym=false,act_group=0"):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        tersor.compress(model, f"rtn:W4A8[{options}]" if options else "rtn:W4A8")
        found[options] = evaluate.perplexity(model, windows)
    print(found)
    assert found["scale=int8,act_group=0"] < 1.03 * found["act_group=0"]
    assert found["scale=int8,sym=false,act_group=0"] < 1.03 * found["act_group=0"]


def test_experts(tmp_path):
    model = moe()
    before = logits(model)
    report = tersor.compress(model, "rtn:W4A8[group=32,sym=false,scale=int8,act_group=0]")
    assert any("experts" in row.name for row in report.rows)
    after = logits(model)
    assert (after - before).norm() < 0.5 * before.norm()
    save(model, tmp_path / "q")
    assert torch.allclose(logits(load(tmp_path / "q")), after, atol=0.02)
