"""The spec grammar: one parser, one round trip, errors that name the nearest valid name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.formats import PRESETS, AdditiveCodebook, Int, LowRank, Outliers, Sparse24, Sum
from tersor.registry import FORMATS, METHODS, register_format, register_method, resolve, resolve_format
from tersor.spec import Atom, CacheSpec, Spec, SpecError, parse, parse_cache

EXAMPLES = [
    "W4A16", "gptq:W4A16", "awq+gptq:W4A16", "aqlm+pv:2x8", "sparsegpt:2:4/W4A16", "rtn:W3A16+lr32",
    "gptq:W4A16[group=64,sym=false]", "gptq[damp=0.05]:W4A16", "2:4", "gptq:2:4", "bd32/2:4",
    "armor:bd32/2:4/W4A16+lr8",
    "W3A16+2:4", "spqr:bilevel3+outliers0.01", "vptq[steps=2]:v8x12[residual=8]", "rtn:FP8_DYNAMIC", *PRESETS,
]
CACHES = ["K4V4", "K16V16", "K2V2[levels=nuq,outliers=0.01]"]

words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda word: word not in ("true", "false"))
values = st.one_of(st.booleans(), st.integers(-10**6, 10**6), words,
                   st.floats(allow_nan=False, allow_infinity=False, width=32))
options = st.dictionaries(words, values, max_size=3).map(lambda d: tuple(d.items()))
names = st.one_of(st.sampled_from(["W4A16", "2:4", "2x8", "lr32", "FP8_DYNAMIC", "v8x12", "outliers0.01", "1:2"]),
                  st.from_regex(r"[A-Za-z][A-Za-z0-9_.]{0,8}", fullmatch=True))
terms = st.lists(st.lists(st.builds(Atom, names, options), min_size=1, max_size=3).map(tuple), min_size=1,
                 max_size=3).map(tuple)
specs = st.builds(Spec, st.lists(st.builds(Atom, words, options), max_size=3).map(tuple), terms)


@settings(deadline=None, max_examples=60)
@given(specs)
def test_round_trip(spec):
    assert parse(str(spec)) == spec
    spaced = str(spec).replace("+", " + ").replace(",", " , ").replace("]", " ] ")
    if "e+" not in str(spec):
        assert parse(f"  {spaced} ") == spec


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 99), st.integers(0, 99), options)
def test_cache_round_trip(key_bits, value_bits, given_options):
    spec = CacheSpec(key_bits, value_bits, given_options)
    assert parse_cache(str(spec)) == spec


@settings(deadline=None, max_examples=150)
@given(st.text("gptqW4A16:[]=,+/ 2x.-_é\n", max_size=24))
def test_any_text_parses_or_is_a_spec_error(text):
    try:
        spec = parse(text)
    except SpecError:
        return
    assert parse(str(spec)) == spec


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(text):
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", CACHES)
def test_cache_examples(text):
    assert str(parse_cache(text)) == text


def test_structure():
    spec = parse("awq+gptq[damp=0.05]:2:4/W4A16[group=64,sym=false]+lr32")
    assert [method.name for method in spec.methods] == ["awq", "gptq"]
    assert spec.methods[1].options == (("damp", 0.05),)
    assert [[atom.name for atom in term] for term in spec.terms] == [["2:4", "W4A16"], ["lr32"]]
    assert spec.terms[0][1].options == (("group", 64), ("sym", False))
    assert parse_cache("K2V4[levels=nuq]") == CacheSpec(2, 4, (("levels", "nuq"),))


def test_meanings():
    assert resolve_format("2:4/W4A16") == Sparse24(Int(4))
    assert resolve_format("W3A16+lr32") == Sum((Int(3), LowRank(32)))
    assert resolve_format("W3A16 + outliers0.01") == Sum((Int(3), Outliers(0.01)))
    assert resolve_format("2x8") == AdditiveCodebook(2, 8)
    assert resolve_format("W4A16[group=64,sym=false]") == Int(4, 64, False)
    assert resolve_format("W4A16[group=-1]") == Int(4, 0)
    assert resolve("W4A16").method_text == "rtn" and resolve("W4A16").text == "rtn:W4A16"
    assert resolve("rtn:W4A16") is resolve("rtn:W4A16")
    damped = resolve("gptq[damp=0.05]:W4A16")
    assert damped.methods[0].damp == 0.05 and damped.method_text == "gptq"


@pytest.mark.parametrize("name", [entry.example for entry in FORMATS] + [n for n, f in PRESETS.items() if f])
def test_every_name_resolves_and_names_itself(name):
    fmt = resolve_format(name)
    assert resolve_format(fmt.text()) == fmt == resolve("rtn:" + name).format
    assert str(fmt) == fmt.text()


@pytest.mark.parametrize("text, message", [
    ("", "expected a format name at character 1, found the end"),
    ("   ", "expected a format name"),
    (":W4A16", "expected a method name at character 1, found ':'"),
    ("gptq:", "expected a format name at character 6, found the end"),
    ("gptq:W4A16[", "expected an option name"),
    ("gptq:W4A16[group", "expected '='"),
    ("gptq:W4A16[group=", "expected a value for 'group'"),
    ("gptq:W4A16[group=64", "expected ']'"),
    ("gptq:W4A16]", "found ']'"),
    ("gptq:W4A16[[group=64]]", "expected an option name"),
    ("gptq:W4A16[group=64,group=32]", "given twice"),
    ("gptq:W4A16//2:4", "expected a format name"),
    ("gptq++rtn:W4A16", "expected a method name"),
    ("gptq:W4A16+", "expected a format name at character 12, found the end"),
    ("W4A16 W4A16", "expected the end"),
    ("gptqq:W4A16", "unknown method 'gptqq'; did you mean 'gptq'?"),
    ("gptq:W4A61", "61 activation bits, accepted are 4, 6, 8 and 16"),
    ("gptq:W9A16", "9 weight bits, accepted are 2 to 8"),
    ("gptq:FP8_DYNAMC", "unknown format 'FP8_DYNAMC'; did you mean 'FP8_DYNAMIC'?"),
    ("nvfp4", "did you mean 'NVFP4'?"),
    ("gptq:int4", "unknown format 'int4'"),
    ("gptq:W4A16[grup=64]", "has no option 'grup'; did you mean 'group'?"),
    ("gptq[dampp=0.1]:W4A16", "has no option 'dampp'; did you mean 'damp'?"),
    ("gptq[damp=much]:W4A16", "'much', accepted is a number"),
    ("gptq[damp=true]:W4A16", "True, accepted is a number"),
    ("gptq:W4A16[group=true]", "True, accepted is an integer"),
    ("gptq:W4A16[group=6.5]", "6.5, accepted is an integer"),
    ("gptq:W4A16[group=33]", "group=33, accepted are multiples of 32"),
    ("gptq:W4A16[sym=yes]", "'yes', accepted is true or false"),
    ("gptq:W4A16[scale=fp8]", "'fp8', accepted are model"),
    ("gptq:W4A16[scale=8]", "8, accepted is a word"),
    ("rtn:W4A16/W4A16", "nothing nests in it"),
    ("UNQUANTIZED", "'keep'"),
])
def test_errors_say_what_was_found_and_what_is_accepted(text, message):
    with pytest.raises(SpecError) as caught:
        resolve(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [None, 4, 4.5, b"W4A16", ["W4A16"], {"a": "W4A16"}, Int(4)])
def test_a_spec_is_a_string(value):
    with pytest.raises(SpecError, match="a spec is a string"):
        resolve(value)
    with pytest.raises(SpecError, match="a spec is a string"):
        parse(value)
    with pytest.raises(SpecError, match="a spec is a string"):
        parse_cache(value)


@pytest.mark.parametrize("text", ["W4A16", "K4", "V4K4", "K4V4[", "K4V4/W4A16", "", "K4V4:rtn", "rtn:W4A16"])
def test_bad_cache_specs(text):
    with pytest.raises(SpecError):
        parse_cache(text)


def test_a_format_is_not_a_spec_with_methods():
    with pytest.raises(SpecError, match="accepted is a format alone"):
        resolve_format("gptq:W4A16")


def test_registration_is_public_and_guards_names():
    @register_method("spec_test")
    @dataclasses.dataclass(frozen=True)
    class Mine:
        steps: int = 3
        rate: float = 0.5
        kind: str = "a"

    @register_format(r"spectest(\d)", "spectest4", "of a test")
    def _make(match, inner, *, group: int = 64):
        return Int(int(match[1]), group)

    try:
        entry = resolve("spec_test[steps=5,rate=2]:spectest4[group=32]")
        assert entry.methods[0].steps == 5 and entry.methods[0].rate == 2 and entry.format == Int(4, 32)
        with pytest.raises(SpecError, match="accepted is an integer"):
            resolve("spec_test[steps=a]:spectest4")
        with pytest.raises(ValueError, match="already registered"):
            register_method("spec_test")(type("Other", (), {}))
    finally:
        METHODS.pop("spec_test")
        FORMATS[:] = [entry for entry in FORMATS if entry.example != "spectest4"]


# -- presets ----------------------------------------------------------------------------------------------------


def test_presets_are_compressed_tensors_own():
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    assert set(schemes.PRESET_SCHEMES) <= set(PRESETS)
    for name in schemes.PRESET_SCHEMES:
        scheme = schemes.preset_name_to_scheme(name, ["Linear"])
        assert _described(PRESETS[name]) == _theirs(scheme), name


def _theirs(scheme):
    def args(a):
        if a is None:
            return None
        scales = "e8m0" if str(a.scale_dtype) == "torch.uint8" else "e4m3" if "float8" in str(a.scale_dtype) else None
        return {"bits": a.num_bits, "type": a.type, "strategy": a.strategy, "group": a.group_size or 0,
                "symmetric": a.symmetric, "scales": scales, "block": a.block_structure}

    return None if scheme.weights is None else (args(scheme.weights), args(scheme.input_activations))


def _described(fmt):
    """The same facts of our formats, read off the formats' fields and stored tensors."""
    from tersor.formats import NVFP4, Float, Inputs, Microscaling
    from tersor.formats.floating import element_bits

    def facts(bits, type, strategy, group=0, symmetric=True, scales=None, block=None):
        return {"bits": bits, "type": type, "strategy": strategy, "group": group, "symmetric": symmetric,
                "scales": scales, "block": block}

    if fmt is None:
        return None
    weights, inputs = fmt, None
    if isinstance(fmt, Inputs):
        weights = fmt.inner
        inputs = {
            "fp8": facts(8, "float", fmt.scale, 128 if fmt.scale == "group" else 0),
            "mxfp4": facts(4, "float", "group", 32, scales="e8m0"),
            "mxfp8": facts(8, "float", "group", 32, scales="e8m0"),
            "nvfp4": facts(4, "float", "tensor_group", 16, scales="e4m3"),
        }[fmt.kind]
    if isinstance(weights, Int):
        if weights.activation != 16:
            inputs = facts(weights.activation, "int", "token")
        strategy = "group" if weights.group_size else "channel"
        return facts(weights.num_bits, "int", strategy, weights.group_size, weights.symmetric), inputs
    if isinstance(weights, NVFP4):
        return facts(4, "float", "tensor_group", weights.group, scales="e4m3"), inputs
    if isinstance(weights, Microscaling):
        return facts(element_bits(weights.element), "float", "group", weights.group, scales="e8m0"), inputs
    assert isinstance(weights, Float)
    block = [128, 128] if weights.scale == "block" else None
    return facts(8, "float", weights.scale, block=block), inputs


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"])
def test_float_presets_store_what_compressed_tensors_reads(name):
    """compressed-tensors' own decompression of our stored tensors gives our weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    import torch
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    torch.manual_seed(0)
    w = torch.randn(256, 384)
    fmt = PRESETS[name]
    params = fmt.fit(w, dtype=torch.float32)
    tensors = dict(fmt.pack(fmt.project(w, params), params))
    kind = "float-quantized" if name.startswith("FP8") else f"{name[:5].lower()}-pack-quantized"
    if name == "MXFP8A16":
        kind = "mxfp8-quantized"
    if tensors["weight_packed"].dtype is torch.float8_e4m3fn:
        tensors["weight"] = tensors.pop("weight_packed")
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    theirs = compressor.decompress(tensors, preset_name_to_scheme(name, ["Linear"]))["weight"]
    ours = fmt.unpack(fmt.pack(fmt.project(w, params), params), (256, 384))
    assert torch.allclose(theirs.float(), ours, rtol=2**-7 if theirs.dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"])
def test_scales_of_the_float_presets_are_compressed_tensors_own(name):
    quantization = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    import torch
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    torch.manual_seed(0)
    w = torch.randn(32, 128) * (torch.rand(32, 1) ** 4 + 1e-2)
    fmt = PRESETS[name]
    groups = w.unflatten(1, (-1, fmt.group))
    low, high = groups.amin(-1), groups.amax(-1)
    one = quantization.generate_gparam(low.min(), high.max()) if name == "NVFP4A16" else None
    theirs, _ = quantization.calculate_qparams(low, high, preset_name_to_scheme(name, ["Linear"]).weights, one)
    ours = fmt.fit(w)["scales"]
    if one is not None:
        theirs = theirs / one
    assert torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-6)
