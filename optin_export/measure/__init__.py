"""Measure parity, accuracy and latency of engines, and judge the gates. Independent of engine internals.

Nothing here imports torch before something is measured: commands that only read results use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export.engines import CALL, Engine
from optin_export.measure.accuracy import Accuracy, Function, evaluate, lost, predict
from optin_export.measure.bootstrap import Interval
from optin_export.measure.chance import chance, labels_of
from optin_export.measure.doubts import Doubt, doubts
from optin_export.measure.gate import Gate, judge
from optin_export.measure.gpu import measure_modes
from optin_export.measure.interleaved import Interleaved, interleave
from optin_export.measure.latency import Latency, LatencySettings, Load, measure_latency
from optin_export.measure.metrics import METRICS, Metric, metric_of
from optin_export.measure.neighbours import BUSY
from optin_export.measure.own import is_own
from optin_export.measure.parity import SHORT, TOLERANCES, ParityCase, Tolerance, compare, shortened
from optin_export.measure.rounds import Speedup, latency_of
from optin_export.progress import advance, phase, task
from optin_export.recipe import MODELS, engine_name, engine_names, model_of, precision_of

if TYPE_CHECKING:
    from optin_export.data import Dataset

__all__ = [
    "METRICS",
    "TOLERANCES",
    "Accuracy",
    "Doubt",
    "Gate",
    "Interleaved",
    "Interval",
    "Latency",
    "LatencySettings",
    "Load",
    "MeasureSettings",
    "Measured",
    "Metric",
    "ParityCase",
    "Speedup",
    "Tolerance",
    "accuracy_of",
    "doubts",
    "evaluate",
    "interleave",
    "judge",
    "latency_of",
    "lost",
    "measure_engines",
    "measure_latency",
    "predict",
]

Arrays = Mapping[str, np.ndarray]
#: Shares of the stage's time that are usually over after parity and after accuracy.
PARITY_SHARE, ACCURACY_SHARE = 0.1, 0.3


@dataclass(frozen=True)
class Measured:
    """All measurements of one run's engines. accuracy: of the first target's engines; None without evaluation data.

    unmeasured: targets whose engines were built but cannot run on this machine, with the reason.
    """

    parity: tuple[ParityCase, ...]
    accuracy: Accuracy | None
    latency: tuple[Latency, ...]
    unmeasured: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "parity": [case.to_json() for case in self.parity],
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "latency": [one.to_json() for one in self.latency],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        return cls(
            tuple(ParityCase(**case) for case in value["parity"]),
            Accuracy(**value["accuracy"]) if value["accuracy"] else None,
            tuple(Latency.from_json(one) for one in value["latency"]),
            value.get("unmeasured", {}),
        )


@dataclass(frozen=True)
class MeasureSettings:
    """Settings of the measurements.

    batches: batch sizes of parity and latency. sequence: tokens per row of text. seed: seed of intervals and of the
    order of blocks. short: whether parity also compares texts of a few tokens, of the fp32 engines at the first batch
    size. judged: target name -> the mode that gates apply to, if not `CALL`. precision: precision of the judged
    engines. classes: axis of the classes in the output, for `compare`. other_work, blocks, seconds: see
    `LatencySettings`.
    """

    batches: Sequence[int]
    sequence: int | None
    seed: int
    short: bool = False
    judged: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"
    classes: int | None = None
    other_work: float = BUSY
    blocks: int | None = None
    seconds: float | None = None


def measure_engines(
    engines: Mapping[str, Mapping[str, Load]],
    references: Mapping[str, Callable[[Arrays], np.ndarray]],
    rows: Callable[[int, bool], Arrays],
    data: Dataset | None,
    settings: MeasureSettings,
    exact: Mapping[str, Callable[[Arrays], np.ndarray | None]] | None = None,
) -> Measured:
    """Measure parity, then accuracy, then latency; engines that fail parity are neither evaluated nor timed.

    Args:
        engines: target name -> `recipe.engine_names(precision)` -> a function that loads the engine; it is called once
            for parity and accuracy, and several times for latency.
        references: the torch models they were built from, as functions of named arrays.
        rows: (batch, distinct) -> that many real rows at the shipped shape, distinct or all the same.
        exact: the same models in fp64, see `parity.compare`.
    """
    precision, batches = settings.precision, settings.batches
    loaded = {target: {name: load() for name, load in loads.items()} for target, loads in engines.items()}
    parity = []
    phase("parity with torch", until=PARITY_SHARE)
    for model in MODELS:
        for kind, inputs in _parity_rows(rows, settings):
            expected = _expected(references[model], inputs, kind)
            if expected is None:
                continue
            parity += [
                compare(
                    engine,
                    lambda _, expected=expected: expected,  # type: ignore[misc]
                    inputs,
                    target=target,
                    model=model,
                    rows=kind,
                    precision=precision_of(name),
                    classes=settings.classes,
                    exact=None if exact is None else exact[model],
                )
                for target, built in loaded.items()
                for name, engine in built.items()
                if model_of(name) == model and (kind != "short" or precision_of(name) == "fp32")
            ]
    if not all(case.passed for case in parity):
        return Measured(tuple(parity), None, ())
    accuracy = None
    if data is not None and engines:
        phase("accuracy", until=ACCURACY_SHARE)
        accuracy = _accuracy(next(iter(loaded.values())), data, precision, settings.seed)
    loaded.clear()
    base, pruned = (engine_name(model, precision) for model in MODELS)
    latency: list[Latency] = []
    pairs = [(target, batch) for target in engines for batch in batches]
    for number, (target, batch) in enumerate(pairs, 1):
        until = ACCURACY_SHARE + (1 - ACCURACY_SHARE) * number / len(pairs)
        phase(f"latency on {target} at batch {batch}", until)
        built = engines[target]
        latency += measure_modes(
            built[base],
            built[pruned],
            rows(batch, True),
            LatencySettings(
                target,
                batch,
                settings.sequence,
                settings.seed,
                mode=settings.judged.get(target, CALL),
                precision=precision,
                other_work=settings.other_work,
                blocks=settings.blocks,
                seconds=settings.seconds,
            ),
            plain={name: built[name] for name in MODELS},
        )
    return Measured(tuple(parity), accuracy, tuple(latency))


def _parity_rows(rows: Callable[[int, bool], Arrays], settings: MeasureSettings) -> Iterator[tuple[str, Arrays]]:
    """(kind of rows, inputs) of every parity case."""
    for batch in settings.batches:
        yield "distinct", rows(batch, True)
        yield "identical", rows(batch, False)
    for tokens in SHORT if settings.short else ():
        yield "short", shortened(rows(settings.batches[0], True), tokens)


def _expected(reference: Callable[[Arrays], np.ndarray], inputs: Arrays, kind: str) -> np.ndarray | None:
    """The torch model's output; None for texts so short that the model itself has no output for them."""
    if kind != "short":
        return reference(inputs)
    try:
        expected = reference(inputs)
    except Exception:  # a library's code on a length that it does not take may raise anything
        return None
    return expected if np.isfinite(expected).all() else None


def _accuracy(built: Mapping[str, Engine], data: Dataset, precision: str, seed: int) -> Accuracy:
    """The accuracy of every engine; gates judge the shipped engine's loss against the unpruned fp32 engine."""
    names = engine_names(precision)
    with task(len(names) * sum(len(side) for side in data.sides)):
        found = {name: predict(_counted(built[name]), data) for name in names}
    own = is_own(data.metric)
    guess = None if own else chance(data.metric, found["base"], labels_of(data), data.classes)
    accuracy = evaluate(found["base"], found[engine_name("pruned", precision)], data.metric, seed, guess)
    return replace(accuracy, engines={name: metric_of(data.metric).value(one) for name, one in found.items()})


def accuracy_of(function: Function, data: Dataset) -> float:
    """The data's metric for a function of named arrays, which is an engine or a torch model."""
    return metric_of(data.metric).value(predict(function, data))


def _counted(engine: Engine) -> Function:
    """A function that returns the engine's first output, and counts every call as a step."""

    def answer(inputs: Arrays) -> np.ndarray:
        outputs = engine.run(inputs)
        advance()
        return outputs[engine.outputs[0]]

    return answer
