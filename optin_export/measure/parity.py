"""Parity: does the engine compute what the model computes, at every shipped batch size and for every row?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from optin_export.engines import Engine
from optin_export.errors import OptinError

Arrays = Mapping[str, np.ndarray]
#: Tokens per row of the cases with short texts: a model's code may do something else for them, and the exporter keeps
#: only what it does for the example.
SHORT = (2, 3)


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference of an engine from its fp32 torch model.

    error: largest difference of a row, relative to the largest value of that row's reference. cosine: at least this
    between a row and its reference. agreement: at least this share of choices is the reference's, or ties with it:
    its reference value is below the best by at most `tie`, relative to the row's largest value.
    """

    error: float
    cosine: float
    agreement: float
    tie: float = 0.0


#: fp32: float rounding stays about a hundred times below it (docs/measurements/*.json, parity). The others have less
#: precise weights and activations by design: their tolerance finds wrong graphs; the accuracy gate judges their cost.
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
    """One comparison: an engine of the 'base' or 'pruned' model at one batch size.

    rows: distinct, identical, or short (texts of a few tokens).

    max_error: the worst row's largest difference, relative to that row's scale. spread: for identical rows, the
    largest difference between rows of the engine's own output (an engine that mixes rows up shows here). cosine: the
    worst row's. agreement: share of choices (largest of the classes) that are the reference's; None without classes.
    failure: what the engine said, if it could not run these inputs. rounding: by how much the torch model in fp32
    differs from itself in fp64 on these rows, as max_error does; only of fp32 engines beyond the tolerance.
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
    failure: str | None = None
    rounding: float | None = None

    @property
    def limit(self) -> float:
        """What max_error and spread may be."""
        return _allowed(TOLERANCES[self.precision], self.rounding).error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: An fp32 engine may differ by this multiple of the model's own rounding: both round, in other orders. A model that
#: rounds by more than MOST_ROUNDING has no digits left in which a wrong graph shows.
ROUNDINGS, MOST_ROUNDING = 4.0, 2e-3


def _allowed(tolerance: Tolerance, rounding: float | None) -> Tolerance:
    """The tolerance for a model that rounds by so much itself."""
    error = ROUNDINGS * (rounding or 0.0)
    if error <= tolerance.error or (rounding or 0.0) > MOST_ROUNDING:
        return tolerance
    # 1 - e^2 / 2 is the cosine of a row that is turned by an angle e; twice that is allowed.
    return replace(tolerance, error=error, cosine=min(tolerance.cosine, 1 - error**2), tie=max(tolerance.tie, error))


def compare(
    engine: Engine,
    reference: Callable[[Arrays], np.ndarray],
    inputs: Arrays,
    *,
    target: str,
    model: str,
    rows: str,
    precision: str = "fp32",
    classes: int | None = None,
    exact: Callable[[Arrays], np.ndarray | None] | None = None,
) -> ParityCase:
    """Run both on the same inputs and compare row by row.

    reference: named inputs -> the output [batch, ...] of the torch model the engine was built from. rows: see
    `ParityCase`. classes: the axis of the output whose largest value is the model's choice; None if there is no choice.
    exact: the same model in fp64 (None: it does not run in fp64), which is called if an fp32 engine fails.
    """
    expected = reference(inputs)
    tolerance = TOLERANCES[precision]
    # JSON has no infinity; the report's largest number fails equally.
    limit = 1e100
    failed = ParityCase(target, model, len(expected), rows, limit, limit, False, precision, 0.0)
    try:
        got = engine.run(inputs)[engine.outputs[0]]
    except (OptinError, MemoryError):
        raise
    except Exception as refusal:  # each engine has types of its own: a size may be a constant in the graph
        shape = " x ".join(map(str, next(iter(inputs.values())).shape))
        return replace(failed, failure=f"cannot run inputs of {shape}: {_said(refusal)}")
    if got.shape != expected.shape or not np.isfinite(got).all():
        return failed
    found = differences(got, expected)
    error, cosine = float(found.error.max()), float(found.cosine.min())
    spread = float((np.abs(found.rows - found.rows[:1]).max(1) / found.scale).max()) if rows == "identical" else 0.0
    choices = classes is not None and expected.ndim > 1 and expected.shape[classes] > 1

    def judged(own: float | None) -> ParityCase:
        allowed, agreement = _allowed(tolerance, own), None
        if choices:
            assert classes is not None
            agreement = share_agreeing(got, expected, classes, found.scale * allowed.tie)
        passed = (
            max(error, spread) <= allowed.error
            and cosine >= allowed.cosine
            and (agreement is None or agreement >= allowed.agreement)
        )
        case = ParityCase(target, model, len(expected), rows, error, spread, passed, precision, cosine, agreement)
        return replace(case, rounding=own)

    case = judged(None)
    wide = None if case.passed or precision != "fp32" or exact is None else exact(inputs)
    return case if wide is None else judged(float(differences(expected, wide).error.max()))


def _said(error: Exception) -> str:
    """The first line of a library's error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def shortened(inputs: Arrays, tokens: int) -> dict[str, np.ndarray]:
    """Text of `tokens` per row: the first token and the last ones before the padding, as models may look for both.

    inputs: [rows, sequence] each, padded at the end where there is an attention mask.
    """
    first, mask = next(iter(inputs.values())), inputs.get("attention_mask")
    ends = np.full((len(first), 1), first.shape[1]) if mask is None else mask.sum(1, keepdims=True)
    at = np.concatenate([np.zeros_like(ends), np.maximum(ends + np.arange(1 - tokens, 0), 0)], 1)
    return {name: np.take_along_axis(array, at, 1) for name, array in inputs.items()}


@dataclass(frozen=True)
class Differences:
    """How far each row of an output is from its reference.

    rows: the output, [rows, values]. scale: the largest value of each reference, [rows]. error: the largest difference
    relative to it, [rows]. cosine: [rows]; 1 where both are equal, all zeros included.
    """

    rows: np.ndarray
    scale: np.ndarray
    error: np.ndarray
    cosine: np.ndarray


def differences(got: np.ndarray, expected: np.ndarray) -> Differences:
    """Compare two outputs of one shape, [rows, ...], in float64."""
    rows, wanted = (array.reshape(len(expected), -1).astype(np.float64) for array in (got, expected))
    scale = np.maximum(np.abs(wanted).max(1), 1e-12)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = np.where((rows == wanted).all(1), 1.0, (rows * wanted).sum(1) / np.maximum(lengths, 1e-24))
    return Differences(rows, scale, np.abs(rows - wanted).max(1) / scale, cosine)


def share_agreeing(got: np.ndarray, expected: np.ndarray, axis: int, slack: np.ndarray) -> float:
    """Share of choices (the largest along `axis`) that are the reference's.

    A choice whose reference value is below the best by at most `slack`, [rows], is a tie and counts.
    """
    chosen = np.take_along_axis(expected, np.expand_dims(got.argmax(axis), axis), axis)
    missed = expected.max(axis, keepdims=True) - chosen
    return float((missed <= slack.reshape(-1, *[1] * (expected.ndim - 1))).mean())
