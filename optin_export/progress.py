"""Progress by context: a loop reports its progress, its caller decides where it is shown; by default nowhere.

    for batch in track(batches): ...         # one step each
    with task(total): ... advance(count)     # steps counted by functions further down
    report(done, total)                      # if the total changes meanwhile
    phase("repair", until=0.8)               # names what comes next; it ends at 0.8 of the stage

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
#: Called with the name of the phase that begins, and the share of the stage that is done when it ends.
Namer = Callable[[str, float | None], None]
Item = TypeVar("Item")


def _nowhere(done: int, total: int) -> None: ...


def _unnamed(name: str, until: float | None) -> None: ...


def _of_no_task(count: int) -> None: ...


class _Around(NamedTuple):
    """The context of a piece of code: the target of `report`, the count of `advance`, and the target of `phase`."""

    report: Reporter = _nowhere
    advance: Callable[[int], None] = _of_no_task
    phase: Namer = _unnamed


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


def reporting(reporter: Reporter, phase: Namer = _unnamed) -> AbstractContextManager[None]:
    """In this block, progress goes to `reporter`, and the names of phases to `phase`."""
    return _set(_Around(reporter, phase=phase))


def reporter() -> Reporter:
    """The current reporter, which may be called from another thread."""
    return _around.get().report


def report(done: int, total: int) -> None:
    """Report `done` steps of `total`."""
    _around.get().report(done, total)


def phase(name: str, until: float | None = None) -> None:
    """A phase of the stage begins.

    Args:
        name: what is done now, in a few words.
        until: share of the stage's time, from 0 to 1, that is over when the phase ends; the phase has its own count of
            steps. None: the phase is a part of one count, of the task around or of the whole stage.
    """
    _around.get().phase(name, until)


@contextmanager
def task(total: int) -> Iterator[None]:
    """A task of `total` steps, which `advance` counts up to `total`."""
    around, done = _around.get(), 0

    def count_steps(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        around.report(done, total)

    def name_part(name: str, until: float | None) -> None:
        around.phase(name, None)  # the steps are counted for the whole task

    with _set(_Around(advance=count_steps, phase=name_part)):
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
