"""YAML is read as it is meant: what PyYAML would take for another number is text, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from optin_export.errors import InputError
from optin_export.recipe import load_recipe
from optin_export.recipe.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("-1:30", "-1:30"),
        ("1:30.5", "1:30.5"),
        ("90", 90),
        ("1_000", 1000),
        ("0x10", 16),
        ("0", 0),
        ("0.5", 0.5),
        ("1.0e+3", 1000.0),
        ("9223372036854775807", 2**63 - 1),
        ("'010'", "010"),
        ("12:34:56", "12:34:56"),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["010", "-012", "00", "9" * 20, "9" * 400, "-" + "9" * 400, "9" * 100_000, "0x" + "f" * 20]
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(f"key: {text}")


@pytest.mark.parametrize("text", ["1:30", "010", "9" * 400])
@pytest.mark.parametrize(
    "field", ["seed", "prune.probes", "data.calibration.samples", "gates.speedup", "model.args.depth"]
)
def test_in_a_recipe(field: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "recipe: 1\nname: x\nmodel: {source: 'timm:vit_tiny_patch16_224', task: image-classification}\n"
        "data: {calibration: {source: 'npz:x.npz'}}\nprune: {budget: {macs: 0.5}}\n"
    )
    if field == "model.args.depth" and text == "1:30":
        assert load_recipe(path, [f"{field}={text}"]).model.args["depth"] == "1:30"
        return
    with pytest.raises(InputError):
        load_recipe(path, [f"{field}={text}"])
