"""Deployment files parse, fit the shipment, and pass the linters of their formats where those are installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from optin_export import cli
from optin_export.ship.deploy import Facts, documents
from optin_export.ship.guide import METRICS

FACTS = Facts(
    name="My_Model.v2",
    models=("My_Model.v2", "My_Model.v2-base", "My_Model.v2-prepare", "My_Model.v2-ensemble"),
    entry="My_Model.v2-ensemble",
    image="nvcr.io/nvidia/tritonserver:26.01-py3",
    packages=("tokenizers==0.22.0",),
    arguments=("--rate-limit=execution_count",),
    repository="../models",
    gpu=False,
    cpus=2,
    memory_mib=1024,
    exact=True,
)
#: Counters that the dashboard reads besides those that `ship` tells to watch.
ALSO = {"nv_inference_count"}


def test_every_file_parses_and_names_the_shipment() -> None:
    texts = documents(FACTS)
    deployment, service = yaml.safe_load_all(texts["kubernetes.yaml"])
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", deployment["metadata"]["name"])
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/models/My_Model.v2-ensemble/ready"
    assert container["args"] == ["tritonserver", "--model-repository=/models", "--rate-limit=execution_count"]
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "1024Mi"}
    assert {port["name"] for port in container["ports"]} == {port["targetPort"] for port in service["spec"]["ports"]}
    (served,) = yaml.safe_load_all(texts["kserve.yaml"])
    assert served["spec"]["predictor"]["model"]["modelFormat"] == {"name": "triton"}
    services = yaml.safe_load(texts["compose.yaml"])["services"]
    assert services["triton"]["volumes"] == ["../models:/models:ro"]
    assert "tokenizers==0.22.0" in services["triton"]["build"]["dockerfile_inline"]
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one["ports"])
    mounted = [source for one in services.values() for source in one["volumes"] if source.startswith("./")]
    assert all(source.split(":")[0].removeprefix("./") in texts for source in mounted)
    assert "RUN pip install --no-cache-dir tokenizers==0.22.0" in texts["Dockerfile"]


def test_a_gpu_is_asked_for_and_nothing_is_installed_in_vain() -> None:
    texts = documents(replace(FACTS, gpu=True, packages=()))
    deployment, _ = yaml.safe_load_all(texts["kubernetes.yaml"])
    assert deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    services = yaml.safe_load(texts["compose.yaml"])["services"]
    assert services["triton"]["image"] == FACTS.image and "deploy" in services["triton"]
    assert "pip" not in texts["Dockerfile"]


def test_rules_and_dashboard_read_the_counters_to_watch_of_this_model() -> None:
    texts = documents(FACTS)
    (group,) = yaml.safe_load(texts["alerts.yaml"])["groups"]
    for rule in group["rules"][1:]:
        assert 'model="My_Model.v2"' in rule["expr"]
    panels = json.loads(texts["grafana/dashboard.json"])["panels"]
    used = {name for one in (*panels, *group["rules"]) for name in re.findall(r"nv_\w+", json.dumps(one))}
    assert used == {*METRICS, *ALSO}


def test_ship_writes_them_and_keeps_what_was_edited(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, folder = tmp_path / "models", tmp_path / "deploy"
    ship = ["ship", str(run), "--to", str(place), "--deploy"]
    assert cli.main([*ship, str(folder)]) == 0
    assert "deployment files: " in capsys.readouterr().out
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert services["triton"]["volumes"] == ["../models:/models:ro"]
    assert cli.main([*ship, str(folder)]) == 0
    (folder / "compose.yaml").write_text("services: {}")
    assert cli.main([*ship, str(folder)]) == 2 and "exists and differs" in capsys.readouterr().err
    assert (folder / "compose.yaml").read_text() == "services: {}"
    assert cli.main([*ship, str(folder), "--replace"]) == 0
    assert cli.main([*ship, str(place / "deploy")]) == 2 and not (place / "deploy").exists()
    assert cli.main(["verify", str(place)]) == 0


@pytest.fixture(params=["cpu", "gpu"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    facts = FACTS if request.param == "cpu" else replace(FACTS, gpu=True, packages=())
    for name, text in documents(facts).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["promtool", "check", "rules", "alerts.yaml"],
        ["promtool", "check", "config", "--syntax-only", "prometheus.yaml"],
        ["hadolint", "Dockerfile"],
        ["yamllint", "-d", "{extends: default, rules: {line-length: disable}}", "."],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_formats_own_linters_find_nothing(written: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=written, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_accepts_the_deployment(written: Path) -> None:
    validate: Any = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all((written / "kubernetes.yaml").read_text()):
        validate.validate(document, "1.30", strict=True)
