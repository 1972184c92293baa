"""measure: two engines and data become parity, accuracy, latency and the gate's verdict. Knows not how engines work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optin_export.engines import CALL, Engine
from optin_export.measure.accuracy import Accuracy, Function, evaluate, lost, predict
from optin_export.measure.gate import Gate, judge
from optin_export.measure.gpu import measure_modes
from optin_export.measure.latency import Latency
from optin_export.measure.metrics import METRICS
from optin_export.measure.parity import TOLERANCE, ParityCase, compare
from optin_export.sources import Dataset

__all__ = [
    "METRICS",
    "TOLERANCE",
    "Accuracy",
    "Gate",
    "Latency",
    "Measured",
    "ParityCase",
    "accuracy_of",
    "judge",
    "lost",
    "measure_engines",
]

Arrays = Mapping[str, np.ndarray]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """Everything measured on one run's engines. accuracy: of the first target's; None without evaluation data.

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


def measure_engines(
    engines: Mapping[str, Mapping[str, Engine]],
    references: Mapping[str, Callable[[Arrays], np.ndarray]],
    rows: Callable[[int, bool], Arrays],
    data: Dataset | None,
    *,
    batches: Sequence[int],
    sequence: int | None,
    seed: int,
    tick: Tick,
    judged: Mapping[str, str] | None = None,
) -> Measured:
    """Parity, then accuracy, then latency; what computes the wrong thing is neither evaluated nor timed.

    engines: target name -> {"base", "pruned"}. references: the torch models they were built from, as functions of
    named arrays. rows: (batch, distinct) -> that many real rows at the shipped shape, distinct or all the same.
    judged: target name -> the mode that gates are about, where it is not `CALL`.
    """
    parity = [
        compare(engine, references[which], rows(batch, distinct), target=target, model=which, identical=not distinct)
        for target, pair in engines.items()
        for which, engine in pair.items()
        for batch in batches
        for distinct in (True, False)
    ]
    if not all(case.passed for case in parity):
        return Measured(tuple(parity), None, ())
    accuracy = None
    if data is not None and engines:
        pair = next(iter(engines.values()))
        steps = 2 * sum(len(side) for side in data.sides)
        half = steps // 2
        base = predict(_function(pair["base"]), data, lambda done, total: tick(done, steps))
        pruned = predict(_function(pair["pruned"]), data, lambda done, total: tick(half + done, steps))
        accuracy = evaluate(base, pruned, data.metric, seed)
    latency = [
        one
        for target, pair in engines.items()
        for batch in batches
        for one in measure_modes(
            pair["base"],
            pair["pruned"],
            rows(batch, True),
            target=target,
            batch=batch,
            sequence=sequence,
            seed=seed,
            judged=(judged or {}).get(target, CALL),
            tick=tick,
        )
    ]
    return Measured(tuple(parity), accuracy, tuple(latency))


def accuracy_of(function: Function, data: Dataset) -> float:
    """The data's metric; a torch model as well as an engine is a function of named arrays."""
    return METRICS[data.metric].value(predict(function, data))


def _function(engine: Engine) -> Function:
    return lambda inputs: engine.run(inputs)[engine.outputs[0]]
