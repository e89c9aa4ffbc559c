"""The calibration runner on small models of several architectures, with experts and broken input."""


import pytest
import torch
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM)

import tersor
from tersor import blocks, calibration
from tersor.methods import GPTQ, Collector

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0)


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **changes)).eval()


def gemma(**changes):
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | changes, sliding_window=8, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def mixture(experts=4):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=experts, num_experts_per_tok=2,
                                              moe_intermediate_size=32, decoder_sparse_step=1)).eval()


def tokens(count=6, length=24, seed=0, high=128):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, high, (1, length), generator=generator) for _ in range(count)]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def divergence(model, reference, batches):
    with torch.no_grad():
        return sum(float(torch.nn.functional.kl_div(
            logits(model, ids).log_softmax(-1), expected, log_target=True, reduction="sum"))
            for ids, expected in zip(batches, reference))


# -- the chain of blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make,name,count", [(llama, "model.layers", 3), (gemma, "model.layers", 3),
                                             (gpt2, "transformer.h", 2), (mixture, "model.layers", 3)])
def test_blocks_are_found_by_running_the_model_and_replay_it_exactly(make, name, count):
    model, batches = make(), tokens(3)
    with torch.no_grad():
        chain = blocks.find_chain(model, batches[0][:, :16])
        assert chain.names == [f"{name}.{i}" for i in range(count)]
        blocks.capture(model, chain, batches, None)
        seen = []
        handle = chain.blocks[-1].register_forward_hook(lambda m, a, out: seen.append(blocks.output_tensor(out)))
        for batch in batches:
            model(batch)
        handle.remove()
        for index in range(count):
            calibration._advance(chain, index)
    for hidden, expected in zip(chain.hidden, seen):
        assert torch.equal(hidden, expected)
    assert hooks_of(model) == 0


def test_arguments_that_repeat_from_batch_to_batch_are_kept_once():
    model, batches = llama(), tokens(4)
    with torch.no_grad():
        chain = blocks.find_chain(model, batches[0])
        blocks.capture(model, chain, batches, None)
    cosines = {id(arguments[1]["position_embeddings"][0]) for per_batch in chain.arguments for arguments in per_batch}
    assert len(cosines) == 1


def test_blocks_with_something_in_between_are_refused():
    class Between(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(16, 8)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x) * 2
            return x

    with pytest.raises(ValueError, match="'layers.0' and 'layers.1'.*chain"):
        blocks.find_chain(Between(), tokens(1, 4, high=16)[0])


# -- statistics ------------------------------------------------------------------------------------------


def test_one_hessian_per_distinct_input_and_inputs_of_the_compressed_blocks_before(monkeypatch):
    model, batches = llama(), tokens()
    made, seen = [], {}
    finish = Collector.finish

    def watched(self):
        stats = finish(self)
        made.append(stats)
        return stats

    choose = GPTQ.choose

    def remember(self, w, fmt, stats, previous=None, *, dtype=None):
        seen.setdefault(id(stats), []).append(tuple(w.shape))
        return choose(self, w, fmt, stats, previous, dtype=dtype)

    monkeypatch.setattr(Collector, "finish", watched)
    monkeypatch.setattr(GPTQ, "choose", remember)
    tersor.compress(model, "gptq:W4A16[group=32]", batches)
    assert len(made) == 3 * 4  # q/k/v, o, gate/up, down
    assert sorted(len(shapes) for shapes in seen.values()) == [1] * 6 + [2] * 3 + [3] * 3
    x = []  # the second block's first input, in the compressed model
    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: x.append(a[0][0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    x = torch.cat(x)
    expected = x.T @ x * (2 / len(x))
    assert (made[4].hessian - expected).norm() / expected.norm() < 1e-4


def test_sequential_collects_inside_a_block_after_what_comes_before():
    model, batches = llama(), tokens()
    tersor.compress(model, "gptq[sequential=true]:W3A16[group=32]", batches)
    again = llama()
    tersor.compress(again, "gptq:W3A16[group=32]", batches)
    first, second = model.model.layers[0], again.model.layers[0]
    assert torch.equal(first.self_attn.q_proj.weight, second.self_attn.q_proj.weight)
    assert not torch.equal(first.self_attn.o_proj.weight, second.self_attn.o_proj.weight)


# -- whole models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make,layers", [(llama, 21), (gemma, 21), (gpt2, 8)])
@pytest.mark.parametrize("recipe", ["gptq:W4A16[group=32]", "awq:W4A16[group=32]", "smoothquant+gptq:W4A16[group=32]"])
def test_models_are_compressed_and_close_to_the_original(make, layers, recipe):
    model, batches = make(), tokens()
    reference = [logits(model, ids).log_softmax(-1) for ids in batches]
    model.train()
    calls = []
    report = tersor.compress(model, recipe, batches, progress=lambda *call: calls.append(call))
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    assert len(report.rows) == layers and all(row.measured_on == "inputs" for row in report.rows)
    assert all(0 < row.relative_error < 0.3 and row.seconds >= 0 for row in report.rows)
    assert hooks_of(model) == 0
    assert calls[-1] == ("compress", layers, layers) and {task for task, _, _ in calls} == {"capture", "compress"}
    assert divergence(model, reference, batches) / (6 * 24) < 0.05


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_transforms_keep_the_function_of_real_architectures(make, method, monkeypatch):
    model, batches = make(), tokens()
    reference = [logits(model, ids) for ids in batches]
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(calibration._Block, "_finish", lambda *_: None)  # transforms alone
    tersor.compress(model, f"{method}:W3A16[group=32]", batches)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("norm" in name or "ln_" in name for name in changed)
    for ids, expected in zip(batches, reference):
        assert (logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_experts_get_statistics_of_their_own_tokens_and_the_rest_is_said(monkeypatch):
    model, batches = mixture(experts=16), tokens(1, 4)
    report = tersor.compress(model, "gptq:W4A16[group=32]", batches)
    rows = [row for row in report.rows if row.name.endswith("experts")]
    assert len(rows) == 3 and all(row.shape[0] == 16 for row in rows)
    assert all("experts received no calibration token: rounded to nearest" in row.note for row in rows)
    assert torch.isfinite(logits(model, batches[0])).all()


def test_experts_collected_in_several_passes_are_the_same(monkeypatch):
    results = []
    for limit in (4 << 30, 1):
        monkeypatch.setattr(calibration, "_EXPERT_BYTES", limit)
        model = mixture()
        tersor.compress(model, "gptq:W3A16[group=32]", tokens())
        results.append(model.model.layers[0].mlp.experts.weights("down_proj"))
    assert torch.equal(*results)


def test_experts_are_closer_than_rounding():
    def errors(recipe):
        model = mixture()
        with torch.no_grad():
            x = torch.randn(64, 64)
            index = torch.randint(0, 4, (64, 2))
            weights = torch.full((64, 2), 0.5)
            expected = model.model.layers[0].mlp.experts(x, index, weights)
            report = tersor.compress(model, recipe, tokens(16, 48) if "gptq" in recipe else None)
            got = model.model.layers[0].mlp.experts(x, index, weights)
        assert float((got - expected).norm() / expected.norm()) < 0.5
        return next(row.relative_error for row in report.rows if row.name.endswith("experts"))

    assert errors("gptq:W3A16[group=32]") < errors("rtn:W3A16[group=32]")


def test_layers_outside_the_blocks_and_embeddings():
    model, batches = llama(tie_word_embeddings=False), tokens()
    report = tersor.compress(model, {"lm_head": "gptq:W8A16[group=32]", "embed_tokens": "rtn:W8A16[group=32]",
                                     "Linear": "gptq:W4A16[group=32]"}, batches)
    names = [row.name for row in report.rows]
    assert names[-2:] == ["model.embed_tokens", "lm_head"] or names[-2:] == ["lm_head", "model.embed_tokens"]
    by_name = {row.name: row for row in report.rows}
    assert by_name["lm_head"].measured_on == "inputs" and by_name["lm_head"].relative_error < 0.01
    assert by_name["model.embed_tokens"].measured_on == "weights"
    assert torch.isfinite(logits(model, batches[0])).all() and hooks_of(model) == 0


def test_data_free_layers_beside_others_and_a_part_of_the_blocks():
    model = llama()
    report = tersor.compress(model, {"re:.*layers\\.1\\.mlp.*": "gptq:W4A16[group=32]", "q_proj": "rtn:W8A16[group=32]",
                                     "k_proj": "rtn:W8A16[group=32]", "v_proj": "rtn:W8A16[group=32]", "*": "keep"},
                             tokens())
    assert len(report.rows) == 3 + 9
    assert isinstance(model.model.layers[2].mlp.up_proj, torch.nn.Linear)
    assert not isinstance(model.model.layers[2].mlp.up_proj, tersor.Linear)


# -- bad input ------------------------------------------------------------------------------------------


def poison_weight(model):
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan


def poison_hidden(model):
    model.model.layers[1].post_attention_layernorm.weight.data[0] = torch.inf


def poison_token(model):
    model.model.embed_tokens.weight.data[7] = torch.inf


@pytest.mark.parametrize("poison,method,match", [
    (poison_weight, "gptq", r"'model.layers.1.mlp.up_proj'.*NaN or Inf"),
    (poison_weight, "rtn", r"'model.layers.1.mlp.up_proj'.*NaN or Inf"),
    (poison_hidden, "gptq", r"block 'model.layers.1'.*NaN or Inf"),
    (poison_token, "awq", r"block 'model.layers.0'.*calibration batch 2.*NaN or Inf"),
])
def test_values_that_are_not_finite_name_the_place_before_anything_is_touched(poison, method, match):
    model, batches = llama(), tokens(2, high=7)
    batches.append(torch.tensor([[1, 2, 7]]))
    poison(model)
    with pytest.raises(ValueError, match=match):
        tersor.compress(model, f"{method}:W4A16[group=32]", batches if method != "rtn" else None)
    assert hooks_of(model) == 0
    assert not any(isinstance(module, tersor.Linear) for module in model.modules())


def test_values_that_stop_being_finite_on_the_way_name_the_block(monkeypatch):
    model, choose = llama(), GPTQ.choose

    def explode(self, w, fmt, stats, previous=None, *, dtype=None):
        choice = choose(self, w, fmt, stats, previous, dtype=dtype)
        choice.params["scales"] *= 1e30
        choice.w_hat = choice.w_hat * 1e30
        return choice

    monkeypatch.setattr(GPTQ, "choose", explode)
    with pytest.raises(ValueError, match=r"layers\.\d.*NaN or Inf.*already compressed: \d+ layers, model.layers.0"):
        tersor.compress(model, "gptq:W4A16[group=32]", tokens())
    assert hooks_of(model) == 0


@pytest.mark.parametrize("batches,match", [([], "found no"), ([torch.tensor([[1, 200]])], "200.*accepted are 0 to 127"),
                                           ([torch.tensor([[1, -2]])], "-2")])
def test_bad_calibration_is_refused(batches, match):
    model = llama()
    with pytest.raises(ValueError, match=match):
        tersor.compress(model, "gptq:W4A16[group=32]", batches)
    assert not any(isinstance(module, tersor.Linear) for module in model.modules())


def test_an_error_on_the_way_restores_the_model_and_names_what_is_done(monkeypatch):
    model = llama().train()
    choose, calls = GPTQ.choose, []

    def failing(self, w, fmt, stats, previous=None, *, dtype=None):
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("out of luck")
        return choose(self, w, fmt, stats, previous, dtype=dtype)

    monkeypatch.setattr(GPTQ, "choose", failing)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        tersor.compress(model, "gptq:W4A16[group=32]", tokens())
    assert any("9 layers, model.layers.0.self_attn.q_proj to" in note for note in caught.value.__notes__)
    assert hooks_of(model) == 0 and all(m.training for m in model.modules())
    assert sum(isinstance(module, tersor.Linear) for module in model.modules()) == 9
    assert torch.isfinite(logits(model, tokens()[0])).all()


def test_a_data_method_on_an_embedding_is_refused():
    with pytest.raises(ValueError, match="embed_tokens.*data, such as rtn"):
        tersor.compress(llama(), {"embed_tokens": "gptq:W8A16[group=32]", "*": "keep"}, tokens())
