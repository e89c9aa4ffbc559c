"""3-D expert parameters: any format, in the place of transformers' fused expert modules."""

import copy

import pytest
import torch
from torch import nn

from tersor.experts import Experts, expert_inputs, is_experts, matrices
from tersor.formats import Int, LowRank, Sparse24, Sum
from tersor.patch import patch
from tersor.registry import resolve

EXPERTS, HIDDEN, INNER, TOKENS = 4, 64, 96, 13


def qwen():
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, moe_intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97, num_experts=EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=64,
    )


def original(kind):
    """An expert module of transformers with random weights."""
    if kind == "qwen3_moe":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Module

        config = qwen()
    elif kind == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Module

        config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    elif kind == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Module

        config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    elif kind == "nemotron_h":
        from transformers import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Module

        config = NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS)
    else:
        from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4TextExperts as Module

        config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = Module(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def compressed(module, fmt):
    """The module's `Experts`, and the module with the weights they stand for."""
    layer, twin = Experts.holding(module, fmt), copy.deepcopy(module)
    for projection, weights in matrices(module).items():
        for expert, w in enumerate(weights):
            params = fmt.fit(w.float(), dtype=w.dtype)
            layer.load_expert(projection, expert, fmt.pack(fmt.project(w.float(), params), params))
        values = layer.weights(projection)
        twin._parameters[projection].data.copy_(values.transpose(1, 2) if layer.is_transposed else values)
    return layer, twin


def routing(kind, dtype=torch.float32):
    torch.manual_seed(1)
    if kind == "llama4":
        return (torch.randn(EXPERTS * TOKENS, HIDDEN, dtype=dtype),)
    weights, index = torch.rand(TOKENS, EXPERTS, dtype=dtype).topk(2)
    return torch.randn(TOKENS, HIDDEN, dtype=dtype), index, weights


KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "llama4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", [Int(4, 32), Int(8, 32, False), Sparse24(), Sum((Int(3, 32), LowRank(4)))], ids=str)
def test_same_output_as_the_original_with_the_dequantized_weights(kind, fmt):
    module = original(kind)
    assert is_experts(module)
    layer, twin = compressed(module, fmt)
    inputs = routing(kind)
    with torch.no_grad():
        y, wanted = layer(*inputs), twin(*inputs)
    assert y.shape == wanted.shape and (y - wanted).norm() < 2e-5 * wanted.norm()
    assert layer.nbytes == sum(tensor.nbytes for tensor in layer.tensors().values())
    assert torch.Size(layer.shape).numel() == sum(w.numel() for w in matrices(module).values())
    assert layer.nbytes * 8 / torch.Size(layer.shape).numel() < 10


def test_weights_count_the_projections_shape():
    layer, _ = compressed(original("gpt_oss"), Int(4, 32))
    assert layer.projections == {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    assert layer.tensors()["gate_up_proj.qweight"].shape[0] == EXPERTS
    assert layer.is_transposed and set(dict(layer.named_parameters())) == {"gate_up_proj_bias", "down_proj_bias"}


def test_bfloat16_gradient_and_unrouted_tokens():
    module = original("qwen3_moe").to(torch.bfloat16)
    layer, twin = compressed(module, Int(4, 32))
    x, index, weights = routing("qwen3_moe", torch.bfloat16)
    index[3] = EXPERTS  # a token of another rank
    y, wanted = layer(x, index, weights), twin(x, index, weights)
    assert y.dtype == torch.bfloat16 and not y[3].any()
    assert (y - wanted).float().norm() < 6e-3 * wanted.float().norm()
    layer, twin = compressed(original("qwen3_moe"), Int(4, 32))
    x, index, weights = routing("qwen3_moe")
    grads = []
    for module in (layer, twin):
        leaf = x.clone().requires_grad_()
        module(leaf, index, weights).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_wrong_tensors_and_widths_are_refused():
    layer, _ = compressed(original("mixtral"), Int(4, 32))
    tensors = layer.tensors()
    with pytest.raises(ValueError, match="accepted are"):
        layer.load_tensors({key: value for key, value in tensors.items() if "scales" not in key})
    with pytest.raises(ValueError, match="gate_up_proj.scales"):
        layer.load_tensors({**tensors, "gate_up_proj.scales": tensors["gate_up_proj.scales"][:1]})
    with pytest.raises(ValueError, match=r"down_proj\[0\]"):
        layer.load_expert("down_proj", 0, {"qweight": tensors["down_proj.qweight"][0]})
    with pytest.raises(ValueError, match="accepted is .tokens, 64."):
        layer(torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


def test_casts_leave_the_stored_tensors_alone_and_copies_are_their_own():
    layer, _ = compressed(original("qwen3_moe"), Int(4, 32))
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin.weight_dtype == torch.bfloat16 and layer.weight_dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
               for name, tensor in twin.tensors().items())
    assert not {t.data_ptr() for t in twin.tensors().values()} & {t.data_ptr() for t in layer.tensors().values()}
    again = Experts.holding(original("qwen3_moe"), layer.format, "meta")
    again.load_tensors(layer.tensors())
    inputs = routing("qwen3_moe")
    assert torch.equal(again(*inputs), layer(*inputs))


def test_expert_inputs_are_what_the_matrices_see():
    module = original("qwen3_moe")
    x, index, weights = routing("qwen3_moe")
    w = matrices(module)
    total = torch.zeros_like(x)
    for expert, inputs in expert_inputs(module, x, index):
        rows, slots = (index == expert).nonzero(as_tuple=True)
        y = inputs["down_proj"] @ w["down_proj"][expert].T * weights[rows, slots, None]
        total.index_add_(0, rows, y)
        assert torch.equal(inputs["gate_up_proj"], x[rows])
    assert torch.allclose(total, module(x, index, weights), atol=1e-5)


def test_what_is_no_expert_module():
    assert not is_experts(nn.Linear(4, 4))
    odd = nn.Module()
    odd.gate_up_proj, odd.down_proj = nn.Parameter(torch.zeros(3, 8, 4)), nn.Parameter(torch.zeros(3, 4, 5))
    odd.forward = lambda hidden_states, top_k_index, top_k_weights: hidden_states
    assert not is_experts(odd), "shapes that do not fit each other"


def test_a_model_with_experts_is_patched_and_generates():
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(qwen()).eval()
    fmt = resolve("rtn:W4A16[group=32]").format
    names = [name for name, module in model.named_modules() if is_experts(module)]
    assert len(names) == 2
    weights = {name: matrices(model.get_submodule(name)) for name in names}
    made = patch(model, {name: fmt for name in names})
    for name, layer in made.items():
        for projection, stacked in weights[name].items():
            for expert, w in enumerate(stacked):
                params = fmt.fit(w, dtype=w.dtype)
                layer.load_expert(projection, expert, fmt.pack(fmt.project(w, params), params))
    assert not [name for name, p in model.named_parameters() if p.dim() == 3]
    tokens = model.generate(torch.randint(0, 97, (1, 5)), max_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 11)


def test_compress_reaches_the_experts():
    import tersor
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(qwen()).eval()
    report = tersor.compress(model, "rtn:W4A16[group=32]")
    rows = [row for row in report.rows if "experts" in row.name]
    assert len(rows) == 2 and all(4 < row.bits < 6 for row in rows)
    assert all(isinstance(model.get_submodule(row.name), Experts) for row in rows)
    tokens = model.generate(torch.randint(0, 97, (1, 5)), max_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 11)


def test_calibrated_experts_beat_rounding():
    """Each expert has the Hessian of the tokens that were routed to it."""
    import tersor
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(qwen()).eval()
    tokens = torch.randint(0, 97, (24, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = base(tokens).logits
    errors = {}
    for method in ("rtn", "gptq"):
        model = copy.deepcopy(base)
        recipe = {"re:.*experts": f"{method}:W3A16[group=32]", "re:.*": "keep"}
        report = tersor.compress(model, recipe, calibration=tokens)
        assert sorted(row.name for row in report.rows) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        with torch.no_grad():
            errors[method] = float((model(tokens).logits - wanted).norm())
    assert errors["gptq"] < 0.95 * errors["rtn"], errors


def test_experts_implementation_by_name():
    import tersor
    import tersor.auto  # registers it  # noqa: F401
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(qwen()).eval()
    ids = torch.randint(0, 97, (2, 7))
    with torch.no_grad():
        wanted = model(ids).logits
        model.set_experts_implementation("tersor")
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        tersor.compress(model, "rtn:W8A16[group=32]")
        assert (model(ids).logits - wanted).norm() < 0.02 * wanted.norm()


def test_no_tokens():
    layer, _ = compressed(original("qwen3_moe"), Int(4, 32))
    with torch.no_grad():
        y = layer(torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, HIDDEN)


def test_one_call_for_each_projection(monkeypatch):
    from tersor import ops

    layer, twin = compressed(original("qwen3_moe"), Int(4, 32))
    calls, inner = [], ops.int_linear_grouped.cpu
    monkeypatch.setattr(ops.int_linear_grouped, "cpu", lambda *given: calls.append(given) or inner(*given))
    x, index, weights = routing("qwen3_moe")
    index[2, 0], index[3, 1] = -1, EXPERTS  # both are nobody's
    with torch.no_grad():
        y = layer(x, index, weights)
        assert len(calls) == 2
        index[2, 0] = EXPERTS
        torch.testing.assert_close(y, twin(x, index, weights), rtol=1e-4, atol=1e-5)
