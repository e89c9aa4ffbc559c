"""The cache in plain transformers: models of several kinds, padding, beams, lookups, and models it must refuse."""

import pytest
import torch
from transformers import (DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, Gemma2Config, Gemma2ForCausalLM,
                          Gemma3ForCausalLM, Gemma3TextConfig, GptOssConfig, GptOssForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import tersor

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=97, max_position_embeddings=512, pad_token_id=0)
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 40}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 40, "attn_implementation": "eager",
                                                 "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 40}),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {"sliding_window": 40, "num_local_experts": 1,
                                                  "num_experts_per_tok": 1, "attn_implementation": "eager"}),
}


def make(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config, model, options = KINDS[kind]
    options = dict(options)
    implementation = options.pop("attn_implementation", "sdpa")
    model = model._from_config(config(**SMALL, **options), attn_implementation=implementation).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # attention that is not flat
        elif "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def prompt(batch=2, length=50, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_by_steps(model, cache, ids, mask=None, steps=(50, 1, 1, 3, 1, 30, 1, 12, 1)):
    """Logits of all tokens, computed in pieces of the lengths given."""
    parts, at = [], 0
    with torch.no_grad():
        for step in steps:
            piece = ids[:, at:at + step]
            part_mask = None if mask is None else mask[:, :at + step]
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, at:at + step]
            parts.append(model(piece, attention_mask=part_mask, position_ids=positions, past_key_values=cache,
                               use_cache=True).logits)
            at += step
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_as_the_plain_cache(kind):
    ids = prompt(2, 100)
    model = make(kind)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids)
    cache = tersor.Cache(model, "K16V16")
    ours = logits_by_steps(model, cache, ids)
    assert (ours - truth).norm() < 1e-5 * truth.norm()
    assert cache.get_seq_length() == 100
    plain = logits_by_steps(model, DynamicCache(config=model.config), ids)  # any other cache runs as before
    assert (plain - truth).norm() < 1e-5 * truth.norm()
    errors = [(logits_by_steps(model, tersor.Cache(model, spec, group=32, sinks=0, recent=0), ids) - truth).norm()
              / truth.norm() for spec in ("K8V8", "K4V4", "K2V2")]
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < errors[2] < 0.9, errors


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_left_padding(kind):
    model, ids = make(kind), prompt(3, 100)
    mask = torch.ones_like(ids)
    mask[0, :37], mask[1, :5] = 0, 0
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, mask)
    for spec, limit in (("K16V16", 1e-5), ("K8V8", 0.02)):
        cache = tersor.Cache(model, spec, **({} if spec == "K16V16" else {"group": 32}))
        ours = logits_by_steps(model, cache, ids, mask)
        seen = mask.bool()
        assert (ours[seen] - truth[seen]).norm() < limit * truth[seen].norm()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_beam_search_and_sampled_batches(kind):
    model, ids = make(kind), prompt(2, 40)
    options = dict(max_new_tokens=40, do_sample=False, num_beams=3, num_return_sequences=2, attention_mask=ids > 0)
    truth = model.generate(ids, **options)
    cache = tersor.Cache(model, "K16V16")
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), truth)
    eight = tersor.Cache(model, "K8V8", group=32)
    ours = model.generate(ids, past_key_values=eight, **options)
    assert ours.shape[0] == 4 and (ours[:, :40] == truth[:, :40]).all()
    assert eight.nbytes < cache.nbytes


def test_prompt_lookup_and_assisted_generation():
    model, helper = make("llama"), make("llama", seed=3)
    ids = prompt(1, 12).repeat(1, 5)
    truth = model.generate(ids, max_new_tokens=40, do_sample=False)
    for spec in ("K16V16", "K8V8"):
        cache = tersor.Cache(model, spec, **({} if spec == "K16V16" else {"group": 32}))
        found = model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache,
                               prompt_lookup_num_tokens=4)
        assert (found == truth).all() if spec == "K16V16" else found.shape == truth.shape
        cache = tersor.Cache(model, spec)
        assisted = model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache,
                                  assistant_model=helper)
        assert (assisted == truth).all() if spec == "K16V16" else assisted.shape == truth.shape


def test_prompt_lookup_with_a_sliding_window():
    model, ids = make("mistral"), prompt(1, 12).repeat(1, 5)
    truth = model.generate(ids, max_new_tokens=30, do_sample=False)
    cache = tersor.Cache(model, "K16V16")
    found = model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(found, truth)


def test_compiled_models_break_the_graph_and_agree():
    model, ids = make("llama"), prompt(1, 50)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids[:, :42], steps=(40, 1, 1))
    cache = tersor.Cache(model, "K16V16")
    compiled = torch.compile(model, backend="eager")
    ours = logits_by_steps(compiled, cache, ids[:, :42], steps=(40, 1, 1))
    assert (ours - truth).norm() < 1e-5 * truth.norm()


def latent():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=97, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def test_latent_attention_is_exact_at_16_bits_and_refused_below():
    model, ids = latent(), prompt(2, 60)
    truth = logits_by_steps(model, DynamicCache(config=model.config), ids, steps=(40, 1, 3, 16))
    cache = tersor.Cache(model, "K16V16")
    ours = logits_by_steps(model, cache, ids, steps=(40, 1, 3, 16))
    assert (ours - truth).norm() < 1e-5 * truth.norm()
    assert "copied out at each step" in cache.report().rows[0].kernel
    with pytest.raises(RuntimeError, match="layer 0: this model computes with cached keys outside its attention"):
        model(ids, past_key_values=tersor.Cache(model, "K4V4"))


def test_clear_errors():
    model, ids = make("llama"), prompt(2, 20)
    cache = tersor.Cache(model, "K4V4")
    with pytest.raises(RuntimeError, match="no backward"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"keys: found .*\[3, 2, 1, 16\].*accepted is .*\[2, 2, tokens, 16\]"):
            model(ids[:1].repeat(3, 1)[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="bfloat16"):
            make("llama", torch.bfloat16)(ids, past_key_values=cache)
        wide = dict(SMALL, head_dim=24)
        odd = LlamaForCausalLM(LlamaConfig(**wide)).eval()
        with pytest.raises(ValueError, match="multiples of 16"):
            odd(ids, past_key_values=tersor.Cache(odd, "K4V4"))


def test_a_cache_belongs_to_one_model_and_its_positions():
    model, other, ids = make("llama"), make("llama", seed=5), prompt(1, 20)
    cache = tersor.Cache(model, "K16V16")
    tersor.Cache(other, "K16V16")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="found a second model, at layer 0, accepted is the model whose tokens"):
            other(ids[:, :1], past_key_values=cache)
        cache.reset()
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="tokens: found 520, accepted is the 512 positions"):
            other(prompt(1, 500), past_key_values=cache)
