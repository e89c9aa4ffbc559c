"""What `ops_kv_cuda` hands to the launchers, run on CPU tensors: the launchers are the host-compiled ones."""

import pytest
import torch
from cuda_kv import Launchers, layout, relative_error

from tersor import ops_kv_cuda as ops
from tersor.kv.layout import reference_attention, reference_mass

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def launchers(monkeypatch):
    made = Launchers()
    made.install(monkeypatch)
    yield made
    ops._plan.cache_clear()


def test_append_pack_attend(launchers):
    """A cache as it is used: tokens go to raw pages, full pages are packed, a step attends to all."""
    dim, kv_heads, total, dtype = 64, 2, 64 * 9 + 9, torch.float16
    keys, values = torch.randn(2, 1, kv_heads, total, dim).to(dtype).unbind()
    counts = [64] * 9 + [9]
    raw = [torch.zeros(kv_heads, layout.page_bytes(dim, 16, 16), dtype=torch.uint8) for _ in counts]
    rows = [[(page.data_ptr(), 64 * i, count, 16, 16) for i, (page, count) in enumerate(zip(raw, counts))]]
    table, pages = ops.page_table(rows, torch.device("cpu"), 10)
    launchers.buffers += [*raw, table, pages, keys, values]
    ops.kv_append(table, pages, keys, values)
    packed = ops.kv_pack(raw[:9], dim, 4, 4, dtype)
    mixed = [(page.data_ptr(), 64 * i, 64, 4, 4) for i, page in enumerate(packed)] + rows[0][9:]
    table, pages = ops.page_table([mixed], torch.device("cpu"), 16)
    q, sinks = torch.randn(1, 8, 1, dim).to(dtype), torch.randn(8)
    first = torch.tensor([30], dtype=torch.int32)
    launchers.buffers += [table, pages, q, sinks, first]
    out, lse = ops.kv_attention(q, table, pages, kv_heads, 0.125, sinks=sinks, first=first)
    assert launchers.splits == 2
    k, v = layout.decode(packed, dim, 4, 4, dtype)
    k, v = (torch.cat((*x, t[0, :, 64 * 9 :].double()), 1)[None] for x, t in ((k, keys), (v, values)))
    visible = torch.arange(total).ge(30).view(1, 1, 1, -1)
    expected, expected_lse = reference_attention(q, k, v, 0.125, visible, 0.0, sinks)
    assert relative_error(out, expected) < 4e-4 and torch.allclose(lse.double(), expected_lse, atol=1e-4)
    mask = torch.rand(1, 1, 1, total - 5).gt(0.4)
    launchers.buffers.append(mask)
    out, lse = ops.kv_attention(q, table, pages, kv_heads, 0.125, mask=mask.expand(1, 8, 1, -1), mask_first=5)
    visible = torch.nn.functional.pad(mask, (5, 0))
    expected, expected_lse = reference_attention(q, k, v, 0.125, visible, 0.0, None)
    assert relative_error(out, expected) < 4e-4 and torch.allclose(lse.double(), expected_lse, atol=1e-4)
    assert torch.allclose(ops.kv_mass(q, table, pages, lse, kv_heads, 0.125, total, mask=mask, mask_first=5).double(),
                          reference_mass(q, k, expected_lse, 0.125, visible), atol=1e-5)
    assert launchers.calls == ["tersor_cuda_kv_append", "tersor_cuda_kv_pack", *["tersor_cuda_kv_attention"] * 2,
                               "tersor_cuda_kv_mass"]


def test_nothing_to_attend_with(launchers):
    table, pages = ops.page_table([[], []], torch.device("cpu"))
    out, lse = ops.kv_attention(torch.zeros(2, 4, 0, 64).half(), table, pages, 2, 1.0)
    assert out.shape == (2, 0, 4, 64) and lse.shape == (2, 4, 0) and not launchers.calls


@pytest.mark.parametrize("entry, words", [
    ((24, 0, 64, 4, 4), "address 24, accepted is a multiple of 16"),
    ((32, 0, 65, 4, 4), "65 tokens"),
    ((32, -1, 64, 4, 4), "position -1"),
    ((32, 0, 64, 5, 4), "5, 4 bits"),
])  # fmt: skip
def test_tables_are_checked(entry, words):
    with pytest.raises(ValueError, match=words):
        ops.page_table([[entry]], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rows\[0\]\[1\]: found position 5"):
        ops.page_table([[(32, 0, 9, 4, 4), (64, 5, 9, 4, 4)]], torch.device("cpu"))


def test_checks_come_before_pointers(launchers):
    table, pages = ops.page_table([[(32, 0, 9, 16, 16)]], torch.device("cpu"))
    x = torch.zeros(1, 4, 1, 64).half()
    for words, call in {
        "query: found torch.float32": lambda: ops.kv_attention(x.float(), table, pages, 2, 1.0),
        "head dimension 72": lambda: ops.kv_attention(torch.zeros(1, 4, 1, 72).half(), table, pages, 2, 1.0),
        "kv_heads: found 3": lambda: ops.kv_attention(x, table, pages, 3, 1.0),
        "window, softcap": lambda: ops.kv_attention(x, table, pages, 2, 1.0, window=-1),
        "sinks: found": lambda: ops.kv_attention(x, table, pages, 2, 1.0, sinks=torch.zeros(3)),
        "first: found": lambda: ops.kv_attention(x, table, pages, 2, 1.0, first=torch.zeros(1)),
        "mask: found torch.float32": lambda: ops.kv_attention(x, table, pages, 2, 1.0, mask=torch.zeros(1, 1, 1, 9)),
        r"mask: found torch.bool \[1, 2": lambda: ops.kv_attention(x, table, pages, 2, 1.0,
                                                                   mask=torch.zeros(1, 2, 1, 9).bool()),
        "mask_first: found -1": lambda: ops.kv_attention(x, table, pages, 2, 1.0, mask_first=-1,
                                                         mask=torch.zeros(1, 1, 1, 9).bool()),
        r"residual: found torch.int64 \[1, 1, 2": lambda: ops.kv_attention(
            x, table, pages, 2, 1.0, residual=(table, torch.zeros(1, 4, 1, 4))),
        r"residual: found torch.float32 \[1, 4, 2, 4": lambda: ops.kv_attention(
            x, table, pages, 2, 1.0, residual=(torch.zeros(1, 1, 4, dtype=torch.int64), torch.zeros(1, 4, 2, 4))),
        "pages: found": lambda: ops.kv_attention(x, table, pages.long(), 2, 1.0),
        "table: found": lambda: ops.kv_append(table[0], pages, x, x),
        "values: found": lambda: ops.kv_append(table, pages, x, x.bfloat16()),
        r"raw\[0\]: found": lambda: ops.kv_pack([torch.zeros(2, 9, dtype=torch.uint8)], 64, 4, 4, torch.float16),
        "dtype: found": lambda: ops.kv_pack([], 64, 4, 4, torch.float32),
        "raw: found no page": lambda: ops.kv_pack([], 64, 4, 4, torch.float16),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert not launchers.calls
