"""Parity: does the engine compute what the model computes, at every shipped batch size and for every row?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from optin_export.engines import Engine

Arrays = Mapping[str, np.ndarray]
#: fp32: largest difference of a row, relative to the largest value of that row's reference. Float rounding stays about
#: a hundred times below it (docs/measurements/*.json, parity).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ParityCase:
    """One comparison: an engine ('base' or 'pruned') at one batch size, on distinct or on identical rows.

    max_error: the worst row's largest difference, relative to that row's scale. spread: for identical rows, the
    largest difference between rows of the engine's own output (an engine that mixes rows up shows here).
    """

    target: str
    model: str
    batch: int
    rows: str
    max_error: float
    spread: float
    passed: bool

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
) -> ParityCase:
    """Run both on the same inputs and compare row by row.

    reference: named inputs -> the output [batch, ...] of the torch model the engine was built from.
    """
    expected = reference(inputs)
    got = engine.run(inputs)[engine.outputs[0]]
    batch = len(expected)
    if got.shape != expected.shape or not np.isfinite(got).all():
        error = spread = float("inf")
    else:
        rows, wanted = got.reshape(batch, -1), expected.reshape(batch, -1)
        scale = np.maximum(np.abs(wanted).max(1), 1e-12)
        error = float((np.abs(rows - wanted).max(1) / scale).max())
        spread = float((np.abs(rows - rows[:1]).max(1) / scale).max()) if identical else 0.0
    passed = error <= TOLERANCE and spread <= TOLERANCE
    # JSON knows no infinity; the largest float says the same and fails the same.
    limit = float(np.finfo(np.float64).max)
    kind = "identical" if identical else "distinct"
    return ParityCase(target, model, batch, kind, min(error, limit), min(spread, limit), passed)
