"""Cleaning: what goes is said, a dry run deletes nothing, and nothing outside run folders is ever touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optin_export import cli
from optin_export.cli.clean import parse_size
from optin_export.errors import InputError
from optin_export.workdir.lock import held

REPORT = {"recipe.yaml", "report.json", "report.html", "manifest.json", "plan/plan.json"}


def make_run(folder: Path, size: int = 1000) -> Path:
    written = REPORT | {
        "onnx/a.onnx",
        "engines/x/a.plan",
        "model/model.safetensors",
        ".stages/search.json",
        "notes.txt",
    }
    for name in (*written, "onnx/.tmp-half.onnx"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return folder


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith(".stages/lock")}


def cleaned(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert cli.main(["clean", "--json", *map(str, words)]) == 0
    told: dict = json.loads(capsys.readouterr().out)
    return told


def test_the_report_stays_and_what_a_run_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    before = files(run)
    told = cleaned(capsys, run, "--dry-run")
    assert files(run) == before and told["freed_bytes"] == 5000
    assert cleaned(capsys, run) == {**told, "dry_run": False}
    assert files(run) == REPORT | {"notes.txt"} and set(told["runs"][str(run)]) == before - files(run)
    assert not (run / "onnx").exists()


def test_parts_that_stay_and_leftovers_that_go_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    cleaned(capsys, run, "--keep", "report,onnx")
    assert files(run) == REPORT | {"notes.txt", "onnx/a.onnx"}


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    (other / "notes.txt").unlink()
    cleaned(capsys, run, other, "--everything")
    assert files(run) == {"notes.txt"} and not other.exists()


def test_links_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, outside = make_run(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (outside / ".tmp-precious").write_text("kept")
    (run / "engines" / "folder").symlink_to(outside, target_is_directory=True)
    (run / "onnx" / "file").symlink_to(outside / "precious")
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    assert cli.main(["clean", str(tmp_path / "link")]) == 2 and "is a link" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(run, target_is_directory=True)
    assert cleaned(capsys, "--all", tmp_path / "runs")["runs"] == {}
    cleaned(capsys, run)
    assert files(outside) == {"precious", ".tmp-precious"} and not (run / "engines").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.onnx").write_text("mine")
    assert cli.main(["clean", str(tmp_path)]) == 2
    assert cli.main(["clean", str(tmp_path / "nothing")]) == 2
    assert cli.main(["clean", "--all", str(tmp_path / "nothing")]) == 2
    assert cli.main(["clean"]) == 2
    assert cli.main(["clean", str(make_run(tmp_path / "run")), "--keep", "everything"]) == 2
    assert cleaned(capsys, "--all", tmp_path, "--everything")["freed_bytes"] and files(tmp_path) == {
        "onnx/mine.onnx",
        "run/notes.txt",
    }


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = files(run)
    with held(run, "a run"):
        assert cli.main(["clean", str(run)]) == 5
        assert files(run) == before


def test_the_oldest_go_until_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    runs = [make_run(tmp_path / name) for name in "abc"]
    for age, run in zip((3, 1, 2), runs, strict=True):
        os.utime(run / "recipe.yaml", (age, age))
    assert cleaned(capsys, "--all", tmp_path, "--limit", "40kB")["runs"] == {}
    assert list(cleaned(capsys, "--all", tmp_path, "--limit", "25kB", "--dry-run")["runs"]) == [
        str(runs[1]),
        str(runs[2]),
    ]
    assert list(cleaned(capsys, "--all", tmp_path, "--limit", "30kB")["runs"]) == [str(runs[1])]


def test_timing_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / ".cache" / "optin-export"
    place.mkdir(parents=True)
    (place / "tensorrt-11-L4.cache").write_bytes(b"x" * 10)
    (place / "other").write_text("kept")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cleaned(capsys, "--cache")["freed_bytes"] == 10
    assert files(place) == {"other"}


def test_sizes() -> None:
    assert [parse_size(text) for text in ("20GB", "1.5 MiB", "7", "3k")] == [20 * 10**9, 3 << 19, 7, 3000]
    for text in ("", "GB", "-1", "1e9", "1 XB"):
        with pytest.raises(InputError):
            parse_size(text)
