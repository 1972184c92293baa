"""A sweep without a cluster: one run after another, scored once; and what a run says of targets that it cannot see."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import optin_export
from optin_export import cli, scoring
from optin_export.distributed import target_nodes
from optin_export.distributed.costs import Book
from optin_export.distributed.sweep import run_sweep
from optin_export.errors import InputError
from optin_export.recipe import validate
from optin_export.ship import check_manifest
from optin_export.workdir.files import read_json, sha256_file
from optin_export.workdir.lock import held
from tests.conftest import Make

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


def test_a_target_elsewhere_is_not_evaluated_without_a_cluster(
    vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [{"engine": "onnxruntime"}, {"engine": "onnxruntime", "resources": {"accelerator_type:L4": 1}}]
    path = written(vit_recipe(targets=targets), tmp_path)
    assert cli.main([str(path), "--out", str(tmp_path / "run"), "--quiet"]) == 4
    (gate,) = [
        one for one in read_json(tmp_path / "run" / "report.json")["verdict"]["gates"] if "target." in one["name"]
    ]
    assert gate["measured"] is None and not gate["passed"]
    assert "not evaluated" in gate["note"] and "accelerator_type:L4" in gate["note"]
    assert not list((tmp_path / "run" / "engines").glob("*l4*"))  # nothing was built here for it


def test_without_ray_the_error_says_what_to_install(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    path = written(vit_recipe(), tmp_path)
    assert cli.main([str(path), "--out", str(tmp_path / "run"), "--cluster", "local"]) == 5
    assert "pip install 'optin-export[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["remote", "ray://host", ""])
def test_what_names_no_cluster_is_refused(
    vit_recipe: Make, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(vit_recipe(), tmp_path)
    assert cli.main([str(path), "--cluster", where]) == 2
    assert "ray://HOST:PORT" in capsys.readouterr().err


def test_a_sweep_is_held_by_one_process_and_can_be_cleaned(
    vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(vit_recipe(sweep={"prune.budget.macs": [0.7, 0.5]}), tmp_path), tmp_path / "sweep"
    line = [str(path), "--out", str(out), "--quiet", "--stop-after", "search"]
    with held(out, "another"):
        assert cli.main(line) == 5
    assert "another" in capsys.readouterr().err
    assert cli.main(line) == 0
    assert cli.main(["clean", str(out), "--everything"]) == 0
    assert not out.exists()


@pytest.mark.parametrize("field", ["data.calibration.source", "model.source", "finetune.source"])
def test_what_is_read_by_path_is_refused_where_files_are_not_shared(
    vit_recipe: Make, tmp_path: Path, field: str
) -> None:
    recipe: Any = vit_recipe(sweep={"prune.budget.macs": [0.7, 0.5]})
    name = f"images:{tmp_path}" if field.startswith("data") else f"py:{tmp_path / 'user.py'}:make"
    section = recipe
    for key in field.split(".")[:-1]:
        section = section.setdefault(key, {})
    section["source"] = name
    session: Any = SimpleNamespace(shared_files=False)
    with pytest.raises(InputError, match="cannot use the recipe's files") as error:
        run_sweep(validate(recipe, tmp_path), tmp_path / "sweep", session, SimpleNamespace())  # type: ignore[arg-type]
    assert name in error.value.why and "--shared-files" in error.value.fix and not (tmp_path / "sweep").exists()


def test_a_target_on_cuda_asks_for_a_gpu_or_for_the_share_it_names(vit_recipe: Make, tmp_path: Path) -> None:
    targets = [
        {"engine": "onnxruntime"},
        {"engine": "torch", "device": "cuda", "resources": {"rack": 1}},
        {"engine": "onnxruntime", "device": "cuda", "resources": {"GPU": 0.5}},
    ]
    asked: list[dict[str, float]] = []
    session: Any = SimpleNamespace(
        missing=lambda wanted: asked.append(dict(wanted)) or "GPU", finished=lambda tasks, turn: ()
    )
    recipe = validate(vit_recipe(targets=targets), tmp_path)
    target_nodes.measure_fleet(session, recipe, tmp_path, Book(tmp_path), force=True)
    assert asked == [{"GPU": 1.0, "rack": 1.0}, {"GPU": 0.5}]
    assert set(read_json(tmp_path / "cluster" / "fleet.json")["unmeasured"].values()) == {
        "no node of the cluster has GPU"
    }
