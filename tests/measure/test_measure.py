"""The measurements and the gate can fail, and do when they should. No test here depends on how fast the machine is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.data import Batch, Dataset
from optin_export.data.text import Answer
from optin_export.engines import modes
from optin_export.errors import InputError
from optin_export.measure import (
    Accuracy,
    Latency,
    Measured,
    MeasureSettings,
    ParityCase,
    judge,
    latency,
    measure_engines,
)
from optin_export.measure.accuracy import evaluate
from optin_export.measure.metrics import METRICS
from optin_export.measure.neighbours import Neighbours
from optin_export.measure.parity import compare, shortened
from optin_export.recipe import Budget, Gates


class FakeEngine:
    """Computes a function of its input; `ms` is what the faked clock says a call takes."""

    inputs, outputs = ("x",), ("y",)

    def __init__(self, function=lambda x: 2 * x, ms: float = 1.0) -> None:  # type: ignore[no-untyped-def]
        self.function, self.ms, self.calls = function, ms, 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"y": self.function(inputs["x"])}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> np.random.Generator:
    """Latency of a call = the engine's `ms` with 2 % noise, without waiting."""
    generator = np.random.default_rng(0)

    def timer_of(engine: FakeEngine, inputs: Mapping[str, np.ndarray], mode: str) -> Callable[[], float]:
        return lambda: engine.ms * float(generator.normal(1.0, 0.02))

    monkeypatch.setattr(latency, "timer_of", timer_of)
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(latency, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(latency.Watch, "seen", lambda watch: None)
    monkeypatch.setattr(latency.time, "process_time_ns", lambda: 0)
    return generator


def measured(base: float, pruned: float) -> Latency:
    x = {"x": np.ones((2, 3), np.float32)}
    settings = latency.LatencySettings("t", 2, None, 0)
    return latency.measure_latency(lambda: FakeEngine(ms=base), lambda: FakeEngine(ms=pruned), x, settings)


def test_speedup_is_the_ratio_with_an_interval_around_it(clock: np.random.Generator) -> None:
    result = measured(20.0, 10.0)
    assert result.speedup.ci_low <= result.speedup.median <= result.speedup.ci_high
    assert result.speedup.median == pytest.approx(2.0, rel=0.02)
    assert result.speedup.ci_high - result.speedup.ci_low < 0.1
    assert result.noise_floor < 0.05
    assert result.base_ms.p50 < result.base_ms.p90 < result.base_ms.p99


def test_a_restless_machine_is_measured_longer(clock: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(20.0, 10.0).blocks == latency.BLOCKS
    inner = latency.timer_of

    def restless_timer(*given: Any) -> Callable[[], float]:
        timer = inner(*given)
        return lambda: timer() * clock.choice([1.0, 1.5])

    monkeypatch.setattr(latency, "timer_of", restless_timer)
    restless = measured(20.0, 10.0)
    assert latency.BLOCKS < restless.blocks <= latency.MAX_BLOCKS
    assert restless.blocks == len(restless.samples["base"]) == len(restless.samples["pruned"])


def test_no_speedup_is_reported_as_none(clock: np.random.Generator) -> None:
    result = measured(10.0, 10.0)
    assert result.speedup.ci_low < 1.0 + result.noise_floor
    assert result.speedup.median == pytest.approx(1.0, abs=0.02)


def test_what_else_ran_meanwhile_is_told(clock: np.random.Generator, monkeypatch: Any) -> None:
    def watched(others: float) -> Latency:
        monkeypatch.setattr(latency.Watch, "seen", lambda watch: Neighbours(others=others, stolen=0.02))
        return measured(20.0, 10.0)

    quiet, busy = watched(0.01), watched(0.5)
    assert Latency.from_json(json.loads(json.dumps(busy.to_json()))) == busy
    assert busy.neighbours is not None and busy.neighbours.busy
    assert quiet.neighbours is not None and not quiet.neighbours.busy


def test_arms_are_interleaved_in_random_order(monkeypatch: pytest.MonkeyPatch, clock: np.random.Generator) -> None:
    order: list[float] = []
    inner = latency.timer_of

    def noted(engine: FakeEngine, *given: Any) -> Callable[[], float]:
        timer = inner(engine, *given)
        return lambda: order.append(engine.ms) or timer()

    monkeypatch.setattr(latency, "timer_of", noted)
    measured(50.0, 40.0)
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes > latency.BLOCKS / 2
    assert order.count(50.0) > order.count(40.0)  # base is loaded twice


class OwnClock(FakeEngine):
    """Brings its own clock, as engines on a GPU do."""

    modes = ("call", "device")

    def timer(self, inputs: Mapping[str, np.ndarray], mode: str) -> Callable[[], float]:
        def once() -> float:
            self.run(inputs)
            return self.ms / (2.0 if mode == "device" else 1.0)

        return once


def test_an_engine_may_bring_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM_UP_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(latency, name, 0.0)
    x = {"x": np.ones((2, 3), np.float32)}
    engine = OwnClock(ms=40.0)
    assert modes(engine) == ("call", "device") and modes(FakeEngine()) == ("call",)
    assert latency.timer_of(engine, x)() == 40.0 and latency.timer_of(engine, x, "device")() == 20.0
    host = FakeEngine(ms=40.0)
    assert 0.0 < latency.timer_of(host, x)() < 40.0 and host.calls == 1  # the host's clock: it does not take that long
    settings = latency.LatencySettings("t", 2, None, 0, mode="device")
    result = latency.measure_latency(lambda: engine, lambda: OwnClock(ms=10.0), x, settings)
    assert (result.mode, result.base_ms.p50) == ("device", 20.0) and result.speedup.median == pytest.approx(4.0)
    assert "cpu" not in result.by  # the host only waits for a device


def test_latency_survives_json(clock: np.random.Generator) -> None:
    result = measured(20.0, 10.0)
    assert Latency.from_json(result.to_json()) == result


X = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}


def case(function, identical: bool = False) -> ParityCase:  # type: ignore[no-untyped-def]
    inputs = {"x": np.repeat(X["x"][:1], 3, 0)} if identical else X
    engine = FakeEngine(function)
    rows = "identical" if identical else "distinct"
    return compare(engine, lambda given: 2 * given["x"], inputs, target="t", model="base", rows=rows)


def test_parity_passes_for_rounding_only() -> None:
    assert case(lambda x: 2 * x * np.float32(1 + 1e-6)).passed


def swapped(x: np.ndarray) -> np.ndarray:
    return 2 * x[::-1]


def later_rows_wrong(x: np.ndarray) -> np.ndarray:
    return 2 * x * np.array([[1], [1], [1.01]], np.float32)


@pytest.mark.parametrize(
    "function",
    [
        swapped,
        later_rows_wrong,
        lambda x: 2 * x + np.nan,
        lambda x: 2 * x[:2],
        lambda x: 2 * x * 1.001,
    ],
    ids=["rows swapped", "last row wrong", "nan", "rows missing", "scaled"],
)
def test_parity_fails_for_wrong_outputs(function) -> None:  # type: ignore[no-untyped-def]
    result = case(function)
    assert not result.passed
    assert np.isfinite(result.max_error)  # JSON has no infinity


def test_short_texts_have_the_first_token_and_the_last_ones_before_the_padding() -> None:
    inputs = {"input_ids": np.array([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).astype(np.int64)
    assert shortened(inputs, 2)["input_ids"].tolist() == [[5, 1], [9, 1]]
    assert shortened(inputs, 3)["input_ids"].tolist() == [[5, 8, 1], [9, 4, 1]]
    assert shortened(inputs, 3)["attention_mask"].tolist() == [[1] * 3] * 2
    assert shortened({"input_ids": inputs["input_ids"][:1]}, 2)["input_ids"].tolist() == [[5, 1]]


def doubled(x: np.ndarray) -> np.ndarray:
    return 2.0 * x.sum(1, keepdims=True)


def measured_texts(function: Any, reference: Any) -> Measured:
    engine = {name: lambda: FakeEngine(function) for name in ("base", "pruned")}
    x = np.arange(20.0, dtype=np.float32).reshape(2, 10)
    settings = MeasureSettings(batches=(2,), sequence=10, seed=0, short=True)
    given = {name: lambda inputs: reference(inputs["x"]) for name in ("base", "pruned")}
    return measure_engines(
        {"t": engine}, given, lambda _, distinct: {"x": x if distinct else x[[0, 0]]}, None, settings
    )


def test_a_graph_that_is_wrong_for_short_texts_fails_parity() -> None:
    """As one that was traced for longer ones, of a model whose code does something else for these."""

    def other(x: np.ndarray) -> np.ndarray:
        return doubled(x) * (1 if x.shape[1] > 2 else -1)

    found = measured_texts(doubled, other)
    assert [(one.rows, one.passed) for one in found.parity if one.model == "base"] == [
        ("distinct", True), ("identical", True), ("short", False), ("short", True)
    ]  # fmt: skip
    assert not found.latency


def test_a_graph_that_cannot_run_a_length_fails_parity_with_the_engines_words() -> None:
    def other(x: np.ndarray) -> np.ndarray:
        if x.shape[1] == 2:
            raise RuntimeError("a Reshape node\nand more")
        return doubled(x)

    found = measured_texts(other, doubled)
    (failed,) = (one for one in found.parity if not one.passed and one.model == "base")
    assert failed.rows == "short" and failed.failure == "cannot run inputs of 2 x 2: RuntimeError: a Reshape node"
    (gate, *_) = judge(Gates(), Budget(macs=0.6), 0.6, found)
    assert not gate.passed and gate.kind == "parity"
    assert "base on t cannot run inputs of 2 x 2: RuntimeError: a Reshape node" in gate.note
    assert not found.latency


def test_lengths_for_which_the_model_itself_has_no_output_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: np.ndarray) -> np.ndarray:
        if x.shape[1] == 2:
            raise IndexError("too short")
        return doubled(x) * (np.nan if x.shape[1] == 3 else 1)

    found = measured_texts(lambda x: -doubled(x), fails)
    assert {one.rows for one in found.parity} == {"distinct", "identical"}


def test_identical_rows_must_give_identical_outputs() -> None:
    result = case(later_rows_wrong, identical=True)
    assert result.spread > 0.009
    assert not result.passed


def dataset(labels: np.ndarray) -> Dataset:
    x = np.linspace(-1, 1, len(labels)).astype(np.float32)
    batches = tuple(
        Batch({"x": torch.from_numpy(np.stack([x[rows], -x[rows]], 1))}, rows)
        for rows in np.array_split(np.random.default_rng(0).permutation(len(labels)), 4)
    )
    return Dataset((batches,), labels, "accuracy")


def test_accuracy_is_measured_on_the_engine_in_the_rows_order(clock: np.random.Generator) -> None:
    labels = (np.linspace(-1, 1, 40) < 0).astype(float)
    good, bad = FakeEngine(), FakeEngine(lambda x: -2 * x)
    for pruned, expected in ((good, 0.0), (bad, 100.0)):
        result = measure_engines(
            {"t": {"base": lambda: good, "pruned": lambda: pruned}},  # noqa: B023
            {"base": lambda given: 2 * given["x"], "pruned": lambda given: pruned.function(given["x"])},  # noqa: B023
            lambda batch, distinct: {"x": X["x"][:batch] if distinct else np.repeat(X["x"][:1], batch, 0)},
            dataset(labels),
            MeasureSettings([2], None, seed=0),
        )
        assert result.accuracy is not None
        assert result.accuracy.base == 100.0
        assert result.accuracy.drop == expected
        assert result.accuracy.drop_low <= expected <= result.accuracy.drop_high
        assert Measured.from_json(result.to_json()) == result


def test_nothing_is_timed_when_parity_fails(clock: np.random.Generator) -> None:
    wrong = FakeEngine(lambda x: 3 * x)
    result = measure_engines(
        {"t": {"base": FakeEngine, "pruned": lambda: wrong}},
        {"base": lambda given: 2 * given["x"], "pruned": lambda given: 2 * given["x"]},
        lambda batch, distinct: {"x": np.ones((batch, 4), np.float32)},
        dataset(np.zeros(8)),
        MeasureSettings([2], None, seed=0),
    )
    assert result.accuracy is None
    assert result.latency == ()
    assert wrong.calls == 2  # distinct and identical rows


def test_metrics() -> None:
    labels = np.array([0.0, 1.0, 2.0, 3.0])

    def points(name: str, outputs: np.ndarray, wanted: Sequence[Any] = labels) -> float:
        return METRICS[name].value(METRICS[name].statistic(outputs, wanted, {}))

    assert points("accuracy", np.eye(4)[[0, 1, 0, 3]]) == 75.0
    assert points("spearman", np.array([[0.1], [0.2], [0.9], [5.0]])) == pytest.approx(100.0)
    assert points("pearson", -labels) == pytest.approx(-100.0)
    with pytest.raises(InputError):
        points("spearman", labels, np.ones(4))
    # Per token: padding (-100, or a shorter list of labels) does not count.
    tokens = np.eye(3)[[[0, 1, 2], [2, 2, 2]]]
    assert points("accuracy", tokens, [[0, 0, -100], [2]]) == pytest.approx(100 * 2 / 3)
    with pytest.raises(InputError, match="no row has a label"):
        points("accuracy", tokens, [[], [-100]])


def test_the_drop_interval_is_paired() -> None:
    """The same errors on both sides cancel: a drop of zero has no spread, however inaccurate both are."""
    labels = np.random.default_rng(0).integers(0, 2, 500).astype(float)
    predictions = np.eye(2)[np.random.default_rng(1).integers(0, 2, 500)]
    statistics = METRICS["accuracy"].statistic(predictions, labels, {})
    result = evaluate(statistics, statistics.copy(), "accuracy", 0)
    assert result.drop == result.drop_low == result.drop_high == 0.0


GOOD = ParityCase("t", "base", 1, "distinct", 1e-6, 0.0, True)
ACCURACY = Accuracy("accuracy", 100, 90.0, 89.5, 0.5, -0.2, 1.2)


def verdicts(gates: Gates, spent: float = 0.6, **changes: object) -> dict[str, bool]:
    values = {"parity": (GOOD,), "accuracy": ACCURACY, "latency": (), **changes}
    return {gate.name: gate.passed for gate in judge(gates, Budget(macs=0.6), spent, Measured(**values))}  # type: ignore[arg-type]


def test_gates_compare_with_what_was_required(clock: np.random.Generator) -> None:
    two = (measured(20.0, 10.0), measured(12.0, 10.0))
    assert verdicts(Gates(speedup=1.1, accuracy_drop=0.5), latency=two) == {
        "parity": True,
        "budget.macs": True,
        "speedup": True,
        "accuracy_drop": True,
    }
    # The slowest gain counts, and by the lower end of its interval.
    assert not verdicts(Gates(speedup=1.5), latency=two)["speedup"]
    assert not verdicts(Gates(speedup=two[1].speedup.median), latency=two[1:])["speedup"]
    assert not verdicts(Gates(accuracy_drop=0.4))["accuracy_drop"]
    assert not verdicts(Gates(), spent=0.61)["budget.macs"]


def test_what_was_not_evaluated_never_passes() -> None:
    result = verdicts(Gates(speedup=0.1, accuracy_drop=99.0), parity=(), accuracy=None)
    assert result == {"parity": False, "budget.macs": True, "speedup": False, "accuracy_drop": False}


def test_macro_f1_is_that_of_torchmetrics() -> None:
    """Over the classes that occur or are predicted; ignored tokens count for nothing."""
    from torchmetrics.functional.classification import multiclass_f1_score

    def library(logits: np.ndarray, wanted: np.ndarray) -> float:
        predicted = torch.from_numpy(logits.argmax(-1))
        return 100 * float(multiclass_f1_score(predicted, torch.from_numpy(wanted), num_classes=4, average="macro"))

    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6, 5, 4))
    logits[..., 3] = -9  # never predicted, never labelled
    wanted = generator.integers(0, 3, (6, 5))
    wanted[0, 2:] = wanted[3, 0] = -100
    metric = METRICS["f1"]
    counted = wanted != -100
    expected = library(logits[counted], wanted[counted])
    halves = [
        metric.statistic(logits[part], [list(row) for row in wanted[part]], {}) for part in (slice(4), slice(4, 6))
    ]
    assert metric.value(np.concatenate(halves)) == pytest.approx(expected)
    single = metric.statistic(logits[:, 0], wanted[:, 1], {})
    expected = library(logits[:, 0], wanted[:, 1])
    assert metric.value(single) == pytest.approx(expected)
    with pytest.raises(InputError, match="f1"):
        metric.value(metric.statistic(logits, [[-100]] * 6, {}))
    with pytest.raises(InputError, match="label 4 is not one of the model"):
        metric.statistic(logits[:, 0], np.array([0, 1, 4, 0, 0, 0]), {})


def test_perplexity_is_the_exponential_of_the_mean_cross_entropy() -> None:
    logits = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(1))
    wanted[0, 4:] = wanted[2, :5] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).exp()
    metric = METRICS["perplexity"]
    statistics = metric.statistic(logits.numpy(), [row.numpy() for row in wanted], {})
    assert statistics.shape == (3, 2) and metric.value(statistics) == pytest.approx(float(expected), rel=1e-5)
    accuracy = evaluate(statistics, statistics * np.array([1.1, 1.0]), "perplexity", 0)
    assert accuracy.drop > 0 and accuracy.drop == pytest.approx(accuracy.pruned - accuracy.base)
    with pytest.raises(InputError, match="perplexity"):
        metric.value(metric.statistic(logits.numpy(), [[-100]] * 3, {}))


def test_answers_are_read_from_the_context_only() -> None:
    """The best pair of start and end inside the context, in order and not too far apart; SQuAD's normalisation."""
    context = "The red house, and a guitar"
    spans = [(0, 3), (4, 7), (8, 13), (13, 14), (15, 18), (19, 20), (21, 27)]
    offsets = np.array([[-1, -1], [-1, -1], *spans, [-1, -1]])
    scores = np.zeros((1, 2, 12))
    scores[0, 0, [0, 3, 11]] = 9, 2, 8  # the mark, "red", padding
    scores[0, 1, [1, 4, 2, 10]] = 9, 2, 3, 7  # "The" ends before "red" begins
    metrics = {name: METRICS[name] for name in ("squad_f1", "exact_match")}

    def points(*answers: str) -> list[float]:
        label = Answer(answers, context, offsets)
        return [one.value(one.statistic(scores, [label], {})) for one in metrics.values()]

    assert points("the Red house!") == [100.0, 100.0]
    assert points("guitar", "red") == [pytest.approx(200 / 3), 0.0]
    assert points("guitar") == [0.0, 0.0]
    far = np.zeros((1, 2, 40))
    far[0, 0, 0], far[0, 1, 35] = 5, 5
    letters = Answer(("b",), "b" * 40, np.stack([np.arange(40), np.arange(40) + 1], 1))
    assert metrics["exact_match"].statistic(far, [letters], {})[0, 0] == 1.0  # 36 tokens are too many
    nothing = Answer(("b",), "b", np.full((4, 2), -1))
    assert metrics["squad_f1"].statistic(np.ones((1, 2, 4)), [nothing], {}).tolist() == [[0.0, 1.0]]
