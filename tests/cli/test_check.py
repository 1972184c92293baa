"""check: a finished run is judged again, by gates of one's own; what was tampered with is not judged at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from optin_export import cli, run
from optin_export.cli._junit import junit_xml
from optin_export.report.schema import GateResult
from optin_export.ship.manifest import add_reports
from optin_export.workdir.files import sha256_file
from tests.conftest import ROOT, VIT_ARGS, measured_shortly


@pytest.fixture(scope="session")
def finished(vit_checkpoint: Path, image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the small ViT."""
    source = {"source": f"npz:{image_data / 'images.npz'}"}
    folder = tmp_path_factory.mktemp("check") / "run"
    model = {
        "source": "timm:vit_tiny_patch16_224",
        "task": "image-classification",
        "weights": str(vit_checkpoint),
        "args": VIT_ARGS,
        "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
    }
    recipe = {
        "recipe": 1,
        "name": "tiny-vit",
        "model": model,
        "data": {"calibration": {**source, "samples": 16}, "evaluation": {**source, "metric": "accuracy"}},
        "prune": {"budget": {"macs": 0.6}, "probes": 8, "rows": 32, "score_samples": 8, "curve_samples": 8},
        "export": {"batch": [1]},
    }
    with measured_shortly():
        run(recipe, folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def check(
    capsys: pytest.CaptureFixture[str], folder: Path, gates: object = None, *words: str
) -> tuple[int, dict[str, object], str]:
    """Exit code, the JSON document, standard error. gates: of a file beside the run; text is written as it is."""
    if gates is not None:
        file = folder.parent / "gates.yaml"
        file.write_text(gates if isinstance(gates, str) else yaml.safe_dump(gates), encoding="utf-8")
        words = ("--gates", str(file), *words)
    code = cli.main(["check", str(folder), *words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_the_runs_own_verdict(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    code, told, _ = check(capsys, finished)
    assert told["gates"] == report["verdict"]["gates"] and told["passed"] is report["verdict"]["passed"] is True
    assert code == 0
    assert cli.main(["check", str(finished)]) == 0
    assert "every gate passed" in capsys.readouterr().out


def test_gates_that_hold(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((copy / "report.json").read_text(encoding="utf-8"))
    gates = {
        "gates": 1,
        "macs": 0.6,
        "params": 1.0,
        "accuracy_drop": 101,
        "accuracy_drop_high": 101,
        "accuracy": 0.0,
        "model_mib": 10,
        "other_work": 1.0,
        "speedup": [{"min": 0.01}, {"min": 0.01, "target": "onnxruntime-cpu-1t", "batch": 1}],
        "latency_ms": [{"max": 1e6, "quantile": "p99"}],
    }
    code, told, _ = check(capsys, copy, gates)
    found = {one["name"]: one["measured"] for one in told["gates"]}  # type: ignore[attr-defined]
    assert code == 0 and told["passed"] is True
    assert found["macs"] == report["macs"]["ratio"] and found["accuracy_drop"] == report["accuracy"]["drop"]
    row = report["latency"][0]
    assert found["speedup"] == row["by"].get(row["clock"], row["speedup"])["ci_low"]
    assert found["latency_ms"] == report["latency"][0]["pruned_ms"]["p99"]
    assert 0 <= found["other_work"] <= 1
    assert found["model_mib"] == (copy / "onnx" / "pruned.onnx").stat().st_size / 2**20
    assert {"verdict", "parity"} <= found.keys()  # asked for unless they are turned off


@pytest.mark.parametrize(
    ("gate", "evaluated"),
    [
        ({"macs": 0.3}, True),
        ({"accuracy_drop": -101}, True),
        ({"accuracy": 100.5}, True),
        ({"model_mib": 0.001}, True),
        ({"speedup": [{"min": 1000}]}, True),
        ({"latency_ms": [{"max": 1e-6}]}, True),
        ({"speedup": [{"min": 0.01, "target": "onnxruntime-cpu-2t"}]}, False),
        ({"speedup": [{"min": 0.01, "batch": 7}]}, False),
        ({"latency_ms": [{"max": 1e6, "machine": "l4"}]}, False),
    ],
)
def test_gates_that_are_missed(
    copy: Path, capsys: pytest.CaptureFixture[str], gate: dict[str, object], evaluated: bool
) -> None:
    code, told, _ = check(capsys, copy, {"gates": 1, **gate})
    missed = [one for one in told["gates"] if not one["passed"]]  # type: ignore[attr-defined]
    assert code == 4 and told["passed"] is False
    assert [one["name"] for one in missed] == [next(iter(gate))]
    assert (missed[0]["measured"] is not None) is evaluated
    assert evaluated or "not measured" in missed[0]["note"]


def test_a_machine_that_did_other_work_meanwhile(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share comes from the measurement, and what was not counted has not passed."""

    def written(*others: float | None) -> None:
        for name in ("report.json", "measure/latency.json"):
            content = json.loads((copy / name).read_text(encoding="utf-8"))
            rows = content["latency"] if name == "report.json" else content
            for row, share in zip(rows, others, strict=True):
                row["neighbours"] = None if share is None else {"others": share, "stolen": 0.05}
            (copy / name).write_text(json.dumps(content), encoding="utf-8")
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        for name in ("measure/latency.json", "report.json"):
            manifest["files"][name] = {"sha256": sha256_file(copy / name), "bytes": (copy / name).stat().st_size}
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    rows = len(json.loads((copy / "report.json").read_text(encoding="utf-8"))["latency"])
    for others, measured in ((0.01, 0.06), (0.3, 0.35), (None, None)):
        written(*[0.0] * (rows - 1), others)
        code, told, _ = check(capsys, copy, {"gates": 1, "other_work": 0.1})
        gate = told["gates"][-1]  # type: ignore[index]
        assert gate["name"] == "other_work" and gate["measured"] == pytest.approx(measured)
        assert code == (0 if measured == 0.06 else 4)


def test_a_misspelt_target_is_told_the_nearest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, told, _ = check(capsys, copy, {"gates": 1, "speedup": [{"min": 0.1, "target": "onnxruntime-cpu"}]})
    assert "did you mean 'onnxruntime-cpu-1t'?" in told["gates"][-1]["note"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ("gates: [", "not a usable YAML file"),
        ("- 1", "is not a gates file"),
        ("gates: 2\nmacs: 0.5", "gates: should be 1"),
        ("gates: 1", "the file has no gate"),
        ({"gates": 1, "acuracy_drop": 1}, "did you mean 'accuracy_drop'?"),
        ({"gates": 1, "speedup": [{"mni": 1}]}, "did you mean 'min'?"),
        ({"gates": 1, "speedup": [{"target": "x"}]}, "speedup.0.min"),
        ({"gates": 1, "macs": 7}, "macs"),
        ({"gates": 1, "latency_ms": [{"max": 1, "quantile": "p95"}]}, "did you mean 'p9"),
        ("\x00", "not a usable YAML file"),
        ("gates: 1\nname: " + "x" * 200_000, "is not a gates file"),
    ],
)
def test_bad_gates(copy: Path, capsys: pytest.CaptureFixture[str], gates: object, says: str) -> None:
    code, told, err = check(capsys, copy, gates)
    assert code == 2 and says in told["error"]["why"] + told["error"]["what"]  # type: ignore[index]
    assert "Traceback" not in err


def test_files_that_cannot_be_read(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--gates", str(tmp_path / "none")], ["--gates", str(tmp_path)]):
        assert cli.main(["check", str(copy), *words]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["check", str(tmp_path / "empty")]) == 2
    assert cli.main(["check", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["check", str(copy), "--junit", str(copy / "report.json" / "x.xml")]) == 5  # cannot be written


def edit(path: Path, *keys: str | int, value: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    if path.name == "report.json":  # as if its writer had written it into the manifest
        add_reports(path.parent)


@pytest.mark.parametrize(
    ("keys", "value", "part"),
    [
        (("verdict", "passed"), False, "verdict"),
        (("verdict", "gates", 0, "passed"), False, "gates"),
        (("accuracy", "drop"), -5.0, "accuracy"),
        (("accuracy",), None, "accuracy"),
        (("latency", 0, "speedup", "ci_low"), 99.0, "latency"),
        (("latency", 0, "pruned_ms", "p50"), 0.001, "latency"),
        (("latency",), [], "latency"),
        (("parity", "cases", 0, "max_error"), 0.0, "parity"),
    ],
)
def test_a_report_that_does_not_say_what_was_measured(
    copy: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str | int, ...], value: object, part: str
) -> None:
    edit(copy / "report.json", *keys, value=value)
    code, told, _ = check(capsys, copy)
    assert code == 2 and f"in {part}" in told["error"]["why"]  # type: ignore[index]


def test_a_run_whose_files_have_changed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / "measure" / "accuracy.json", "drop", value=-5.0)
    code, told, _ = check(capsys, copy)
    assert code == 2 and "measure/accuracy.json" in told["error"]["why"]  # type: ignore[index]
    (copy / "report.json").write_text("{", encoding="utf-8")
    assert check(capsys, copy)[0] == 2


def test_junit_xml(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "gates.xml"
    code, told, _ = check(capsys, copy, {"gates": 1, "macs": 0.3, "params": 1.0}, "--junit", str(file))
    suite = ElementTree.parse(file).getroot().find("testsuite")
    assert code == 4 and suite is not None
    cases = suite.findall("testcase")
    assert len(cases) == len(told["gates"]) == int(suite.attrib["tests"])  # type: ignore[arg-type]
    failed = [case for case in cases if case.find("failure") is not None]
    assert len(failed) == int(suite.attrib["failures"]) == 1 and failed[0].attrib["name"].startswith("macs")
    assert "0.3" in str(failed[0].find("failure").attrib["message"])  # type: ignore[union-attr]


def test_junit_is_xml_whatever_a_reason_holds() -> None:
    gate = GateResult(
        name="speedup", kind="gate", relation=">=", required=1, measured=None, passed=False, note='\x1b[31m<&>"]]>\x00é'
    )
    case = ElementTree.fromstring(junit_xml("a<b", "2026", [gate]).encode()).find("testsuite/testcase/failure")
    assert case is not None and case.attrib["type"] == "NotEvaluated" and '<&>"]]>' in case.attrib["message"]


def test_parity_that_failed_has_its_own_exit_code(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it is changed consistently, as a run with a wrong engine would have written it."""
    from optin_export.ship.manifest import read_manifest, write_manifest

    edit(copy / "measure" / "parity.json", 0, "passed", value=False)
    edit(copy / "report.json", "parity", "cases", 0, "passed", value=False)
    edit(copy / "report.json", "verdict", "gates", 0, "passed", value=False)
    edit(copy / "report.json", "verdict", "passed", value=False)
    facts = {**{k: v for k, v in read_manifest(copy).items() if k not in ("files", "version")}, "passed": False}
    write_manifest(copy, facts)
    assert check(capsys, copy)[0] == 3
    assert check(capsys, copy, {"gates": 1, "macs": 1.0})[0] == 3
    assert check(capsys, copy, {"gates": 1, "macs": 1.0, "parity": False, "verdict": False})[0] == 0


def test_the_page_on_ci_says_what_works() -> None:
    """The workflow is YAML, its steps use no registry by name, and its command lines are those of the parsers."""
    import re
    import shlex

    from optin_export.cli._gates import GatesFile
    from optin_export.cli.run import optin_export

    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    workflow = next(block for block in blocks if "jobs" in block)
    gates = next(block for block in blocks if "gates" in block)
    assert GatesFile.model_validate(gates)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(step.get("uses", "").startswith("actions/setup-python@") for step in steps)
    lines = [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("optin-export")]
    lines += re.findall(r"^(?:    )?(optin-export .+)$", page, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        program, *words = shlex.split(re.split(r" (?:2?>) ?", line)[0])
        optin_export.make_context(program, words)
