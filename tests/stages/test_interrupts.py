"""Ctrl-C and SIGTERM in the middle of any stage: nothing half-written, one line that says how to go on, and it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optin_export.workdir.run_directory import STAGES
from tests.conftest import Make
from tests.shortly import SHORTLY

ENVIRONMENT = {**os.environ, "PYTHONPATH": SHORTLY, "OMP_NUM_THREADS": "1"}


def start(place: Path, *options: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "optin_export", "recipe.yaml", "--out", "run", *options]
    return subprocess.Popen(line, cwd=place, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)


def leftovers(folder: Path) -> list[str]:
    """Files that only a run under way has."""
    return [path.name for path in folder.rglob("*") if path.name.startswith((".tmp-", ".trials"))]


def signalled(place: Path, stage: str, number: int, *options: str) -> tuple[int, list[dict[str, object]]]:
    """Run until `stage` has begun (or has made progress), send the signal; exit code and events."""
    process = start(place, "--json", *options)
    assert process.stderr is not None
    events = []
    for line in process.stderr:
        if not line.startswith("{"):  # Python may print that the signal ended a destructor
            continue
        events.append(json.loads(line))
        if events[-1].get("stage") == stage and not any(event["event"] == "sent" for event in events):
            process.send_signal(number)
            events.append({"event": "sent"})
    return process.wait(600), events


@pytest.fixture
def place(tmp_path: Path, vit_recipe: Make) -> Path:
    recipe = vit_recipe(prune={"budget": {"macs": 0.6}, "probes": 8, "rows": 32, "score_samples": 8})
    recipe["prune"]["curve_samples"] = 8
    recipe["export"] = {"batch": [1]}
    recipe["gates"] = {"other_work": 1.0}  # of other tests: nothing is measured again for it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def check(place: Path, stage: str, number: int, code: int) -> None:
    found, events = signalled(place, stage, number)
    assert found == code, events
    assert events[0]["event"] == "begin" and events[0]["folder"] == str(place / "run")
    told = next(event for event in events if event["event"] == "interrupted")
    assert told["stage"] in STAGES[STAGES.index(stage) :] and told["exit_code"] == code
    assert told["command"] == "optin-export recipe.yaml --out run --json"
    assert events[-1]["event"] == "end" and events[-1]["exit_code"] == code
    assert leftovers(place) == []
    assert not (place / "run" / "report.json").exists()


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(place: Path) -> None:
    check(place, "scoring", signal.SIGINT, 130)
    process = start(place, "--stop-after", "search", "--force")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("scoring ..."):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(600) == 143
    assert rest.splitlines()[-1] == (
        "interrupted in the stage scoring; to continue: optin-export recipe.yaml --out run --stop-after search"
    )
    assert "Traceback" not in rest and leftovers(place) == []
    process = start(place, "--stop-after", "search")
    assert process.wait(600) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_stage_can_be_interrupted(place: Path, number: int) -> None:
    """One folder: every stage is interrupted once, the next attempt goes on from there, and the last one passes on."""
    for stage in STAGES[:-2]:  # the last two are over before a signal arrives
        check(place, stage, number, 128 + number)
    process = start(place, "--quiet")
    out, err = process.communicate(timeout=900)
    assert process.returncode in (0, 4), err
    assert (place / "run" / "report.json").is_file() and leftovers(place) == []
    assert out
