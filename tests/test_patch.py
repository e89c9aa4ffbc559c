"""Modules are exchanged by name: everywhere they are used, and nothing else changes."""

import pytest
import torch
from test_calibration import llama
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

import tersor
from tersor.formats import Int
from tersor.patch import replace


def test_shared_modules_are_exchanged_in_every_place():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": nn.Linear(4, 4)})
    other, new = model["c"], nn.Identity()
    replace(model, {"a": new})
    assert model["a"] is new and model["b"][1] is new and model["c"] is other


def test_what_is_not_in_the_model_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer '7': the model has no such module"):
        replace(model, {"7": nn.Identity()})
    with pytest.raises(ValueError, match="found the model itself"):
        replace(model, {"": nn.Identity()})


@pytest.mark.parametrize("name, tied", [("model.embed_tokens", False), ("lm_head", False),
                                        ("model.layers.0.mlp.up_proj", True)])
def test_tied_embeddings_part_when_one_of_them_is_exchanged(name, tied):
    model = llama()
    model.config.tie_word_embeddings = True
    tersor.patch(model, {name: Int(8, 32)})
    assert model.config.tie_word_embeddings is tied


def test_models_without_token_embeddings_are_taken():
    config = Wav2Vec2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
                            conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
                            num_conv_pos_embedding_groups=2, vocab_size=64)
    model = Wav2Vec2ForCTC(config).eval()
    speech = torch.randn(1, 400)
    with torch.no_grad():
        before = model(speech).logits
        report = tersor.compress(model, "rtn:W8A16[group=32]")
        assert len(report.rows) == 8 and (model(speech).logits - before).norm() < 0.05 * before.norm()
