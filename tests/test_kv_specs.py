"""For every spec and method of docs/cache.md: attention against float64 over what the cache holds, on the CPU in
float32 and on CUDA, host-executed, in float16: batches with padding of their own, page borders, sliding windows,
soft-capping."""

import pytest
import torch
from cuda_cache import device  # noqa: F401
from kv_specs import METHODS, PLAIN, expected, step_of, store_of, tokens_of

LIMIT = 2e-3
LENGTH, PADDING = 215, (0, 11)
PROMPT, STEPS = 140, (1, 47, 1, 5, 1, 1)  # the 47 and the 5 go over page borders, at 160 and 192


def walk(spec, dtype, window=0, softcap=0.0):
    """The worst relative error of outputs, and the worst difference of log-sum-exps."""
    data, store = tokens_of(LENGTH, dtype), store_of(spec, dtype, window)
    store.prompt(step_of(data, 0, PROMPT, PADDING, softcap, window))
    worst, at = [0.0, 0.0], PROMPT
    for count in STEPS:
        step = step_of(data, at, at + count, PADDING, softcap, window)
        truth, total = expected(store, step)
        out, scores = store.attend(step)
        worst[0] = max(worst[0], float((out.double() - truth).norm() / truth.norm()))
        worst[1] = max(worst[1], float((scores.double() - total).abs().max()))
        at += count
    assert store.seen == at
    return worst


def check(spec, dtype, **options):
    error, difference = walk(spec, dtype, **options)
    assert error < LIMIT and difference < LIMIT, (error, difference)


@pytest.mark.parametrize("spec", PLAIN + METHODS)
def test_on_the_cpu(spec, one_thread):
    check(spec, torch.float32)


@pytest.mark.parametrize("spec", PLAIN + METHODS)
def test_on_cuda(spec, device):  # noqa: F811
    device.calls.clear()
    check(spec, torch.float16)
    assert device.calls.count("attention") >= len(STEPS)


WINDOWED = ["K4V4", "K8V8[levels=e4m3]", "K4V4[rope=pre]", "K4V4[hadamard=true]"]


@pytest.mark.parametrize("spec", WINDOWED)
def test_windows_and_caps(spec, device, monkeypatch):  # noqa: F811
    check(spec, torch.float16, window=70, softcap=3.0)
    monkeypatch.setattr("tersor.kv.devices.on_cuda", lambda device: False)
    check(spec, torch.float32, window=70, softcap=3.0)
