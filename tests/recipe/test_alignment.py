"""`prune.align: auto` is what the targets' kernels want in the recipe's precision; a user's number wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optin_export.recipe import Alignment, validate
from tests.recipe.test_recipe import GOOD

CPU: dict[str, Any] = {"engine": "onnxruntime"}
CUDA = {"engine": "onnxruntime", "device": "cuda"}
TENSORRT, RTX = {"engine": "tensorrt"}, {"engine": "tensorrt-rtx"}


def alignment(targets: list[dict[str, Any]], precision: str, **prune: Any) -> Alignment:
    sections = {"targets": targets, "export": {"precision": precision}, "prune": {**GOOD["prune"], **prune}}
    return validate({**GOOD, **sections}, Path("/")).alignment


@pytest.mark.parametrize(
    ("targets", "precision", "features"),
    [
        ([CPU], "fp32", 8),
        ([CPU], "int8", 8),
        ([{"engine": "openvino"}], "int8", 8),
        ([{"engine": "auto"}], "int8", 8),
        ([TENSORRT], "fp32", 8),
        ([TENSORRT], "fp16", 8),
        ([RTX], "bf16", 8),
        ([TENSORRT], "int8", 32),
        ([RTX], "int8", 32),
        ([{**CUDA, "provider": "tensorrt"}], "int8", 32),
        ([CUDA], "int8", 16),
        ([CUDA], "fp8", 16),
        ([TENSORRT], "fp8", 16),
        ([CUDA, TENSORRT], "int8", 32),
        ([CPU, CUDA], "int8", 16),
    ],
)
def test_the_largest_number_that_a_target_wants(targets: list[dict[str, Any]], precision: str, features: int) -> None:
    found = alignment(targets, precision)
    assert found.features == features and not found.fixed
    assert precision in found.reason


def test_the_reason_names_the_targets_that_want_it() -> None:
    assert alignment([CPU, TENSORRT], "int8").reason == "what int8 kernels of tensorrt-cuda compute without padding"
    assert alignment([CPU], "fp32").reason == "enough for fp32 on onnxruntime-cpu-1t"


@pytest.mark.parametrize("align", [1, 4, 24, 64])
def test_a_users_number_wins(align: int) -> None:
    found = alignment([TENSORRT], "int8", align=align)
    assert (found.features, found.fixed) == (align, True)
