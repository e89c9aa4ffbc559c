"""QuaRot and FlatQuant: steps and their weights, models that compute the same, and what each is for."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from outliers import MODEL, text_tokens, with_outliers
from safetensors import safe_open
from safetensors.torch import save_file
from test_calibration import gemma, gpt2, llama, logits, mixture, tokens
from toys import HEAD, Block, batch, group_of
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tersor
from tersor import calibration
from tersor.formats import Int
from tersor.formats.floating import round_to
from tersor.io.errors import CheckpointError
from tersor.transforms import fireq
from tersor.transforms.rotation import rotate_residual
from tersor.transforms.steps import ChannelScale, HeadMix, Hadamard, Kronecker, Permute

pytestmark = pytest.mark.usefixtures("one_thread")


# -- steps ------------------------------------------------------------------------------------------------------------


def steps(width):
    generator = torch.Generator().manual_seed(1)
    return [Permute(torch.randperm(width, generator=generator)),
            ChannelScale(torch.rand(width, generator=generator) + 0.5), Hadamard.random(width, 3),
            HeadMix(torch.randn(4, 4, generator=generator) + 3 * torch.eye(4)),
            Kronecker(*(torch.randn(n, n, generator=generator) + 3 * torch.eye(n) for n in Kronecker.factors(width)))]


@pytest.mark.parametrize("width", [48, 64, 80])
def test_weights_make_up_for_steps(width):
    x, w = torch.randn(5, width, dtype=torch.float64), torch.randn(7, width, dtype=torch.float64)
    for step in steps(width):
        y = F.linear(x, w)
        assert (F.linear(step(x), step.absorb(w)) - y).abs().max() < 1e-10 * y.abs().max(), step.kind
        assert (F.linear(x, step.fold(step.absorb(w))) - y).abs().max() < 1e-10 * y.abs().max(), step.kind
        assert (step.inverse(step(x)) - x).abs().max() < 1e-10 * x.abs().max(), step.kind


def test_steps_that_are_none_are_refused():
    with pytest.raises(ValueError, match="found width 7; accepted"):
        Hadamard(torch.ones(7))
    with pytest.raises(ValueError, match="signs that are not"):
        Hadamard(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="accepted are square ones of"):
        Kronecker(torch.eye(2), torch.eye(32))
    with pytest.raises(ValueError, match="without an inverse"):
        Kronecker(torch.zeros(8, 8), torch.eye(8))
    with pytest.raises(ValueError, match="without an inverse"):
        HeadMix(torch.ones(4, 4))
    with pytest.raises(ValueError, match="accepted is a square one"):
        HeadMix(torch.ones(4, 3))


def test_factors_are_balanced():
    assert [Kronecker.factors(n) for n in (4096, 14336, 256, 768)] == [(64, 64), (112, 128), (16, 16), (24, 32)]


# -- the function stays -----------------------------------------------------------------------------------------------


@pytest.fixture
def exact_norms(monkeypatch):
    """Norms of Llama models compute in the model's dtype, not in float32."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
        x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def changed_alike(model, spec, batches, monkeypatch):
    """The largest change of the logits, relative, that a method's transforms alone make."""
    before = [logits(model, ids) for ids in batches]
    monkeypatch.setattr(calibration._Block, "_finish", lambda *_: None)
    tersor.compress(model, spec, batches)
    return max(float((logits(model, ids) - expected).abs().max() / expected.abs().max())
               for ids, expected in zip(batches, before))


@pytest.mark.parametrize("spec", ["quarot:W4A4[group=32]", "flatquant[steps=2]:W4A4[group=32]",
                                  "smoothquant+quarot:W4A4[group=32]", "comet[ratio=2]:W4Ax[group=32]",
                                  "fireq[attention=true]:W4AFP8"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_models_compute_the_same_in_float64(spec, biased, exact_norms, monkeypatch):
    model = llama(tie_word_embeddings=spec.startswith("quarot"), attention_bias=biased, mlp_bias=biased).double()
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            p.data += torch.rand_like(p)
    assert not biased or all(layer.self_attn.o_proj.bias.any() and layer.mlp.down_proj.bias.any()
                             for layer in model.model.layers), "writers of the residual stream have biases"
    assert changed_alike(model, spec, tokens(2), monkeypatch) < 1e-10


def test_gains_that_are_offsets_and_tied_heads(monkeypatch):
    model = llama(tie_word_embeddings=True)
    ids, before = tokens(1)[0], logits(model, tokens(1)[0])
    rotate_residual(model, ids, Hadamard.random(64))
    assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight
    assert (logits(model, ids) - before).abs().max() < 1e-4 * before.abs().max()
    assert all(bool((p == 1).all()) for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("make,what", [(gpt2, "change by"), (gemma, "no linear layer that reads it"),
                                       (mixture, "change by|reads it")])
def test_models_that_do_not_turn_are_untouched(make, what):
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=what):
        rotate_residual(model, tokens(1)[0], Hadamard.random(64))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_outside_a_recipe_that_share_an_input_are_named():
    with pytest.raises(ValueError, match="q_proj.*v_proj outside the recipe"):
        tersor.compress(llama(), {"q_proj": "flatquant[steps=0]:W4A4[group=32]", "*": "keep"}, tokens(2), tie=False)
    with pytest.raises(ValueError, match="accepted are integer formats"):
        tersor.compress(llama(), "flatquant:MXFP4", tokens(2))
    with pytest.raises(ValueError, match="0 or more steps"):
        tersor.compress(llama(), "flatquant[steps=-1]:W4A4", tokens(2))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_of_values_are_turned_where_they_are_made(kv_heads):
    block = Block(kv_heads=kv_heads)
    before = block(batch())
    group = group_of(block, "o_proj")
    assert group.producer.name == "v_proj" and group.producer.head == HEAD
    group.turn_heads(torch.randn(HEAD, HEAD) + 4 * torch.eye(HEAD))
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()
    assert [group_of(block, name).producer.head for name in ("q_proj", "gate_proj", "down_proj")] == [0, 0, 0]
    with pytest.raises(ValueError, match="heads cannot be turned"):
        group_of(block, "down_proj").turn_heads(torch.eye(HEAD))


def test_only_the_map_among_heads_runs_online():
    model, batches = llama(attention_bias=True), tokens(2)
    tersor.compress(model, "flatquant[steps=1]:W4A4[group=32]", batches)
    for layer in model.model.layers:
        attention = layer.self_attn
        (step,) = attention.o_proj.pre
        assert step.kind == "head_mix" and step.left.shape == (model.config.num_attention_heads,) * 2
        assert [module.pre[0].kind for module in (attention.q_proj, layer.mlp.up_proj, layer.mlp.down_proj)] \
            == ["kronecker"] * 3
    # values that the recipe rounds otherwise are not turned, and the output keeps a map of its own
    model = llama()
    recipe = {"*v_proj": "rtn:W8A8[group=32]", "*": "flatquant[steps=0]:W4A4[group=32]"}
    report = tersor.compress(model, recipe, batches, tie=False)
    assert model.model.layers[0].self_attn.o_proj.pre[0].kind == "kronecker" and len(report.rows) == 21


# -- what they are for ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outlier_model():
    return with_outliers()


def perplexity(model, ids):
    with torch.no_grad():
        found = model(ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(found, ids[:, 1:].flatten()).exp().item()


def test_the_outlier_model_computes_the_same_and_is_hard_to_quantize(outlier_model):
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = text_tokens(512).view(2, 256)
    assert abs(perplexity(outlier_model, ids) / perplexity(plain, ids) - 1) < 1e-4
    losses = []
    for model in (plain, outlier_model):
        twin = copy.deepcopy(model)
        tersor.compress(twin, "rtn[search=false]:W4A4[act_group=0]")
        losses.append(perplexity(twin, ids) / perplexity(model, ids))
    assert losses[0] < 3 and losses[1] > 10


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
def test_training_gains_on_text_that_it_has_not_seen(outliers, outlier_model):
    """A block's output, from the real kernels, on held-out text: nearer after training than before."""
    whole = outlier_model if outliers else AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids, data = text_tokens(512).view(2, 256), text_tokens(1536, 60_000).view(6, 256)

    def output(model):
        with torch.no_grad():
            return model.model(ids, output_hidden_states=True).hidden_states[1].double()

    expected, errors = output(whole), []
    for steps in (0, 24):
        model = copy.deepcopy(whole)
        tersor.compress(model, {"*layers.0.*": f"flatquant[steps={steps}]:W4A4[act_group=0]", "*": "keep"}, data)
        errors.append(float((output(model) - expected).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_methods_order_as_they_should(outlier_model):
    ids, data = text_tokens(512).view(2, 256), text_tokens(512, 60_000).view(2, 256)
    found = []
    for method in ("flatquant[steps=0]", "quarot", "smoothquant", "rtn"):
        model = copy.deepcopy(outlier_model)
        tersor.compress(model, f"{method}:W4A4[act_group=0]", data)
        found.append(perplexity(model, ids) / perplexity(outlier_model, ids))
    flatquant, quarot, smoothquant, rtn = found
    assert flatquant < 0.98 * quarot and 5 * quarot < smoothquant and 2 * smoothquant < rtn
    assert flatquant < 1.25


def test_flexq_gives_eight_bits_where_six_cost_most(outlier_model):
    ids, data = text_tokens(512).view(2, 256), text_tokens(512, 60_000).view(2, 256)
    whole, found = perplexity(outlier_model, ids), {}
    for spec in ("rtn:W6A6[act_group=128]", "flexq:W6A6[act_group=128]"):
        model = copy.deepcopy(outlier_model)
        report = tersor.compress(model, spec, data)
        found[spec[:3]] = perplexity(model, ids) / whole - 1
    eight = {row.name.split(".")[-1] for row in report.rows if "A8" in row.format}
    assert {"o_proj", "down_proj"} <= eight
    assert all("flexq: 6 bits cost" in row.note for row in report.rows if "A6" in row.format)
    assert found["fle"] < 0.04 and found["fle"] < 0.4 * found["rtn"]
    with pytest.raises(ValueError, match="accepted are integer formats with 4 or 6"):
        tersor.compress(llama(), "flexq:W6A8", tokens(2))


def test_static_scales_come_from_calibration():
    batches = tokens(4)
    with pytest.raises(ValueError, match=r"act_scale=static.* looks at data and found none"):
        tersor.compress(llama(), "rtn:W8A8[act_scale=static,act_group=0]")
    model, reference = llama(), llama()
    tersor.compress(model, "smoothquant:W8A8[act_scale=static,act_group=0]", batches)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.tensors()["input_scale"].shape == (1,)
    expected = logits(reference, batches[0])
    assert (logits(model, batches[0]) - expected).norm() < 0.05 * expected.norm()


def test_comet_gathers_outliers_in_wide_blocks(outlier_model):
    ids, data = text_tokens(512).view(2, 256), text_tokens(512, 60_000).view(2, 256)
    whole, found = perplexity(outlier_model, ids), {}
    for spec in ("rtn:W4A16", "rtn:W4Ax", "comet[ratio=4]:W4Ax"):
        model = copy.deepcopy(outlier_model)
        report = tersor.compress(model, spec, data)
        found[spec] = perplexity(model, ids) / whole - 1
    exact, narrow, comet = found.values()
    assert comet - exact < 0.03 * (narrow - exact)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.tensors()["block_bits"].tolist() == [8, 4, 4, 4, 4, 4] and layer.pre[0].kind == "permute"
    assert any("outlier channels, 1 of 6 blocks" in row.note for row in report.rows)
    with pytest.raises(ValueError, match="accepted are W.Ax"):
        tersor.compress(llama(), "comet:W4A4", tokens(2))


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["W4A4[act_group=0]", "W6A8", "W4Ax", "W4A16"])
def test_layers_run_steps_and_products_in_one_call(spec):
    linear = torch.nn.Linear(256, 48)
    format = tersor.registry.resolve_format(spec)
    for step in (Permute(torch.randperm(256)), Hadamard.random(256), *steps(256)[-2:]):
        layer = tersor.Linear.holding(linear, format, pre=(step,))
        params = format.fit(step.absorb(linear.weight.detach()), dtype=torch.float32)
        if spec == "W4Ax":
            params["block_bits"] = torch.tensor([8, 4])
        layer.load_tensors(format.pack(format.project(step.absorb(linear.weight.detach()), params), params))
        x = torch.randn(3, 256)
        with torch.no_grad():
            found = layer(x)
        tensors = layer.tensors()
        seen = format.quantize_input(step(x), tensors) if spec != "W4A16" else step(x)
        expected = F.linear(seen.double(), format.unpack(tensors, layer.shape, torch.float64), linear.bias.double())
        assert (found - expected).norm() < 1e-5 * expected.norm(), step.kind
        assert (layer._fused[0] is not None) == (spec != "W4A16")
        replaced = copy.deepcopy(layer)
        replaced.pre[0] = Hadamard.random(256, 9)  # another step is seen
        with torch.no_grad():
            assert not torch.equal(replaced(x), found)


def test_projections_of_one_input_share_the_step():
    model, batches = llama(), tokens(2)
    tersor.compress(model, "flatquant[steps=0]:W4A4[group=32]", batches)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.siblings is not None and attention.q_proj.siblings is attention.v_proj.siblings
    together = logits(model, batches[0])
    for layer in model.modules():
        if isinstance(layer, tersor.Linear) and layer.siblings:
            layer.siblings.dissolve()
    assert torch.equal(logits(model, batches[0]), together)


@pytest.mark.parametrize("spec", ["flatquant[steps=1]:W4A4[group=32]", "quarot:W4A4[group=32]", "comet:W4Ax[group=32]",
                                  "flatquant[steps=0]+gptq:W4A4[group=32]"])
def test_saved_and_loaded_models_say_the_same(spec, tmp_path):
    model, batches = llama(), tokens(2)
    tersor.compress(model, spec, batches)
    tersor.save(model, tmp_path / "q")
    loaded = tersor.load(tmp_path / "q")
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))
    prompt = batches[0][:, :8]
    one, other = (m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, loaded))
    assert torch.equal(one, other)


def test_a_map_among_heads_that_fits_no_heads_is_refused(tmp_path):
    model = llama()
    tersor.compress(model, "flatquant[steps=0]:W4A4[group=32]", tokens(2))
    tersor.save(model, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    with safe_open(file, "pt") as source:
        tensors, about = {name: source.get_tensor(name) for name in source.keys()}, source.metadata()
    name = next(name for name in tensors if name.endswith("o_proj.pre_0_left"))
    for wrong, said in ((torch.eye(3), r"pre_0_left.*\[3, 3\]"), (torch.ones(4, 4), "without an inverse")):
        save_file({**tensors, name: wrong}, file, about)
        with pytest.raises(CheckpointError, match=said):
            tersor.load(tmp_path / "q")


# -- FireQ ------------------------------------------------------------------------------------------------------------


def test_fireq_scales_are_eight_bit_floats_under_one_power_of_two():
    w = torch.randn(32, 256) * 1e-3
    w[3] *= 1e-2  # groups that E4M3 would lose
    scales = fireq.group_scales(w, 128)
    multiplier = fireq.power(w.abs().unflatten(1, (2, 128)).amax(2))
    assert 1 < multiplier <= 2**14 and math.log2(multiplier).is_integer()
    eight = (scales * multiplier).to(torch.float8_e4m3fn).float() / multiplier
    assert torch.equal(eight, scales) and torch.equal(scales.bfloat16().float(), scales)

    def error(row):
        format = Int(4, 128)
        choice = fireq.FireQ().choose(w, format, None, dtype=torch.float32)
        return float((choice.w_hat - w)[row].norm() / w[row].norm())

    assert error(3) < 1.5 * error(4) < 0.3
    one = round_to(w.abs().unflatten(1, (2, 128)).amax(2) / 7, "e4m3").clamp_min(2.0**-9)
    assert float(one[3].min() / scales[3].max()) > 10, "without the power of two they would be far too coarse"
    assert fireq.power(torch.full((2, 2), 1e4)) == 1.0, "what overflows is left to saturate"


def test_fireq_evens_out_the_weights_that_share_a_scale():
    block = Block()
    block.up_proj.weight.data *= torch.exp(torch.randn(96, 1, dtype=torch.float64))
    group, before = group_of(block, "down_proj"), block(batch())
    assert fireq.FireQ().transform(group) == ""
    assert (block(batch()) - before).abs().max() < 1e-10 * before.abs().max()
    means = group.weight("down_proj").abs().mean(0)
    assert means.max() / means.min() < 1.0001
    group = group_of(block, "q_proj")
    assert torch.equal(group.weight("q_proj"), block.q_proj.weight)


def test_fireq_needs_integers_of_four_bits():
    with pytest.raises(ValueError, match="accepted are W4AFP8"):
        tersor.compress(llama(), "fireq:W8A16[group=32]", tokens(2))
    model, batches = llama(), tokens(2)
    report = tersor.compress(model, "fireq:W4AFP8", batches)
    assert len(report.rows) == 21 and torch.isfinite(logits(model, batches[0])).all()
