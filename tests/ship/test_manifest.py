"""The manifest notices any change: content, size, missing and extra files, and names that point outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optin_export.errors import InputError
from optin_export.ship import check_manifest, write_manifest
from optin_export.ship.manifest import content_of, run_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "onnx").mkdir(parents=True)
    (run / "onnx" / "pruned.onnx").write_bytes(b"weights")
    (run / "plan.json").write_text("{}")
    write_manifest(run, {"seed": 0})
    return run


def test_an_untouched_folder_verifies(folder: Path) -> None:
    assert check_manifest(folder) == []
    # What comes later has no entry yet where nothing entered it.
    (folder / "report.html").write_text("a page")
    (folder / "measure").mkdir()
    (folder / "measure" / "deployed.json").write_text("{}")
    assert check_manifest(folder) == []


def test_a_flipped_bit_and_missing_and_extra_files_are_found(folder: Path) -> None:
    (folder / "onnx" / "pruned.onnx").write_bytes(b"weightt")
    (folder / "plan.json").unlink()
    (folder / "onnx" / "more.onnx").write_bytes(b"")
    assert check_manifest(folder) == [
        "onnx/pruned.onnx: content differs",
        "plan.json: missing",
        "onnx/more.onnx: not in the manifest",
    ]
    (folder / "onnx" / "pruned.onnx").write_bytes(b"weights and more")
    assert check_manifest(folder)[0] == "onnx/pruned.onnx: has 16 bytes, not 7"


def test_a_link_that_leads_outside_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (folder / "onnx" / "pruned.onnx").unlink()
    (folder / "onnx" / "pruned.onnx").symlink_to(tmp_path / "elsewhere")
    assert check_manifest(folder) == ["onnx/pruned.onnx: points outside the folder"]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_may_not_point_outside(folder: Path, name: str) -> None:
    text = (folder / "manifest.json").read_text().replace("plan.json", name)
    (folder / "manifest.json").write_text(text)
    assert f"{name}: points outside the folder" in check_manifest(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "not json", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"sha256": "x"}}}']
)
def test_a_damaged_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        check_manifest(folder)
    assert run_of(folder) is None and content_of(folder) is None


def test_times_are_not_content(folder: Path) -> None:
    before = content_of(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "created": "now", "instance": {}}))
    assert content_of(folder) == before
