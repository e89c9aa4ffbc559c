"""The numbers of a model that a cache depends on."""

from __future__ import annotations

from torch import nn


def geometry_of(model: nn.Module) -> dict[str, int]:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {"layers": config.num_hidden_layers, "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads}
