"""Every spec and method of docs/cache.md's tables, for tests that walk over them on the CPU and on CUDA, and attention
in float64 over what a store holds."""

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tersor
from tersor.kv import devices
from tersor.kv.blocks import BlockStore
from tersor.kv.eviction import EvictingStore, WindowStore, attend_few, from_position
from tersor.kv.layer import build_store
from tersor.kv.layout import reference_attention
from tersor.kv.plan import plan_for
from tersor.kv.rotary import find_rotary
from tersor.kv.store import HeadGroups, Projected, Shape, Step, merge

DIM, KV_HEADS, HEADS = 64, 2, 4

PLAIN = [
    "K16V16", "K8V8", "K4V4", "K8V4", "K16V4", "K3V3", "K2V2", "K4V4[group=32]", "K4V4[group=128]",
    "K8V8[group=32]", "K2V2[levels=nuq,outliers=0.01]", "K2V2[keys=token,rope=pre]", "K8V8[levels=e4m3]",
    "K4V4[levels=nuq]", "K3V3[levels=nuq]", "K2V2[group=64,levels=nuq,outliers=0.01]", "K4V4[outliers=0.02]",
    "K4V4[rope=pre]", "K8V8[levels=e4m3,rope=pre]", "K4V4[keys=token]", "K4V4[keys=token,rope=pre]",
    "K4V4[values=separable]", "K4V4[hadamard=true]", "K4V4[recent=0,sinks=0]",
]
METHODS = [
    "kvquant:K2V2[group=64,outliers=0.01]", "smoothattention:K4V4[keys=token]", "fireq:K4V4[keys=token]",
    "flatquant:K4V4", "streaming[sinks=3,window=90]+flatquant:K8V8",
    "gear:K4V4", "gear:K2V2", "gear[outliers=0.0]:K4V4[rope=pre]", "zipcache:K4V4",
    "zipcache:K4V4[recent=0]", "zipcache:K8V8[rope=pre]",
    "matryoshka[budget=1.0,steps=0]:K4V4", "share_heads[heads=1]:K8V8", "cskv[steps=0]:K16V16", "cskv[steps=0]:K4V4",
    "xkv[layers=1,keys=0.5,values=0.5]:K8V8",
    "streaming[sinks=3,window=90]:K8V8", "h2o[budget=120,slack=8]:K4V4", "ems[budget=120,window=32]:K4V4",
    "razor[window=90,ratio=100.0,tokens=20,retrieval=0.5]:K8V8",
]


@functools.cache
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, vocab_size=97, max_position_embeddings=512, pad_token_id=0)).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    # as FlatQuant leaves a map of keys: a turn, and channels of other sizes
    turn = torch.linalg.qr(torch.randn(DIM, DIM))[0] * (torch.rand(DIM) + 0.5)
    made.model.layers[0].self_attn.register_buffer("key_transform", turn)
    return made


@functools.cache
def plan(spec):
    """With what its methods learned, on the CPU, and what they find in the model."""
    ids = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(5))
    on_cuda, devices.on_cuda = devices.on_cuda, lambda device: False
    try:
        return plan_for(model(), tersor.kv.calibrate(model(), spec, ids), {})
    finally:
        devices.on_cuda = on_cuda


def store_of(spec, dtype, window=0, batch=2):
    settings, methods = plan(spec).layer(0)
    return build_store(Shape(0, batch, KV_HEADS, DIM, DIM, dtype, settings, window, rotary=find_rotary(model(), 0)),
                       methods)


def tokens_of(count, dtype, batch=2, seed=0):
    """Keys, values and queries of so many tokens; keys' channels differ, some far from zero, and so do directions."""
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, KV_HEADS, count, DIM, generator=random) for _ in range(2))
    keys = keys * (torch.rand(KV_HEADS, 1, DIM, generator=random) * 2 + 0.2) + torch.randn(
        KV_HEADS, 1, DIM, generator=random)
    query = torch.randn(batch, HEADS, count, DIM, generator=random)
    return [x.to(dtype) for x in (keys, values, query)]


def step_of(data, first, end, padding, softcap=0.0, window=0):
    """Tokens ``first`` to before ``end``, for sequences with so much padding in front."""
    keys, values, query = (t[:, :, first:end] for t in data)
    at = torch.arange(end)
    own = torch.arange(first, end).view(-1, 1)
    seen = (at <= own) & ((at > own - window) | (window == 0)) & (at >= torch.tensor(padding).view(-1, 1, 1))
    positions = torch.arange(first, end) - torch.tensor(padding).view(-1, 1)
    return Step(query, keys, values, DIM**-0.5, False, softcap, None, seen.unsqueeze(1), 0, positions, True)


def expected(store, step):
    """What attention of a step is to give: of what the store holds before it, as decoded, and the fresh tokens as they
    come. Outputs and log-sum-exps."""
    if isinstance(store, Projected):
        out, total = expected(store.inner, store._into(step))
        grouped = out.unflatten(2, (store.kv_heads, -1))
        if store.outputs is not None:
            matrix = store.outputs.double()
            grouped = grouped * matrix if matrix.shape[-2] == 1 else grouped @ matrix
        if store.value_mean is not None:
            grouped = grouped + store.value_mean.double().squeeze(1).unsqueeze(1)
        if store.key_mean is not None:
            constant = step.query.double().unflatten(1, (store.kv_heads, -1)) * store.key_mean.double().unsqueeze(1)
            total = total + constant.sum(-1).flatten(1, 2) * step.scale
        return grouped.flatten(2, 3), total
    if isinstance(store, HeadGroups):
        batch, heads, queries, _ = step.query.shape
        out, total = None, torch.empty(batch, heads, queries, dtype=torch.float64)
        for own, inner, part in store._parts(step):
            found, scores = expected(inner, part)
            out = found.new_empty(batch, queries, heads, found.shape[-1]) if out is None else out
            out[:, :, own], total[:, own] = found, scores
        return out, total
    if isinstance(store, WindowStore):
        return _of_window(store, step)
    if isinstance(store, EvictingStore):
        return expected(store.inner, from_position(step, store.tokens - store.whole, store.inner.held - store.whole))
    keys, values = (torch.cat((held, fresh.double()), 2)
                    for held, fresh in zip(store.decode(), (step.keys, step.values)))
    pages = getattr(store, "pages", None)
    bias = None
    first = 0 if pages is None else pages.first
    mask = torch.nn.functional.pad(step.mask, (step.mask_first, 0))[..., first:]
    if pages is not None and pages.layout.biased:
        bias = torch.nn.functional.pad(pages.biases(), (0, step.fresh))
    if isinstance(store, BlockStore) and bias is not None:  # packed tokens lie in another order; biases hide padding
        queries, held = step.query.shape[2], keys.shape[2]
        mask = torch.ones(queries, held, dtype=torch.bool).tril(held - queries)
    if getattr(store, "window", 0) and pages is not None:
        at = torch.arange(first, first + keys.shape[2])
        own = first + keys.shape[2] - step.query.shape[2] + torch.arange(step.query.shape[2])
        mask = mask & (at > own.view(-1, 1) - store.window)
    return reference_attention(step.query, keys, values, step.scale, mask, step.softcap, step.sinks, bias)


def _of_window(store, step):
    """The pages' part in float64, and that of the entries beside them, of which there are a few, in float32."""
    queries, after = step.query.shape[2], store.seen + step.fresh
    part = expected(store.inner, from_position(step, store.skipped))
    first, end = (store.gone, store.gone + 1) if store.compensate else \
        (after - queries - store.window + 1, after - store.window + 1)
    if end <= 1:
        return part
    few = attend_few(step.changed(query=step.query.float()), *store._entries(first, end))
    return merge([part, few])
