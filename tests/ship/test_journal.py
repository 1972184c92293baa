"""A change of a repository that is killed between two of its renames: the next command finds all or nothing of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optin_export.ship import journal
from optin_export.ship.repository import install, private_folder, put_in_order, roll_back
from tests.ship.test_repository import contents, place, writer  # noqa: F401 - a fixture


def killed(at: int, change: Callable[[], Any]) -> bool:
    """Carry out a change in a child that is killed before its rename number `at`; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            real, calls = Path.rename, []

            def rename(self: Path, target: Path) -> Path:
                calls.append(self)
                if len(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, target)

            Path.rename = rename  # type: ignore[assignment]
            change()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def models(text: str) -> dict[str, Any]:
    return {"m": writer(text), "m-base": writer(f"{text}b")}


@pytest.mark.parametrize("at", range(1, 8))
def test_a_shipment_that_is_killed_and_repeated(at: int, place: Path) -> None:  # noqa: F811
    """A rollback puts back all that was there before it, not what the kill happened to leave."""
    install(place, models("2"), "a")
    assert killed(at, lambda: install(place, models("3"), "a")) == (at <= 6)
    install(place, models("3"), "a")
    assert contents(place) == {"m": "3", "m-base": "3b"}
    assert sorted(path.name for path in private_folder(place).iterdir()) == ["lock", "previous"]
    assert roll_back(place, "m") == ["m", "m-base"]
    assert contents(place) == {"m": "2", "m-base": "2b"}


@pytest.mark.parametrize("at", range(2, 7))
def test_a_rollback_after_a_kill_puts_back_what_was_there(at: int, place: Path) -> None:  # noqa: F811
    install(place, models("2"), "a")
    assert killed(at, lambda: install(place, models("3"), "a"))
    assert roll_back(place, "m") == ["m", "m-base"]
    assert contents(place) == {"m": "2", "m-base": "2b"}
    assert roll_back(place, "m") == ["m", "m-base"]
    assert contents(place) == {"m": "1", "m-base": "b"}


@pytest.mark.parametrize("at", range(1, 7))
def test_a_rollback_that_is_killed_and_repeated(at: int, place: Path) -> None:  # noqa: F811
    install(place, models("2"), "a")
    assert killed(at, lambda: roll_back(place, "m"))
    assert roll_back(place, "m") == ["m", "m-base"]
    assert contents(place) == {"m": "1", "m-base": "b"}
    assert contents(private_folder(place) / "previous") == {"m": "2", "m-base": "2b"}


def test_another_command_puts_it_in_order(place: Path) -> None:  # noqa: F811
    put_in_order(place)
    install(place, models("2"), "a")
    assert killed(5, lambda: install(place, models("3"), "a"))
    assert (private_folder(place) / journal.NAME).exists()
    put_in_order(place)
    assert contents(place) == {"m": "2", "m-base": "2b"}
    assert contents(private_folder(place) / "previous") == {"m": "1", "m-base": "b"}
    assert sorted(path.name for path in private_folder(place).iterdir()) == ["lock", "previous"]


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "[1]",
        json.dumps([[["", "taken"], ["..", "outside"], "INODE"], [["", "x"], ["", "y"], 1]]),
        json.dumps([[["", "taken"], ["", "../outside"], "INODE"], [["", "x"], ["", "y"], 1]]),
        json.dumps([[["", "taken"], ["", 7], 1]]),
        json.dumps([[["", "taken"], ["previous", "m"]]]),
    ],
)
def test_a_journal_of_somebody_else_moves_nothing(told: str, place: Path) -> None:  # noqa: F811
    outside = place.parent / "outside"
    outside.mkdir()
    (private_folder(place) / journal.NAME).write_text(told.replace('"INODE"', str(outside.stat().st_ino)))
    put_in_order(place)
    assert outside.is_dir() and contents(place) == {"m": "1", "m-base": "b"}
    assert not (private_folder(place) / journal.NAME).exists()
