"""What `--dry-run` says that each stage would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optin_export.cli.dry_run.work import planned_work
from optin_export.recipe import validate
from tests.recipe.test_recipe import GOOD


@pytest.mark.parametrize(
    ("prune", "more", "says"),
    [
        (
            {},
            {},
            "within 50% of the macs, in multiples of 8: enough for fp32 on onnxruntime-cpu-1t, onnxruntime-cpu-2t",
        ),
        ({"budget": {"speedup": 2.0}}, {}, "(3 rounds at most), in multiples of 8: enough for fp32"),
        ({"budget": {"accuracy_drop": 1.0}}, {}, "loses at most 1 points, in multiples of 8: enough for fp32"),
        ({"align": 12}, {}, "within 50% of the macs, in multiples of 12: prune.align of the recipe"),
        (
            {},
            {"targets": [{"engine": "tensorrt"}], "export": {"precision": "int8"}},
            "in multiples of 32: what int8 kernels of tensorrt-cuda compute without padding",
        ),
    ],
)
def test_the_search_says_in_which_multiples_units_are_kept(
    prune: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    recipe = validate({**GOOD, "prune": {**GOOD["prune"], **prune}, **more}, Path("/"))
    assert says in dict(planned_work(recipe, Path("run")))["search"]
