"""Something else lies where a file is expected: nothing waits for it, opens it, or reads it without end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attacks.attempt import Outcome, attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.matrix import pairs
from tests.attacks.places import DONE_WITHOUT, PLACES, Place
from tests.attacks.things import THINGS

#: A place's commands take turns.
CASES = [
    (place, thing, place.commands[number // len(PLACES) % len(place.commands)])
    for number, (place, thing) in enumerate(pairs(PLACES, list(THINGS)))
]


def _is_right(place: Place, found: Outcome) -> bool:
    if place.spared or place.kind in DONE_WITHOUT:
        return found.is_harmless and (found.code == 0 or found.is_clean or bool(found.out))
    return found.is_clean


@pytest.mark.parametrize(
    ("place", "thing", "command"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{number // len(PLACES)}") for number, case in enumerate(CASES)],
)
def test_instead_of_a_file(
    place: Place, thing: str, command: str, copied: Folder, tmp_path: Path, count: Count, short_measurement: None
) -> None:
    folder = copied(place.of)
    run = folder if place.of == "run" else tmp_path / "run"
    if "RUN" in command and place.of != "run":
        run = copied("run")
    path = folder / place.name
    path.parent.mkdir(parents=True, exist_ok=True)
    THINGS[thing](path)
    count(place.kind)
    paths = {"IN": folder, "RUN": run, "TO": tmp_path / "to", "NEW": tmp_path / "new", "FILE": path}
    words = []
    for word in command.split():
        first, slash, rest = word.partition("/")
        words.append(f"{paths[first]}{slash}{rest}" if first in paths else word)
    found = attempt(words)
    assert _is_right(place, found), found.told
    if not (tmp_path / "to").exists() or place.spared:
        return
    assert not list((tmp_path / "to").glob("*"))
    shutil.rmtree(tmp_path / "to")
