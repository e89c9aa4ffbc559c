"""What the cache's Python does on a GPU, without one: the device is `meta`, whose tensors have no numbers.

A tensor of another device, and any wait for what the device computes (`.item()`, `.tolist()`, `if tensor`), is an error
here. Kernels are stood in for by functions of shapes.
"""

import contextlib

import pytest
import torch
from test_kv_cuda_cache import KINDS, SMALL

import tersor
from tersor import ops_kv_cuda as ops
from tersor.kv import devices
from tersor.kv.eviction import WindowStore
from tersor.kv.methods import CACHE_METHODS
from tersor.kv.rotary import Rotary
from tersor.kv.settings import Settings
from tersor.kv.static_pages import static_pages
from tersor.kv.store import HeadGroups, PagedStore, Shape, Step, base_store

CUDA = torch.device("meta")
HEADS, DIM = 2, 64


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Addresses are made up, launches give tensors of the right shape."""
    def address(tensor):
        return 1 << 40 | tensor.storage_offset() * tensor.element_size()

    def attention(query, table, used, kv_heads, scale, **options):
        for x in (table, used, options.get("mask"), options.get("sinks")):
            assert x is None or x.device == query.device == CUDA
        batch, heads, queries, dim = query.shape
        return (query.new_empty((batch, queries, heads, dim)),
                query.new_empty((batch, heads, queries), dtype=torch.float32))

    def append(table, used, keys, values, **options):
        assert table.device == used.device == keys.device == values.device == CUDA
        assert options.get("bias") is None or options["bias"].device == CUDA

    def mass(query, table, used, lse, kv_heads, scale, tokens, **options):
        assert lse.device == query.device == CUDA
        return query.new_empty((len(query), kv_heads, tokens), dtype=torch.float32)

    monkeypatch.setattr(torch.Tensor, "data_ptr", address)
    monkeypatch.setattr(devices, "on_cuda", lambda device: device == CUDA)
    monkeypatch.setattr("tersor.kv.cuda_slabs.host_like", torch.empty_like)
    for name, function in (("kv_attention", attention), ("kv_append", append), ("kv_mass", mass),
                           ("kv_pack_jobs", lambda jobs, *args, **options: None)):
        monkeypatch.setattr(ops, name, function)
    monkeypatch.setattr(ops, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ops, "_stream", lambda device: 0)
    monkeypatch.setattr(ops._C, "cuda_kv_advance", lambda arguments, tokens, stream: None, raising=False)


def shape(settings="K4V4", window=0, **changes):
    rotary = Rotary(tuple(10000.0**-(i / 32) for i in range(32)))
    return Shape(0, 2, HEADS, DIM, DIM, torch.bfloat16, Settings.of(settings), window, rotary=rotary, device=CUDA,
                 **changes)


def step(tokens, batch=2, mask=False, held=0):
    keys, values = (torch.empty((batch, HEADS, tokens, DIM), dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    query = torch.empty((batch, 2 * HEADS, tokens, DIM), dtype=torch.bfloat16, device=CUDA)
    made = Step(query, keys, values, 0.125)
    if mask:
        made.mask, made.causal = torch.empty((batch, 1, tokens, held + tokens), dtype=torch.bool, device=CUDA), False
    return made


def with_method(name, settings="K4V4", **options):
    """The store of a method around pages, with what its calibration finds."""
    rows = torch.empty((HEADS, DIM), device=CUDA)
    tensors = {"key_max": rows, "pair_norm": rows, "key_basis": torch.empty((1, 2 * DIM, DIM), device=CUDA),
               "value_basis": torch.empty((1, 2 * DIM, DIM), device=CUDA),
               "keys": torch.empty((DIM, DIM), device=CUDA), "queries": torch.empty((DIM, DIM), device=CUDA)}
    return CACHE_METHODS[name](**options).wrap(shape(settings), tensors, base_store)


def with_features(older="K4V4"):
    """`cskv` of rank 96 for keys and 80 for values."""
    tensors = {"heads": torch.tensor(HEADS)}
    for part, rank in (("key", 96), ("value", 80)):
        tensors |= {f"{part}_features": torch.empty((HEADS * DIM, rank), device=CUDA),
                    f"{part}_back": torch.empty((rank, HEADS * DIM), device=CUDA),
                    f"{part}_mean": torch.empty(HEADS * DIM, device=CUDA)}
    return CACHE_METHODS["cskv"]().wrap(shape(older), tensors, base_store)


STORES = {
    "K16V16": lambda: PagedStore(shape("K16V16")),
    "K4V4": lambda: PagedStore(shape()),
    "a window": lambda: PagedStore(shape(window=100)),
    "float8": lambda: PagedStore(shape("K8V8[levels=e4m3]")),
    "hadamard": lambda: base_store(shape("K4V4[hadamard=true]")),
    "groups": lambda: HeadGroups([((1,), PagedStore(shape().changed(kv_heads=1))),
                                  ((0,), PagedStore(shape("K8V8").changed(kv_heads=1)))], HEADS),
    "smoothattention": lambda: with_method("smoothattention"),
    "fireq": lambda: with_method("fireq"),
    "flatquant": lambda: with_method("flatquant"),
    "share_heads": lambda: with_method("share_heads", heads=1),
    "streaming": lambda: WindowStore(shape("K8V8"), 0, 70),
    "razor": lambda: HeadGroups([((1,), PagedStore(shape().changed(kv_heads=1))), (
        (0,), WindowStore(shape().changed(kv_heads=1), 0, 70, 16.0, True))], HEADS),
    "kvquant": lambda: with_method("kvquant", "K4V2[group=64,levels=nuq,outliers=0.01]"),
    "h2o": lambda: with_method("h2o", budget=130),
    "h2o, keys turned back": lambda: with_method("h2o", "K4V4[rope=pre]", budget=130),
    "ems": lambda: with_method("ems", budget=130),
    "gear": lambda: with_method("gear", "K2V2"),
    "groups of 32": lambda: PagedStore(shape("K2V2")),
    "zipcache": lambda: with_method("zipcache", gap=64),
    "cskv": lambda: with_features(),
    "xkv": lambda: with_method("xkv", layers=1, keys=0.5, values=0.75),
}


@pytest.mark.parametrize("name", STORES)
def test_a_step_waits_for_nothing(name):
    store, held = STORES[name](), 200
    assert store.bits > 0 and isinstance(store.kernel, str)
    store.prompt(step(200))
    for tokens in (1, 1, 3, 60, 1, 64, 1, 70, 1, 64):
        one = step(tokens)
        if tokens == 1:
            one.positions = torch.empty((2, 1), dtype=torch.int64, device=CUDA)
        out = store.attend(one)
        held += tokens
        assert out.device == CUDA and out.shape == (2, tokens, 2 * HEADS, DIM)
    assert store.seen == held and store.nbytes > 0
    store.select([1, 0])
    store.attend(step(1))
    store.offload()
    store.prefetch()
    if not name.startswith(("h2o", "ems", "streaming", "razor", "zipcache", "gear")):
        store.attend(step(1))
        store.crop(2)
        held -= 1
    store.attend(step(1))
    store.select([1])
    assert store.seen == held + 2 and store.attend(step(1, 1)).shape == (1, 1, 2 * HEADS, DIM)


@pytest.mark.parametrize("name", ["K4V4", "h2o", "ems", "zipcache", "cskv", "xkv"])
def test_padding_does_not_either(name):
    store, held = STORES[name](), 90
    store.prompt(step(90, mask=True))
    for tokens in (1, 70, 1, 1):
        store.attend(step(tokens, mask=True, held=held))
        held += tokens
    assert store.seen == held


def test_a_static_step():
    store = base_store(shape("K4V4[hadamard=true]", max_tokens=1024))
    store.prompt(step(200))
    for tokens in (1, 3, 200, 1):
        assert store.attend(step(tokens, mask=True, held=1024 - tokens)).shape == (2, tokens, 2 * HEADS, DIM)
    store.select([1, 0])
    assert store.seen == 405 and static_pages(store)[0].length().device == CUDA


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_step_waits_for_nothing(kind):
    """Nor does what transformers does around the cache, so that a step can be captured."""
    config, model, options = KINDS[kind]
    with CUDA:
        model = model(config(**SMALL, **options)).bfloat16().eval()
        ids = torch.empty((2, 70), dtype=torch.long)
    growing, static = tersor.Cache(model, "K4V4"), tersor.StaticCache(model, "K4V4", max_tokens=256, batch=2)
    with torch.no_grad():
        model(ids, past_key_values=growing)
        for layer in static.layers:
            layer.store.prompt(step(70).changed(keys=torch.empty((2, 1, 70, DIM), dtype=torch.bfloat16, device=CUDA),
                                                values=torch.empty((2, 1, 70, DIM), dtype=torch.bfloat16, device=CUDA)))
        for cache, steps in ((growing, 60), (static, 3)):  # over a page border; always the same
            for _ in range(steps):
                assert model(ids[:, :1], past_key_values=cache).logits.device == CUDA
    assert growing.get_seq_length() == 130 and static.get_seq_length().device == CUDA


def test_tensors_elsewhere_are_noticed():
    """That these tests can fail."""
    store = PagedStore(shape())
    one = step(1)
    with pytest.raises(ValueError, match="values: found .* on cpu, accepted is .* on meta"):
        store.prompt(one.changed(values=torch.empty((2, HEADS, 1, DIM), dtype=torch.bfloat16)))
    with pytest.raises(RuntimeError, match="device"):
        one.query + torch.ones(DIM)
    for wait in (lambda x: bool(x.all()), lambda x: x[0, 0, 0, 0].item(), lambda x: x.tolist(), lambda x: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            wait(one.query)
