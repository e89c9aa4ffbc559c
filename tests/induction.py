"""A Llama whose weights are set by hand so that it finds needles: after a token it says what followed it before.

Layer 0 has a head that copies the code of the previous token into each position; layer 1 has two heads that look for
the position whose previous token is the current one and say its token: one says even tokens, one odd ones. All other
heads are decoys: they look one to three tokens back, or everywhere alike, and what they write moves logits a little.

Rotary embedding serves both: its fast pairs of channels tell neighbours apart, its slow ones stand still over any
length here, so codes are compared in them. The feed-forward layers write nothing.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODE, HEAD, KV_HEADS, GROUP = 48, 64, 8, 2
EVEN, ODD = slice(0, CODE), slice(CODE, 2 * CODE)  # a token's code stands in one of the two
ONE = 2 * CODE  # the channel that is 1 in every token
BEFORE, SAID, WIDTH = slice(112, 160), slice(160, 208), 208
PREVIOUS = (0, 3)  # layer and key head
INDUCTION = ((1, 2), (1, 5))  # of even and of odd tokens
FAST = 6  # pairs of channels that tell positions apart
SLOW = [*range(32 - CODE // 2, 32), *range(64 - CODE // 2, 64)]  # channels that hardly turn
VOCABULARY = 1024
SHARP = 100.0  # what equal codes add to a score
DECOY = 0.1  # the size of what a decoy writes, beside 1


def induction_model(seed: int = 0, positions: int = 8192) -> LlamaForCausalLM:
    """float32, 2 layers of 8 key heads, 16 query heads, 1024 tokens; 0 begins a text, 1 pads and says nothing."""
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=KV_HEADS * GROUP, num_key_value_heads=KV_HEADS, head_dim=HEAD,
                         max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=0, pad_token_id=1,
                         eos_token_id=None, rms_norm_eps=1e-12,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").float().eval()
    inverse = model.model.rotary_emb.inv_freq
    assert inverse[0] == 1 and inverse[FAST - 1] > 1e-5 and inverse[32 - CODE // 2] * positions < 0.01
    codes = torch.nn.functional.normalize(torch.randn(VOCABULARY, CODE, generator=generator), dim=-1)
    codes[1] = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        table = model.model.embed_tokens.weight
        table[0::2, EVEN], table[1::2, ODD], table[:, ONE] = codes[0::2], codes[1::2], 1
        model.lm_head.weight[:, SAID] = codes * 20
        for layer, squared_norm in ((0, 2.0), (1, 3.0)):  # of what comes in: a code, the one, and the code before
            model.model.layers[layer].input_layernorm.weight.fill_((squared_norm / WIDTH)**0.5)
            model.model.layers[layer].post_attention_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_((4.0 / WIDTH)**0.5)
        for layer in range(2):
            for head in range(KV_HEADS):
                what, where = (EVEN, ODD), SAID
                matrix = torch.randn(CODE, CODE, generator=generator) * DECOY / CODE**0.5
                if (layer, head) == PREVIOUS:
                    _looks_back(model, layer, head, 1)
                    where, matrix = BEFORE, torch.eye(CODE)
                elif (layer, head) in INDUCTION:
                    _looks_for_code(model, layer, head)
                    what, matrix = ((EVEN, ODD)[INDUCTION.index((layer, head))],), torch.eye(CODE)
                elif head % 2:
                    _looks_back(model, layer, head, 1 + head // 3)
                _says(model, layer, head, what, matrix / GROUP, where)
    return model


def _looks_back(model, layer: int, head: int, tokens: int, sharp: float = 120.0) -> None:
    """Scores are largest so many tokens ago: the query is the key turned by as many positions."""
    attention = model.model.layers[layer].self_attn
    angles = model.model.rotary_emb.inv_freq[:FAST].double() * -tokens
    size = (sharp / FAST)**0.5 * HEAD**0.25
    attention.k_proj.weight[head * HEAD:][:FAST, ONE] = size
    for query in range(head * GROUP, (head + 1) * GROUP):
        attention.q_proj.weight[query * HEAD:][:FAST, ONE] = (size * angles.cos()).float()
        attention.q_proj.weight[query * HEAD + 32:][:FAST, ONE] = (size * angles.sin()).float()


def _looks_for_code(model, layer: int, head: int) -> None:
    """Queries are the codes of tokens, keys those of the tokens before."""
    attention = model.model.layers[layer].self_attn
    size = SHARP**0.5 * HEAD**0.25 * torch.eye(CODE)
    slow = torch.tensor(SLOW)
    attention.k_proj.weight[head * HEAD + slow, BEFORE] = size
    for query in range(head * GROUP, (head + 1) * GROUP):
        for code in (EVEN, ODD):
            attention.q_proj.weight[query * HEAD + slow, code] = size


def _says(model, layer: int, head: int, what, matrix: torch.Tensor, where: slice) -> None:
    """Values are the codes that stand in the channels ``what``; ``matrix`` takes them to the channels ``where``."""
    attention = model.model.layers[layer].self_attn
    for code in what:
        attention.v_proj.weight[head * HEAD:][:CODE, code] = torch.eye(CODE)
    for query in range(head * GROUP, (head + 1) * GROUP):
        attention.o_proj.weight[where, query * HEAD:query * HEAD + CODE] = matrix


def haystack(length: int, needles: int, seed: int = 0, run: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[length]`` of random text, which begins with 0, and needles ``[needles, 1 + run]``: runs of tokens of
    their own, each somewhere in the text, once."""
    generator = torch.Generator().manual_seed(seed)
    own = 2 + torch.randperm(VOCABULARY - 2, generator=generator)[:needles * (1 + run)].view(needles, 1 + run)
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[:2], others[own.flatten()] = False, False
    others = others.nonzero().flatten()
    ids = others[torch.randint(len(others), (length,), generator=generator)]
    ids[0] = 0
    places = 1 + torch.randperm((length - 1) // (1 + run), generator=generator)[:needles] * (1 + run)
    for place, needle in zip(places.tolist(), own):
        ids[place:place + 1 + run] = needle
    return ids, own


def questions(needles: torch.Tensor) -> torch.Tensor:
    """The first token of each needle, and a blank after it, so that nothing else follows it from now on."""
    return torch.stack((needles[:, 0], torch.ones_like(needles[:, 0])), 1).flatten()
