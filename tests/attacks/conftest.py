"""The folders that are attacked; adds up the attempts by kind, and how many were refused cleanly."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.attempt import attempt
from tests.attacks.inputs import write_inputs
from tests.robust.forked import write_recipe
from tests.ship.conftest import finished

__all__ = ["finished"]

# As the command line sets it before it imports what would draw bars; here that may be imported already.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

Count = Callable[[str], None]
Folder = Callable[[str], Path]


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    """Call it with an attempt's kind before the attempt; it is clean if the test passes."""
    return lambda kind: record_property("attack_kind", kind)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the test's own folder: what they write elsewhere is a stray."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Folder:
    """The folders by name, each made when it is first asked for."""
    place = tmp_path_factory.mktemp("attacked")
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = place / name
            known[name].mkdir()
            {"inputs": write_inputs, "run": run, "models": models, "half": half}[name](known[name])
        return known[name]

    def run(folder: Path) -> None:
        shutil.copytree(request.getfixturevalue("finished"), folder, dirs_exist_ok=True)

    def models(folder: Path) -> None:
        ship = ["ship", request.getfixturevalue("finished"), "--to", folder / "models"]
        for more in ([], ["--set", "ship.instances=3"]):
            assert attempt([*ship, *more]).code == 0

    def half(folder: Path) -> None:
        recipe = write_recipe(folder)
        assert attempt([recipe, "--out", folder / "run", "--stop-after", "surgery", "--quiet"]).code == 0

    return folder


@pytest.fixture
def copied(made: Folder, tmp_path: Path) -> Folder:
    """A copy of one of the folders, for this test."""

    def folder(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / name))

    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    attempts, clean = Counter[str](), Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, kind in report.user_properties:
                    if name == "attack_kind":
                        attempts[str(kind)] += 1
                        clean[str(kind)] += report.passed
    for kind, number in sorted(attempts.items()):
        terminalreporter.write_line(f"attacks: {kind}: {clean[kind]} of {number} refused cleanly")
    if attempts:
        terminalreporter.write_line(f"attacks: {clean.total()} of {attempts.total()} in all")
    if attempts and "OPTIN_EXPORT_ATTACKS_OUT" in os.environ:  # for tools/studies/study_attacks.py
        rows = [{"kind": kind, "attempts": attempts[kind], "clean": clean[kind]} for kind in sorted(attempts)]
        Path(os.environ["OPTIN_EXPORT_ATTACKS_OUT"]).write_text(json.dumps(rows), encoding="utf-8")
