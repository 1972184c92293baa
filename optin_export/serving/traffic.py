"""Requests by several threads: as fast as answers come (closed loop), or at fixed times (open loop).

In the open loop a request's latency counts from when it was due, not from when a free thread sent it: a server that
stalls delays the requests after the stall, and this is measured (no coordinated omission).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optin_export.serving.bounded_http import end_of_thread

#: A thread's own sender: number of the request -> its answer. Made in the thread that uses it.
Send = Callable[[int], Any]
#: No block has more requests, whatever the server's speed.
MOST_REQUESTS = 20_000
#: A block of the open loop ends after this many times its planned length, even if requests are still due.
PATIENCE = 3.0


@dataclass(frozen=True)
class Traffic:
    """One block. latencies: milliseconds, in the order of `answers`, which are (number, answer) pairs.

    seconds: from the first request to the last answer. unsent: requests that were due but never sent (open loop).
    """

    latencies: tuple[float, ...]
    answers: tuple[tuple[int, Any], ...]
    seconds: float
    unsent: int = 0


def closed_loop(connect: Callable[[], Send], threads: int, seconds: float, first: int = 0) -> Traffic:
    """Each thread sends its next request when the last is answered, for `seconds` and at least one each."""
    clock = _Clock(first)

    def work(send: Send, record: _Record) -> None:
        end = clock.start + seconds
        while True:
            number = clock.next()
            if number - first >= MOST_REQUESTS:
                return
            begun = time.perf_counter()
            answer = send(number)
            record(number, begun, answer)
            if time.perf_counter() >= end:
                return

    return _run(connect, threads, clock, work)


def open_loop(connect: Callable[[], Send], threads: int, rate: float, seconds: float, first: int = 0) -> Traffic:
    """`rate` requests a second, due at equal distances, sent by the next free of `threads` threads.

    Requests that are still due after PATIENCE times the planned seconds count as unsent.
    """
    total = min(max(1, round(rate * seconds)), MOST_REQUESTS)
    clock = _Clock(first)

    def work(send: Send, record: _Record) -> None:
        while True:
            number = clock.next()
            due = clock.start + (number - first) / rate
            now = time.perf_counter()
            if number - first >= total or now > clock.start + PATIENCE * max(seconds, total / rate):
                return
            if due > now:
                time.sleep(due - now)
            answer = send(number)
            record(number, due, answer)

    done = _run(connect, threads, clock, work)
    return Traffic(done.latencies, done.answers, done.seconds, total - len(done.answers))


class _Clock:
    """When the block began, and the number of the next request, shared by its threads."""

    def __init__(self, first: int) -> None:
        self.start, self._number, self._lock = 0.0, first, threading.Lock()

    def next(self) -> int:
        with self._lock:
            self._number += 1
            return self._number - 1


_Record = Callable[[int, float, Any], None]


def _run(connect: Callable[[], Send], threads: int, clock: _Clock, work: Callable[[Send, _Record], None]) -> Traffic:
    """Connect in every thread, start all at once, and raise the first error of any."""
    done: list[tuple[float, float, int, Any]] = []  # list.append is atomic
    errors: list[BaseException] = []

    def begin() -> None:
        clock.start = time.perf_counter()

    barrier = threading.Barrier(threads, action=begin)

    def record(number: int, begun: float, answer: Any) -> None:
        now = time.perf_counter()
        done.append((now, 1e3 * (now - begun), number, answer))
        if errors:  # another thread has failed: nothing more is worth sending
            raise _Stopped

    def thread() -> None:
        try:
            send = connect()
            barrier.wait()
            work(send, record)
        except (_Stopped, threading.BrokenBarrierError):
            pass
        except BaseException as error:
            errors.append(error)
            barrier.abort()
        finally:
            end_of_thread()

    running = [threading.Thread(target=thread, daemon=True) for _ in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    if errors:
        raise errors[0]
    end = max(now for now, *_ in done)
    return Traffic(
        tuple(latency for _, latency, _, _ in done),
        tuple((number, answer) for *_, number, answer in done),
        end - clock.start,
    )


class _Stopped(Exception):
    """Ends a thread after another thread has failed."""


def pooled(blocks: Sequence[Traffic]) -> list[list[float]]:
    """Latencies by block."""
    return [list(block.latencies) for block in blocks]
