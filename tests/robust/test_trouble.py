"""A full disk, a read-only folder, data that vanish: one clear error, its exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import optin_export
from optin_export import cli
from optin_export.displays import Quiet
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.stages import forecast
from optin_export.workdir import durations
from optin_export.workdir.cache import FOLDER
from optin_export.workdir.run_directory import leftovers
from tests.conftest import Make
from tests.robust import forked


def whole(run: Path) -> None:
    """Everything that a record names is there as it was written; nothing is half-written."""
    from optin_export.workdir.files import sha256_file

    assert leftovers(run) == []
    for record in (run / FOLDER).glob("*.json"):
        if record.name in (Path(durations.NAME).name, Path(forecast.NAME).name):
            continue  # how long stages took, or will take: no step's record
        entry = json.loads(record.read_text())
        assert all(sha256_file(run / name) == digest for name, digest in entry["files"].items()), record


@pytest.fixture
def disk(small_disk: Callable[[str], Path]) -> Path:
    return small_disk("300k")


def test_a_full_disk(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fills up in the middle of a run, and the run goes on once there is room."""
    recipe = forked.write_recipe(tmp_path)
    run = disk / "run"
    (disk / "filler").write_bytes(b"x" * 230_000)
    assert cli.main([str(recipe), "--out", str(run), "--stop-after", "export"]) == 5
    error = capsys.readouterr().err
    assert "No space left" in error and "Traceback" not in error
    whole(run)
    (disk / "filler").unlink()
    assert cli.main([str(recipe), "--out", str(run), "--stop-after", "surgery"]) == 0
    whole(run)


def test_a_disk_that_is_full_from_the_start(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = forked.write_recipe(tmp_path)
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while file.write(b"x" * 4096):
            pass
    assert cli.main([str(recipe), "--out", str(disk / "run"), "--stop-after", "search"]) == 5
    assert "No space left" in capsys.readouterr().err
    assert not list((disk / "run").rglob("*.yaml")) if (disk / "run").exists() else True


def test_a_folder_that_may_only_be_read(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read-only for root as well; nothing can be written, not even the lock, and all is as it was."""
    recipe = forked.write_recipe(tmp_path)
    optin_export.run(recipe, disk / "run", stop_after="search")
    before = {path: path.stat().st_mtime_ns for path in sorted((disk / "run").rglob("*"))}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for run in (disk / "run", disk / "new"):
        assert cli.main([str(recipe), "--out", str(run), "--stop-after", "search"]) == 5
        error = capsys.readouterr().err
        assert "Read-only file system" in error and "Traceback" not in error
    assert before == {path: path.stat().st_mtime_ns for path in sorted((disk / "run").rglob("*"))}
    assert not (disk / "new").exists()


def test_data_that_vanish_between_two_runs(tmp_path: Path, vit_recipe: Make, image_data: Path) -> None:
    data = tmp_path / "images.npz"
    shutil.copy(image_data / "images.npz", data)
    source = {"source": f"npz:{data}", "samples": 48}
    recipe = vit_recipe(data={"calibration": source})
    run = tmp_path / "run"
    optin_export.run(recipe, run, stop_after="scoring")
    data.unlink()
    with pytest.raises(InputError, match="No such file") as caught:
        optin_export.run(recipe, run)
    assert caught.value.exit_code == 2
    whole(run)
    shutil.copy(image_data / "images.npz", data)
    optin_export.run(recipe, run, stop_after="search")


class Remover(Quiet):
    """A display that deletes a file when a stage starts."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.at = path, stage

    def start(self, stage: str) -> None:
        if stage == self.at:
            self.path.unlink()


def test_images_that_vanish_within_a_run(tmp_path: Path, vit_recipe: Make) -> None:
    from PIL import Image

    for index in range(12):
        Image.new("L", (32, 32), 20 * index).save(tmp_path / f"{index}.png")
    recipe = vit_recipe(data={"calibration": {"source": f"images:{tmp_path}"}})
    with pytest.raises(InputError, match=r"cannot read .*7\.png"):
        optin_export.run(recipe, tmp_path / "run", display=Remover(tmp_path / "7.png", "scoring"), stop_after="search")
    whole(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("scores/scores.safetensors", "search"),
        ("plan/plan.json", "surgery"),
        ("model/model.safetensors", "export"),
        ("onnx/pruned.onnx", "engines"),
    ],
)
def test_an_artefact_that_vanishes_between_stages(name: str, stage: str, tmp_path: Path, vit_recipe: Make) -> None:
    """It is no input of the user's, and the next run makes it again."""
    run = tmp_path / "run"
    with pytest.raises(EnvironmentLacks) as caught:
        optin_export.run(vit_recipe(), run, display=Remover(run / name, stage), stop_after=stage)
    assert caught.value.why == "it has vanished"
    optin_export.run(vit_recipe(), run, stop_after=stage)
    whole(run)
