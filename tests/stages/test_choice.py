"""`engine: auto`: the fastest engine that passes is taken and shipped, the others are reported with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import optin_export
from optin_export import cli, engines
from optin_export.cli._machine import target_check
from optin_export.cli.run import exit_code
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.recipe import Target, validate
from optin_export.stages import choice
from tests.conftest import Make

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
TARGETS = [{"engine": "auto", "threads": 1}]
ORT, OPENVINO = "onnxruntime-cpu-1t", "openvino-cpu-1t"
pytestmark = pytest.mark.usefixtures("short_measurement")


@pytest.fixture
def recipe(vit_recipe: Make) -> Make:
    def make(**sections: Any) -> dict[str, Any]:
        return vit_recipe(**{"targets": TARGETS, "gates": {"speedup": 0.01}, **sections})

    return make


def timed(monkeypatch: pytest.MonkeyPatch, **ms: float) -> None:
    """Each engine's calls take this long, as far as the choice knows."""
    times = {ORT: ms["onnxruntime"], OPENVINO: ms["openvino"]}
    monkeypatch.setattr(
        choice,
        "_times",
        lambda work, candidates: {
            one.name: {"1": times[one.name], "3": 2 * times[one.name]} for one in candidates.targets
        },
    )


def spoiled(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """All outputs of an engine are wrong."""
    real = engines.load

    def load(path: Path, target: Target) -> Any:
        found = real(path, target)
        if target.engine == engine:
            run = found.run
            found.run = lambda inputs: {  # type: ignore[method-assign]
                name: array + 1 + np.abs(array).max() for name, array in run(inputs).items()
            }
        return found

    monkeypatch.setattr(engines, "load", load)


@pytest.mark.parametrize(("fast", "slow"), [("openvino", "onnxruntime"), ("onnxruntime", "openvino")])
def test_the_faster_is_taken_measured_and_shipped(
    fast: str, slow: str, tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, **{fast: 1.0, slow: 1.5})
    report = optin_export.run(recipe(ship={"triton": True}), tmp_path)
    assert report is not None and report.verdict.passed
    first, second = report.candidates
    assert (first.target, first.taken, first.reason) == (f"{fast}-cpu-1t", True, None)
    assert (second.target, second.taken, second.ms) == (f"{slow}-cpu-1t", False, {"1": 1.5, "3": 3.0})
    assert second.reason == f"its calls take 1.50 times as long as those of {fast}-cpu-1t"
    assert {one.target for one in report.latency} == {one.target for one in report.parity.cases} == {first.target}
    assert {one.target for one in report.engines} == {ORT, OPENVINO}
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert [target["engine"] for target in written["targets"]] == [fast]
    # OpenVINO's own backend cannot be told to compute in fp32.
    assert written["ship"]["backend"] == {"onnxruntime": "onnxruntime", "openvino": "python"}[fast]
    served = {path.suffix for path in (tmp_path / "triton" / "tiny-vit" / "1").iterdir()}
    assert served == ({".onnx"} if fast == "onnxruntime" else {".xml", ".bin", ".py"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert second.reason in page and ">taken<" in page
    assert cli.main(["verify", str(tmp_path)]) == 0 and cli.main(["check", str(tmp_path)]) == 0
    # Nothing is measured again, and the choice stays.
    monkeypatch.setattr(choice, "_times", None)
    again = optin_export.run(recipe(ship={"triton": True}), tmp_path)
    assert again is not None and again.candidates == report.candidates
    assert {one.name for one in again.stages if not one.reused} <= {"sources", "ship", "report"}


def test_real_times_decide_without_help(tmp_path: Path, recipe: Make) -> None:
    report = optin_export.run(recipe(), tmp_path)
    assert report is not None
    taken, other = report.candidates
    assert taken.taken and not other.taken
    means = [np.exp(np.mean(np.log(list(one.ms.values())))) for one in (taken, other)]
    assert list(taken.ms) == list(other.ms) == ["1", "3"] and 0 < means[0] <= means[1]
    assert other.reason == f"its calls take {means[1] / means[0]:.2f} times as long as those of {taken.target}"


def test_the_fastest_is_not_taken_where_it_computes_something_else(
    tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, openvino=1.0, onnxruntime=9.0)
    spoiled(monkeypatch, "openvino")
    report = optin_export.run(recipe(), tmp_path)
    assert report is not None and report.verdict.passed
    assert [(one.target, one.taken) for one in report.candidates] == [(OPENVINO, False), (ORT, True)]
    assert report.candidates[0].reason.startswith("parity ") and "required <= 0.0001" in report.candidates[0].reason
    assert {one.target for one in report.latency} == {ORT}


def test_where_none_passes_the_run_fails_with_both_reasons(
    tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, openvino=1.0, onnxruntime=9.0)
    for engine in ("openvino", "onnxruntime"):
        spoiled(monkeypatch, engine)
    report = optin_export.run(recipe(), tmp_path)
    assert report is not None and exit_code(report) == 3
    assert all(one.reason.startswith("parity ") for one in report.candidates)


def test_an_engine_that_cannot_read_the_graph_is_refused(
    tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optin_export.engines import openvino
    from optin_export.errors import ParityError

    def build(*given: Any) -> None:
        raise ParityError("OpenVINO cannot load base.onnx", "No conversion rule found", "report the operator")

    monkeypatch.setattr(openvino, "build", build)
    report = optin_export.run(recipe(), tmp_path)
    assert report is not None and report.verdict.passed
    assert [(one.target, one.taken) for one in report.candidates] == [(ORT, True), (OPENVINO, False)]
    assert report.candidates[1].reason == "OpenVINO cannot load base.onnx: No conversion rule found"
    assert report.candidates[1].ms == {}


def test_what_is_not_installed_or_has_no_kernels_is_refused(
    tmp_path: Path, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = validate(recipe(export={"precision": "bf16"}), tmp_path)
    if engines.lacks(Target(engine="openvino"), "bf16") is None:
        expanded, candidates = choice.expanded(half)
        assert candidates is not None and [one.name for one in expanded.targets] == [OPENVINO]
        assert "no bf16 kernels" in candidates.refused[ORT]
    monkeypatch.setitem(sys.modules, "openvino", None)
    expanded, candidates = choice.expanded(validate(recipe(), tmp_path))
    assert candidates is not None and [one.name for one in expanded.targets] == [ORT]
    assert "pip install 'optin-export[openvino]'" in candidates.refused[OPENVINO]
    with pytest.raises(EnvironmentLacks) as error:
        choice.expanded(half)
    assert error.value.exit_code == 5 and ORT in error.value.why and OPENVINO in error.value.why
    assert target_check(half.targets[0], half).state == "missing"
    found = target_check(Target(engine="auto"), validate(recipe(), tmp_path))
    assert found.state == "ok" and found.detail.startswith(f"{ORT}; not {OPENVINO}: ")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"targets": [{"engine": "auto", "device": "cuda"}]}, "device: cpu only"),
        ({"targets": [{"engine": "auto"}, {"engine": "auto", "threads": 2}]}, "only one can have engine: auto"),
        ({"targets": [{"engine": "auto", "resources": {"big": 1}}]}, "name an engine"),
        ({"prune": {"budget": {"speedup": 1.2}}}, "name it instead of auto"),
    ],
)
def test_what_a_recipe_cannot_leave_open(sections: dict[str, Any], says: str, recipe: Make) -> None:
    with pytest.raises(InputError, match=says):
        validate(recipe(**sections), Path.cwd())


def test_a_finished_run_has_chosen(finished_vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure", str(finished_vit), "--target", "engine=auto", "--json"]) == 2
    assert "name the engine" in json.dumps(json.loads(capsys.readouterr().out))
