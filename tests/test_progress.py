"""Progress from context: who reports, who is shown, and that a loop left early leaves nothing behind in the context."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from optin_export.progress import advance, phase, report, reporter, reporting, task, track

Steps = list[tuple[int, int]]


@pytest.fixture
def seen() -> Iterator[Steps]:
    """What is reported during the test."""
    steps: Steps = []
    with reporting(lambda *step: steps.append(step)):
        yield steps


def test_an_item_is_done_when_the_next_one_is_asked_for(seen: Steps) -> None:
    found = []
    for item in track("ab"):
        found.append((item, list(seen)))
    assert found == [("a", []), ("b", [(1, 2)])] and seen == [(1, 2), (2, 2)]


def test_functions_further_down_count_the_steps_of_a_task_and_never_too_many(seen: Steps) -> None:
    with task(5):
        for count in (1, 3, 3):
            advance(count)
    advance()
    assert seen == [(1, 5), (4, 5), (5, 5)]


def test_what_reports_within_a_step_is_not_shown(seen: Steps) -> None:
    def inner() -> None:
        report(7, 9)
        for _ in track(range(3)):
            advance()  # of no task: the loop counts by itself
        with task(2):
            advance()

    with task(2):
        inner()
        advance()
    for _ in track(range(2)):
        inner()
        advance()
    assert seen == [(1, 2), (1, 2), (2, 2)]


def test_a_part_of_a_task_is_shown_where_it_has_a_reporter(seen: Steps) -> None:
    show = reporter()
    for part in range(2):
        with reporting(lambda done, total, part=part: show(part * total + done, 2 * total)):  # type: ignore[misc]
            for _ in track("ab"):
                pass
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("how", ["break", "error", "error in a task", "closed"])
def test_a_loop_left_early_gives_the_reporter_back(how: str, seen: Steps) -> None:
    if how == "break":
        for _ in track(range(3)):
            break
    elif how == "closed":
        loop = track(range(3))
        next(loop)
        loop.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError), task(3):
            for _ in track(range(3)) if how == "error" else range(3):
                raise ValueError
    report(2, 2)
    advance()
    assert seen == [(2, 2)]


def test_nothing_is_shown_without_a_reporter() -> None:
    with task(2):
        advance()
    assert list(track("ab")) == ["a", "b"]
    report(1, 1)


def test_a_thread_reports_where_it_is_handed_the_reporter(seen: Steps) -> None:
    show = reporter()
    for work in (lambda: report(1, 3), lambda: show(2, 3)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [(2, 3)]


def test_phases_are_named_where_steps_are_counted() -> None:
    """In a task a phase is a part of its count; within a step of a loop it is no one's."""
    named: list[tuple[str, float | None]] = []
    with reporting(lambda done, total: None, lambda name, until: named.append((name, until))):
        phase("parity", until=0.1)
        with task(2):
            phase("first", until=0.5)
        for _ in track("ab"):
            phase("inner")
    phase("outside")
    assert named == [("parity", 0.1), ("first", None)]
