"""A model repository changes whole or not at all, keeps what it replaced, and belongs to the run that wrote it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship import repository
from optin_export.ship.manifest import write_manifest
from optin_export.ship.repository import install, private_folder, roll_back
from optin_export.ship.verify import check_folder


def writer(text: str, run: str = "a"):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "1").mkdir()
        (folder / "1" / "model.onnx").write_text(text)
        (folder / "config.pbtxt").write_text("name")
        write_manifest(folder, {"shipped_from": run})

    return write


def contents(place: Path) -> dict[str, str]:
    return {path.parent.parent.name: path.read_text() for path in sorted(place.glob("*/1/model.onnx"))}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    assert install(folder, {"m": writer("1"), "m-base": writer("b")}, "a") == ["m", "m-base"]
    return folder


def test_only_models_are_inside_and_servers_may_read_them(place: Path) -> None:
    assert sorted(path.name for path in place.iterdir()) == ["m", "m-base"]
    assert (place / "m").stat().st_mode & 0o777 == 0o755
    assert (place / "m" / "1" / "model.onnx").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in private_folder(place).glob("staging-*")] == []
    assert check_folder(place) == {"m": [], "m-base": []}


def test_another_run_is_refused_unless_told_otherwise(place: Path) -> None:
    with pytest.raises(InputError, match="already has another model 'm'"):
        install(place, {"x": writer("x", "b"), "m": writer("2", "b")}, "b")
    assert contents(place) == {"m": "1", "m-base": "b"}
    assert install(place, {"n": writer("n", "b")}, "b") == ["n"]
    assert install(place, {"m": writer("2", "b")}, "b", replace=True) == ["m"]
    assert contents(place) == {"m": "2", "m-base": "b", "n": "n"}


def test_a_model_that_nobody_shipped_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    with pytest.raises(InputError, match="from elsewhere"):
        install(tmp_path / "models", {"m": writer("1")}, "a")


def test_what_does_not_change_is_left_alone(place: Path) -> None:
    before = (place / "m-base").stat().st_ino
    assert install(place, {"m": writer("2"), "m-base": writer("b")}, "a") == ["m"]
    assert (place / "m-base").stat().st_ino == before
    assert install(place, {"m": writer("2"), "m-base": writer("b")}, "a") == []


def test_a_rollback_puts_back_what_was_shipped_together_and_can_be_undone(place: Path) -> None:
    install(place, {"m": writer("2"), "m-base": writer("c")}, "a")
    assert roll_back(place, "m") == ["m", "m-base"]
    assert contents(place) == {"m": "1", "m-base": "b"}
    assert roll_back(place, "m-base") == ["m", "m-base"]
    assert contents(place) == {"m": "2", "m-base": "c"}


def test_a_rollback_leaves_models_that_the_last_shipment_did_not_change(place: Path) -> None:
    install(place, {"m": writer("2"), "m-base": writer("c")}, "a")
    install(place, {"m": writer("3"), "m-base": writer("c")}, "a")
    assert roll_back(place, "m") == ["m"]
    assert contents(place) == {"m": "2", "m-base": "c"}


def test_a_rollback_brings_back_a_model_that_is_gone(place: Path) -> None:
    install(place, {"m": writer("2")}, "a")
    shutil.rmtree(place / "m")
    roll_back(place, "m")
    assert contents(place)["m"] == "1"


def test_nothing_to_go_back_to(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no earlier 'm'"):
        roll_back(place, "m")
    with pytest.raises(InputError, match="not a model repository"):
        roll_back(tmp_path / "none", "m")
    with pytest.raises(InputError, match="cannot name"):
        roll_back(place, "../m")


def test_a_rollback_writes_nothing_where_nothing_was_shipped(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="no earlier 'm'") as refused:
        roll_back(folder, "m")
    assert "available: none" in str(refused.value)
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize("at", range(1, 7))
def test_whatever_rename_fails_the_repository_is_as_before(
    place: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(place, {"m": writer("2"), "m-base": writer("c")}, "a")
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(EnvironmentLacks, match="no changes were made"):
        install(place, {"m": writer("3"), "m-base": writer("d")}, "a")
    monkeypatch.undo()
    assert contents(place) == {"m": "2", "m-base": "c"}
    roll_back(place, "m")
    assert contents(place) == {"m": "1", "m-base": "b"}


def test_an_interrupt_while_writing_leaves_nothing(place: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "config.pbtxt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(place, {"m": write}, "a")
    assert contents(place) == {"m": "1", "m-base": "b"} and not list(private_folder(place).glob("staging-*"))


def test_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentLacks, match="No space left"):
        install(place, {"m": writer("2")}, "a")
    monkeypatch.undo()
    assert contents(place) == {"m": "1", "m-base": "b"}


def test_a_really_full_disk(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("64k")
    install(disk / "models", {"m": writer("1")}, "a")
    with pytest.raises(EnvironmentLacks, match="No space left"):
        install(disk / "models", {"m": writer("2"), "big": writer("x" * 100_000)}, "a")
    assert contents(disk / "models") == {"m": "1"}
    assert check_folder(disk / "models") == {"m": []}
    assert not list(private_folder(disk / "models").glob("staging-*"))
    with pytest.raises(InputError, match="is a mount point"):
        install(disk, {"m": writer("1")}, "a")


def test_one_change_at_a_time(place: Path) -> None:
    with repository._locked(place), pytest.raises(EnvironmentLacks, match="being changed"):
        install(place, {"m": writer("2")}, "a")


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentLacks, match="cannot write"):
        install(tmp_path / "file" / "models", {"m": writer("1")}, "a")


def test_strange_files_are_found(place: Path, tmp_path: Path) -> None:
    (place / ".hidden").mkdir()
    (place / "note.txt").write_text("")
    (place / "m" / "1" / "extra.bin").write_text("")
    (place / "m-base" / "1" / "model.onnx").write_text("B")
    found = check_folder(place)
    assert found["."] == [".hidden: not shipped by optin-export", "note.txt: not shipped by optin-export"]
    assert found["m"] == ["1/extra.bin: not in the manifest"]
    assert found["m-base"] == ["1/model.onnx: content differs"]
    with pytest.raises(InputError, match="nothing in"):
        check_folder(tmp_path / "none")
