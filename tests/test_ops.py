"""The op table: every op passes opcheck, equals its reference, and refuses bad input before a pointer leaves Python."""

import pytest
import torch

from tersor import _C, ops, ops_float, ops_fused  # noqa: F401  (the latter two register their operations)

torch.manual_seed(0)


def stored(n, k, bits, group_size, symmetric, dtype=torch.bfloat16):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    groups = -(-k // group_size) if group_size else 1
    shape = (-(-n // 16), groups, 16)
    scales = (torch.rand(shape) * 0.1 + 0.01).to(dtype)
    zeros = None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return codes, ops.int_pack(codes, bits), scales, zeros


def samples():
    """One or more argument lists for every op of the table."""
    codes, q, s, z = stored(33, 97, 4, 32, False)
    _, q2, s2, z2 = stored(17, 97, 4, 32, False)
    x, bias = torch.randn(3, 97, dtype=torch.bfloat16), torch.randn(33, dtype=torch.bfloat16)
    yield "int_linear", (x, q, s, z, bias, 33, 4, 32, 16)
    yield "int_linear", (x.float(), q, s, z, None, 33, 4, 32, 8)
    yield "int_linear", (x.float(), q, s, z, bias.float(), 33, 4, 32, 6, 64, 0.9)
    yield "int_linear", (x.float(), q, s, z, None, 33, 4, 32, 8, 0, 1.0, False)
    yield "int_linear", (x.float(), q, s, z, None, 33, 4, 32, 4, 32, 1.0, True, torch.rand(4) + 0.1)
    yield "int_linear_multi", (x.float(), [q, q2], [s, s2], [z, z2], [], [33, 17], 4, 32, 4, 0)
    yield "int_linear_multi", (x, [q, q2], [s, s2], [z, z2], [], [33, 17], 4, 32, 16)
    yield "float_round", (x, "e4m3", "largest", 0)
    yield "float_round", (x.float(), "e2m1", "e4m3", 16)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32)
    stacked = [torch.stack([tensor] * 3) for tensor in (q, s, z)]
    rows, biases = torch.randn(4, 97).bfloat16(), torch.randn(3, 33).bfloat16()
    yield "int_linear_grouped", (rows, ends, *stacked, biases, 33, 4, 32, 16)
    static = torch.rand(3, 2) + 0.1
    yield "int_linear_grouped", (rows.float(), ends, *stacked, None, 33, 4, 32, 6, 64, 1.0, True, static)
    fused = ([q, q2], [s, s2], [z, z2], [], [33, 17], 4, 32, 8)
    yield "int_linear_fused", (x.float(), x.float() + 1, *fused)
    yield "int_linear_fused", (x.float(), None, *fused, 0, 1.0, True, None, torch.rand(97), 1e-6)
    elements = torch.randint(0, 256, (33, 49), dtype=torch.uint8)
    yield "float_linear", (x.float(), elements, torch.rand(33, 4), None, bias.float(), 33, 1, 32)
    yield "float_linear", (x, elements, torch.randint(120, 130, (33, 4), dtype=torch.uint8), None, None, 33, 1, 32)
    yield "fp8_linear", (x, q, s, bias, 33, 1, 32, "token")
    yield "fp8_linear", (x.float(), q, s, None, 33, 1, 32, "group")
    yield "fp4_linear", (x.float(), elements, torch.randint(120, 130, (33, 4), dtype=torch.uint8), None, None, 33)
    six = torch.randint(0, 256, (33, 73), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (33, 4), dtype=torch.uint8)
    yield "float_linear", (x, six, exponents, None, bias, 33, 1, 32)
    yield "mx_linear", (x.float(), elements, exponents, None, 33, "e4m3")
    yield "mx_linear", (x, six, exponents, bias, 33, "e2m3")
    yield "int_pack", (codes, 4)
    yield "int_unpack", (q, 33, 97, 4)
    yield "int_fit", (torch.randn(17, 97), torch.rand(97), 4, 32, False, 80, torch.float16)
    yield "int_fit", (torch.randn(5, 97), None, 3, 0, True, 1, torch.bfloat16)
    yield "int_dequantize", (q, s, z, 33, 97, 4, 32, torch.float32)
    yield "rms_norm", (x, torch.rand(97).bfloat16(), 1e-6)
    yield "rms_norm", (torch.randn(2, 3, 40).transpose(0, 1), torch.rand(40), 1e-5)


@pytest.mark.parametrize("name,arguments", list(samples()), ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name, arguments):
    result = torch.library.opcheck(ops.OPS[name].dispatch, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_every_op_is_sampled():
    # Those of the cache are there once it is imported, and sampled in test_kv_ops.
    assert {name for name, _ in samples()} == {name for name in ops.OPS if not name.startswith("kv_")}


@pytest.mark.parametrize("name,arguments", list(samples()), ids=lambda value: value if isinstance(value, str) else "")
def test_kernel_equals_reference(name, arguments):
    op = ops.OPS[name]
    got, expected = op(*arguments), op.reference(*arguments)
    pairs = (x if isinstance(x, (list, tuple)) else [x] for x in (got, expected))
    for a, b in zip(*pairs):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (5e-3 if a.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size,k", [(32, 97), (128, 256), (0, 77)])
def test_fit_finds_the_least_error_of_the_grid(symmetric, group_size, k):
    w, importance = torch.randn(24, k) ** 3, torch.rand(k)
    for bits in (2, 4, 8):
        got = ops.int_fit(w, importance, bits, group_size, symmetric, 80, torch.float16)
        best = ops.int_fit.reference(w, importance, bits, group_size, symmetric, 80, torch.float16)
        plain = ops.int_fit(w, None, bits, group_size, symmetric, 1, torch.float16)
        index = torch.arange(k) // (group_size or k)

        def error(fitted):
            s, z = (t.double()[:, index] for t in fitted)
            q = ((w.double() / s).round() + z).clamp(0, 2**bits - 1)
            return ((((q - z) * s - w.double()) ** 2) * importance).sum()

        assert error(got) <= error(best) * (1 + 1e-4)
        assert error(got) <= error(plain) and (bits > 2 or error(got) < 0.95 * error(plain))
        assert torch.equal(got[0], got[0].half().float())


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_exact_and_is_the_documented_layout(bits):
    codes = torch.randint(0, 2**bits, (50, 77), dtype=torch.uint8)
    packed = ops.int_pack(codes, bits)
    assert torch.equal(ops.int_unpack(packed, 50, 77, bits), codes)
    assert torch.equal(ops.int_unpack.reference(packed, 50, 77, bits), codes)
    assert torch.equal(ops.int_unpack(ops.int_pack.reference(codes, bits), 50, 77, bits), codes)


def change(arguments, index, value):
    arguments = list(arguments)
    arguments[index] = value(arguments[index]) if callable(value) else value
    return arguments


BAD = {
    "x dtype": (0, lambda x: x.double(), "float32, bfloat16, float16"),
    "x width": (0, lambda x: x[:, :64], "qweight"),
    "qweight dtype": (1, lambda q: q.to(torch.int32), "torch.uint8"),
    "qweight cut": (1, lambda q: q[:-1], "qweight"),
    "qweight strided": (1, lambda q: q.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
    "scales dtype": (2, lambda s: s.double(), "scales"),
    "scales shape": (2, lambda s: s[:, :-1], "scales"),
    "zero points dtype": (3, lambda z: z.float(), "zero_points"),
    "zero points shape": (3, lambda z: z[:1], "zero_points"),
    "bias shape": (4, lambda b: b[:-1], "bias"),
    "bias dtype": (4, lambda b: b.float(), "bias"),
    "out_features": (5, 1000, "qweight"),
    "bits": (6, 9, "2 to 8"),
    "group": (7, 48, "multiple of 32"),
    "negative group": (7, -1, "multiple of 32"),
    "act_bits": (8, 7, "4, 6, 8 or 16"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", ["direct", "dispatched"])
def test_bad_arguments_are_named(case, way):
    index, value, message = BAD[case]
    arguments = change(next(samples())[1], index, value)
    call = ops.int_linear if way == "direct" else ops.int_linear.dispatch
    with pytest.raises(ValueError, match="found .* accepted") as error:
        call(*arguments)
    assert message in str(error.value)


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="codes: found 16"):
        ops.int_pack(torch.full((16, 32), 16, dtype=torch.uint8), 4)


@pytest.mark.parametrize("shape", [(0, 97), (2, 0, 97)])
def test_no_tokens_give_no_rows(shape):
    arguments = change(next(samples())[1], 0, torch.empty(shape, dtype=torch.bfloat16))
    assert ops.int_linear(*arguments).shape == (*shape[:-1], 33)


def test_strided_and_batched_inputs():
    arguments = next(samples())[1]
    wide = torch.randn(2, 5, 200, dtype=torch.bfloat16)
    for x in (wide[..., :97], wide[..., ::2][..., :97], wide[:, ::2, 3:100], wide[0, 0, :97]):
        got = ops.int_linear(*change(arguments, 0, x))
        assert torch.equal(got, ops.int_linear(*change(arguments, 0, x.contiguous())))
        assert got.shape == (*x.shape[:-1], 33)


def test_no_kernel_is_called_reference():
    assert ops.int_linear.kernel(torch.device("meta")).startswith("reference")
    assert ops.int_linear.kernel(torch.device("cuda")).startswith("reference") != _C.has_cuda_build
    assert ops.int_linear.kernel(torch.device("cpu")).startswith("int_linear ")


def test_results_lie_where_the_input_does_whatever_the_default_device_is():
    codes, q, s, z = stored(33, 97, 4, 32, False)
    with torch.device("meta"):
        packed = ops.int_pack(codes, 4)
        assert packed.is_cpu and torch.equal(packed, q)
        assert torch.equal(ops.int_unpack(q, 33, 97, 4), codes)
        assert ops.int_dequantize(q, s, z, 33, 97, 4, 32, torch.float32).is_cpu


def test_transforms_are_not_passed_by():
    _, q, s, z = stored(33, 97, 4, 32, False)
    x, tangent = torch.randn(3, 97), torch.randn(3, 97)
    with torch.autograd.forward_ad.dual_level():
        assert not ops.plain(torch.autograd.forward_ad.make_dual(x, tangent))
    seen = []
    torch.func.vmap(lambda row: seen.append(ops.plain(row)) or row)(x)
    assert seen == [False] and ops.plain(x)
