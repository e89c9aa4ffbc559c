"""Statistics, round-to-nearest, chains, and compressing one weight."""

import pytest
import torch
from torch import nn

import tersor
from tersor.formats import Int
from tersor.methods import GPTQ, RTN, Choice, Collector, base, compress_weight, gptq, statistics
from tersor.registry import resolve


def inputs(tokens=600, width=128, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    scale = torch.rand(width, generator=generator).mul(5).exp()
    return ((torch.randn(tokens, width, generator=generator) @ mix / width**0.5) * scale).to(dtype)


def linear(rows=48, width=128, seed=1, dtype=torch.float32):
    module = nn.Linear(width, rows, bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    module.weight.data = (torch.randn(rows, width, generator=generator) * 0.02).to(dtype)
    return module


def collect(parts, needs=base.NEEDS, **options):
    collector = Collector(parts[0].shape[-1], needs, **options)
    for part in parts:
        collector.add(part)
    return collector.finish()


def output_error(layer, linear, x):
    with torch.no_grad():
        expected = linear(x)
        return float((layer(x) - expected).norm() / expected.norm())


# -- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
def test_statistics_equal_their_definition_however_the_inputs_are_split(dtype, tolerance):
    x = inputs(700, 1100, dtype=dtype)
    stats = collect([x[:3], x[3:400].view(1, -1, 1100), x[400:]])
    wide = x.double()
    hessian = wide.T @ wide * (2 / 700)
    assert stats.tokens == 700
    assert (stats.hessian - hessian).norm() / hessian.norm() < tolerance
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert torch.allclose(stats.abs_mean.double(), wide.abs().mean(0), rtol=1e-6)
    assert torch.equal(stats.abs_max, x.abs().amax(0).float())


def test_the_hessian_is_flushed_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(statistics, "BUFFER_BYTES", 4 * 64 * 100)
    x = inputs(950, 64)
    collector = Collector(64, {"hessian"})
    waiting = []
    for part in x.split(50):
        collector.add(part)
        waiting.append(collector._waiting_bytes)
    assert max(waiting) < 4 * 64 * 100
    assert torch.allclose(collector.finish().hessian, x.T @ x * (2 / 950), rtol=1e-4, atol=1e-4)


def test_the_sample_is_bounded_and_spread_over_all_tokens():
    x = torch.arange(1000.0)[:, None].expand(-1, 4)
    kept = collect([part for part in x.split(37)], {"inputs"}, sample=64).inputs[:, 0]
    assert 32 <= len(kept) <= 64
    steps = kept.diff()
    assert (steps == steps[0]).all() and steps[0] > 0  # evenly, in order
    assert kept[0] == 0 and kept[-1] >= 1000 - steps[0]


def test_only_what_is_needed_is_collected():
    stats = collect([inputs(10, 8)], {"abs_max"})
    assert stats.hessian is None and stats.abs_mean is None and stats.inputs is None


def test_statistics_of_scaled_inputs():
    x, s = inputs(200, 16), torch.linspace(0.5, 1.5, 16)
    scaled, direct = collect([x]).scaled(s), collect([x / s])
    for field in ("hessian", "abs_mean", "abs_max", "inputs"):
        a, b = getattr(scaled, field), getattr(direct, field)
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_inputs_are_refused(bad):
    x = inputs(10, 8)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        Collector(8).add(x)
    with pytest.raises(ValueError, match=r"found \[10, 8\].*\[..., 9\]"):
        Collector(9).add(x)
    with pytest.raises(ValueError, match="no token"):
        Collector(8).finish()


# -- round to nearest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Int(4, 32), Int(2, 64, symmetric=False), Int(3, 0)], ids=str)
def test_rtn_is_the_projection_and_its_search_lowers_the_error(fmt):
    w = linear(32, 256).weight.data
    plain, searched = RTN(search=False).choose(w, fmt), RTN().choose(w, fmt)
    assert torch.equal(plain.w_hat, fmt.project(w, fmt.fit(w)))

    def error(choice):
        return float((choice.w_hat - w).abs().pow(2.4).sum())

    assert error(searched) < error(plain)


def test_rtn_values_are_nearest():
    w = linear(8, 64).weight.data
    choice = RTN(search=False).choose(w, Int(3, 32))
    scales = choice.params["scales"].repeat_interleave(32, 1)
    grid = scales[..., None] * torch.arange(-4, 4)
    nearest = (grid - w[..., None]).abs().amin(-1)
    assert torch.allclose((choice.w_hat - w).abs(), nearest, atol=1e-7)


# -- chains ------------------------------------------------------------------------------------------


def test_a_chain_hands_each_choice_to_the_next_and_ends_in_rounding_without_a_chooser():
    seen = []

    class Note(base.Method):
        def choose(self, w, fmt, stats, previous=None, *, dtype=None):
            seen.append(previous)
            return Choice(w, fmt.fit(w))

    w = linear().weight.data
    base.choose((Note(), Note()), w, Int(4, 32), None)
    assert seen[0] is None and seen[1].w_hat is w
    smooth = resolve("smoothquant:W4A16").methods
    assert base.choosers(smooth) == (RTN(),)
    assert [method.name for method in base.transforms(resolve("smoothquant+awq+gptq:W4A16").methods)] == [
        "smoothquant", "awq"]
    assert [method.name for method in base.choosers(resolve("smoothquant+awq+gptq:W4A16").methods)] == ["awq", "gptq"]


def test_option_errors_name_the_option():
    for spec, match in (("gptq[damp=-1]:W4A16", "damp"), ("gptq[order=best]:W4A16", "order.*none, grouped, static"),
                        ("awq[grid=0]:W4A16", "grid"), ("smoothquant[alpha=2]:W4A16", "alpha")):
        with pytest.raises(tersor.SpecError, match=match):
            resolve(spec)


# -- one weight ------------------------------------------------------------------------------------------

METHODS = ["gptq", "gptq[order=grouped]", "gptq[order=static]", "awq", "awq+gptq"]


def relative(method, bits=4):
    module, x = linear(), inputs()
    nearest = tersor.Linear.from_linear(module, f"rtn:W{bits}A16[group=32]")
    layer = tersor.Linear.from_linear(module, f"{method}:W{bits}A16[group=32]", inputs=x)
    return output_error(layer, module, x) / output_error(nearest, module, x)


@pytest.mark.parametrize("method", METHODS)
def test_methods_beat_rounding_on_one_layer(method):
    assert relative(method) < 0.9


@pytest.mark.parametrize("method,module,name,empty", [
    ("gptq", gptq, "feed_back", lambda w, fmt, params, factor, **_: RTN().choose(w, fmt)),
    ("awq", None, "search", lambda self, group, magnitude: (0.0, torch.ones_like(magnitude))),
])
def test_that_check_fails_when_the_core_step_is_rounding(method, module, name, empty, monkeypatch):
    from tersor.methods import AWQ, awq

    monkeypatch.setattr(module or AWQ, name, empty)
    monkeypatch.setattr(awq, "clipped", lambda w, *_: w)
    assert not relative(method) < 0.9


def test_smoothquant_lowers_the_error_of_low_bit_activations_on_one_layer(monkeypatch):
    module, x = linear(), inputs()
    spec = "W8A4[group=32]"
    plain = output_error(tersor.Linear.from_linear(module, f"rtn:{spec}"), module, x)
    smoothed = tersor.Linear.from_linear(module, f"smoothquant:{spec}", inputs=x)
    assert [step.kind for step in smoothed.pre] == ["scale"]
    ratio = output_error(smoothed, module, x) / plain
    assert ratio < 0.85
    from tersor.transforms.smoothquant import SmoothQuant

    monkeypatch.setattr(SmoothQuant, "transform", lambda self, group: "")
    idle = tersor.Linear.from_linear(module, f"smoothquant:{spec}", inputs=x)
    assert not output_error(idle, module, x) / plain < 0.85


def test_compress_weight_refuses_bad_weights_and_missing_inputs():
    w = linear().weight.data
    with pytest.raises(ValueError, match="gptq looks at data"):
        compress_weight(w, resolve("gptq:W4A16[group=32]"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        compress_weight(w * torch.inf, resolve("rtn:W4A16[group=32]"))
    with pytest.raises(ValueError, match=r"\[..., 128\]"):
        compress_weight(w, resolve("gptq:W4A16[group=32]"), inputs(10, 64))


def test_gptq_in_the_model_dtype_stores_what_it_chose():
    w = linear(dtype=torch.bfloat16).weight.data
    resolved = resolve("gptq:W4A16[group=32]")
    choice = compress_weight(w, resolved, inputs())
    fmt = resolved.format
    stored = fmt.unpack(fmt.pack(choice.w_hat, choice.params), tuple(w.shape))
    assert torch.allclose(stored, choice.w_hat, rtol=1e-6, atol=1e-9)
    assert choice.params["scales"].to(torch.bfloat16).float().equal(choice.params["scales"])
    assert isinstance(GPTQ(), base.Method)
