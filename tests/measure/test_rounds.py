"""The interval of a speedup holds what one loaded engine differs from the next, as often as it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optin_export.measure.rounds import latency_of, p90, speedup_of
from tests.conftest import ROOT
from tools.studies.study_interval import MACHINES, TRUTH, in_rounds, one_instance

ROUNDS = [number // 3 for number in range(24)]


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_it_is_the_geometric_mean_over_rounds_with_students_interval() -> None:
    """Without noise in a round all is known by hand."""
    ratios = np.array([1.5, 1.6, 1.7, 1.5, 1.6, 1.7, 1.8, 1.4])
    slow = [[10.0 * ratios[number]] * 5 for number in ROUNDS]
    found = speedup_of([slow], [[10.0] * 5] * 24, ROUNDS, generator())
    logs = np.log(ratios)
    half = 2.364624 * logs.std(ddof=1) / np.sqrt(8)  # Student's quantile at 7 degrees of freedom
    assert found.median == pytest.approx(np.exp(logs.mean()))
    assert (found.ci_low, found.ci_high) == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)))
    two = speedup_of([slow, [[10.0] * 5] * 24], [[10.0] * 5] * 24, ROUNDS, generator())
    assert two.median == pytest.approx(np.exp(logs.mean() / 2))  # two loaded copies of one model count alike
    base = latency_of(slow, ROUNDS)
    assert base.median == pytest.approx(10 * np.exp(logs.mean())) and base.high == pytest.approx(10 * found.ci_high)


def test_blocks_of_one_time_are_drawn_together() -> None:
    """A machine that slows down for a block slows both arms: the ratio does not spread. Drawn apart it would."""
    states = generator().choice([1.0, 1.5], 24)
    slow, fast = [[2 * state] * 3 for state in states], [[state] * 3 for state in states]
    found = speedup_of([slow], fast, ROUNDS, generator(), statistic=p90)
    assert found.ci_low == pytest.approx(2.0) and found.ci_high == pytest.approx(2.0)


def test_many_calls_and_blocks_of_one_instance_do_not_make_the_interval_narrow() -> None:
    """What differs between rounds counts by the number of rounds, however much was measured in each."""
    ratios = [1.0, 1.1, 1.0, 1.2, 1.0, 1.1, 1.0, 1.2]
    few, many = (
        speedup_of(
            [[[ratio] * calls for ratio in ratios for _ in range(blocks)]],
            [[1.0] * calls] * (8 * blocks),
            [number for number in range(8) for _ in range(blocks)],
            generator(),
        )
        for calls, blocks in ((2, 2), (50, 10))
    )
    assert few.ci_high - few.ci_low == pytest.approx(many.ci_high - many.ci_low)


@pytest.mark.parametrize("name", ["instance", "everything"])
def test_the_interval_holds_the_truth(name: str) -> None:
    """Few runs here; the committed study has more of them."""
    found = [in_rounds(MACHINES[name], seed) for seed in range(24)]
    assert sum(one.ci_low <= TRUTH <= one.ci_high for one in found) >= 21
    alone = [one_instance(MACHINES[name], seed) for seed in range(24)]
    assert sum(one.ci_low <= TRUTH <= one.ci_high for one in alone) < 18


def test_the_committed_study_covers_the_truth_on_every_machine() -> None:
    rows = json.loads((ROOT / "docs" / "measurements" / "studies" / "interval.json").read_text())["rows"]
    assert {row["machine"] for row in rows} == set(MACHINES)
    for row in rows:
        if row["method"] == "in_rounds":
            assert row["covered"] / row["runs"] >= 0.9, row
