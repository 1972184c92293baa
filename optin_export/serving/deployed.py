"""Latency for clients: base and pruned model on a server, measured alternately, with every answer checked.

Blocks in random order of base, base again (A/A) and pruned, per setting: a number of threads in a closed loop, or a
fixed rate in an open loop. The speedup is a ratio of medians with a bootstrap interval over blocks, as for engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from optin_export.errors import InputError, ParityError
from optin_export.measure.bootstrap import ratio_of_medians
from optin_export.measure.parity import differences
from optin_export.progress import report
from optin_export.serving.client import Connection, Counters, Model, Request, Url, check_inputs, prepare
from optin_export.serving.traffic import Send, Traffic, closed_loop, open_loop
from optin_export.workdir.files import regular

ARMS = ("base", "again", "pruned")
#: Threads that wait for answers in the open loop.
OPEN_THREADS = 32
#: Without --rate: this share of the slower model's rate with one thread.
SHARE_OF_RATE = 0.7


@dataclass(frozen=True)
class Reference:
    """Real rows and the torch models' answers: inputs {name: [rows, ...]}, outputs {'base', 'pruned': [rows, ...]}."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    output: str
    tolerance: float

    @classmethod
    def load(cls, path: Path, output: str, tolerance: float) -> Reference:
        """Load measure/reference.safetensors. Raises InputError if it cannot be read."""
        try:
            tensors = load_file(regular(path))
            inputs = {name.removeprefix("input."): array for name, array in tensors.items() if name[:6] == "input."}
            outputs = {which: tensors[f"output.{which}"] for which in ("base", "pruned")}
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"cannot read {path}", str(error), "run the recipe again: it writes the file") from None
        return cls(inputs, outputs, output, tolerance)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of the answer to a request of `batch` rows."""
        return (batch, *self.outputs["base"].shape[1:])

    def rows(self, number: int, batch: int) -> np.ndarray:
        """The rows of request `number`."""
        count = len(self.outputs["base"])
        return np.arange(number * batch, (number + 1) * batch) % count


@dataclass(frozen=True)
class Setting:
    """One load. concurrency: threads of the closed loop; rate: requests a second of the open loop, 0: chosen."""

    protocol: str
    mode: Literal["closed", "open"]
    batch: int
    concurrency: int = 1
    rate: float = 0.0


@dataclass(frozen=True)
class LoadSettings:
    """Settings of a measurement.

    batch: rows per request. concurrency: threads of the closed loop, a setting each. rate: requests a second of the
    open loop; 0: chosen; None: no open loop. blocks: per setting and arm, of `seconds` each. timeout: seconds until a
    request has failed. seed: of the order of the blocks and of the intervals.
    """

    batch: int
    concurrency: Sequence[int]
    blocks: int
    seconds: float
    timeout: float
    seed: int
    rate: float | None = None


@dataclass(frozen=True)
class Arm:
    """One model in one setting. Milliseconds; throughput in rows a second. queue, compute: per request, by the server.

    rows_per_batch: how many rows the server ran together. None if it has no statistics.
    """

    p50: float
    p90: float
    p99: float
    throughput: float
    requests: int
    unsent: int = 0
    queue: float | None = None
    compute: float | None = None
    rows_per_batch: float | None = None


@dataclass(frozen=True)
class Result:
    """speedup: (median ratio, lower, upper end of its 95 % interval); noise_floor: base against itself."""

    setting: Setting
    base: Arm
    pruned: Arm
    speedup: tuple[float, float, float]
    noise_floor: float
    blocks: int
    largest_error: float
    samples: dict[str, list[list[float]]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    urls: Sequence[Url],
    models: tuple[Model, Model],
    reference: Reference,
    load: LoadSettings,
) -> Iterator[Result]:
    """One result per protocol and setting, as they are done.

    Raises EnvironmentLacks if the server fails, InputError if it does not serve the run's models, ParityError if an
    answer is wrong.
    """
    generator, batch, rate = np.random.default_rng(load.seed), load.batch, load.rate
    arms = {"base": models[0], "again": models[0], "pruned": models[1]}
    for url in urls:
        check_served(url, models, reference, batch, load.timeout)
    total, done = len(urls) * (len(load.concurrency) + (rate is not None)) * load.blocks, 0
    for url in urls:
        settings = [Setting(url.protocol, "closed", batch, threads) for threads in load.concurrency]
        if rate is not None:
            settings.append(Setting(url.protocol, "open", batch, OPEN_THREADS, rate))
        slowest = 0.0
        for setting in settings:
            if setting.mode == "open" and not setting.rate:
                setting = Setting(url.protocol, "open", batch, OPEN_THREADS, _some_rate(slowest, batch))
            bench = _Bench(url, setting, reference, load.timeout, load.seconds)
            for arm in ("base", "pruned"):  # warm up: connections, the server's threads, its memory
                bench.block(arms[arm], arm)
            bench.forget()
            for _ in range(load.blocks):
                for arm in generator.permutation(ARMS):
                    bench.block(arms[arm], arm)
                done += 1
                report(done, total)
            result = bench.result(generator)
            if slowest == 0.0:
                slowest = min(result.base.throughput, result.pruned.throughput)
            yield result


def check_served(url: Url, models: Sequence[Model], reference: Reference, batch: int, timeout: float) -> str:
    """Check that both models are ready and accept the rows; returns the server's name and version."""
    connection = Connection(url, timeout)
    try:
        for model in models:
            connection.ready(model)
            check_inputs(reference.inputs, reference.output, connection.metadata(model), model, batch)
        return connection.server()
    finally:
        connection.close()


def _some_rate(throughput: float, batch: int) -> float:
    """Requests a second that both models can take."""
    return max(0.1, round(SHARE_OF_RATE * throughput / batch, 1))


class _Bench:
    """The blocks of one setting so far."""

    def __init__(self, url: Url, setting: Setting, reference: Reference, timeout: float, seconds: float) -> None:
        self.url, self.setting, self.reference, self.timeout = url, setting, reference, timeout
        # One request to a slow model may take longer than a block: each loop sends at least one.
        self.seconds = seconds
        self.requests = requests_of(url, reference, setting.batch)
        self.forget()

    def forget(self) -> None:
        self.blocks: dict[str, list[Traffic]] = {arm: [] for arm in ARMS}
        self.counters: dict[str, list[Counters | None]] = {arm: [] for arm in ARMS}
        self.largest_error = 0.0

    def block(self, model: Model, arm: str) -> None:
        observer = Connection(self.url, self.timeout)
        try:
            before = observer.counters(model)
            if self.setting.mode == "closed":
                traffic = closed_loop(self._connect(model), self.setting.concurrency, self.seconds)
            else:
                traffic = open_loop(self._connect(model), self.setting.concurrency, self.setting.rate, self.seconds)
            after = observer.counters(model)
        finally:
            observer.close()
        which = "pruned" if arm == "pruned" else "base"
        self.largest_error = max(
            self.largest_error, check_answers(traffic, self.reference, which, self.setting.batch, model)
        )
        self.blocks[arm].append(Traffic(traffic.latencies, (), traffic.seconds, traffic.unsent))
        spent = after.since(before) if after is not None and before is not None else None
        if spent is not None and min(vars(spent).values()) < 0:
            spent = None  # the server was restarted in between, or its statistics are wrong
        self.counters[arm].append(spent)

    def _connect(self, model: Model) -> Callable[[], Send]:
        shape = self.reference.shape(self.setting.batch)
        return connector(self.url, model, self.reference.output, self.requests, self.timeout, shape)

    def result(self, generator: np.random.Generator) -> Result:
        latencies = {arm: [list(block.latencies) for block in blocks] for arm, blocks in self.blocks.items()}
        both = [first + second for first, second in zip(latencies["base"], latencies["again"], strict=True)]
        again = ratio_of_medians(latencies["base"], latencies["again"], generator)
        return Result(
            self.setting,
            self._arm("base", "again"),
            self._arm("pruned"),
            astuple(ratio_of_medians(both, latencies["pruned"], generator)),
            max(abs(again.low - 1), abs(again.high - 1)),
            len(latencies["pruned"]),
            self.largest_error,
            {arm: [[round(ms, 4) for ms in block] for block in blocks] for arm, blocks in latencies.items()},
        )

    def _arm(self, *names: str) -> Arm:
        blocks = [block for name in names for block in self.blocks[name]]
        counts = [one for name in names for one in self.counters[name]]
        p50, p90, p99 = np.percentile([ms for block in blocks for ms in block.latencies], [50, 90, 99])
        requests = sum(len(block.latencies) for block in blocks)
        throughput = requests * self.setting.batch / sum(block.seconds for block in blocks)
        known = [one for one in counts if one is not None]
        served = sum(one.requests for one in known)
        times: dict[str, float] = {}
        if served and len(known) == len(counts):
            times = {
                "queue": sum(one.queue for one in known) / served / 1e6,
                "compute": sum(one.compute for one in known) / served / 1e6,
                "rows_per_batch": sum(one.rows for one in known) / max(1, sum(one.batches for one in known)),
            }
        return Arm(
            float(p50), float(p90), float(p99), throughput, requests, sum(block.unsent for block in blocks), **times
        )


def requests_of(url: Url, reference: Reference, batch: int) -> list[Request]:
    """As many different requests as there are rows to begin with, made before any clock runs."""
    count = len(reference.outputs["base"])
    return [
        prepare(url, {name: array[reference.rows(number, batch)] for name, array in reference.inputs.items()})
        for number in range(count)
    ]


def connector(
    url: Url, model: Model, output: str, requests: Sequence[Request], timeout: float, shape: tuple[int, ...]
) -> Callable[[], Send]:
    """Makes a thread's sender: request `number` is `requests[number]`, over and over. shape: of an answer."""

    def connect() -> Send:
        connection = Connection(url, timeout, shape)
        return lambda number: connection.infer(model, requests[number % len(requests)], output)

    return connect


def check_answers(traffic: Traffic, reference: Reference, which: str, batch: int, model: Model) -> float:
    """The largest relative difference of any row to the torch model's answer. Raises ParityError beyond tolerance."""
    worst = 0.0
    count = len(reference.outputs[which])
    for number, answer in traffic.answers:
        expected = reference.outputs[which][reference.rows(number % count, batch)]
        if answer.shape != expected.shape:
            raise ParityError(
                f"{model} answered with shape {list(answer.shape)}",
                f"expected {list(expected.shape)}",
                "ship the run again",
            )
        error = float(differences(answer, expected).error.max())
        worst = max(worst, error if np.isfinite(error) else np.inf)
    if worst > reference.tolerance:
        raise ParityError(
            f"{model} answers differently from the {which} model of this run",
            f"relative difference {worst:.3g}, allowed {reference.tolerance:g}",
            "check that the server has this run, and that base comes first, then pruned",
        )
    return worst
