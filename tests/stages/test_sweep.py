"""A sweep without a cluster: one run after another, scored once; and no code of clusters in either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import optin_export
from optin_export import cli, scoring
from optin_export.errors import InputError
from optin_export.ship import check_manifest
from optin_export.workdir.files import read_json, sha256_file
from optin_export.workdir.lock import held
from tests.conftest import Make
from tests.shortly import SHORTLY

pytestmark = pytest.mark.usefixtures("short_measurement")


def written(recipe: dict, folder: Path) -> Path:  # type: ignore[type-arg]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_sweep_is_scored_once_and_every_run_stands_alone(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, score = [], scoring.score
    monkeypatch.setattr(scoring, "score", lambda *args, **kwargs: scored.append(1) or score(*args, **kwargs))
    # One of them cannot be met: it fails for itself.
    path = written(vit_recipe(sweep={"prune.budget.macs": [0.7, 0.5, 0.001]}), tmp_path)
    out = tmp_path / "sweep"
    assert cli.main([str(path), "--out", str(out), "--quiet", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in told["runs"]] == ["macs-0.7", "macs-0.5", "macs-0.001"]
    assert [one["exit_code"] for one in told["runs"]] == [0, 0, 2]
    assert len(scored) == 1
    assert read_json(out / "sweep.json")["runs"] == told["runs"]
    hashes = set()
    for name, limit in (("macs-0.7", 0.7), ("macs-0.5", 0.5)):
        report = read_json(out / name / "report.json")
        assert report["verdict"]["passed"] and report["macs"]["ratio"] <= limit
        assert check_manifest(out / name) == []
        hashes.add(sha256_file(out / name / "scores" / "scores.safetensors"))
    assert len(hashes) == 1
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "macs-0.7" in page and "macs-0.5" in page and "macs-0.001" not in page
    # A run of the sweep is the run that its recipe alone makes.
    alone = optin_export.run(vit_recipe(prune={**vit_recipe()["prune"], "budget": {"macs": 0.5}}), tmp_path / "alone")
    assert alone is not None
    for name in ("scores/scores.safetensors", "plan/plan.json", "model/model.safetensors"):
        assert sha256_file(tmp_path / "alone" / name) == sha256_file(out / "macs-0.5" / name)
    # Again: nothing is done again.
    before = len(scored)
    cli.main([str(path), "--out", str(out), "--quiet"])
    stages = {one["name"]: one["reused"] for one in read_json(out / "macs-0.5" / "report.json")["stages"]}
    assert len(scored) == before and all(stages[name] for name in ("scoring", "search", "surgery", "measure"))


def test_the_library_says_what_a_sweep_is(vit_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a sweep"):
        optin_export.run(vit_recipe(sweep={"seed": [1, 2]}), tmp_path / "run")


def test_a_dry_run_names_all_runs(vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(vit_recipe(sweep={"prune.budget.macs": [0.7, 0.5]}), tmp_path)
    assert cli.main([str(path), "--dry-run", "--out", str(tmp_path / "sweep")]) == 0
    told = capsys.readouterr().out
    assert "a sweep of 2 runs" in told and "macs-0.7" in told and "macs-0.5" in told
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_is_held_by_one_process(vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(vit_recipe(sweep={"prune.budget.macs": [0.7, 0.5]}), tmp_path), tmp_path / "sweep"
    line = [str(path), "--out", str(out), "--quiet", "--stop-after", "search"]
    with held(out, "another"):
        assert cli.main(line) == 5
    assert "another" in capsys.readouterr().err
    assert cli.main(line) == 0


ALONE = """
import sys
from optin_export import cli
codes = [cli.main([f"{name}.yaml", "--out", name, "--quiet"]) for name in ("run", "sweep")]
print(codes, [name for name in sys.modules if name == "ray" or name.startswith("optin_export.distributed")])
"""


def test_one_machine_needs_no_code_of_clusters(vit_recipe: Make, tmp_path: Path) -> None:
    quick = vit_recipe(export={"batch": [1]})
    for name, recipe in (("run", quick), ("sweep", {**quick, "sweep": {"prune.budget.macs": [0.7]}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SHORTLY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[0, 0] []"], done.stdout + done.stderr
