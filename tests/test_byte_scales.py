"""Integer weights under group scales of e4m3: ``W4A16[scale=e4m3]``, and FireQ with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from io_models import compressed, config_of, logits, moe
from test_compress import LINEARS, TOKENS, llama
from test_gptq import correlated, output_error, statistics, weight

import tersor
from tersor import ops_float
from tersor.experts import Experts
from tersor.formats import ByteScales, Inputs, Int, byte_scales
from tersor.formats.base import under
from tersor.formats.byte_scales import widen
from tersor.formats.integer import untile_rows
from tersor.io import load, save
from tersor.io.errors import CheckpointError, Unsupported
from tersor.layer import Linear, Siblings
from tersor.methods import GPTQ, RTN
from tersor.registry import resolve_format
from tersor.transforms import fireq

pytestmark = pytest.mark.usefixtures("one_thread")
FIREQ = "AFP8/W4A16[group=32,scale=e4m3]"


@pytest.mark.parametrize("text", ["W4A16[scale=e4m3]", "W3A16[group=32,sym=false,scale=e4m3]", "AFP8/W4A16[scale=e4m3]",
                                  "W4A8[scale=e4m3,act_group=0]"])
def test_specs(text):
    fmt = resolve_format(text)
    stored = fmt.inner if isinstance(fmt, Inputs) else fmt
    assert isinstance(stored, ByteScales) and fmt.text() == text and resolve_format(fmt.text()) == fmt
    assert not fmt.kernel((64, 128)).startswith("reference")


@pytest.mark.parametrize("text, words", [
    ("W4A16[scale=fp8]", "found scale='fp8', accepted are model, .* e4m3"),
    ("W4Ax[scale=e4m3]", "found scale='e4m3', accepted are model, fp32, bf16, fp16, int8: "),
])  # fmt: skip
def test_scales_that_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        resolve_format(text)


def test_what_it_is_around():
    for inner in (Int(4), ByteScales(Int(4, scale_dtype="fp32"))):
        with pytest.raises(ValueError, match="found .* accepted are integer weights with float32 scales"):
            ByteScales(inner)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", [Int(4, 32, scale_dtype="fp32"), Int(3, 64, False, scale_dtype="fp32"),
                                 Int(8, 0, scale_dtype="fp32")], ids=str)
def test_scales_are_bytes_under_one_power_of_two(fmt, search):
    torch.manual_seed(0)
    fmt, w = ByteScales(fmt), torch.randn(40, 200) * torch.logspace(-3, 0, 40)[:, None]
    w[5, :32] = 0
    params = fmt.fit(w, search=search, dtype=torch.bfloat16)
    w_hat = fmt.project(w, params)
    tensors = fmt.pack(w_hat, params)
    spec = fmt.spec((40, 200))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == \
        {name: (one.shape, one.dtype) for name, one in spec.items()}
    assert tensors["scales"].dtype is torch.float8_e4m3fn and tensors["scales"].numel() == tensors["scales"].nbytes
    assert torch.frexp(tensors["scale_multiplier"])[0].item() == 0.5
    assert 224 <= tensors["scales"].float().max() <= 448, "of E4M3's range nothing is given away"
    assert torch.equal(fmt.unpack(tensors, (40, 200)), w_hat)
    wide = untile_rows(tensors["scales"].double() * tensors["scale_multiplier"].double(), 40)
    assert torch.equal(wide, params["scales"].double())
    plain = fmt.inner.project(w, fmt.inner.fit(w, search=search))
    # a scale may lose 1/17 of its group's range, which is seven of 127 steps of 8 bits to either side
    assert (w_hat - w).norm() < (1.1 if fmt.inner.num_bits < 8 else 1.4) * (plain - w).norm()


def test_a_matrix_of_zeros():
    fmt = ByteScales(Int(4, 32, scale_dtype="fp32"))
    params = fmt.fit(torch.zeros(16, 64))
    assert not fmt.unpack(fmt.pack(fmt.project(torch.zeros(16, 64), params), params), (16, 64)).any()


@pytest.mark.parametrize("text", ["W4A16[group=32,scale=e4m3]", "W4A8[group=32,sym=false,scale=e4m3]", FIREQ])
def test_products_are_those_of_the_widened_scales(text):
    fmt, (n, k) = resolve_format(text), (40, 200)
    layer = Linear(k, n, fmt, bias=True, dtype=torch.float32)
    torch.nn.init.normal_(layer.bias)
    params = fmt.fit(w := torch.randn(n, k))
    layer.load_tensors(tensors := fmt.pack(fmt.project(w, params), params))
    assert layer._bind() is not None
    for m in (1, 5, 40):
        x = torch.randn(m, k)
        wanted = F.linear(fmt.quantize_input(x).double(), fmt.unpack(tensors, (n, k), torch.float64),
                          layer.bias.double())
        bound, plain = layer(x), fmt.linear(x, tensors, layer.bias, (n, k))
        assert (bound - wanted).norm() < 1e-5 * wanted.norm() and (plain - wanted).norm() < 1e-5 * wanted.norm()


def test_the_operation_and_its_definition():
    fmt, (n, k) = resolve_format(FIREQ), (40, 200)
    params = fmt.fit(w := torch.randn(n, k))
    t = fmt.pack(fmt.project(w, params), params)
    x = torch.randn(3, k)
    given = (x, t["qweight"], t["scales"], None, n, 1, 32, "token", t["scale_multiplier"])
    y = ops_float.fp8_linear(*given)
    assert (y - ops_float.fp8_linear.reference(*given)).norm() < 1e-5 * y.norm()
    with pytest.raises(ValueError, match="scale_multiplier: found .* accepted"):
        ops_float.fp8_linear(*given[:2], t["scales"].float(), *given[3:])


def test_gptq_beats_rounding_to_nearest():
    x, w = correlated(400, 160, dtype=torch.float32), weight(24, 160, dtype=torch.float32)
    fmt = resolve_format("W3A16[group=32,scale=e4m3]")
    nearest = RTN(search=False).choose(w, fmt)
    chosen = GPTQ(search=False).choose(w, fmt, statistics(x))
    assert output_error(w, chosen.w_hat, x) < 0.75 * output_error(w, nearest.w_hat, x)
    stored = fmt.unpack(fmt.pack(chosen.w_hat, chosen.params), (24, 160))
    assert torch.allclose(stored, chosen.w_hat, rtol=1e-6, atol=1e-7)


def test_fireq_stores_the_bytes_that_it_chooses():
    w = torch.randn(32, 256) * 1e-3
    fmt = resolve_format("AFP8/W4A16[scale=e4m3]")
    choice = fireq.FireQ().choose(w, fmt, None, dtype=torch.bfloat16)
    tensors = fmt.pack(choice.w_hat, choice.params)
    wide = untile_rows(tensors["scales"].float() * tensors["scale_multiplier"], 32)
    assert torch.equal(wide, fireq.group_scales(w, 128))
    same = fireq.FireQ().choose(w, Inputs(Int(4)), None, dtype=torch.bfloat16)
    assert torch.equal(choice.w_hat, same.w_hat), "as with 16-bit scales"
    assert fmt.bits((4096, 4096)) < Inputs(Int(4)).bits((4096, 4096)) - 0.06


@torch.no_grad()
@pytest.mark.parametrize("recipe", [f"fireq:{FIREQ}", "gptq:W4A16[group=32,scale=e4m3]"])
def test_models_are_compressed_saved_and_loaded(tmp_path, recipe):
    model = llama(dtype=torch.float32)
    before = model(TOKENS).logits
    report = tersor.compress(model, recipe, calibration=TOKENS)
    assert len(report.rows) >= LINEARS and not any(row.kernel.startswith("reference") for row in report.rows)
    after = logits(model)
    assert (model(TOKENS).logits - before).norm() / before.norm() < 0.5
    save(model, tmp_path)
    assert {group["spec"] for group in config_of(tmp_path)["config_groups"].values()} == \
        {recipe.split(":", 1)[1]}
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), after)
    assert all(layer._buffers["scales"].dtype is torch.float8_e4m3fn for layer in compressed(loaded).values())
    with pytest.raises(Unsupported, match="accepted are integer formats"):
        save(model, tmp_path / "other", "compressed-tensors")


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rtn:W4A8[group=32,scale=e4m3]", "rtn:W4A16[group=32,scale=e4m3]",
                                    "quarot:W4A8[group=32,sym=false,scale=e4m3,act_group=0]"])
def test_siblings_run_together(recipe):
    model = llama(dtype=torch.float32)
    tersor.compress(model, recipe, calibration=TOKENS)
    apart = copy.deepcopy(model)
    for layer in compressed(apart).values():
        layer.siblings = None
    block = model.model.layers[0]
    for layers in ((block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                   (block.mlp.gate_proj, block.mlp.up_proj)):
        assert layers[0].siblings is not None and layers[0].siblings.layers == layers
    together = model(TOKENS).logits
    assert block.self_attn.q_proj.siblings._call is not None and block.mlp.up_proj.siblings._call is not None
    assert torch.equal(apart(TOKENS).logits, together)


def test_static_scales_of_inputs_keep_siblings_apart():
    fmt = resolve_format("W4A8[group=32,scale=e4m3,act_scale=static,act_group=0]")
    assert not Siblings.fit_together([Linear(64, 32, fmt) for _ in range(2)])


@pytest.mark.parametrize("value", [0.75, 0.0, -0.5, float("inf"), float("nan")])
def test_multipliers_that_are_no_powers_of_two_are_refused(tmp_path, value):
    model = llama(dtype=torch.float32)
    tersor.compress(model, "rtn:W4A16[group=32,scale=e4m3]")
    model.model.layers[0].mlp.up_proj.tensors()["scale_multiplier"][0] = value
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match="up_proj.*scale_multiplier: found .*, accepted are finite"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["W4A16[group=32,scale=e4m3]", FIREQ])
def test_experts(text):
    fmt, (n, k) = resolve_format(text), (24, 96)
    packed = []
    for expert in range(3):
        params = fmt.fit(w := torch.randn(n, k) * 10.0 ** -expert)
        packed.append(fmt.pack(fmt.project(w, params), params))
    stacked = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
    x, ends = torch.randn(7, k), torch.tensor([2, 2, 6], dtype=torch.int32)
    y = fmt.linear_grouped(x, ends, stacked, None, (n, k))
    for expert, (begin, end) in enumerate(((0, 2), (2, 2), (2, 6))):
        wanted = fmt.linear(x[begin:end], packed[expert], None, (n, k))
        assert torch.allclose(y[begin:end], wanted, rtol=1e-5, atol=1e-7 * 10.0 ** -expert)
    assert not y[6].any()


@torch.no_grad()
@pytest.mark.parametrize("text", ["W4A16[group=32,scale=e4m3]", "W4A8[group=32,scale=e4m3]", FIREQ])
def test_state_dicts_that_are_loaded_into_a_layer_that_ran(text):
    one, other = (Linear.from_linear(torch.nn.Linear(96, 32), f"rtn:{text}") for _ in range(2))
    x = torch.randn(3, 96)
    wanted = other(x)
    assert not torch.equal(one(x), wanted)
    bound = one._bind()
    assert one._bind() is bound, "held"
    one.load_state_dict(other.state_dict())  # in place
    assert torch.equal(one(x), wanted)


@torch.no_grad()
@pytest.mark.parametrize("text", ["W4A16[group=32,scale=e4m3]", "W4A8[group=32,sym=false,scale=e4m3]", FIREQ])
def test_experts_widen_their_scales_once(monkeypatch, text):
    model = moe()
    tersor.compress(model, f"rtn:{text}")
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    fmt, made = experts.format, []
    monkeypatch.setattr(byte_scales, "widen", lambda *scales: made.append(1) or widen(*scales))
    x, chosen = torch.randn(5, 64), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    weights = torch.rand(5, 2)

    def run(module=experts):
        made.clear()
        return module(x, chosen, weights)

    first = run()
    assert len(made) == 2, "one for each projection"
    assert torch.equal(run(), first) and not made
    assert torch.equal(run(copy.deepcopy(experts)), first) and made

    one = {name: tensor[2].clone() for name, tensor in under(experts.tensors(), "down_proj").items()}
    experts.load_expert("down_proj", 0, one)
    changed = run()
    assert len(made) == 1 and not torch.equal(changed, first)
    experts.tensors()["down_proj.scale_multiplier"].mul_(2)  # in place: the next call sees it
    assert torch.equal(run(), 2 * changed) and len(made) == 1
    rows, ends = x[:, : experts.projections["down_proj"][1]], torch.tensor([1, 3, 5], dtype=torch.int32)
    held = under(experts.tensors(), "down_proj")
    assert torch.equal(experts._linear_grouped(rows, ends, "down_proj"),
                       fmt.linear_grouped(rows, ends, held, None, experts.projections["down_proj"]))
    experts.load_tensors({name: tensor.clone() for name, tensor in experts.tensors().items()})
    run()
    assert len(made) == 2
    # As on a GPU, where nothing that is made while a graph is captured may be held.
    monkeypatch.setattr("tersor.experts.plain", lambda x: False)
    monkeypatch.setattr("tersor.experts.eager_cuda", lambda x: True)
    assert torch.equal(run(), run()) and not made, "held"


def test_kernels_say_where_scales_are_widened():
    for text in ("W4A16[scale=e4m3]", "W4A8[scale=e4m3]", "AFP8/W4A16[scale=e4m3]"):
        fmt = resolve_format(text)
        assert "widened" not in fmt.kernel((64, 128)) + fmt.kernel_grouped((64, 128)), "held"
    assert byte_scales._each_call("int_linear cuda", "cuda") == "int_linear cuda on scales widened in each call"
    assert byte_scales._each_call("reference: why", "cuda") == "reference: why"
