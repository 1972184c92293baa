"""Something else lies where a file is expected: nothing waits for it, opens it, or reads it without end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count
from tests.attacks.things import NO_FILES, THINGS
from tests.ship.conftest import finished  # noqa: F401 - a fixture

GATES = "gates: 1\naccuracy_drop: 1.0\n"


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["recipe", "gates", "wheel"])
def test_what_the_command_is_given(thing: str, name: str, finished: Path, tmp_path: Path, count: Count) -> None:  # noqa: F811
    path = tmp_path / f"{name}.yaml"
    path.write_text(GATES)
    THINGS[thing](path)
    count("files given")
    if name == "recipe":
        found = attempt([path, "--dry-run"])
    elif name == "gates":
        found = attempt(["check", finished, "--gates", path])
    else:
        found = attempt(["client", "127.0.0.1:9", "--model", "a", "--model", "b", "--import-perf-analyzer", path, path])
    assert found.is_clean, found
    assert found.code == 2


#: Files of a run -> commands that read them.
READ = {
    "recipe.yaml": (["check", "RUN"], ["ship", "RUN", "--to", "TO"]),
    "report.json": (["check", "RUN"], ["ship", "RUN", "--to", "TO"], ["measure", "RUN", "--quiet"]),
    "manifest.json": (["verify", "RUN"], ["check", "RUN"], ["ship", "RUN", "--to", "TO"]),
    "measure/parity.json": (["ship", "RUN", "--to", "TO"], ["check", "RUN"]),
    "measure/latency.json": (["ship", "RUN", "--to", "TO"],),
    "measure/reference.safetensors": (["ship", "RUN", "--to", "TO"], ["measure", "RUN", "--quiet"]),
    "onnx/pruned.onnx": (["ship", "RUN", "--to", "TO"], ["measure", "RUN", "--quiet"]),
}
CASES = [(name, command, thing) for name, commands in READ.items() for command in commands for thing in THINGS]


@pytest.mark.parametrize(("name", "command", "thing"), CASES)
def test_files_of_a_run(
    name: str,
    command: list[str],
    thing: str,
    finished: Path,  # noqa: F811
    tmp_path: Path,
    count: Count,
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    THINGS[thing](run / name)
    count("files of a run")
    words = [{"RUN": str(run), "TO": str(tmp_path / "models")}.get(word, word) for word in command]
    found = attempt(words)
    if command[0] == "verify" or (command[0] == "check" and name == "recipe.yaml"):
        # What verify finds is its answer, not an error; and check reads the report alone.
        assert found.code in (0, 2) and "Traceback" not in found.error
    else:
        assert found.is_clean, found
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").glob("*"))


@pytest.mark.parametrize("thing", NO_FILES)
@pytest.mark.parametrize("name", ["scores/scores.safetensors", "plan/plan.json", "report.html", "new", "onnx/.new"])
def test_verify_finds_it(thing: str, name: str, finished: Path, tmp_path: Path, count: Count) -> None:  # noqa: F811
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert attempt(["verify", run]).code == 0
    THINGS[thing](run / name)
    count("verify")
    found = attempt(["verify", run])
    assert found.code == 2 and "Traceback" not in found.error
    assert f"run/{name}: " in found.out


@pytest.mark.parametrize("thing", NO_FILES)
@pytest.mark.parametrize("name", ["scoring.json", "search.json", "lock", "seconds.json"])
def test_records_of_a_run_are_done_without(
    thing: str,
    name: str,
    finished: Path,  # noqa: F811
    tmp_path: Path,
    count: Count,
) -> None:
    """What a record cannot say is done again; the run itself ends as it would have."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    THINGS[thing](run / ".stages" / name)
    count("records")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = attempt([tmp_path / "recipe.yaml", "--out", run, "--stop-after", "search", "--quiet"])
    assert found.code == 0 or found.is_clean, found
