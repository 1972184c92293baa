"""Closed and open loops count what clients see: a stall makes every request behind it late, failures end the block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from optin_export.serving import traffic
from optin_export.serving.traffic import closed_loop, open_loop


def server(seconds: Callable[[int], float]) -> Callable[[], Callable[[int], int]]:
    """A sender whose request `number` takes so long."""

    def connect() -> Callable[[int], int]:
        def send(number: int) -> int:
            time.sleep(seconds(number))
            return number

        return send

    return connect


def test_every_request_of_a_closed_loop_is_sent_once_and_answered() -> None:
    done = closed_loop(server(lambda number: 0.002), 4, 0.1)
    numbers = sorted(number for number, _ in done.answers)
    assert numbers == list(range(len(numbers))) and len(numbers) > 20
    assert all(number == answer for number, answer in done.answers)
    assert min(done.latencies) >= 2 and len(done.latencies) == len(numbers)


def test_a_slow_server_still_answers_one_request_per_thread() -> None:
    assert len(closed_loop(server(lambda number: 0.05), 3, 0.001).answers) == 3


def test_a_stall_is_seen_by_the_requests_that_were_due_in_it() -> None:
    """One request of ten takes 200 ms; with one thread, those due meanwhile wait for it (coordinated omission)."""
    slow = server(lambda number: 0.2 if number == 2 else 0.0)
    opened = open_loop(slow, 1, 100.0, 0.2)
    late = sum(latency > 50 for latency in opened.latencies)
    assert late > 5 and opened.unsent == 0
    closed = closed_loop(slow, 1, 0.25)
    assert sum(latency > 50 for latency in closed.latencies) == 1


def test_requests_are_not_sent_before_they_are_due() -> None:
    sent: list[float] = []

    def connect() -> Callable[[int], None]:
        return lambda number: sent.append(time.perf_counter())

    open_loop(connect, 4, 50.0, 0.2)
    assert len(sent) == 10 and sent[-1] - sent[0] >= 0.15


def test_an_overloaded_server_ends_the_block_and_leaves_requests_unsent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "PATIENCE", 2.0)
    done = open_loop(server(lambda number: 0.05), 1, 1000.0, 0.1)
    assert done.unsent > 50 and len(done.answers) + done.unsent == 100


def test_a_block_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "MOST_REQUESTS", 7)
    assert len(closed_loop(server(lambda number: 0.0), 2, 5.0).answers) == 7
    assert len(open_loop(server(lambda number: 0.0), 2, 1e5, 5.0).answers) == 7


@pytest.mark.parametrize("loop", [lambda c: closed_loop(c, 3, 5.0), lambda c: open_loop(c, 3, 100.0, 5.0)])
@pytest.mark.parametrize("when", ["connecting", "sending"])
def test_the_first_failure_ends_the_block(loop, when: str) -> None:  # type: ignore[no-untyped-def]
    turn = threading.Lock()

    def connect() -> Callable[[int], int]:
        if when == "connecting" and turn.acquire(blocking=False):
            raise ConnectionError("gone")

        def send(number: int) -> int:
            if number == 5:
                raise ConnectionError("gone")
            time.sleep(0.001)
            return number

        return send

    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="gone"):
        loop(connect)
    assert time.monotonic() - begun < 4
