"""tersor.evaluate against hand computation on a tiny model."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tersor import evaluate
from tersor.calibration_text import HELD_OUT_EVERY, split_standard_library, standard_library_texts

VOCABULARY = 97


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                         bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
                         initializer_range=0.5)
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def other():
    return tiny(1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (1000,), generator=torch.Generator().manual_seed(3))


def by_hand(model, original, windows):
    """Perplexities, KL and agreement in float64, token by token."""
    nll = nll_original = kl = agree = count = 0
    with torch.no_grad():
        for window in windows.tolist():
            q = model(input_ids=torch.tensor([window])).logits[0].double()
            p = original(input_ids=torch.tensor([window])).logits[0].double()
            for t in range(len(window) - 1):
                log_q = (q[t] - q[t].logsumexp(0)).tolist()
                log_p = (p[t] - p[t].logsumexp(0)).tolist()
                nll -= log_q[window[t + 1]]
                nll_original -= log_p[window[t + 1]]
                kl += sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q))
                agree += log_p.index(max(log_p)) == log_q.index(max(log_q))
                count += 1
    return math.exp(nll / count), math.exp(nll_original / count), kl / count, agree / count


@pytest.mark.parametrize("length", [7, 150])  # below and above the rows that are reduced at once
def test_quality_equals_hand_computation(model, other, ids, length):
    windows = evaluate.windows(ids, length, limit=3)
    assert windows.shape == (3, length)
    quality = evaluate.compare(model, other, windows)
    expected = by_hand(model, other, windows)
    found = (quality.perplexity, quality.original_perplexity, quality.kl, quality.agreement)
    assert found == pytest.approx(expected, rel=1e-5)
    assert evaluate.perplexity(model, windows) == pytest.approx(expected[0], rel=1e-5)
    assert quality.kl > 0.1 and quality.agreement < 0.9  # two random models are far apart


def test_a_model_equals_itself(model, ids):
    quality = evaluate.compare(model, copy.deepcopy(model), evaluate.windows(ids, 50, limit=2))
    assert quality.kl == pytest.approx(0, abs=1e-7)
    assert quality.agreement == 1
    assert quality.perplexity == quality.original_perplexity


def test_windows():
    ids = torch.arange(10)
    assert evaluate.windows(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluate.windows(ids, 4, limit=1).tolist() == [[0, 1, 2, 3]]
    assert evaluate.windows(ids, 64).tolist() == [list(range(10))]
    for bad in (lambda: evaluate.windows(ids, 1), lambda: evaluate.windows(ids[:1], 4),
                lambda: evaluate.windows(ids, 4, limit=0)):
        with pytest.raises(ValueError, match="found .* accepted"):
            bad()


def test_logits_that_are_not_finite_are_refused(ids):
    broken = tiny()
    broken.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="logits of the model: found NaN"):
        evaluate.perplexity(broken, evaluate.windows(ids, 10, limit=1))


def test_vocabularies_must_agree(model, ids):
    smaller = tiny()
    smaller.lm_head = torch.nn.Linear(32, VOCABULARY - 1, bias=False)
    with pytest.raises(ValueError, match="vocabulary: found 96"):
        evaluate.compare(smaller, model, evaluate.windows(ids % 90, 10, limit=1))


def test_bytes_count_shared_storage_once():
    model = tiny()
    untied = evaluate.model_bytes(model)
    assert untied == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    head = model.lm_head.weight.nbytes
    model.lm_head.weight = model.model.embed_tokens.weight
    assert evaluate.model_bytes(model) == untied - head
    model.register_buffer("view", model.lm_head.weight.data[:5])
    assert evaluate.model_bytes(model) == untied - head


def test_computing_in_another_dtype_restores_every_tensor():
    model = tiny(dtype=torch.bfloat16)
    model.model.norm.float()  # mixed dtypes, as checkpoints have
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in
              (*model.named_parameters(), *model.named_buffers())}
    with evaluate.computing_in(model, torch.float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    after = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in
             (*model.named_parameters(), *model.named_buffers())}
    assert after == before


def test_evaluate_measures_everything_and_leaves_the_model_alone(ids):
    model, original = tiny(dtype=torch.bfloat16), tiny(1, torch.bfloat16)
    model.train()
    calls = []
    result = evaluate.evaluate(model, evaluate.windows(ids, 32, limit=2), original, dtype=torch.float32, new_tokens=4,
                               prefill=32, progress=lambda *call: calls.append(call))
    assert (result.windows, result.window, result.dtype) == (2, 32, "float32")
    assert result.bytes == result.original_bytes == evaluate.model_bytes(model)
    for speed in (result.speed, result.original_speed):
        assert speed.prefill > 0 and speed.decode > 0
    expected = evaluate.compare(tiny(dtype=torch.bfloat16).float(), tiny(1, torch.bfloat16).float(),
                                evaluate.windows(ids, 32, limit=2))
    assert result.quality == expected
    assert model.training and model.dtype == torch.bfloat16
    assert ("perplexity", 2, 2) in calls
    assert result.to_dict()["quality"]["kl"] == expected.kl


def test_decoding_does_not_stop_at_an_end_of_text(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(VOCABULARY)))  # every token ends the text
    arrivals = []
    monkeypatch.setattr(evaluate._Clock, "put", lambda clock, value: arrivals.append(value) or clock.times.append(
        float(len(arrivals) ** 2)))
    speed = evaluate.decode_speed(model, new_tokens=5)
    assert len(arrivals) == 1 + 5 + 4  # the prompt, what was asked for, the warm-up
    # Token k arrives at k squared: gaps 2k + 1, those after the warm-up are 11, 13, 15, 17, 19.
    assert speed == pytest.approx(1 / 15)
    assert model.generation_config.eos_token_id == list(range(VOCABULARY))


def test_evaluate_without_an_original(model, ids):
    result = evaluate.evaluate(model, evaluate.windows(ids, 16, limit=1), speed=False)
    assert result.quality.kl is None and result.original_bytes is None and result.speed is None
    assert result.quality.perplexity > 1


def test_standard_library_text_leaves_out_what_is_held_out(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i:02d}.py").write_text(f"# file {i}\n" + f"value_{i} = {i}\n" * 80)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("x = 1\n" * 200)
    kept, held_out = split_standard_library(tmp_path)
    assert [file.name for file in held_out] == ["module_00.py", "module_20.py", "module_40.py"]
    assert HELD_OUT_EVERY == 20 and len(kept) == 57 and not set(kept) & set(held_out)
    texts = list(standard_library_texts(excerpt=None, root=tmp_path))
    assert sorted(texts) == sorted(file.read_text() for file in kept)
    assert texts == list(standard_library_texts(excerpt=None, root=tmp_path))
    assert texts != list(standard_library_texts(excerpt=None, seed=1, root=tmp_path))
    without = standard_library_texts("before\n" + kept[4].read_text() + "after\n", excerpt=None, root=tmp_path)
    assert set(texts) - set(without) == {kept[4].read_text()}
    for excerpt in standard_library_texts(excerpt=500, root=tmp_path):
        assert len(excerpt) == 500 and any(excerpt in text and "\n" + excerpt in "\n" + text for text in texts)
    with pytest.raises(ValueError, match="no Python source"):
        split_standard_library(tmp_path / "site-packages" / "nothing")
