"""The study of loss curves: the ways that it compares are those of a run, and it judges plans by the curves given."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.repair.measured_points import CONVOLUTIONAL_SHARES, SHARES, measured_at
from optin_export.units import find_structure
from tests.test_docs import load_tool
from tests.units.models import small_model


@pytest.mark.parametrize(("name", "shares"), [("bert", SHARES), ("resnet-cifar", CONVOLUTIONAL_SHARES)])
def test_its_points_are_those_of_a_run(name: str, shares: tuple[float, ...]) -> None:
    study, structure = load_tool("studies/study_curves"), find_structure(small_model(name)[0])
    for counts in ([1, 3, 4, 5, 7, 8, 9, 11, 16], [0, 2]):
        assert study.points(counts, shares) == measured_at(structure, counts)
    assert {way.shares for way in study.WAYS.values() if way is not None} >= {shares}


def test_the_loss_of_a_plan_is_read_from_the_curves() -> None:
    study = load_tool("studies/study_curves")
    curves = {"a": np.array([[0.0, 4.0], [2.0, 1.0], [4.0, 0.0]]), "b": np.array([[1.0, 3.0], [3.0, 0.0]])}
    assert study.loss_of({"a": 3, "b": 2}, curves) == pytest.approx(0.5 + 1.5)
