"""The host versions of the warp-wide products of 8- and 4-bit floats, against numpy on matrices."""

import numpy as np
import pytest
import torch
from emulation import build, cases

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
NAMES = ["m16n8k32_e4m3", "m16n8k64_mxf4", "m16n8k64_nvf4"]


def run(kind, words):
    library = build(["matrix_float.cu"])
    out = np.zeros(128, np.float32)
    counters = library.call("product_of", words, out, kind, names=["in", "out"], outputs=[out])
    assert counters["total"]["mma"] == {NAMES[kind]: 1}
    return cases.fragment_d(out.reshape(32, 4).view(np.uint32)).view(np.float32)


def operands(kind, words):
    """A, B and D as matrices of float64, scales multiplied in."""
    bits, table = (8, E4M3) if kind == 0 else (4, E2M1)
    a = table[cases.fragment_a(words[:128].reshape(32, 4), bits)]
    b = table[cases.fragment_b(words[128:192].reshape(32, 2), bits)]
    d = cases.fragment_d(words[192:320].reshape(32, 4)).view(np.float32).astype(np.float64)
    if kind:
        block, count = (32, 2) if kind == 1 else (16, 4)
        value = (lambda code: 2.0 ** (code.astype(np.float64) - 127)) if kind == 1 else (lambda code: E4M3[code])
        # Rows g and g + 8 of A have their scales in lanes 4g and 4g + 1, column g of B in lane 4g.
        of_a = cases.elements(np.concatenate([words[320:352:4], words[321:352:4]]), 8)[:, :count]
        of_b = cases.elements(words[352:384:4], 8)[:, :count]
        a, b = a * value(of_a).repeat(block, 1), b * value(of_b).repeat(block, 1).T
    return a, b, d


def drawn(kind, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 384, dtype=np.uint32)
    if kind == 0:
        codes = words[:192].view(np.uint8)
        codes[codes % 128 == 127] = 0
    words[192:320] = rng.standard_normal(128).astype(np.float32).view(np.uint32)
    low, high = ((120, 134) if kind == 1 else (0, 127))
    words[320:] = rng.integers(low, high, (64, 4), dtype=np.uint8).view(np.uint32)[:, 0]
    return words


def test_every_wrapper_is_here():
    assert cases.wrappers(some_gpus=True) == {f"mma_{name}" for name in NAMES}


@pytest.mark.parametrize("kind", range(3), ids=NAMES)
def test_products_of_matrices(kind):
    for seed in range(4):
        words = drawn(kind, seed)
        a, b, d = operands(kind, words)
        bound = (np.abs(d) + np.abs(a) @ np.abs(b)) * 66 * 2.0**-24
        assert (np.abs(run(kind, words) - (d + a @ b)) <= bound).all()


@pytest.mark.parametrize("kind", (1, 2), ids=NAMES[1:])
def test_only_the_named_lanes_bring_scales(kind):
    words = drawn(kind)
    expected = run(kind, words)
    words[322:352:4] = words[323:352:4] = words[353:384:4] = words[354:384:4] = words[355:384:4] = 0xffffffff
    assert (run(kind, words) == expected).all()


def test_nan_is_nan():
    words = drawn(0)
    words[0] = 0x7f
    found = run(0, words)
    assert np.isnan(found[0]).all() and not np.isnan(found[1:]).any()
