"""Every field is described, and what is said of it is what `validate` accepts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter

from optin_export.errors import InputError
from optin_export.recipe import Recipe, validate
from optin_export.recipe.load import _apply, _models_in
from optin_export.recipe.manual import describe_fields, nearest
from tests.conftest import Make

FIELDS = describe_fields()


def _sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            found |= _sections(inner)
    return found


def test_no_field_of_any_section_lacks_a_description() -> None:
    bare = [
        f"{section.__name__}.{name}"
        for section in _sections(Recipe)
        for name, field in section.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert bare == []


def test_the_walk_misses_no_field() -> None:
    count = sum(len(section.model_fields) for section in _sections(Recipe))
    # DataSource stands in two places (calibration, and the rows of a fine-tune).
    twice = len(next(section for section in _sections(Recipe) if section.__name__ == "DataSource").model_fields)
    assert len(FIELDS) == count + twice


@pytest.mark.parametrize("path", [path for path, one in FIELDS.items() if not one.section])
def test_every_example_is_accepted(path: str) -> None:
    """The field alone, as its section takes it: other fields may still object to the combination."""
    model: Any = Recipe
    *parents, last = path.replace("[]", "").split(".")
    for name in parents:
        model = next(_models_in(model.model_fields[name].annotation))
    field = model.model_fields[last]
    TypeAdapter(Annotated[field.annotation, None, *field.metadata]).validate_python(FIELDS[path].example)


def test_overrides_of_examples_make_a_recipe(vit_recipe: Make, tmp_path: Path) -> None:
    raw = vit_recipe()
    for path in ("prune.score", "export.precision", "gates.speedup", "targets[].threads", "prune.units"):
        example, node = FIELDS[path], copy.deepcopy(raw)
        node["targets"] = [{}]
        _apply(node, example.override)
        assert validate(node, tmp_path) is not None


def test_limits_are_those_of_the_schema() -> None:
    assert FIELDS["prune.budget.macs"].limits == ("greater than 0.0", "at most 1.0")
    assert FIELDS["targets[].threads"].limits == ("at least 1", "at most 1000000000000000")
    assert "dynamic" in FIELDS["export.quantization"].choices
    assert FIELDS["model.source"].required and not FIELDS["gates"].required


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("prune.bugdet", "prune.budget"),
        ("budget", "prune.budget"),
        ("targets.0.threads", "targets[].threads"),
        ("prune.socre", "prune.score"),
        ("precison", "export.precision"),
    ],
)
def test_nearest(word: str, first: str) -> None:
    assert nearest(word, FIELDS)[0] == first
    assert nearest("qqqqqqq", FIELDS) == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"budget": {"macs": 0.5}}, "did you mean prune.budget?"),
        ({"prune": {"budget": {"macs": 0.5}, "score": "optim"}}, "did you mean 'optin'?"),
        ({"prune": {"budget": {"macss": 0.5}}}, "did you mean 'macs'?"),
        ({"targets": [{"thread": 2}]}, "did you mean 'threads'?"),
        ({"targets": [{"tensorrt": {"worksapce": 2}}]}, "did you mean 'workspace'?"),
        ({"data": {"calibration": {"source": "npz:x", "colums": {}}}}, "did you mean 'columns'?"),
    ],
)
def test_misspelt_fields_and_values_are_told_what_was_meant(
    vit_recipe: Make, sections: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        validate(vit_recipe(**sections), tmp_path)
    assert says in caught.value.why
