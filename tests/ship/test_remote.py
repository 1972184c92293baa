"""Shipping to a URL: the same files as in a folder, foreign models refused, half uploads repaired."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from optin_export import cli
from optin_export.ship.repository import models_of

pytest.importorskip("tritonclient.grpc")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
    else:
        yield "memory://bucket/models"
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def download(url: str, to: Path) -> Path:
    files, root = fsspec.core.url_to_fs(url)
    shutil.rmtree(to, ignore_errors=True)
    for path in files.find(root):
        target = to / path.removeprefix(root).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.cat_file(path))
    return to


def test_a_url_gets_what_a_folder_gets(run: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ship = ["ship", str(run), "--to", url]
    assert cli.main(ship) == 0
    out = capsys.readouterr().out
    assert f"{url}/tiny: written" in out and f"--model-repository={url}" in out and "rollback" not in out
    copy = download(url, tmp_path / "copy")
    assert [path.name for path in models_of(copy)] == ["tiny", "tiny-base"] and cli.main(["verify", str(copy)]) == 0
    assert (copy / "tiny" / "1" / "model.onnx").read_bytes() == (run / "onnx" / "pruned.onnx").read_bytes()
    capsys.readouterr()
    assert cli.main(ship) == 0 and f"{url}/tiny: unchanged" in capsys.readouterr().out
    # Another layout has no warm-up file less and one file more: what is not shipped any more goes.
    assert cli.main([*ship, "--set", "ship.warm_up=false", "--set", "ship.layout=pruned"]) == 0
    copy = download(url, tmp_path / "copy")
    assert not (copy / "tiny" / "warmup").exists()
    # A file that is gone, as after an upload that broke off, is uploaded again.
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/tiny/1/model.onnx")
    assert cli.main(ship) == 0
    assert cli.main(["verify", str(download(url, tmp_path / "copy"))]) == 0


def test_a_model_of_another_run_is_refused(
    run: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = shutil.copytree(run, tmp_path / "second")
    assert cli.main(["ship", str(run), "--to", url]) == 0
    assert cli.main(["ship", str(second), "--to", url]) == 2
    assert "already has another model 'tiny'" in capsys.readouterr().err
    assert cli.main(["ship", str(second), "--to", url, "--replace"]) == 0


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("nowhere://x/y", 2, "nowhere"),
        ("s3://bucket/models", 5, "s3fs"),
        ("file:///proc/no/models", 5, "cannot write to file:///proc/no/models"),
    ],
)
def test_urls_that_cannot_be_written(
    run: Path, url: str, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    assert cli.main(["ship", str(run), "--to", url]) == code
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert cli.main(["ship", str(run), "--to", url, "--deploy", str(run / "deploy")]) == 2
