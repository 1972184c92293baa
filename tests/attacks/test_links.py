"""Links in a run folder or beside a repository: nothing is written, emptied or deleted on their other side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count
from tests.attacks.matrix import some
from tests.robust.forked import write_recipe
from tests.ship.conftest import finished  # noqa: F401 - a fixture


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of somebody's, with a file of every name that could be hit."""
    folder = tmp_path / "victim"
    for name in ("lock", "places.safetensors", "pruned.onnx", "costs.json", "previous/tiny/x", "staging-x/x", "tiny/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def linked(place: Path, to: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(to)


@pytest.mark.parametrize("name", some([".stages", "scores", "plan", "model"], 4))
def test_folders_of_a_run(name: str, tmp_path: Path, victim: Path, count: Count) -> None:
    run, before = tmp_path / "run", contents(victim)
    linked(run / name, victim)
    (run / "recipe.yaml").write_text("")
    count("links")
    found = attempt([write_recipe(tmp_path), "--out", run, "--stop-after", "surgery", "--quiet"])
    assert found.is_clean and "a link" in found.error, found
    assert contents(victim) == before


@pytest.mark.parametrize(
    "name", some(["machines", "machines/here", "machines/here/measure", "machines/here/engines"], 4)
)
def test_measure(name: str, finished: Path, tmp_path: Path, victim: Path, count: Count) -> None:  # noqa: F811
    run, before = Path(shutil.copytree(finished, tmp_path / "run")), contents(victim)
    linked(run / name, victim)
    count("links")
    found = attempt(["measure", run, "--machine", "here", "--quiet"])
    assert found.is_clean and "a link" in found.error, found
    assert contents(victim) == before


@pytest.mark.parametrize("name", some(["lock", "previous", ""], 3))
def test_beside_a_repository(name: str, finished: Path, tmp_path: Path, victim: Path, count: Count) -> None:  # noqa: F811
    run, before = Path(shutil.copytree(finished, tmp_path / "run")), contents(victim)
    assert attempt(["ship", run, "--to", tmp_path / "models"]).code == 0
    (tmp_path / "models" / "tiny" / "config.pbtxt").write_text("damaged")
    linked(tmp_path / ".models.optin-export" / name, victim / "lock" if name == "lock" else victim)
    count("links")
    found = attempt(["ship", run, "--to", tmp_path / "models", "--set", "ship.instances=2"])
    assert found.is_clean, found
    assert contents(victim) == before


def test_the_repository_of_a_run(finished: Path, tmp_path: Path, victim: Path, count: Count) -> None:  # noqa: F811
    run, before = Path(shutil.copytree(finished, tmp_path / "run")), contents(victim)
    linked(run / "triton", victim)
    count("links")
    found = attempt(["ship", run, "--to", run / "triton"])
    assert found.is_clean and "a link" in found.error, found
    assert contents(victim) == before


def test_a_repository_that_its_user_reaches_through_a_link(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    """That is the user's own choice, as a run folder behind a link is."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    assert attempt(["ship", finished, "--to", tmp_path / "models"]).code == 0
    assert (tmp_path / "disk" / "tiny" / "config.pbtxt").is_file()
    assert attempt(["verify", tmp_path / "models"]).code == 0


@pytest.mark.parametrize("name", some(["1", "1/model.onnx", "config.pbtxt", "manifest.json", "."], 5))
def test_verify_of_a_repository(name: str, finished: Path, tmp_path: Path, count: Count) -> None:  # noqa: F811
    """A link that leads to the very same content is found as well: it may lead to other content later."""
    place = tmp_path / "models"
    assert attempt(["ship", finished, "--to", place]).code == 0
    (place / "tiny" / name).rename(tmp_path / "moved")
    (place / "tiny" / name).symlink_to(tmp_path / "moved")
    count("verify")
    found = attempt(["verify", place])
    assert found.code == 2 and "tiny/" in found.out, found
