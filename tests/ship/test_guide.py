"""What is printed after a shipment: a comparison only where two models are served."""

from __future__ import annotations

from typing import Any

import pytest

from optin_export.recipe import validate
from optin_export.ship.guide import comparison
from tests.conftest import ROOT, Make


@pytest.mark.parametrize(
    ("section", "arms"),
    [
        ({}, "--model tiny-base --model tiny "),
        ({"layout": "versions"}, "--model tiny:1 --model tiny:2 "),
        ({"layout": "versions", "serve": "pruned"}, None),
        ({"layout": "pruned"}, None),
    ],
)
def test_a_model_is_not_compared_with_itself(vit_recipe: Make, section: dict[str, Any], arms: str | None) -> None:
    lines = comparison("tiny", validate(vit_recipe(ship={"triton": True, **section}), ROOT))
    assert (lines == []) if arms is None else (len(lines) == 1 and arms in lines[0])
