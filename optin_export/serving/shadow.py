"""Shadow traffic: sends every row to both models, and compares answers and latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from optin_export.errors import ParityError
from optin_export.measure.bootstrap import median_of, ratio_of_medians
from optin_export.measure.parity import differences, share_agreeing
from optin_export.progress import track
from optin_export.serving.client import Connection, Model, Url
from optin_export.serving.deployed import LoadSettings, Reference, check_served, requests_of
from optin_export.serving.traffic import Send, closed_loop


@dataclass(frozen=True)
class Shadow:
    """Comparison of both models' answers to the same rows.

    same_largest: share of rows whose largest value is at the same place (the same class). cosine: of the rows' answers,
    mean and smallest. largest_difference: of any value, relative to the row's largest of the base model.
    """

    protocol: str
    concurrency: int
    requests: int
    rows: int
    same_largest: float
    cosine: tuple[float, float]
    largest_difference: float
    base_p50: float
    pruned_p50: float
    speedup: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    url: Url,
    models: tuple[Model, Model],
    reference: Reference,
    load: LoadSettings,
) -> Shadow:
    """Send each request of the rows of `reference` to both models, in alternating order.

    load: in a closed loop of the first concurrency.
    """
    batch, concurrency = load.batch, load.concurrency[0]
    check_served(url, models, reference, batch, load.timeout)
    requests = requests_of(url, reference, batch)
    latencies: tuple[list[list[float]], list[list[float]]] = ([], [])
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    connect = _connector(url, models, reference.output, requests, load.timeout, reference.shape(batch))
    closed_loop(connect, concurrency, min(load.seconds, 0.2))  # warm up
    for _ in track(range(load.blocks)):
        answers = [answer for _, answer in closed_loop(connect, concurrency, load.seconds).answers]
        for which in (0, 1):
            latencies[which].append([answer[which][0] for answer in answers])
        pairs += [(answer[0][1], answer[1][1]) for answer in answers]
    first, second = (np.concatenate([pair[which].reshape(batch, -1) for pair in pairs]) for which in (0, 1))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ParityError("a model returned invalid numbers", "NaN or infinity", "check the server's log")
    found = differences(second, first)
    return Shadow(
        protocol=url.protocol,
        concurrency=concurrency,
        requests=len(pairs),
        rows=len(first),
        same_largest=share_agreeing(second, first, 1, np.zeros(len(first))),
        cosine=(float(found.cosine.mean()), float(found.cosine.min())),
        largest_difference=float(found.error.max()),
        base_p50=median_of(latencies[0]),
        pruned_p50=median_of(latencies[1]),
        speedup=astuple(ratio_of_medians(latencies[0], latencies[1], np.random.default_rng(load.seed))),
    )


def _connector(
    url: Url, models: tuple[Model, Model], output: str, requests: list[Any], timeout: float, shape: tuple[int, ...]
) -> Callable[[], Send]:
    def connect() -> Send:
        connection = Connection(url, timeout, shape)

        def send(number: int) -> list[tuple[float, np.ndarray]]:
            found: list[Any] = [None, None]
            for which in (0, 1) if number % 2 else (1, 0):
                begun = time.perf_counter()
                answer = connection.infer(models[which], requests[number % len(requests)], output)
                found[which] = (1e3 * (time.perf_counter() - begun), answer)
            return found

        return send

    return connect
