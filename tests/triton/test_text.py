"""A text classifier behind the real server: text in by one curl line, the run's own logits out, requests batched."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import optin_export
from optin_export import cli
from optin_export.recipe import load_recipe, validate
from optin_export.serving.client import Connection, Model, Url
from optin_export.serving.server import Program, Server, fetch, running
from optin_export.ship.deploy import Facts, documents
from optin_export.ship.guide import METRICS, curl
from tests.conftest import Make, measured_shortly, sentences

pytestmark = pytest.mark.triton
TEXTS = [*sentences(7, 3), "guitar", "a " * 60]


@pytest.fixture(scope="module")
def classifier(classifier_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "texts"
    gates = {"speedup": 0.1, "accuracy_drop": 100, "other_work": 1}
    recipe = classifier_recipe(ship={"triton": True, "backend": "python"}, gates=gates)
    with measured_shortly():
        report = optin_export.run(validate(recipe, folder), folder)
    assert report is not None and report.verdict.passed
    return folder


@pytest.fixture(scope="module")
def place(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the ensemble that is shipped by default, a queue limit, and much time to form batches."""
    place = tmp_path_factory.mktemp("served") / "models"
    own = {"dynamic_batching": {"default_queue_policy": {"max_queue_size": 50}}, "response_cache": {"enable": False}}
    settings = ["--set", "ship.queue_delay=20000", "--set", f"ship.config={json.dumps(own)}"]
    assert cli.main(["ship", str(classifier), "--to", str(place), *settings]) == 0
    assert cli.main(["verify", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def served(program: Program, place: Path) -> Iterator[Server]:
    with running(program, place) as server:
        yield server


def expected(run: Path) -> np.ndarray:
    """The pruned graph's answers to the texts one by one, without any padding."""
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(load_recipe(run / "recipe.yaml").model.source)
    session = onnxruntime.InferenceSession(run / "onnx" / "pruned.onnx")
    rows = []
    for text in TEXTS:
        encoded = tokenizer([text], truncation=True, max_length=16, return_tensors="np")
        feed = {one.name: encoded[one.name].astype(np.int64) for one in session.get_inputs()}
        rows.append(session.run(["logits"], feed)[0][0])
    return np.array(rows)


def test_one_curl_line_answers_a_text(served: Server, classifier: Path) -> None:
    recipe = load_recipe(classifier / "recipe.yaml")
    wanted = expected(classifier)
    for text, logits in zip(TEXTS, wanted, strict=True):
        line = curl("tiny-classifier-ensemble", recipe, served.http.removeprefix("http://")).replace("some text", text)
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True, timeout=60)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert np.allclose(answer["outputs"][0]["data"], logits, atol=1e-4 * np.abs(wanted).max())


def test_texts_of_different_length_are_batched(served: Server, classifier: Path) -> None:
    """Every client sends a text of another length at the same time; without padding none could share a batch."""
    import tritonclient.grpc

    connection, model, found = Connection(Url.parse(served.grpc), 10), Model("tiny-classifier"), {}
    before = connection.counters(model)
    start = threading.Barrier(len(TEXTS))

    def ask(index: int) -> None:
        client = tritonclient.grpc.InferenceServerClient(served.grpc.removeprefix("grpc://"))
        tensor = tritonclient.grpc.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[TEXTS[index].encode()]], object))
        start.wait()
        for _ in range(10):
            found[index] = client.infer("tiny-classifier-ensemble", [tensor]).as_numpy("logits")[0]

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = connection.counters(model)
    assert before is not None and after is not None
    spent = after.since(before)
    assert spent.rows == 10 * len(TEXTS) and spent.batches < 0.7 * spent.rows
    wanted = expected(classifier)
    answers = np.array([found[index] for index in range(len(TEXTS))])
    assert np.allclose(answers, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_alerts_and_the_dashboard_read_what_the_server_exports(served: Server, place: Path) -> None:
    exported = fetch(f"{served.metrics}/metrics")
    names = tuple(path.name for path in place.iterdir())
    facts = Facts("tiny-classifier", names, "tiny-classifier-ensemble", "image", (), (), "models", False, 1, 512, True)
    texts = documents(facts)
    used = {name for file in ("alerts.yaml", "grafana/dashboard.json") for name in re.findall(r"nv_\w+", texts[file])}
    assert len(used) >= len(METRICS)
    for name in used:
        assert f'{name}{{model="tiny-classifier"' in exported, name
    # What the probes ask.
    deployment = next(iter(yaml.safe_load_all(texts["kubernetes.yaml"])))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        fetch(served.http + container[probe]["httpGet"]["path"])


def test_tune_measures_instances_and_suggests_one(
    program: Program, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--instances", "1,2", "--clients", "1,4", "--blocks", "2", "--seconds", "0.1"]
    capsys.readouterr()
    assert cli.main(["tune", str(classifier), *quick]) == 0
    out = capsys.readouterr().out
    assert "--set ship.instances=" in out and "<-" in out
    stored = json.loads((classifier / "measure" / "serving.json").read_text())
    tried = {(row["instances"], row["batch"], row["clients"]) for row in stored["settings"]}
    assert tried == {(instances, batch, clients) for instances in (1, 2) for batch in (1, 3) for clients in (1, 4)}
    for row in stored["settings"]:
        assert 0 < row["lowest"] <= row["throughput"] <= row["highest"] and 0 < row["p50"] <= row["p99"]
        assert row["rows_per_batch"] >= row["batch"]
    assert stored["suggested"] in stored["settings"] and cli.main(["verify", str(classifier)]) == 0
    assert cli.main(["tune", str(classifier), *quick, "--latency", "0.0001"]) == 4
    assert "no setting has a p99" in capsys.readouterr().out
