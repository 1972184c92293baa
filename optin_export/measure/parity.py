"""Parity: does the engine compute what the model computes, at every shipped batch size and for every row?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from optin_export.engines import Engine

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """What an engine may differ from its fp32 torch model.

    error: largest difference of a row, relative to the largest value of that row's reference. cosine: at least this
    between a row and its reference. agreement: at least this share of choices is the reference's, or ties with it:
    its reference value is below the best by at most `tie`, relative to the row's largest value.
    """

    error: float
    cosine: float
    agreement: float
    tie: float = 0.0


#: fp32: float rounding stays about a hundred times below it (docs/measurements/*.json, parity). The others have less
#: precise weights and activations by intent: their tolerance finds wrong graphs, what they cost is the accuracy gate's.
#: int8 and fp8: an error of about twice what a right int8 graph shows (docs/measurements/minilm_sts_int8.json, parity),
#: and less than of one with a wrong scale or exchanged weights (tests/engines/test_unsigned.py). Cosine, agreement and
#: ties: by judgement.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(1e-4, 1 - 1e-6, 1.0, 1e-4),
    "fp16": Tolerance(2e-2, 0.9995, 1.0, 1e-2),
    "bf16": Tolerance(1e-1, 0.995, 1.0, 5e-2),
    "int8": Tolerance(4e-1, 0.95, 0.9, 2e-1),
    "fp8": Tolerance(4e-1, 0.95, 0.9, 2e-1),
}


@dataclass(frozen=True)
class ParityCase:
    """One comparison: an engine of the 'base' or 'pruned' model at one batch size, on distinct or on identical rows.

    max_error: the worst row's largest difference, relative to that row's scale. spread: for identical rows, the
    largest difference between rows of the engine's own output (an engine that mixes rows up shows here). cosine: the
    worst row's. agreement: share of choices (largest of the classes) that are the reference's; None without classes.
    """

    target: str
    model: str
    batch: int
    rows: str
    max_error: float
    spread: float
    passed: bool
    precision: str = "fp32"
    cosine: float = 1.0
    agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    engine: Engine,
    reference: Callable[[Arrays], np.ndarray],
    inputs: Arrays,
    *,
    target: str,
    model: str,
    identical: bool,
    precision: str = "fp32",
    classes: int | None = None,
) -> ParityCase:
    """Run both on the same inputs and compare row by row.

    reference: named inputs -> the output [batch, ...] of the torch model the engine was built from. classes: the axis
    of the output whose largest value is the model's choice; None where there is no choice.
    """
    expected = reference(inputs)
    got = engine.run(inputs)[engine.outputs[0]]
    tolerance = TOLERANCES[precision]
    kind = "identical" if identical else "distinct"
    if got.shape != expected.shape or not np.isfinite(got).all():
        # JSON has no infinity; the largest number of a report fails in the same way.
        limit = 1e100
        return ParityCase(target, model, len(expected), kind, limit, limit, False, precision, 0.0)
    rows, wanted = (array.reshape(len(expected), -1).astype(np.float64) for array in (got, expected))
    scale = np.maximum(np.abs(wanted).max(1), 1e-12)
    error = float((np.abs(rows - wanted).max(1) / scale).max())
    spread = float((np.abs(rows - rows[:1]).max(1) / scale).max()) if identical else 0.0
    cosine = _cosine(rows, wanted)
    agreement = None
    if classes is not None and expected.ndim > 1 and expected.shape[classes] > 1:
        agreement = _agreement(got, expected, classes, scale * tolerance.tie)
    passed = (
        max(error, spread) <= tolerance.error
        and cosine >= tolerance.cosine
        and (agreement is None or agreement >= tolerance.agreement)
    )
    return ParityCase(target, model, len(rows), kind, error, spread, passed, precision, cosine, agreement)


def _cosine(rows: np.ndarray, wanted: np.ndarray) -> float:
    """The worst row's cosine; 1 where both are zero."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
    same = (rows == wanted).all(1)
    return float(np.where(same, 1.0, (rows * wanted).sum(1) / np.maximum(lengths, 1e-24)).min())


def _agreement(got: np.ndarray, expected: np.ndarray, axis: int, slack: np.ndarray) -> float:
    """Share of choices that are the reference's; a choice whose reference value is within `slack` [rows] is a tie."""
    chosen = np.take_along_axis(expected, np.expand_dims(got.argmax(axis), axis), axis)
    missed = expected.max(axis, keepdims=True) - chosen
    return float((missed <= slack.reshape(-1, *[1] * (expected.ndim - 1))).mean())
