"""The host versions of the warp-wide products of 8-, 6- and 4-bit floats, against numpy on matrices."""

import numpy as np
import pytest
import torch
from emulation import build, cases

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
_E2M3 = np.array([(m if e == 0 else m + 8) * 2.0 ** (max(e, 1) - 4) for e in range(4) for m in range(8)])
# By the byte that holds an element in a product of mixed ones: six bits at its bottom, four in its middle.
E2M3, E2M1_MIDDLE = np.full(256, np.nan), np.full(256, np.nan)
E2M3[:64], E2M1_MIDDLE[:64:4] = np.concatenate([_E2M3, -_E2M3]), E2M1
MX = ("e4m3", "e2m3", "e2m1")
TABLES, BYTES = (E4M3, E2M3, E2M1_MIDDLE), (255, 0x3f, 0x3c)
NAMES = ["m16n8k32_e4m3", "m16n8k64_mxf4", "m16n8k64_nvf4",
         *(f"m16n8k32_mx_{MX[kind % 3]}_{MX[kind // 3]}" for kind in range(6))]


def run(kind, words):
    library = build(["matrix_float.cu"])
    out = np.zeros(128, np.float32)
    counters = library.call("product_of", words, out, kind, names=["in", "out"], outputs=[out])
    assert counters["total"]["mma"] == {NAMES[kind]: 1}
    return cases.fragment_d(out.reshape(32, 4).view(np.uint32)).view(np.float32)


def operands(kind, words):
    """A, B and D as matrices of float64, scales multiplied in."""
    mx, bits = kind - 3, 4 if kind in (1, 2) else 8
    table_a, table_b = (TABLES[mx % 3], TABLES[mx // 3]) if mx >= 0 else [E4M3 if kind == 0 else E2M1] * 2
    a = table_a[cases.fragment_a(words[:128].reshape(32, 4), bits)]
    b = table_b[cases.fragment_b(words[128:192].reshape(32, 2), bits)]
    d = cases.fragment_d(words[192:320].reshape(32, 4)).view(np.float32).astype(np.float64)
    if kind:
        block, used = (16, slice(4)) if kind == 2 else (32, slice(2) if kind == 1 else slice(mx % 4, mx % 4 + 1))
        value = (lambda code: E4M3[code]) if kind == 2 else (lambda code: 2.0 ** (code.astype(np.float64) - 127))
        # Rows g and g + 8 of A have their scales in lanes 4g and 4g + 1, column g of B in lane 4g.
        of_a = cases.elements(np.concatenate([words[320:352:4], words[321:352:4]]), 8)[:, used]
        of_b = cases.elements(words[352:384:4], 8)[:, used]
        a, b = a * value(of_a).repeat(block, 1), b * value(of_b).repeat(block, 1).T
    return a, b, d


def drawn(kind, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 384, dtype=np.uint32)
    if kind not in (1, 2):
        codes = words[:192].view(np.uint8)
        for part, element in ((codes[:512], (kind - 3) % 3), (codes[512:], (kind - 3) // 3)):
            part &= BYTES[element if kind else 0]
            part[part % 128 == 127] = 0
    words[192:320] = rng.standard_normal(128).astype(np.float32).view(np.uint32)
    low, high = ((0, 127) if kind == 2 else (120, 134))
    words[320:] = rng.integers(low, high, (64, 4), dtype=np.uint8).view(np.uint32)[:, 0]
    return words


def test_every_wrapper_is_here():
    assert cases.wrappers(some_gpus=True) == {*(f"mma_{name}" for name in NAMES[:3]), "mma_m16n8k32_mx"}


@pytest.mark.parametrize("kind", range(9), ids=NAMES)
def test_products_of_matrices(kind):
    for seed in range(4):
        words = drawn(kind, seed)
        a, b, d = operands(kind, words)
        bound = (np.abs(d) + np.abs(a) @ np.abs(b)) * 66 * 2.0**-24
        assert (np.abs(run(kind, words) - (d + a @ b)) <= bound).all()


@pytest.mark.parametrize("kind", range(1, 9), ids=NAMES[1:])
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


@pytest.mark.parametrize("kind", (4, 5), ids=NAMES[4:6])
def test_what_pads_a_byte_must_be_zero(kind):
    words = drawn(kind)
    words[0] |= 0x40
    found = run(kind, words)
    assert np.isnan(found[0]).all() and not np.isnan(found[1:]).any()
