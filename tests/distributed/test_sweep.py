"""What is said without a cluster: of targets out of sight, of a missing Ray, of files that workers do not have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from optin_export import cli
from optin_export.distributed import target_nodes
from optin_export.distributed.costs import Book
from optin_export.distributed.sweep import check_paths
from optin_export.errors import InputError
from optin_export.recipe import validate
from optin_export.workdir.files import read_json
from tests.conftest import Make

pytestmark = pytest.mark.usefixtures("short_measurement")


def written(recipe: dict, folder: Path) -> Path:  # type: ignore[type-arg]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


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
        check_paths(validate(recipe, tmp_path), session)
    assert name in error.value.why and "--shared-files" in error.value.fix


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
