"""The rows on which loss curves are judged, where they are not those that the recipe asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optin_export.data import load_sources
from optin_export.recipe import validate
from optin_export.stages.curves import rows_note
from tests.conftest import Make


@pytest.mark.parametrize(
    ("rows", "prune", "told"),
    [
        (48, {}, None),
        (48, {"curve_samples": 40}, "judged on 16 rows, not on prune.curve_samples: 40"),
        (32, {}, "fit into one batch"),
    ],
)
def test_rows_of_loss_curves_that_are_others_than_asked_for(
    rows: int, prune: dict[str, Any], told: str | None, vit_recipe: Make, image_data: Path
) -> None:
    recipe = vit_recipe()
    recipe["data"]["calibration"]["samples"] = rows
    recipe["prune"] |= prune
    note = rows_note(load_sources(validate(recipe, Path("/"))))
    assert note is None if told is None else note is not None and told in note
