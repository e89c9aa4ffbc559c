"""The commands on a tiny model: what they write, say and refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tersor
from tersor import evaluate, htmlreport, svg
from tersor.cli import demo, shapes
from tersor.cli.app import app
from tersor.cli.common import load_model
from tersor.recipe import make_plan
from tersor.registry import resolve
from tersor.report import Report, Row

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
REFERENCE = Path(__file__).parent.parent / "examples" / "models" / "stdlib-llama"
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 20


def make_model(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**dict(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=True), **changes})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    (folder / "heldout.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "q"
    result = run("compress", model, "--recipe", "rtn:W4A16", "--out", out)
    assert result.exit_code == 0, result.output
    return out


def run(*args):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
    # Anything but a clean exit is an error that the command line did not turn into words.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assert_self_contained(page: str):
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    for outside in ("http:", "https:", "//cdn", "src=", "<script", "<link", "@import", "url("):
        assert outside not in page, outside


def python_m_tersor(*args):
    return subprocess.run([sys.executable, "-m", "tersor", *map(str, args)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_python_m_tersor_is_the_command(compressed):
    # The command line is the first to load anything in its process: nothing has imported transformers by then.
    result = python_m_tersor("explain", compressed)
    assert result.returncode == 0, result.stderr
    assert "14 compressed layers" in result.stdout
    failing = python_m_tersor("explain", "./absent")
    assert failing.returncode == 2 and failing.stdout == ""
    assert failing.stderr.strip() == "error: model ./absent: no such folder"


def test_help_lists_every_command():
    assert run("--version").stdout.strip() == f"tersor {tersor.__version__}"
    output = run("--help").output
    for command in ("compress", "eval", "generate", "explain", "specs", "bench", "doctor", "demo"):
        assert command in output
        assert run(command, "--help").exit_code == 0


def test_compress_writes_a_checkpoint_and_a_self_contained_page(model, compressed):
    assert (compressed / "config.json").is_file() and (compressed / "tokenizer.json").is_file()
    page = (compressed / "report.html").read_text()
    assert_self_contained(page)
    for expected in ("<svg", "model.layers.1.mlp.down_proj", "W4A16", "lm_head", "rtn", str(model)):
        assert expected in page
    before, after = (sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                     for folder in (model, compressed))
    assert after < before


def test_compress_calibrates_on_the_standard_library_and_says_so(model, tmp_path):
    result = run("compress", model, "-r", "gptq:W4A16", "-o", tmp_path / "q", "--samples", 2, "--length", 32)
    assert result.exit_code == 0, result.output
    assert "calibration: this Python's standard library" in result.output
    assert "gptq" in result.output and "standard library" in (tmp_path / "q" / "report.html").read_text()


def test_compress_with_every_option(model, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('"re:.*layers.0.*": keep\n"*": gptq:W8A16[group=32]\n')
    page, q = tmp_path / "pages" / "r.html", tmp_path / "q"
    arguments = ("compress", model, "--recipe", recipe, "--out", q, "--calibration", tmp_path / "texts", "--samples", 2,
                 "--length", 16, "--strict", "--as", "compressed-tensors", "--report", page, "--text",
                 model / "heldout.txt", "--threads", torch.get_num_threads())
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    config = json.loads((q / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert_self_contained(page.read_text())
    figures = re.search(r"perplexity ([\d.]+) -> ([\d.]+)", result.output)
    assert float(figures[2]) == pytest.approx(float(figures[1]), rel=0.02)  # one block in 8 bits
    names = [row.name for row in tersor.explain(load_model(str(q))[0]).rows]
    assert names and all(".layers.1." in name for name in names)
    again = run(*arguments)
    assert again.exit_code == 2 and "not empty" in again.output
    assert run(*arguments, "--overwrite").exit_code == 0


def test_eval_reports_what_evaluate_measures(model, compressed, tmp_path):
    figures = tmp_path / "figures.json"
    result = run("eval", compressed, "--against", model, "--window", 32, "--windows", 3, "--new-tokens", 3,
                 "--dtype", "float32", "--json", figures)
    assert result.exit_code == 0, result.output
    assert str(model / "heldout.txt") in result.output
    found = json.loads(figures.read_text())
    one, tokenizer = load_model(str(compressed))
    other, _ = load_model(str(model))
    ids = evaluate.windows(evaluate.token_ids(tokenizer, TEXT), 32, 3)
    expected = evaluate.evaluate(one, ids, other, dtype=torch.float32, speed=False).to_dict()
    assert found["quality"] == pytest.approx(expected["quality"])
    assert found["bytes"] == expected["bytes"] < found["original_bytes"] == expected["original_bytes"]
    assert found["speed"]["decode"] > 0 and found["original_speed"]["prefill"] > 0
    assert f"{found['quality']['perplexity']:.3f}" in result.output
    alone = run("eval", compressed, "--text", model / "heldout.txt", "--windows", 1, "--window", 16, "--no-speed")
    assert alone.exit_code == 0 and "perplexity" in alone.output


def test_generate_writes_the_continuation(compressed):
    one, tokenizer = load_model(str(compressed))
    inputs = tokenizer("def ", return_tensors="pt")
    ids = one.generate(inputs.input_ids, max_new_tokens=6, do_sample=False)
    result = run("generate", compressed, "--prompt", "def ", "--new-tokens", 6)
    assert result.exit_code == 0
    assert result.stdout.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert "tokens/s" in result.stderr
    sampled = [run("generate", compressed, "-p", "def ", "-n", 6, "--temperature", 1, "--seed", seed).stdout
               for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_explain_names_formats_and_kernels(compressed, model):
    result = run("explain", compressed)
    assert "model.layers.0.self_attn.q_proj" in result.output and "W4A16" in result.output
    assert "int_linear" in result.output and "not compressed: model.embed_tokens" in result.output
    record = json.loads(run("explain", compressed, "--json").stdout)
    assert len(record["rows"]) == 14 and all(row["format"] == "W4A16" for row in record["rows"])
    assert run("explain", model).exit_code == 0


def test_specs_and_doctor():
    infos = json.loads(run("specs", "--json").stdout)
    by_name = {info["name"]: info for info in infos}
    assert by_name["gptq"]["kind"] == "method" and by_name["W4A16"]["kernel"].startswith("int_linear")
    assert by_name["2:4/W4A16"]["kernel"].startswith("reference: ")
    shown = run("specs").output
    assert "gptq" in shown and "FP8_DYNAMIC" in shown
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["cpu"]["isa"] in facts["cpu"]["isas"] and facts["versions"]["torch"] == torch.__version__
    assert facts["cuda"]["why_not"] or facts["cuda"]["devices"]
    assert facts["kernels"]["W4A16"] == by_name["W4A16"]["kernel"]
    assert "threads" in run("doctor").output


def test_bench_on_a_small_shape(tmp_path):
    page = tmp_path / "roofline.html"
    result = run("bench", "--specs", "W4A16", "--shapes", "64x32", "--tokens", "1,3", "--seconds", 0.01, "--html", page)
    assert result.exit_code == 0, result.output
    assert result.output.count("64 x 32") == 2 and "GB/s" in result.output
    assert_self_contained(page.read_text())
    assert "<svg" in page.read_text() and "fp32" in page.read_text()


def test_demo_on_a_small_model(model, tmp_path):
    result = run("demo", "--model", model, "--samples", 2, "--windows", 1, "--no-large", "--out", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())  # where lines end depends on how many seconds it took
    for expected in ("perplexity", "KL", "original", "gptq:W4A16", "def copy_file", "saved and loaded again"):
        assert expected in shown
    assert (tmp_path / "kept" / "config.json").is_file()


def test_demo_finds_the_reference_model(monkeypatch, tmp_path):
    assert demo.find_reference(tmp_path) == tmp_path
    monkeypatch.chdir(REFERENCE.parents[2])
    assert demo.find_reference(None).samefile(REFERENCE)


def test_shape_of_the_large_model():
    config = shapes.qwen3_0_6b(layers=1)
    attention = 1024 * (16 + 8 + 8 + 16) * 128 + 2 * 128
    assert sum(p.numel() for p in config.parameters()) == 151936 * 1024 + attention + 3 * 1024 * 3072 + 3 * 1024
    assert config.lm_head.weight is config.model.embed_tokens.weight
    with torch.no_grad():
        logits = config(input_ids=torch.tensor([[5, 7]])).logits
    assert logits.isfinite().all() and logits.float().std() > 0.1


ERRORS = {
    "no such folder": (("compress", "./absent", "-r", "rtn:W4A16", "-o", "{out}"), "model ./absent: no such folder"),
    "not a model": (("explain", "{empty}"), "has no config.json"),
    "unknown format": (("compress", "{model}", "-r", "rtn:W4A61", "-o", "{out}"), "W4A61"),
    "unknown method": (("compress", "{model}", "-r", "gtpq:W4A16", "-o", "{out}"), "did you mean 'gptq'"),
    "recipe file": (("compress", "{model}", "-r", "./absent.yaml", "-o", "{out}"), "recipe absent.yaml"),
    "pattern that matches nothing": (("compress", "{model}", "-r", "{recipe}", "-o", "{out}"), "'nothing_proj'"),
    "calibration": (("compress", "{model}", "-r", "gptq:W4A16", "-o", "{out}", "--calibration", "./absent.txt"),
                    "text absent.txt"),
    "no text in the folder": (("compress", "{model}", "-r", "gptq:W4A16", "-o", "{out}", "--calibration", "{empty}"),
                              "found no text files"),
    "strict": (("compress", "{model}", "-r", "rtn:2:4/W4A16", "-o", "{out}", "--strict"),
               "strict: layer 'model.layers"),
    "out is the model": (("compress", "{model}", "-r", "rtn:W4A16", "-o", "{model}"), "found the model itself"),
    "nan": (("compress", "{nan}", "-r", "rtn:W4A16", "-o", "{out}"), "model.layers.0.mlp.up_proj"),
    "truncated": (("explain", "{truncated}"), "model.safetensors"),
    "text": (("eval", "{model}", "--text", "{empty}"), "text "),
    "shapes": (("bench", "--shapes", "12by3"), "accepted are sizes such as 4096x14336"),
    "demo": (("demo", "--model", "./absent"), "model absent: no such folder"),
}


@pytest.fixture(scope="module")
def given(model, compressed, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "recipe.yaml").write_text("nothing_proj: rtn:W4A16\n'*': keep\n")
    broken = LlamaForCausalLM.from_pretrained(model)
    broken.model.layers[0].mlp.up_proj.weight.data[1, 2] = float("nan")
    shutil.copytree(model, root / "nan")
    broken.save_pretrained(root / "nan")
    shutil.copytree(compressed, root / "truncated")
    shard = root / "truncated" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    return {name: str(root / name) for name in ("empty", "nan", "truncated")} | {
        "model": str(model), "recipe": str(root / "recipe.yaml")}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_that_names_the_thing(case, given, tmp_path):
    arguments, expected = ERRORS[case]
    out = tmp_path / "out"
    arguments = [argument.format(out=out, **given) for argument in arguments]
    result = run(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], result.stderr
    assert "Traceback" not in result.output
    assert not out.exists(), "nothing may be half-written"


def test_debug_keeps_the_traceback():
    result = CliRunner().invoke(app, ["explain", "./absent", "--debug"])
    assert isinstance(result.exception, ValueError) and "no such folder" in str(result.exception)


def test_page_escapes_names_and_draws_what_it_was_given():
    report = Report(kept={"<head>": "kept & named"}, kept_bytes=10)
    for block in range(3):
        for kind in ("q_proj", "o_proj"):
            report.add(Row(f"layers.{block}.{kind}", "W4A16", "gptq", (8, 8), 4.5, "int_linear avx2",
                           relative_error=0.1 + block, seconds=0.5, bytes_before=128, bytes_after=36))
    report.add(Row("layers.2.extra", "2:4", "rtn", (8, 8), 9.0, "reference: none", bytes_before=128, bytes_after=72))
    quality = evaluate.Quality(12.25), evaluate.Quality(12.5)
    page = htmlreport.render(report, "a <model>", [("recipe", "<x>")], quality=quality, samples=[("text", "if a < b:")])
    assert_self_contained(page)
    for expected in ("a &lt;model&gt;", "&lt;head&gt;", "kept &amp; named", "if a &lt; b:", "12.500", "was 12.250",
                     'class="reference"', "layers.1.o_proj: 1.1"):
        assert expected in page
    # Two plots of two series with three points each, and a dot per series in the legends; bars for three kinds + kept.
    assert page.count("<circle") == 2 * (2 * 3 + 2)
    assert page.count('class="ghost"') == 4


def test_page_is_written_whole_or_not_at_all(tmp_path):
    htmlreport.write(tmp_path / "a" / "page.html", "x")
    assert (tmp_path / "a" / "page.html").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["page.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="report .*file"):
        htmlreport.write(tmp_path / "file" / "page.html", "x")


def test_plots_place_points_on_their_axes():
    plot = svg.lines({"a": [(1, 10, "low"), (100, 1000, "high")]}, "label", "x", "y", log=True)
    (x0, y0), (x1, y1) = [tuple(map(float, found)) for found in
                          re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.6"', plot)]
    assert x0 < x1 and y0 > y1 and "<title>high</title>" in plot
    # Equal factors are equal distances: the geometric middle lies halfway.
    middle = svg.lines({"a": [(1, 10, ""), (10, 100, ""), (100, 1000, "")]}, "label", "x", "y", log=True)
    xs = [float(x) for x, _ in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.6"', middle)]
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2, abs=0.1)
    assert svg.lines({"a": []}, "label", "x", "y") == ""


def test_the_readme_shows_specs_and_a_recipe_that_work(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.split("| spec | means |", 1)[1].split("\n\n", 1)[0]
    specs = [spec for line in table.splitlines()[2:] for spec in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert "awq+gptq:W4A16" in specs and len(specs) >= 8
    for spec in specs:
        assert resolve(spec).methods
    (tmp_path / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", readme, re.S)[1])
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(REFERENCE))
    plan = make_plan(model, tmp_path / "recipe.yaml")
    assert plan.entries["model.layers.3.mlp.down_proj"].text == "gptq:W6A16"
    assert plan.entries["model.layers.3.self_attn.q_proj"].text == "gptq:W4A16"
    assert plan.entries["lm_head"].text == "rtn:W8A16"
    assert "model.layers.0.mlp.down_proj" in plan.kept and "model.embed_tokens" in plan.kept


def test_the_readme_names_every_command_and_no_other():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    named = set(re.findall(r"^\| `tersor (\w+)", readme, re.M))
    assert named == {command.name for command in app.registered_commands}
