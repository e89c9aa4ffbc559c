"""`StaticPages` and `StaticCache`: the results of those that grow, from launches that nothing on the host changes."""

import ctypes

import pytest
import torch
from cuda_cache import advance_library, device  # noqa: F401
from cuda_kv import fields, ints
from test_kv_cuda_cache import CLOSE, distance, make, on_cpu, prompt, run
from test_kv_cuda_pages import DIM, HEADS, layout, query, tokens

import tersor
from tersor.kv import cuda_layout
from tersor.kv.cuda_pages import CudaPages
from tersor.kv.formats import PageFormat
from tersor.kv.layout import Layout
from tersor.kv.rotary import Rotary
from tersor.kv.static_pages import MOST, StaticPages


def pair(bits, max_tokens=1024, recent=0, sink_pages=0, batch=2, heads=HEADS, window=0):
    """Tables of one width, so that attention is split alike."""
    made = layout(*bits, heads=heads)
    return (StaticPages(made, batch, max_tokens, recent, sink_pages, window, "cpu"),
            CudaPages(made, batch, recent, sink_pages, "cpu"))


def kinds(static):
    return [(word >> 48 & 255) < 16 or (word >> 56 & 255) < 16
            for word in static.table[0, :int(static.used[0]), 1].tolist()]


def check_held(static, growing, flipped=False):
    """The same tokens. What became old in the last step is read packed from the next one on."""
    assert static.held() == growing.tokens and static.counts() == growing.counts()
    if flipped:
        assert kinds(static) == [page.packed for page in growing.pages]
        assert all(torch.equal(a, b) for a, b in zip(static.decode(), growing.decode()))


@pytest.mark.parametrize("bits, recent, sink_pages", [((4, 4), 32, 1), ((8, 3), 0, 0), ((16, 16), 0, 0),
                                                      ((2, 16), 70, 2)])
def test_steps_equal_those_of_growing_pages(device, bits, recent, sink_pages):
    """Over page borders, a step at a time and several tokens at once: to the bit."""
    torch.manual_seed(0)
    static, growing = pair(bits, recent=recent, sink_pages=sink_pages, batch=1, heads=1)
    fresh = tokens(120, 1, 1)
    static.append(*fresh)
    growing.append(*fresh)
    check_held(static, growing)
    for count in (1, 5, 1, 1, 66, 1, 30, 128, 1, 33, 1):
        fresh, q = tokens(count, 1, 1), query(1, count, 2)
        ours, theirs = (pages.attend(q, *fresh, 0.125, log_sum_exp=True) for pages in (static, growing))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), count
        check_held(static, growing)
    static._advance(0)
    check_held(static, growing, flipped=True)


def test_a_step_is_replayed_without_the_host(device):
    """The launches of one step, with the arguments that they had then, over page borders."""
    torch.manual_seed(1)
    static, growing = pair((4, 4), recent=16, batch=2, heads=1)
    fresh = tokens(50, heads=1)
    static.append(*fresh)
    growing.append(*fresh)
    (keys, values), q = tokens(1, heads=1), query(heads=2)
    with device.capture() as graph:
        out = static.attend(q, keys, values, 0.125)
    assert torch.equal(out, growing.attend(q, keys, values, 0.125))
    assert graph.names == ["advance", "append", "attention", "pack"]
    for _ in range(90):
        for held, new in zip((keys, values, q), (*tokens(1, heads=1), query(heads=2))):
            held.copy_(new)
        graph.replay()
        assert torch.equal(out, growing.attend(q, keys, values, 0.125))
    assert static.tokens == 51 and static.held() == growing.tokens == 141 == static.tokens
    assert sum(kinds(static)) == 1 and device.splits == 2


def test_what_is_captured_counts_where_it_runs(device, monkeypatch):
    """While a graph is captured nothing runs, so the host counts nothing, and waits for nothing."""
    static, _ = pair((4, 4), max_tokens=66, batch=1, heads=1)
    static.append(*tokens(64, 1, 1))
    with monkeypatch.context() as other, device.capture() as graph:
        other.setattr("tersor.kv.static_pages.capturing", lambda device: True)
        static.attend(query(1, 1, 2), *tokens(1, 1, 1), 0.125)  # run here all the same
    assert static.tokens == 64
    graph.replay()
    assert static.tokens == 64 and static.held() == static.tokens == static.top == 66


def test_formats_beside_plain_integers(device):
    torch.manual_seed(6)
    rotary = Rotary(tuple(100.0**-(i / 16) for i in range(16)))
    made = Layout(1, DIM, DIM, torch.bfloat16, 64, (PageFormat(4, 4, key_outliers=9, value_axis="separable"),), rotary)
    static, growing = StaticPages(made, 1, 1024, 16, 1, 0, "cpu"), CudaPages(made, 1, 16, 1, "cpu")
    fresh = tokens(150, 1, 1)
    static.append(*fresh)
    growing.append(*fresh)
    for count in (1, 60, 1):
        fresh, q = tokens(count, 1, 1), query(1, count, 2)
        assert torch.equal(static.attend(q, *fresh, 0.125), growing.attend(q, *fresh, 0.125))
    static._advance(0)
    check_held(static, growing, flipped=True)


def test_long_steps_are_several(device):
    torch.manual_seed(2)
    static, growing = pair((4, 4), recent=32, sink_pages=1, batch=1, heads=1)
    fresh = tokens(MOST + 30, 1, 1)
    device.calls.clear()
    static.append(*fresh)
    assert device.calls == ["advance", "append", "pack"] * 2
    growing.append(*fresh)
    fresh, q = tokens(MOST + 9, 1, 1), query(1, MOST + 9, 2)
    held = [torch.cat((a, b.double()), 2) for a, b in zip(growing.decode(), fresh)]
    mask = torch.ones(1, 1, MOST + 9, 1024, dtype=torch.bool)
    ours = static.attend(q, *fresh, 0.125)
    growing.append(*fresh)
    static._advance(0)
    check_held(static, growing, flipped=True)
    scores = q.double() @ held[0].transpose(-1, -2) * 0.125
    first = held[0].shape[2] - q.shape[2]
    scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(first + 1), -torch.inf)
    truth = (scores.softmax(-1) @ held[1]).transpose(1, 2)
    assert distance(ours[:, :MOST].double(), truth[:, :MOST]) < 4e-3
    assert distance(ours.double(), truth) < 0.1, "later queries read packed what followed 32 tokens before"
    with pytest.raises(ValueError, match="a causal query for each token of a step of more than 128"):
        static.attend(q[:, :, :3], *fresh, 0.125, mask=mask[:, :, :3])


def test_taking_back(device):
    """What comes back is what there was: pages are raw again, and packed again as before."""
    torch.manual_seed(3)
    made = dict(recent=32, batch=1, heads=1)
    static, history = pair((4, 4), **made)[0], None
    for number, step in enumerate((100, 62, -20, 1, 30, -32, 7, 60, -1, 40, 120, -90, -90, 5, -4)):
        if step < 0:
            static.crop(-step)
            history = [t[:, :, :step] for t in history]
        else:
            fresh = tokens(step, 1, 1)
            history = fresh if history is None else [torch.cat(two, 2) for two in zip(history, fresh)]
            static.append(*fresh)
        if number % 3 != 2:
            continue
        static._advance(0)
        growing = pair((4, 4), **made)[1]  # one that never saw what was taken back
        growing.append(*history)
        check_held(static, growing, flipped=True)
    assert static.held() == 188 and static.top == 367
    with pytest.raises(ValueError, match="tokens to remove: found 120, accepted is at most 92, or all"):
        static.crop(120)
    static.crop(92)
    growing = pair((4, 4), **made)[1]
    growing.append(*(t[:, :, :96] for t in history))
    check_held(static, growing, flipped=True)
    with pytest.raises(ValueError, match="accepted is at most 0, or all"):
        static.crop(1)
    static.crop(1000)
    assert static.held() == 0 and static.used.tolist() == [0]
    fresh, q = tokens(1, 1, 1), query(1, 1, 2)
    assert torch.equal(static.attend(q, *fresh, 0.125), pair((4, 4), **made)[1].attend(q, *fresh, 0.125))


def test_taking_back_behind_a_window(device):
    torch.manual_seed(7)
    static, history = pair((4, 4), batch=1, heads=1, window=30)[0], tokens(430, 1, 1)
    static.append(*history)
    static.crop(150)
    growing = pair((4, 4), batch=1, heads=1)[1]
    growing.append(*(t[:, :, :280] for t in history))
    fresh, q = tokens(1, 1, 1), query(1, 1, 2)
    assert torch.equal(static.attend(q, *fresh, 0.125, window=30), growing.attend(q, *fresh, 0.125, window=30))
    with pytest.raises(ValueError, match="found 150, accepted is at most"):
        static.crop(150)


def test_beams_are_copied_in_place(device):
    torch.manual_seed(4)
    static, growing = pair((4, 4), recent=10, sink_pages=1, batch=3, heads=1)
    fresh = tokens(140, 3, 1)
    static.append(*fresh)
    growing.append(*fresh)
    places = [t.data_ptr() for t in (static.raw, static.packed, static.sink_memory)]
    for rows in ([1, 1, 0], [2, 0, 1]):
        static.select(rows)
        growing.select(rows)
        fresh, q = tokens(1, 3, 1), query(3, 1, 2)
        assert torch.equal(static.attend(q, *fresh, 0.125), growing.attend(q, *fresh, 0.125))
    assert places == [t.data_ptr() for t in (static.raw, static.packed, static.sink_memory)]
    with pytest.raises(ValueError, match="sequences: found .*accepted is 3 indices of 3"):
        static.select([0, 1])


def test_windows_use_a_ring_of_pages(device):
    torch.manual_seed(5)
    static, growing = pair((4, 4), max_tokens=2048, batch=1, heads=1, window=40)
    assert static.packed.shape[1] == 5 and static.raw_pages == 4
    for count in (128, 100, 1, 128, 90, 1, 1):
        fresh, q = tokens(count, 1, 1), query(1, count, 2)
        ours = static.attend(q, *fresh, 0.125, window=40)
        assert torch.equal(ours, growing.attend(q, *fresh, 0.125, window=40))
    assert static.held() == 449


def test_a_full_cache_says_so(device):
    static, _ = pair((4, 4), max_tokens=66, batch=1, heads=1)
    static.append(*tokens(65, 1, 1))
    fresh, q = tokens(1, 1, 1), query(1, 1, 2)
    with device.capture() as graph:
        static.attend(q, *fresh, 0.125)
    before = static.table.clone()
    with pytest.raises(ValueError, match="StaticCache: tokens: found 67, accepted is at most max_tokens = 66"):
        static.attend(q, *fresh, 0.125)
    assert static.held() == 66
    graph.replay()
    assert torch.equal(static.table[..., 1] & 0xFFFFFFFFFF, before[..., 1] & 0xFFFFFFFFFF), "nothing was counted"
    with pytest.raises(RuntimeError, match="found 1 steps past max_tokens = 66"):
        static.held()


def test_the_launcher_refuses(device):
    static, _ = pair((4, 4), max_tokens=1024, recent=32, batch=1, heads=1)
    native = advance_library().library
    native.tersor_last_error.restype = ctypes.c_char_p
    for at, value, words in ((3, 8, "state and jobs"), (5, 0, "sinks, raw and packed"), (11, 3, "raw_pages is 3"),
                             (12, 0, "packed_pages, job_pages"), (9, 1, "packed_pages, job_pages"), (15, 5, "key_bits"),
                             (20, 2000, "max_tokens is 2000"), (18, -1, "tokens, most, recent"), (17, 300, "format")):
        arguments = list(static.arguments)
        arguments[at] = value
        assert native.tersor_cuda_kv_advance(fields(*arguments), *ints(1, 0)) != 0
        assert words in native.tersor_last_error().decode()
    assert native.tersor_cuda_kv_advance(fields(*static.arguments), *ints(MOST + 1, 0)) != 0
    assert "tokens, most, recent are 129" in native.tersor_last_error().decode()
    static.attend(query(1, 1, 2), *tokens(1, 1, 1), 0.125)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_models(device, monkeypatch, kind):
    model, ids, steps = make(kind), prompt(2, 88), (66, 1, 3, 1, 16, 1)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    for spec, own in (("K4V4", None), ("K8V8", mask), ("K4V4[hadamard=true]", None)):
        cache = tersor.StaticCache(model, spec, max_tokens=128)
        ours = run(model, cache, ids, steps, own)
        theirs = on_cpu(monkeypatch, lambda spec=spec, own=own: run(model, tersor.Cache(model, spec), ids, steps, own))
        seen = torch.ones_like(ids).bool() if own is None else own.bool()
        assert distance(ours[seen], theirs[seen]) < CLOSE
        assert cache.get_max_length() == 128 and int(cache.get_seq_length()) == 88
        assert "static" in cache.report().rows[0].kernel and cache.report().rows[0].tokens == 88
        size = cache.nbytes
        cache.reset()
        assert int(cache.get_seq_length()) == 0 and cache.nbytes == size
        again = run(model, cache, ids, steps, own)
        assert torch.equal(again[seen], ours[seen])


def test_generate(device):
    model, ids = make(), prompt(1, 60)
    options = dict(max_new_tokens=12, do_sample=False)
    truth = model.generate(ids, **options)
    cache = tersor.StaticCache(model, "K16V16", max_tokens=80, batch=1)
    assert cache.is_initialized and not cache.is_compileable and cache.nbytes > 2 * 80 * 2 * 64 * 2
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), truth)
    beams = dict(options, num_beams=2)
    cache = tersor.StaticCache(model, "K16V16", max_tokens=80)
    assert torch.equal(model.generate(ids, past_key_values=cache, **beams), model.generate(ids, **beams))
    cache = tersor.StaticCache(model, "K16V16", max_tokens=80)
    looked_up = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked_up, truth)


def test_a_models_step_is_replayed(device):
    """All that `StaticCache` launches in a decode step depends on nothing that the host knows."""
    model, ids = make(), prompt(1, 70)
    ours = tersor.StaticCache(model, "K4V4", max_tokens=192)
    with torch.no_grad():
        model(ids, past_key_values=ours)
        launches = []
        for step in range(3):
            with device.capture() as graph:
                model(ids[:, :1], past_key_values=ours)
            assert graph.names == ["advance", "append", "attention", "pack"] * 2
            launches.append([arguments for function, arguments in graph.launches if function.__name__ == "advance"])
    assert launches[0] == launches[1] == launches[2]


def test_what_is_refused(device, monkeypatch):
    model, ids = make(), prompt(1, 20)
    for options, words in ((dict(max_tokens=0), "max_tokens: found 0, accepted is 1 to"),
                           (dict(max_tokens=9, batch=-1), "batch: found -1"),
                           (dict(max_tokens=9, offloading=True), "offloading: found True")):
        with pytest.raises(ValueError, match=words):
            tersor.StaticCache(model, "K4V4", **options)
    with torch.no_grad():
        with pytest.raises(ValueError, match="tokens: found 20, accepted is at most max_tokens = 19"):
            model(ids, past_key_values=tersor.StaticCache(model, "K4V4", max_tokens=19))
        with monkeypatch.context() as other:
            other.setattr("tersor.kv.devices.on_cuda", lambda device: False)
            with pytest.raises(ValueError, match="layer 0: found keys on cpu, accepted is a CUDA device"):
                model(ids, past_key_values=tersor.StaticCache(model, "K4V4", max_tokens=64))


def test_bytes(device):
    static, _ = pair((4, 4), max_tokens=64 * 20, recent=32, sink_pages=1, batch=2)
    raw, packed = (2 * HEADS * cuda_layout.page_bytes(DIM, *bits) for bits in ((16, 16), (4, 4)))
    tables = 2 * 20 * 16 + 2 * 4 + 2 * 8 + 2 * 2 * 16
    assert static.nbytes == (1 + 5) * raw + 19 * packed + tables


requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@requires_gpu
def test_graphs_on_a_gpu():
    model, ids = make().cuda(), prompt(1, 300).cuda()
    cache, growing = tersor.StaticCache(model, "K4V4", max_tokens=512), tersor.Cache(model, "K4V4")
    with torch.no_grad():
        for one in (cache, growing):
            model(ids[:, :200], past_key_values=one)
            model(ids[:, 200:201], past_key_values=one)
        token = ids[:, 201:202].clone()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            logits = model(token, past_key_values=cache).logits
        for at in range(201, 300):
            token.copy_(ids[:, at:at + 1])
            graph.replay()
            assert distance(logits.float(), model(token, past_key_values=growing).logits.float()) < CLOSE
    assert int(cache.get_seq_length()) == 300
