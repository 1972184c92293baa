"""The share of a run that is done, and the seconds left, against a clock that the test moves."""

from __future__ import annotations

import pytest

from optin_export.remaining import SHORT, Remaining


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_shares_are_those_of_the_expected_time() -> None:
    run = Remaining(("scoring", "measure"), Clock())
    assert run.left is None
    run.expect({"scoring": 100.0, "measure": 300.0})
    assert (run.share, run.left) == (0.0, 400.0)
    run.start("scoring")
    run.tick(1, 2)
    assert run.share == 0.125
    run.finish("scoring", 100.0, False)
    assert (run.share, run.left) == (0.25, 300.0)


def test_the_bar_never_goes_back() -> None:
    """Phases that count anew, more steps than planned, and phases that are repeated."""
    clock = Clock()
    run, shares = Remaining(("measure", "report"), clock), []
    run.expect({"measure": 100.0})
    run.start("measure")
    for until in (0.1, 0.3, 1.0, 0.1, 1.0):
        run.phase(until)
        for done, total in ((1, 24), (24, 24), (25, 36), (36, 36)):
            run.tick(done, total)
            shares.append(run.share)
    assert shares == sorted(shares) and shares[0] < 0.01 and shares[3] == pytest.approx(10 / (100 + SHORT))
    run.finish("measure", 100.0, False)
    assert run.share == 100 / (100 + SHORT)


def test_a_part_of_one_count_does_not_begin_anew() -> None:
    run = Remaining(("curves",), Clock())
    run.start("curves")
    run.tick(5, 10)
    run.phase(None)
    run.tick(6, 10)
    assert run.share == 0.6


def test_what_is_left_follows_the_speed_of_this_machine() -> None:
    clock = Clock()
    run = Remaining(("scoring", "curves", "measure"), clock)
    run.expect({"scoring": 10.0, "curves": 10.0, "measure": 100.0})
    run.start("scoring")
    clock.now = 5.0
    assert run.left == 115.0  # nothing counted yet: what was expected, less the time that passed
    run.finish("scoring", 20.0, False)  # twice what was expected
    assert run.left == 220.0
    run.start("curves")
    run.tick(1, 2)
    clock.now = 35.0
    assert run.left == 30.0 + 200.0  # by its own speed
    run.finish("curves", 0.1, True)  # reused: says nothing of the speed
    assert run.left == 200.0


def test_a_stage_of_unknown_length_makes_it_a_lower_bound() -> None:
    run = Remaining(("search", "report"), Clock())
    run.expect({"search": None})
    assert run.at_least
    run.start("search")
    run.finish("search", 500.0, False)
    assert not run.at_least and run.left == SHORT
