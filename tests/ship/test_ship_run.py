"""`optin-export ship`, `verify` and `rollback` on a finished run, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from optin_export import cli
from optin_export.errors import InputError
from optin_export.ship import Origin
from optin_export.ship.config import read_config
from optin_export.ship.origin import license_of


def ship(run: Path, to: Path, *options: str) -> int:
    return cli.main(["ship", str(run), "--to", str(to), *options])


def test_both_models_are_shipped_with_real_rows_and_facts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "models"
    assert ship(run, place) == 0
    out = capsys.readouterr().out
    assert "server image: " in out and "optin-export rollback" in out and "nv_inference_request_failure" in out
    rows = load_file(run / "measure" / "reference.safetensors")["input.pixel_values"]
    for name, which in (("tiny", "pruned"), ("tiny-base", "base")):
        config = read_config((place / name / "config.pbtxt").read_text())
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 3)
        assert list(config.dynamic_batching.preferred_batch_size) == [3]
        assert (place / name / "1" / "model.onnx").read_bytes() == (run / "onnx" / f"{which}.onnx").read_bytes()
        warm = np.frombuffer((place / name / "warmup" / "batch-3.pixel_values").read_bytes(), np.float32)
        assert np.array_equal(warm, rows[1].reshape(-1))
        facts = json.loads((place / name / "manifest.json").read_text())
        assert facts["verdict"]["passed"] and facts["seed"] == 0 and facts["environment"]["cpu"]
        assert facts["model"]["license"] == facts["data"]["license"] == "unknown"
    assert cli.main(["verify", str(place)]) == 0


def test_load_time_and_memory_of_an_instance_are_measured_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ship(run, tmp_path / "models") == 0
    found = json.loads((tmp_path / "models" / "tiny" / "manifest.json").read_text())["instance"]["pruned"]
    assert found["library"] == "onnxruntime" and found["batch"] == 3 and found["threads"] == 1
    # A session of this model holds at least its weights.
    assert 0 < found["load_seconds"] < 60 and found["memory_bytes"] > (run / "onnx" / "pruned.onnx").stat().st_size / 2
    assert cli.main(["verify", str(run)]) == cli.main(["verify", str(tmp_path / "models")]) == 0

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("optin_export.ship.footprint._measure", refuse)
    assert ship(run, tmp_path / "other", "--set", "ship.layout=pruned") == 0
    again = json.loads((tmp_path / "other" / "tiny" / "manifest.json").read_text())["instance"]
    assert again == {"pruned": found}


def test_a_run_that_failed_is_refused_and_recorded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "passed": False}))
    assert ship(run, tmp_path / "models") == 4
    assert "failed its gates" in capsys.readouterr().err and not (tmp_path / "models").exists()
    assert ship(run, tmp_path / "models", "--allow-failed") == 0
    facts = json.loads((tmp_path / "models" / "tiny" / "manifest.json").read_text())
    assert facts["verdict"]["passed"] is False and facts["verdict"]["shipped_although_failed"] is True


def test_files_that_are_not_those_that_were_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((run / "onnx" / "pruned.onnx").read_bytes())
    data[-1] ^= 1
    (run / "onnx" / "pruned.onnx").write_bytes(data)
    assert ship(run, tmp_path / "models") == 2
    assert "not the file that was measured" in capsys.readouterr().err
    assert cli.main(["verify", str(run)]) == 2
    assert "onnx/pruned.onnx: content differs" in capsys.readouterr().out


def test_versions_of_one_model(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    options = ["--set", "ship.layout=versions", "--set", "ship.serve=base", "--set", "ship.backend=python"]
    assert ship(run, place, *options) == 0
    assert [path.name for path in place.iterdir()] == ["tiny"]
    for number, which in ((1, "base"), (2, "pruned")):
        assert (place / "tiny" / str(number) / "model.onnx").read_bytes() == (
            run / "onnx" / f"{which}.onnx"
        ).read_bytes()
        assert (place / "tiny" / str(number) / "model.py").is_file()
    config = read_config((place / "tiny" / "config.pbtxt").read_text())
    assert list(config.version_policy.specific.versions) == [1]
    assert ship(run, place, "--set", "ship.layout=versions") == 0
    config = read_config((place / "tiny" / "config.pbtxt").read_text())
    assert list(config.version_policy.specific.versions) == [1, 2]


def test_the_ensemble_and_its_labels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "models"
    labels = ["--set", "ship.labels=[a, b, c, d, e]"]
    assert ship(run, place, "--set", "ship.ensemble=true", *labels) == 0
    assert sorted(path.name for path in place.iterdir()) == ["tiny", "tiny-base", "tiny-ensemble", "tiny-prepare"]
    assert (place / "tiny" / "labels.txt").read_text().split() == list("abcde")
    config = read_config((place / "tiny-ensemble" / "config.pbtxt").read_text())
    assert config.input[0].name == "IMAGE" and config.output[0].name == "logits"
    for name in ("tiny", "tiny-base", "tiny-ensemble"):
        config = read_config((place / name / "config.pbtxt").read_text())
        assert config.output[0].label_filename == "labels.txt"
        assert (place / name / "labels.txt").read_text().split() == list("abcde")
    assert ship(run, tmp_path / "other", "--set", "ship.labels=[a]") == 2
    assert "1 labels do not fit" in capsys.readouterr().err and not list((tmp_path / "other").glob("*"))


@pytest.mark.parametrize("name", ["own.yaml", "own.pbtxt"])
def test_an_own_part_of_the_config_is_merged_and_verified(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, file = tmp_path / "models", tmp_path / name
    policy = "dynamic_batching {default_queue_policy: {max_queue_size: 64}}"
    file.write_text(policy.replace("batching {", "batching: {") if name == "own.yaml" else policy)
    assert ship(run, place, "--config", str(file)) == 0
    for model in ("tiny", "tiny-base"):
        batching = read_config((place / model / "config.pbtxt").read_text()).dynamic_batching
        assert batching.default_queue_policy.max_queue_size == 64 and list(batching.preferred_batch_size) == [3]
    assert cli.main(["verify", str(place)]) == 0
    assert json.loads((place / "tiny" / "manifest.json").read_text())["own_config"]
    file.write_text(file.read_text().replace("max_queue_size", "max_queue_siz"))
    capsys.readouterr()
    assert ship(run, place, "--config", str(file)) == 2
    assert "did you mean max_queue_size?" in capsys.readouterr().err
    file.write_text("")
    assert ship(run, place, "--config", str(file)) == 2 and ship(run, place, "--config", str(tmp_path / "none")) == 2


def test_two_runs_into_one_repository(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, second = tmp_path / "models", Path(shutil.copytree(run, tmp_path / "second"))
    assert ship(run, place) == 0
    assert ship(second, place) == 2
    assert "already has another model 'tiny'" in capsys.readouterr().err
    assert ship(second, place, "--name", "other") == 0
    assert ship(second, place, "--replace") == 0
    assert cli.main(["rollback", str(place), "tiny"]) == 0
    facts = json.loads((place / "tiny" / "manifest.json").read_text())
    assert facts["shipped_from"] == Origin.from_run(run).identity != Origin.from_run(second).identity
    assert ship(run, place, "--name", "a b") == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "prune.budget.macs=0.1"], "is not a field of ship"),
        (["--set", "ship.backend=tensorrt"], "no engine of tensorrt"),
        (["--set", "ship.backend=none"], "ship.backend"),
    ],
)
def test_what_cannot_be_shipped(
    run: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ship(run, tmp_path / "models", *options) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "models").exists()


def test_what_is_no_finished_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a run folder"):
        Origin.from_run(tmp_path / "empty")
    (run / "report.json").unlink()
    with pytest.raises(InputError, match=r"no readable report\.json"):
        Origin.from_run(run)


def test_the_licence_is_what_the_readme_says(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == license_of("timm:vit") == license_of("hf:no/such-model") == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
    assert license_of(str(tmp_path)) == license_of(f"hf:{tmp_path}") == "apache-2.0"
    (tmp_path / "README.md").write_text("# no front matter")
    assert license_of(str(tmp_path)) == "unknown"


def test_a_signature_holds_until_something_changes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {}
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        keys[name] = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        keys[name][0].write_bytes(key.private_bytes(*private))
        keys[name][1].write_bytes(key.public_key().public_bytes(*public))
    place = tmp_path / "models"
    assert ship(run, place, "--sign-key", str(keys["ours"][0])) == 0
    assert cli.main(["verify", str(place), "--key", str(keys["ours"][1])]) == 0
    assert cli.main(["verify", str(place), "--key", str(keys["theirs"][1])]) == 2
    capsys.readouterr()
    # A manifest that was made to fit is caught by the signature alone.
    manifest = (place / "tiny" / "manifest.json").read_text()
    (place / "tiny" / "manifest.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    assert cli.main(["verify", str(place)]) == 0
    assert cli.main(["verify", str(place), "--key", str(keys["ours"][1])]) == 2
    assert "tiny/model.sig: does not hold" in capsys.readouterr().out
    assert ship(run, tmp_path / "other", "--sign-key", str(tmp_path / "none.pem")) == 2
    (tmp_path / "bad.pem").write_text("no key")
    assert ship(run, tmp_path / "other", "--sign-key", str(tmp_path / "bad.pem")) == 2
    assert not list((tmp_path / "other").glob("*"))


def test_the_bill_of_materials_is_cyclonedx(run: Path, tmp_path: Path) -> None:
    assert ship(run, tmp_path / "models", "--bom") == 0
    text = (tmp_path / "models" / "tiny" / "bom.cdx.json").read_text()
    bom = json.loads(text)
    component = bom["metadata"]["component"]
    assert component["type"] == "machine-learning-model" and component["name"] == "tiny"
    names = {one["name"] for one in bom["components"]}
    assert {"1/model.onnx", "config.pbtxt", "torch"} <= names
    validators = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion

    try:
        problem = validators.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except MissingOptionalDependencyException:
        pytest.skip("cyclonedx-python-lib is installed without json-validation")
    assert problem is None, problem
