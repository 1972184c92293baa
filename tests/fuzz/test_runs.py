"""Run folders by anybody, with a manifest that fits: the commands that take one end with an exit code of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optin_export import cli, ship
from optin_export.report import add_elsewhere, still_deployed, still_elsewhere
from optin_export.serving.deployed import Reference
from optin_export.ship import check_manifest
from optin_export.workdir.files import sha256_file
from tests.fuzz.conftest import COUNT, PROFILE
from tests.fuzz.oracle import canary, harmless
from tests.fuzz.strategies import mangled, twisted
from tests.shortly import measure_shortly


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(data: st.DataObject, path: Path) -> bytes:
    """A file of JSON, gone wrong as text or as a structure."""
    text = path.read_bytes()
    changed = twisted(json.loads(text)).map(lambda value: json.dumps(value).encode())
    return data.draw(st.one_of(changed, changed, mangled(text), st.just(b"[" * 200_000)))


@given(data=st.data())
def test_manifests(data: st.DataObject, finished: Path, run: Path) -> None:
    (run / "manifest.json").write_bytes(content(data, finished / "manifest.json"))
    with harmless("manifest.json", run.parent):
        check_manifest(run)
        origin = ship.Origin.from_run(run)
        origin.check(ship.files_of(origin), False)


@given(data=st.data())
def test_reports(data: st.DataObject, finished: Path, run: Path) -> None:
    (run / "report.json").write_bytes(content(data, finished / "report.json"))
    with harmless("report.json", run.parent):
        ship.Origin.from_run(run).facts()
        add_elsewhere(run)


@given(data=st.data())
def test_results_of_elsewhere(data: st.DataObject, finished: Path, run: Path) -> None:
    entry = {
        "machine": "m",
        "target": "t",
        "created": "now",
        "graphs": {"base": sha256_file(finished / "onnx" / "base.onnx")},
        "environment": {},
        "gates": [],
        "engines": [],
        "accuracy_note": None,
        **{name: json.loads((finished / "measure" / f"{name}.json").read_text()) for name in ("parity", "latency")},
        "accuracy": None,
        "unmeasured": {},
    }
    for name, value in (("machines/m/measure/t.json", entry), ("measure/deployed.json", {"graphs": {}, "results": []})):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        path.write_bytes(content(data, path))
    with harmless("results", run.parent):
        still_elsewhere(run)
        still_deployed(run)


@given(data=st.data())
def test_references(data: st.DataObject, finished: Path, run: Path) -> None:
    path = run / "measure" / "reference.safetensors"
    path.write_bytes(data.draw(mangled((finished / "measure" / "reference.safetensors").read_bytes(), head=500)))
    with harmless("safetensors", run.parent):
        Reference.load(path, "logits", 1e-4)


FILES = (
    "recipe.yaml",
    "measure/reference.safetensors",
    "onnx/pruned.onnx",
    "onnx/base.pt2",
    "report.json",
    "manifest.json",
)


@settings(max_examples=max(4, COUNT[PROFILE] // 12))
@given(data=st.data())
def test_commands_on_a_folder_that_fits_its_manifest(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    """What was changed is entered in the manifest: nothing but the content itself can give it away."""
    run = tmp_path / "run"
    for old in (run, tmp_path / "models", tmp_path / ".models.optin-export"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(finished, run)
    name = data.draw(st.sampled_from(FILES))
    (run / name).write_bytes(data.draw(mangled((finished / name).read_bytes(), head=2000, changes=2)))
    if name == "recipe.yaml" and data.draw(st.booleans()):
        (run / "code.py").write_text(f"open({str(canary(run.parent))!r}, 'w')\ndef rows(): ...\n")
        text = (finished / name).read_text().replace("npz:", f"py:{run / 'code.py'}:rows#")
        (run / name).write_text(text)
    if name != "manifest.json":
        manifest = json.loads((run / "manifest.json").read_text())
        if name in manifest["files"]:
            manifest["files"][name] = {"sha256": sha256_file(run / name), "bytes": (run / name).stat().st_size}
        (run / "manifest.json").write_text(json.dumps(manifest))
    words = data.draw(
        st.sampled_from(
            [
                ["measure", str(run), "--target", "engine=onnxruntime", "--quiet"],
                ["measure", str(run), "--target", "engine=torch", "--quiet"],
                ["ship", str(run), "--to", str(run.parent / "models"), "--set", "ship.backend=onnxruntime"],
                ["verify", str(run)],
            ]
        )
    )
    with pytest.MonkeyPatch.context() as patch, harmless("commands", run.parent):
        measure_shortly(patch.setattr)
        assert cli.main(words) in (0, 2, 3, 4, 5), "a bug: see the traceback"
