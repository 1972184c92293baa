"""doctor: what is said of this machine is what a run would find out."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from optin_export import cli, engines
from optin_export.cli import _gpu_software, _machine
from optin_export.cli._machine import install_line
from tests.conftest import ROOT, Make


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object]]:
    code = cli.main(["doctor", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def recipe(vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    return "recipe.yaml"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from optin_export.engines import _device

    monkeypatch.setattr(_device, "gpu_name", lambda: None)
    monkeypatch.setattr(_device, "no_gpu", lambda: "there is no GPU")


def test_the_machine(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = doctor(capsys)
    found = {one["name"]: one for one in told["checks"]}  # type: ignore[attr-defined]
    assert code == 0 and told["able"] is True
    assert found["torch"]["detail"] == metadata.version("torch")
    assert found["engine onnxruntime, cpu"]["state"] == "ok"
    assert found["engine torch, cuda"]["state"] == "unusable" and "no GPU" in found["engine torch, cuda"]["detail"]
    assert found["gpu"]["state"] == "missing"
    assert all(one["state"] in ("ok", "missing", "unusable") for one in found.values())
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["recipe.yaml"]  # nothing is written
    assert cli.main(["doctor"]) == 0
    assert "can be built and measured here" in capsys.readouterr().out


def test_a_missing_package_is_told_the_line_that_adds_it(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, told = doctor(capsys)
    found = {one["name"]: one for one in told["checks"]}  # type: ignore[attr-defined]
    assert code == 5 and told["able"] is False
    assert found["engine onnxruntime, cpu"] == {
        "name": "engine onnxruntime, cpu",
        "state": "missing",
        "detail": "'onnxruntime' cannot be imported in this environment",
        "fix": "pip install 'optin-export[cpu]'",
    }
    assert cli.main(["doctor"]) == 5
    assert "CANNOT be built and measured here" in capsys.readouterr().out
    code, told = doctor(capsys, recipe, "--set", "targets=[{engine: torch}]")
    assert code == 0  # another engine does without it


def test_a_package_that_does_not_load_is_unusable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def broken() -> str:
        raise OSError("libcudart.so.13: cannot open shared object file")

    check = _machine._tool("x", "x", broken)
    assert check.state == "unusable" and "libcudart" in check.detail


def test_a_recipe_that_can_be_built_and_not_measured(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = doctor(capsys, recipe)
    assert code == 0
    code, told = doctor(capsys, recipe, "--set", "targets=[{engine: torch, device: cuda}]")
    needed = {one["name"]: one for one in told["needed"]}  # type: ignore[attr-defined]
    assert code == 5 and needed["target torch-cuda"]["state"] == "unusable"
    assert "can be built, but not measured here" in needed["target torch-cuda"]["detail"]
    code, told = doctor(capsys, recipe, "--set", "data.calibration.source=npz:none.npz")
    needed = {one["name"]: one for one in told["needed"]}  # type: ignore[attr-defined]
    assert code == 2 and needed["model and data"]["state"] == "refused"  # as a run would end
    assert "No such file" in needed["model and data"]["detail"]


def test_what_a_recipe_needs_besides_engines(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, told = doctor(capsys, recipe, "--set", "data.calibration.source=hf-dataset:glue:sst2")
    needed = {one["name"]: one for one in told["needed"]}  # type: ignore[attr-defined]
    assert code == 5 and needed["datasets"]["state"] == "missing"


def test_wrong_use_of_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "none.yaml"]) == 2
    assert cli.main(["doctor", "--set", "a=b"]) == 2
    assert "--set needs a recipe" in capsys.readouterr().err


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_machine, "LEAST_DISK", 2**62)
    assert _machine._disk(tmp_path / "not" / "there").state == "unusable"
    monkeypatch.setattr(_machine, "LEAST_MEMORY", 2**62)
    assert _machine._memory().state == "unusable"


def test_the_line_of_a_package_is_that_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = [f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines]
    monkeypatch.setattr(_machine.metadata, "requires", lambda name: listed)
    for package, extra in (
        ("onnxruntime", "cpu"),
        ("tensorrt", "gpu"),
        ("model-signing", "signing"),
        ("datasets", "datasets"),
        ("tritonclient", "triton"),
    ):
        assert install_line(package) == f"pip install 'optin-export[{extra}]'"
    assert install_line("something-else") == "pip install something-else"


def test_every_engine_kind_is_looked_at() -> None:
    names = {check.name.split()[1].rstrip(",") for check in _machine.engine_checks()}
    assert names == {"onnxruntime", "openvino", "torch", "tensorrt", "tensorrt-rtx"}
    assert engines.MODES  # the package itself loads without any of them


@pytest.mark.parametrize(
    ("name", "driver", "able", "said"),
    [
        (
            "NVIDIA L4 (sm89)",
            "550.54.15",
            True,
            "RTX runs here too. driver 550.54.15: packages for CUDA 12",
        ),
        ("NVIDIA L4 (sm89)", "580.65.06", True, "packages for CUDA 13 or 12"),
        ("NVIDIA H200 (sm90)", "580.65.06", True, "TensorRT for RTX does not support 9.0"),
        ("NVIDIA RTX PRO 6000 (sm120)", None, True, "compute capability 12.0"),
        ("Tesla V100 (sm70)", "580.65.06", False, "too old for TensorRT"),
        ("Tesla T4 (sm75)", "470.57.02", False, "driver 470.57.02 is too old"),
    ],
)
def test_software_that_goes_with_a_gpu(name: str, driver: str | None, able: bool, said: str) -> None:
    found = _gpu_software.advice(name, driver)
    assert found[0] == able and said in found[1] and (found[2] is None) == able


def test_without_a_gpu_the_rules_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _, told = doctor(capsys)
    found = {one["name"]: one for one in told["checks"]}  # type: ignore[attr-defined]
    assert "driver 580" in found["gpu software"]["detail"] and "25.08" in found["gpu software"]["detail"]
