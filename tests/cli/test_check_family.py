"""`optin-export check-family`, and a family in a file of the user that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import optin_export
from optin_export import cli
from optin_export.data import load_sources
from optin_export.errors import InputError
from optin_export.recipe import load_recipe, validate
from optin_export.stages.structures import units_of
from tests.conftest import Make

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 32, 32)}
        self.stem, self.blocks, self.head = nn.Linear(64, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 5)
    def forward(self, pixel_values):
        hidden = self.stem(pixel_values[:, 0].flatten(1)[:, :64])
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

def made():
    torch.manual_seed(0)
    return Own()
"""
FAMILY = """
from optin_export.units import Family, Producer, UnitGroup

def groups(block, path, index):
    return (UnitGroup(index, "neurons", COUNT, 1, (Producer(f"{path}.up"),), f"{path}.down", (path, 0), None),)

FAMILY = Family("NAME", "transformers", "my own", ("neurons",), lambda one: type(one).__name__ == "Block", groups)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def family(count: int = 24, name: str = "mine") -> Path:
    Path("own.py").write_text(FAMILY.replace("COUNT", str(count)).replace("NAME", name), encoding="utf-8")
    return Path("own.py")


def checked(*more: str) -> int:
    flags = ["--model", "py:model.py:made", "--task", "image-classification", "--image", "1,8,8"]
    return cli.main(["check-family", "own.py", *flags, *more])


def test_a_right_family(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family()
    assert checked("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] and said["family"] == "mine" and said["not_declared"] == []
    assert [(one["key"], one["measured"], one["exact"], one["costs"]) for one in said["groups"]] == [
        (f"block0{index}.neurons", "the same", "yes", "yes") for index in range(2)
    ]
    assert checked() == 0 and "family mine: all groups are right" in capsys.readouterr().out


def test_a_wrong_family(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It declares half of the neurons."""
    family(12)
    assert checked("--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert not said["passed"]
    assert {one["measured"] for one in said["groups"]} == {"24 units of width 1 rather than 12 of 1"}


@pytest.mark.parametrize(
    ("text", "why"), [("FAMILY = 3", "FAMILY is a int"), ("", "it has no FAMILY"), ("1 / 0", "ZeroDivisionError")]
)
def test_a_file_without_a_family(folder: Path, capsys: pytest.CaptureFixture[str], text: str, why: str) -> None:
    Path("own.py").write_text(text, encoding="utf-8")
    assert checked() == 2 and why in capsys.readouterr().err
    family(name="bert")
    assert checked() == 2 and "a family of this package has this name" in capsys.readouterr().err


WHOLE = """
from dataclasses import dataclass
from optin_export.units import Family, Inside, class_named

@dataclass
class Names:
    up: str = "up"

def groups(block, path, index):
    inside = Inside(block, path, index)
    return (inside.neurons([Names().up], "down", residual=("", 0), sublayer="down", bypass=[("up", False)]),)

FAMILY = Family("whole", "transformers", "my own", ("neurons",), class_named("Block"), groups)
"""


def test_sub_layers_and_streams_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(WHOLE, encoding="utf-8")
    assert checked("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["exact"] for one in said["groups"]] == ["yes", "yes"]
    # The rebuilt block would add the constant to its input twice.
    Path("own.py").write_text(WHOLE.replace('sublayer="down"', 'sublayer="up"'), encoding="utf-8")
    assert checked("--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert all("'model.blocks." in one["exact"] and "cannot go as a whole" in one["exact"] for one in said["groups"])
    Path("own.py").write_text(WHOLE.replace('residual=("", 0)', 'residual=("down", 0)'), encoding="utf-8")
    assert checked("--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert "the residual stream is not at 'model.blocks.0.down' but at" in said["groups"][0]["measured"]


@pytest.mark.parametrize(
    ("wrong", "right", "why"),
    [
        ('[Names().up], "down"', '[Names().up], "dwon"', "AttributeError: Block has no attribute `dwon`"),
        ('sublayer="down"', 'sublayer="dwon"', "AttributeError: Block has no attribute `dwon`"),
        ('residual=("", 0)', 'sizes=[("width", 1)]', "AttributeError: 'Block' object has no attribute 'width'"),
        ("return (inside", "return (3, inside", "TypeError: it returns a int, not only UnitGroups and Refusals"),
        ('class_named("Block")', "lambda one: one.name", "`is_block` of the family whole fails"),
        ('class_named("Block")', 'class_named("Other")', "its is_block is true for no module of the Own"),
    ],
)
def test_mistakes_in_the_file_are_told_with_their_place(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: str, right: str, why: str
) -> None:
    assert wrong in WHOLE
    Path("own.py").write_text(WHOLE.replace(wrong, right), encoding="utf-8")
    assert checked() == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said


def recipe(make: Make, **model: Any) -> dict[str, Any]:
    raw = make()
    own = {"source": "py:model.py:made", "weights": "random", "args": {}}
    return {**raw, "model": {**raw["model"], **own, **model}, "prune": {"budget": {"macs": 0.8}}}


def test_a_recipe_names_a_family(folder: Path, vit_recipe: Make) -> None:
    """It is used rather than measurement, decides what is cached, and the saved model needs it no more."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe(vit_recipe, family="own.py")), encoding="utf-8")
    family()
    read = load_recipe(Path("recipe.yaml"))
    assert read.model.family == str(folder / "own.py")
    sources = load_sources(read)
    structure = units_of(sources, False, ("neurons",))
    assert structure.family == "mine" and [one.count for one in structure.groups] == [24, 24]
    digest = sources.digest()["architecture"]
    assert optin_export.run("recipe.yaml", out="run", stop_after="surgery") is None
    family(12)
    assert load_sources(read).digest()["architecture"] != digest
    Path("own.py").unlink()
    with pytest.raises(InputError, match="cannot load the family"):
        units_of(load_sources(read), False, ("neurons",))
    saved = optin_export.load_model("run/model", trust_python=True)
    assert saved.get_submodule("model.blocks.0.up").out_features < 24
    # Without the field the same units are measured.
    measured = units_of(load_sources(validate(recipe(vit_recipe), folder)), False, ("neurons",))
    assert [(one.consumer, one.count) for one in measured.groups] == [
        (one.consumer, one.count) for one in structure.groups
    ]


def test_tokens_are_not_merged_with_an_own_family(folder: Path, vit_recipe: Make) -> None:
    with pytest.raises(InputError, match="tokens are merged in known families only"):
        validate({**recipe(vit_recipe, family="own.py"), "tokens": {"keep": 0.8}}, folder)
