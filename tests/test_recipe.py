"""Recipes: what they name, what they keep, and how they fail."""

import pytest
import torch
from torch import nn

from tersor.recipe import make_plan, read_recipe
from tersor.registry import resolve


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(32, 32))


class Model(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, 64)
        if extra:
            self.table = nn.Parameter(torch.empty(1024, 1024))

    def get_output_embeddings(self):
        return self.lm_head


def test_bare_spec_means_every_linear_but_the_head():
    plan = make_plan(Model(), "rtn:W4A16")
    assert list(plan.entries) == [f"blocks.{i}.{n}_proj" for i in (0, 1) for n in "qkvo"]
    assert plan.kept == {"embed": "embedding, kept unless named", "lm_head": "head, kept unless named"}
    assert plan.kept_bytes == sum(p.nbytes for n, p in Model().named_parameters() if not n.startswith("blocks"))


def test_mapping_first_match_wins_and_names_the_head():
    plan = make_plan(Model(), {"blocks.0.*": "rtn:W8A16", "lm_head": "rtn:W8A16[group=32]",
                               "re:blocks\\..*o_proj": None, "*": "rtn:W4A16"})
    assert plan.entries["blocks.0.o_proj"].format == resolve("W8A16").format
    assert plan.entries["blocks.1.q_proj"].format == resolve("W4A16").format
    assert plan.entries["lm_head"].format.group_size == 32
    assert "blocks.1.o_proj" in plan.kept and "embed" in plan.kept


@pytest.mark.parametrize("pattern", ["*", "re:.*", "**"])
def test_a_catch_all_does_not_name_embeddings(pattern):
    assert set(make_plan(Model(), {pattern: "rtn:W4A16"}).kept) == {"embed", "lm_head"}


@pytest.mark.parametrize("pattern", ["Linear", "o_proj", "blocks.?.o_proj"])
def test_pattern_kinds(pattern):
    plan = make_plan(Model(), {pattern: "rtn:W8A16", "*": "keep"} if pattern != "Linear" else {pattern: "rtn:W8A16"})
    assert "blocks.1.o_proj" in plan.entries
    assert ("blocks.1.q_proj" in plan.entries) == (pattern == "Linear")


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="'blocks.0.oproj' matches no layer; the nearest is 'blocks.0.o_proj'"):
        make_plan(Model(), {"blocks.0.oproj": "rtn:W4A16", "*": "rtn:W4A16"})
    with pytest.raises(ValueError, match="no pattern covers .*blocks.1.o_proj"):
        make_plan(Model(), {"blocks.0.*": "rtn:W4A16"})
    with pytest.raises(ValueError, match="names no layer"):
        make_plan(Model(), {"*": "keep"})
    with pytest.raises(ValueError, match="names no layer"):
        make_plan(nn.Sequential(nn.ReLU()), "rtn:W4A16")
    with pytest.raises(ValueError, match="unknown method 'gptk'.*'gptq'"):
        make_plan(Model(), "gptk:W4A16")
    with pytest.raises(ValueError, match="must share a format"):
        make_plan(Model(), {"q_proj": "rtn:W8A16", "*": "rtn:W4A16"})
    make_plan(Model(), {"q_proj": "rtn:W8A16", "*": "rtn:W4A16"}, tie=False)
    with pytest.raises(ValueError, match="regular expression"):
        make_plan(Model(), {"re:(": "rtn:W4A16"})
    with pytest.raises(ValueError, match="accepted are name patterns"):
        make_plan(Model(), {"*": 4})
    with pytest.raises(ValueError, match="found list"):
        make_plan(Model(), ["rtn:W4A16"])


def test_large_parameters_of_no_known_kind_are_reported():
    assert "table" in make_plan(Model(extra=True), "rtn:W4A16").kept


def test_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("recipe:\n  lm_head: rtn:W8A16\n  'blocks.0.*': keep\n  '*': rtn:W4A16\n")
    assert list(read_recipe(path)) == ["lm_head", "blocks.0.*", "*"]
    plan = make_plan(Model(), str(path))
    assert "lm_head" in plan.entries and "blocks.0.q_proj" in plan.kept
    path.write_text("gptq:W4A16\n")
    assert read_recipe(path) == "gptq:W4A16"
    for text, message in (("- 1\n", "found list"), ("a: [", "not a YAML file"), ("", "found NoneType")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(path)
    with pytest.raises(ValueError, match="missing.yaml"):
        read_recipe(tmp_path / "missing.yaml")
