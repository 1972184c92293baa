"""Progress by context: a loop reports its progress, its caller decides where it is shown; by default nowhere.

    for batch in track(batches): ...         # one step each
    with task(total): ... advance(count)     # steps counted by functions further down
    report(done, total)                      # if the total changes meanwhile

Reports from within a task are part of one of its steps, and are not shown. A new thread or process has no reporter: its
coordinator reports, or passes it `reporter()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

#: Called with (steps done, steps in all).
Reporter = Callable[[int, int], None]
Item = TypeVar("Item")


def _nowhere(done: int, total: int) -> None: ...


def _of_no_task(count: int) -> None: ...


class _Around(NamedTuple):
    """The context of a piece of code: the target of `report`, and the count of `advance`."""

    report: Reporter = _nowhere
    advance: Callable[[int], None] = _of_no_task


_SILENT = _Around()
_around: ContextVar[_Around] = ContextVar("progress", default=_SILENT)


@contextmanager
def _set(around: _Around) -> Iterator[None]:
    before = _around.get()
    _around.set(around)
    try:
        yield
    finally:  # without a token: a generator may be closed in another context
        _around.set(before)


def reporting(reporter: Reporter) -> AbstractContextManager[None]:
    """In this block, progress goes to `reporter`."""
    return _set(_Around(reporter))


def reporter() -> Reporter:
    """The current reporter, which may be called from another thread."""
    return _around.get().report


def report(done: int, total: int) -> None:
    """Report `done` steps of `total`."""
    _around.get().report(done, total)


@contextmanager
def task(total: int) -> Iterator[None]:
    """A task of `total` steps, which `advance` counts up to `total`."""
    show, done = reporter(), 0

    def count_steps(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        show(done, total)

    with _set(_Around(advance=count_steps)):
        yield


def advance(count: int = 1) -> None:
    """Report `count` more steps of the task around; nothing in a loop of `track`, and without a task."""
    _around.get().advance(count)


def track(items: Sequence[Item]) -> Iterator[Item]:
    """The items as a task: each is a step, done when the next one is asked for."""
    show = reporter()
    for done, item in enumerate(items, 1):
        with _set(_SILENT):
            yield item
        show(done, len(items))
