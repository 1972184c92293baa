"""A finished run in each tracker, read back by the tracker's own reader; skipped where its package is absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from optin_export import cli, tracking
from optin_export.cli.run import optin_export as parser
from optin_export.errors import EnvironmentLacks
from optin_export.report.schema import read_report
from optin_export.tracking import values_of


@pytest.fixture
def run(finished_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished_vit, tmp_path / "run"))


def test_a_run_as_flat_values(finished_vit: Path) -> None:
    report, values = read_report(finished_vit), values_of(finished_vit)
    one = report.latency[0]
    where = f"latency/{one.target}/batch_{one.batch}"
    assert values.metrics[f"{where}/pruned_p50_ms"] == one.pruned_ms.p50
    assert values.metrics[f"{where}/speedup_low"] == one.judged_speedup.ci_low
    assert report.accuracy is not None and values.metrics["accuracy/drop"] == report.accuracy.drop
    assert values.metrics["passed"] == float(report.verdict.passed)
    assert values.params["prune.budget.macs"] == "0.6" and "prune.budget.params" not in values.params
    assert {"report.html", "pruned.onnx", "recipe.yaml"} <= {file.name for file in values.files}


def test_a_missing_tracker_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    (tmp_path / "recipe.yaml").write_text(
        "recipe: 1\nname: r\nmodel: {source: 'timm:resnet18', task: image-classification}\n"
        "data: {calibration: {source: 'npz:none.npz'}}\nprune: {budget: {macs: 0.5}}\n",
        encoding="utf-8",
    )
    assert cli.main([str(tmp_path / "recipe.yaml"), "--log", "mlflow", "--out", str(tmp_path / "run")]) == 5
    assert "pip install 'optin-export[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert parser.make_context("optin-export", ["r.yaml", "--log", "wandb", "--log", "mlflow"]).params["log"] == (
        "wandb",
        "mlflow",
    )


def test_mlflow(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    told = tracking.log_run("mlflow", run)
    (found,) = mlflow.search_runs(experiment_names=["optin-export"], output_format="list")
    values = values_of(run)
    assert found.info.run_id in told and found.info.run_name == values.name
    assert found.data.metrics == pytest.approx(values.metrics)
    assert found.data.params["prune.budget.macs"] == "0.6" and found.data.tags["verdict"] == values.tags["verdict"]
    client = mlflow.tracking.MlflowClient()
    assert {one.path for one in client.list_artifacts(found.info.run_id, "onnx")} == {"onnx/pruned.onnx"}


def test_tensorboard(run: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # logged again, a run is still one point
        tracking.log_run("tensorboard", run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    found = {name: [one.value for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [pytest.approx(value, rel=1e-6)] for name, value in values_of(run).metrics.items()}


def test_wandb(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged: list[Any] = []
    monkeypatch.setattr(wandb.Run, "log", lambda self, data: logged.append(data))
    assert "W&B run" in tracking.log_run("wandb", run)
    assert logged == [values_of(run).metrics]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_tracker_that_fails_leaves_the_run_as_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optin_export.tracking import to_tensorboard

    def broken(values: Any, folder: Path) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tracking, "check", lambda tracker: None)
    monkeypatch.setattr(to_tensorboard, "log", broken)
    with pytest.raises(EnvironmentLacks, match="no route to host") as error:
        tracking.log_run("tensorboard", run)
    assert "the run itself is complete" in error.value.fix
