"""Parity draws its line at its tolerances: an output just within one passes, an output just beyond it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from optin_export.measure import Measured, ParityCase, judge
from optin_export.measure.parity import compare
from optin_export.recipe import Budget, Gates

#: precision -> (largest relative error, smallest cosine, smallest share of agreeing choices). Written out here, so that
#: no tolerance is loosened unnoticed.
LIMITS = {
    "fp32": (1e-4, 1 - 1e-6, 1.0),
    "fp16": (2e-2, 0.9995, 1.0),
    "bf16": (1e-1, 0.995, 1.0),
    "int8": (4e-1, 0.95, 0.9),
    "fp8": (4e-1, 0.95, 0.9),
}


class Constant:
    """An engine that answers with the same rows to everything."""

    inputs, outputs = ("x",), ("y",)

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": self.rows}


def judged(
    expected: np.ndarray,
    got: np.ndarray,
    precision: str,
    classes: int | None = None,
    exact: Callable[[Mapping[str, np.ndarray]], np.ndarray | None] | None = None,
) -> ParityCase:
    return compare(
        Constant(got),
        lambda inputs: expected,
        {"x": expected},
        target="t",
        model="base",
        rows="distinct",
        precision=precision,
        classes=classes,
        exact=exact,
    )


@pytest.mark.parametrize("precision", LIMITS)
def test_the_largest_error_of_a_row(precision: str) -> None:
    """One value of many is off, so that the cosine stays far within its own limit."""
    limit, cosine, _ = LIMITS[precision]
    expected = np.ones((3, 4000))

    def off_by(share: float) -> ParityCase:
        got = expected.copy()
        got[1, 7] += share * limit
        found = judged(expected, got, precision)
        assert found.cosine > cosine
        assert found.max_error == pytest.approx(share * limit)
        return found

    assert off_by(0.9).passed
    assert not off_by(1.1).passed


@pytest.mark.parametrize("precision", LIMITS)
def test_the_worst_rows_cosine(precision: str) -> None:
    """One large value keeps the relative error of the many small ones within its limit; only the cosine sees them.

    A row of ones, n of them, against which noise e of alternating sign is set: the cosine is 1 / sqrt(1 + e^2), about
    1 - e^2 / 2. The large value adds its square to both lengths.
    """
    limit, cosine, _ = LIMITS[precision]
    small, large, count = 1.0, 12.0 / limit**0.5, 40_000

    def turned_by(share: float) -> ParityCase:
        wanted = 1 - share * (1 - cosine)
        expected = np.full((2, count), small)
        expected[:, 0] = large
        total = (expected[0] ** 2).sum()
        noise = np.sqrt(total * (wanted**-2 - 1) / (count - 2))
        got = expected.copy()
        got[0, 2:] += noise * np.where(np.arange(count - 2) % 2, 1.0, -1.0)
        found = judged(expected, got, precision)
        assert found.max_error < limit
        assert found.cosine == pytest.approx(wanted, abs=0.05 * (1 - cosine))
        return found

    assert turned_by(0.5).passed
    assert not turned_by(2.0).passed


@pytest.mark.parametrize("precision", LIMITS)
def test_the_share_of_agreeing_choices(precision: str) -> None:
    """Twenty rows of two classes that are no ties; in some the engine chooses the other one."""
    agreement = LIMITS[precision][2]
    allowed = round(20 * (1 - agreement))
    tie = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 2e-1, "fp8": 2e-1}[precision]
    expected = np.concatenate([np.ones((20, 1)), np.full((20, 1), 1 - 1.5 * tie)], 1)

    def exchanged(rows: int, between: float = 1.5 * tie) -> ParityCase:
        one = np.array([1.0, 1 - between])
        wanted = np.tile(one, (20, 1)) if between != 1.5 * tie else expected
        got = wanted.copy()
        # Both values meet in the middle and pass each other by a little: an error of half the distance.
        got[:rows] = [1 - 0.51 * between, 1 - 0.49 * between]
        return judged(wanted, got, precision, classes=1)

    assert exchanged(allowed).agreement == agreement
    assert exchanged(allowed + 1).agreement == pytest.approx(agreement - 0.05)
    assert not exchanged(allowed + 1).passed
    assert exchanged(20, 0.5 * tie).agreement == 1.0  # ties are no disagreement


@pytest.mark.parametrize(
    ("own", "share", "passed"), [(4e-4, 3.9, True), (4e-4, 4.1, False), (2.1e-3, 1.0, False), (None, 1.0, False)]
)
def test_an_engine_may_round_as_its_model_does(own: float | None, share: float, passed: bool) -> None:
    """Four times what the model differs from itself in fp64, if that is little enough for a wrong graph to show."""
    expected, got = np.ones((2, 4000)), np.ones((2, 4000))
    got[1, 7] += share * (own or 4e-4)
    found = judged(expected, got, "fp32", exact=lambda inputs: None if own is None else expected / (1 + own))
    assert found.passed == passed and found.rounding == (own and pytest.approx(own))
    assert found.limit == (pytest.approx(4 * 4e-4) if own == 4e-4 else 1e-4)


def test_a_model_is_run_in_fp64_only_where_an_fp32_engine_differs() -> None:
    def fails(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        raise AssertionError

    expected = np.ones((2, 40))
    assert judged(expected, expected, "fp32", exact=fails).rounding is None
    assert not judged(expected, -expected, "fp16", exact=fails).passed


def test_the_gate_names_the_limit_that_was_missed() -> None:
    """A case of rounding may differ by more; one without is judged by the tolerance, and the gate says which failed."""
    allowed = ParityCase("t", "base", 1, "distinct", 1e-3, 0.0, True, rounding=4e-4)
    failed = ParityCase("t", "pruned", 1, "distinct", 5e-4, 0.0, False)
    for cases, limit in (([allowed], 1.6e-3), ([allowed, failed], 1e-4)):
        measured = Measured(tuple(cases), None, ())
        gate = next(one for one in judge(Gates(), Budget(macs=0.5), 0.5, measured) if one.name == "parity")
        assert gate.required == pytest.approx(limit) and gate.passed == (limit > 1e-4)
        assert ("the model itself rounds by 0.0004" in gate.note) == gate.passed
