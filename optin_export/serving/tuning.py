"""How many instances, and which size of requests, give the most rows a second: measured on one server.

The pruned model is served once per number of instances, under different names, by the same server. All settings are
measured in turns, in random order, so that a slow minute of the machine does not favour one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from optin_export.progress import report
from optin_export.serving.client import Connection, Counters, Model, Url
from optin_export.serving.deployed import Reference, check_answers, check_served, connector, requests_of
from optin_export.serving.traffic import closed_loop

#: A setting with less than this share of the best throughput is worse; the others differ by noise.
ALIKE = 0.95


@dataclass(frozen=True)
class Load:
    """What is tried. batches: rows of a request. clients: requests at a time. blocks: of each setting, of `seconds`."""

    batches: Sequence[int]
    clients: Sequence[int]
    blocks: int
    seconds: float
    timeout: float
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One setting. throughput: rows a second, the median of the blocks, with the lowest and the highest of them.

    p50, p99: milliseconds of a request. rows_per_batch: rows that the server ran together; None without statistics.
    """

    instances: int
    batch: int
    clients: int
    throughput: float
    lowest: float
    highest: float
    p50: float
    p99: float
    rows_per_batch: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(url: Url, models: Mapping[int, Model], reference: Reference, load: Load) -> list[Row]:
    """Every setting on a running server. models: instances -> the model that is served with that many.

    Raises EnvironmentLacks if the server fails, ParityError if an answer is wrong.
    """
    settings = list(product(models, load.batches, load.clients))
    for batch in load.batches:
        check_served(url, list(models.values()), reference, batch, load.timeout)
    requests = {batch: requests_of(url, reference, batch) for batch in load.batches}
    found: dict[tuple[int, int, int], list[_Block]] = {setting: [] for setting in settings}
    generator, done, total = np.random.default_rng(load.seed), 0, len(settings) * (load.blocks + 1)
    observer = Connection(url, load.timeout)
    try:
        for number in range(load.blocks + 1):
            for index in generator.permutation(len(settings)):
                instances, batch, clients = settings[index]
                model, shape = models[instances], reference.shape(batch)
                connect = connector(url, model, reference.output, requests[batch], load.timeout, shape)
                before = observer.counters(model)
                traffic = closed_loop(connect, clients, load.seconds)
                spent = _since(observer.counters(model), before)
                check_answers(traffic, reference, "pruned", batch, model)
                if number:  # the first round warms up
                    rate = len(traffic.latencies) * batch / traffic.seconds
                    found[settings[index]].append(_Block(rate, traffic.latencies, spent))
                done += 1
                report(done, total)
    finally:
        observer.close()
    return [_row(*setting, blocks) for setting, blocks in found.items()]


@dataclass(frozen=True)
class _Block:
    rate: float
    latencies: tuple[float, ...]
    spent: Counters | None


def _since(after: Counters | None, before: Counters | None) -> Counters | None:
    return None if after is None or before is None else after.since(before)


def _row(instances: int, batch: int, clients: int, blocks: Sequence[_Block]) -> Row:
    rates = [block.rate for block in blocks]
    p50, p99 = np.percentile([ms for block in blocks for ms in block.latencies], [50, 99])
    counts = [block.spent for block in blocks if block.spent is not None]
    executions = sum(one.batches for one in counts)
    together = sum(one.rows for one in counts) / executions if executions else None
    median = float(np.median(rates))
    return Row(instances, batch, clients, median, min(rates), max(rates), float(p50), float(p99), together)


def best(rows: Sequence[Row], latency: float | None = None) -> Row | None:
    """Of the settings whose throughput is that of the best but for noise: the fewest instances, then the lowest p99.

    latency: only settings with at most this p99, in milliseconds. None if no setting has.
    """
    allowed = [row for row in rows if latency is None or row.p99 <= latency]
    if not allowed:
        return None
    limit = ALIKE * max(row.throughput for row in allowed)
    return min((row for row in allowed if row.throughput >= limit), key=lambda row: (row.instances, row.p99))
