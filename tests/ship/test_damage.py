"""What became of a shipment: repaired by the next one, found by `verify`, and told by its numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optin_export import cli
from optin_export.ship.repository import install, private_folder, roll_back
from optin_export.workdir.files import sha256_file
from tests.ship.test_repository import contents, place, writer  # noqa: F401 - a fixture


def ship(run: Path, to: Path, *options: str) -> int:
    return cli.main(["ship", str(run), "--to", str(to), *options])


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    code = cli.main(["verify", str(folder), "--json"])
    problems: list[str] = json.loads(capsys.readouterr().out)["problems"]
    assert code == (2 if problems else 0)
    return problems


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def more(path: Path) -> None:
    (path.parent / "more").write_text("x")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "gone": Path.unlink,
    "truncated": lambda path: os.truncate(path, 3),
    "an extra file": more,
    "a hidden file": lambda path: (path.parent / ".x").write_text("x"),
    "an empty folder": lambda path: (path.parent / "deeper").mkdir(),
    "a FIFO": lambda path: os.mkfifo(path.parent / "pipe"),
    "a link": lambda path: (path.parent / "link").symlink_to(path.name),
    "the file as a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_repaired(damage: str, place: Path) -> None:  # noqa: F811
    """By its files, not by what its manifest says; what was kept before it stays, and the damage is not kept."""
    models = {"m": writer("2"), "m-base": writer("b")}
    assert install(place, models, "a") == ["m"]
    DAMAGE[damage](place / "m" / "1" / "model.onnx")
    assert install(place, models, "a") == ["m"]
    assert contents(place) == {"m": "2", "m-base": "b"}
    assert install(place, models, "a") == []
    roll_back(place, "m")
    assert contents(place)["m"] == "1"


def test_repaired_by_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    assert ship(run, models) == 0
    flip(models / "tiny" / "1" / "model.onnx")
    assert verify(models, capsys) == ["tiny/1/model.onnx: content differs"]
    assert ship(run, models) == 0
    said = capsys.readouterr().out
    assert f"{models / 'tiny'}: written" in said and f"{models / 'tiny-base'}: unchanged" in said
    assert verify(models, capsys) == []


@pytest.mark.parametrize("at", ["staged", "swapped", "rolled back"])
def test_what_a_killed_shipment_left(at: str, place: Path) -> None:  # noqa: F811
    """The next one tidies up; a model that was on its way is put where there is room for it."""
    install(place, {"m": writer("2")}, "a")
    around = private_folder(place)
    if at == "staged":
        shutil.copytree(place / "m", around / "staging-x" / "m")
    elif at == "swapped":
        shutil.copytree(place / "m", around / "staging-x" / "m")
        shutil.rmtree(around / "previous" / "m")
        (place / "m").rename(around / "previous" / "m")
    else:
        (around / "moving-x").mkdir()
        (around / "previous" / "m").rename(around / "moving-x" / "m")
    assert install(place, {"m-base": writer("c")}, "a") == ["m-base"]
    assert sorted(path.name for path in around.iterdir()) == ["lock", "previous"]
    if at == "swapped":  # two renames are not one: it is where a rollback finds it
        assert roll_back(place, "m") == ["m", "m-base"]
    elif at == "rolled back":
        assert (around / "previous" / "m" / "1" / "model.onnx").read_text() == "1"
    assert contents(place)["m"] == "2"


def test_a_rollback_that_was_killed_at_its_end(place: Path) -> None:  # noqa: F811
    install(place, {"m": writer("2")}, "a")
    around = private_folder(place)
    (around / "moving-x").mkdir()
    (around / "previous" / "m").rename(around / "moving-x" / "m")
    (place / "m").rename(around / "previous" / "m")
    assert install(place, {"m-base": writer("c")}, "a") == ["m-base"]
    assert contents(place)["m"] == "1" and (around / "previous" / "m" / "1" / "model.onnx").read_text() == "2"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("where", ["models", "run"])
def test_verify_finds(damage: str, where: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ship(run, tmp_path / "models") == 0
    assert verify(tmp_path / where, capsys) == []
    path = {"models": "tiny/1/model.onnx", "run": "onnx/pruned.onnx"}[where]
    DAMAGE[damage](tmp_path / where / path)
    assert verify(tmp_path / where, capsys)


@pytest.mark.parametrize(
    "name", ["report.json", "report.html", "measure/latency.json", "plan/plan.json", "recipe.yaml"]
)
def test_verify_finds_what_was_replaced(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).write_text((run / name).read_text() + " ")
    size = (run / name).stat().st_size
    assert verify(run, capsys) == [f"run/{name}: has {size} bytes, not {size - 1}"]


@pytest.mark.parametrize(
    "name", ["empty", ".hidden", ".stages/evil.py", ".stages/deeper/x.json", "cluster/x.sh", ".triton.optin-export/x"]
)
def test_verify_finds_what_was_added(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "empty":
        (run / name).mkdir()
    else:
        (run / name).write_text("x")
    assert any(problem.startswith(f"run/{name}: ") for problem in verify(run, capsys))


def test_verify_misses_a_model_that_has_gone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    assert ship(run, models) == 0
    shutil.rmtree(models / "tiny-base")
    assert verify(models, capsys) == ["./tiny-base: missing, it was shipped together with tiny"]
    assert ship(run, models) == 0
    assert verify(models, capsys) == []


def forge(run: Path, name: str, change: Callable[[Any], None]) -> None:
    """A changed file of a run, and the manifest changed with it."""
    value, manifest = (json.loads((run / path).read_text()) for path in (name, "manifest.json"))
    change(value)
    (run / name).write_text(json.dumps(value))
    size = (run / name).stat().st_size
    manifest["files"][name] = {"sha256": sha256_file(run / name), "bytes": size}
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_forged_summary_is_not_shipped(run: Path, tmp_path: Path) -> None:
    forge(run, "report.json", lambda report: report["verdict"].update(summary="PASSED: 1000x faster"))
    assert ship(run, tmp_path / "models") == 0
    text = (tmp_path / "models" / "tiny" / "manifest.json").read_text()
    assert "1000x" not in text
    summary = json.loads(text)["verdict"]["summary"]
    assert "parity" in summary and "budget.macs" in summary and "(<= 0.6)" in summary


def test_a_run_is_judged_again_by_its_numbers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verdict that says it passed, and measurements that do not."""

    def worse(cases: Any) -> None:
        cases[0]["max_error"] = 5.0
        cases[0]["passed"] = False

    forge(run, "measure/parity.json", worse)
    assert ship(run, tmp_path / "models") == 4
    assert "failed its gates" in capsys.readouterr().err
    assert ship(run, tmp_path / "models", "--allow-failed") == 0
    facts = json.loads((tmp_path / "models" / "tiny" / "manifest.json").read_text())
    assert facts["verdict"]["passed"] is False and "parity 5 " in facts["verdict"]["summary"]


def test_no_folder_of_this_machine_is_told(run: Path, tmp_path: Path) -> None:
    assert ship(run, tmp_path / "models", "--bom") == 0
    for path in (tmp_path / "models").rglob("*.json"):
        assert "/tmp" not in path.read_text() and str(tmp_path) not in path.read_text(), path
    facts = json.loads((tmp_path / "models" / "tiny" / "manifest.json").read_text())
    assert facts["model"]["source"] == "timm:vit_tiny_patch16_224" and facts["model"]["weights"] == "vit.safetensors"
    assert facts["data"]["calibration"] == "npz:images.npz"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/home/me/model", "model"),
        ("csv:/home/me/train.csv", "csv:train.csv"),
        ("py:/home/me/own.py:make", "py:own.py:make"),
        ("py:package.module:make", "py:package.module:make"),
        ("hf:org/name", "hf:org/name"),
        ("hf:/home/me/model", "hf:model"),
        ("images:/data/", "images:data"),
        ("timm:vit_tiny", "timm:vit_tiny"),
        ("pretrained", "pretrained"),
    ],
)
def test_sources_without_their_folders(source: str, told: str) -> None:
    from optin_export.ship.origin import without_folders

    assert without_folders(source) == told


def test_nobody_else_may_write_what_is_made(run: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert ship(run, tmp_path / "new" / "models") == 0
    finally:
        assert os.umask(before) == 0
    for path in (tmp_path / "new", *(tmp_path / "new").rglob("*")):
        assert not path.stat().st_mode & 0o022, path
