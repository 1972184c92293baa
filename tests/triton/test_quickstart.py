"""The quickstart's run behind the real server: shipped, ready, right, measured, compared, rolled back, stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from optin_export import cli
from optin_export.data.batches import ImageProcessor
from optin_export.data.readers import Examples
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.report import Report
from optin_export.serving.client import Connection, Model, Url
from optin_export.serving.deployed import Reference, Result, measure
from optin_export.serving.server import Program, Server, fetch, free_ports, running
from optin_export.ship.guide import METRICS
from tests.conftest import ROOT

pytestmark = pytest.mark.triton
QUICK = ["--blocks", "2", "--seconds", "0.1", "--concurrency", "1,2", "--json"]


def ship(run: Path, to: Path, *options: str) -> Path:
    settings = ["--set", "ship.backend=python", *options]
    assert cli.main(["ship", str(run), "--to", str(to), *settings]) == 0
    return to


@pytest.fixture(scope="module")
def served(program: Program, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("served") / "models"
    labels = f"ship.labels=[{', '.join(f'digit-{index}' for index in range(10))}]"
    ship(quickstart, place, "--set", "ship.ensemble=true", "--set", labels)
    with running(program, place) as server:
        yield server


def reference_of(run: Path, tolerance: float = 1e-4) -> Reference:
    return Reference.load(run / "measure" / "reference.safetensors", "logits", tolerance)


MODELS = (Model("quickstart-base"), Model("quickstart"))


def asked(url: str, reference: Reference, models: tuple[Model, Model] = MODELS, **options: Any) -> Iterator[Result]:
    """A measurement of two short blocks per setting, in the closed loop with one thread unless said otherwise."""
    usual = {"batch": 1, "concurrency": [1], "rate": None, "blocks": 2, "seconds": 0.1, "timeout": 10.0, "seed": 0}
    return measure([Url.parse(url)], models, reference, **{**usual, **options})


def test_the_client_measures_both_protocols_and_the_report_has_it(
    served: Server, quickstart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--model", "quickstart-base", "--model", "quickstart", "--run", str(quickstart)]
    assert cli.main(["client", served.grpc, served.http, *names, *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["server"].startswith("triton ")
    assert [(one["protocol"], one["mode"], one["concurrency"]) for one in printed["results"]] == [
        (protocol, *how) for protocol in ("grpc", "http") for how in (("closed", 1), ("closed", 2), ("open", None))
    ]
    for one in printed["results"]:
        assert one["largest_error"] <= 1e-4 and one["speedup"]["ci_low"] > 0
        for arm in (one["base"], one["pruned"]):
            assert 0 < arm["p50"] <= arm["p90"] <= arm["p99"] and arm["throughput"] > 0
            # The server's own time is part of what the client sees.
            assert 0 < arm["compute"] < arm["p99"] and arm["rows_per_batch"] >= 1
    report = Report.model_validate_json((quickstart / "report.json").read_text())
    assert len(report.deployed) == 6
    page = (quickstart / "report.html").read_text()
    assert "Deployed latency" in page and "Deployed p50 (one client)" in page
    assert cli.main(["verify", str(quickstart)]) == 0
    assert all(line.startswith("perf_analyzer -m quickstart") for line in printed["perf_analyzer"])


def test_dynamic_batching_puts_requests_together(served: Server, quickstart: Path) -> None:
    (result,) = asked(served.grpc, reference_of(quickstart), concurrency=[8], seconds=0.4)
    assert result.base.rows_per_batch is not None and result.base.rows_per_batch > 1.05


def test_shadow_traffic_compares_answers(served: Server, quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--model", "quickstart-base", "--model", "quickstart", "--run", str(quickstart)]
    assert cli.main(["client", served.http, *names, "--shadow", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_largest"] >= 0.9 and found["cosine"][0] > 0.8 and found["rows"] == found["requests"]


def test_the_wrong_model_is_told_apart(served: Server, quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = ["--model", "quickstart", "--model", "quickstart-base", "--run", str(quickstart)]
    assert cli.main(["client", served.grpc, *swapped, *QUICK]) == ParityError.exit_code
    assert "answers differently from the" in capsys.readouterr().err


def test_a_model_that_is_not_there(served: Server, quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (served.grpc, served.http):
        names = ["--model", "quickstart-base", "--model", "none", "--run", str(quickstart)]
        assert cli.main(["client", url, *names, *QUICK]) == EnvironmentLacks.exit_code
        assert "the model none is not ready" in capsys.readouterr().err


def test_rows_of_another_shape_or_type(served: Server, quickstart: Path) -> None:
    right = reference_of(quickstart)
    pixels = right.inputs["pixel_values"]
    for wrong, says in (
        ({"pixel_values": pixels[..., :16]}, "takes pixel_values as"),
        ({"pixel_values": pixels.astype(np.float16)}, "takes pixel_values as FP32"),
        ({"other": pixels}, "takes pixel_values"),
    ):
        reference = Reference(wrong, right.outputs, "logits", 1e-4)
        with pytest.raises(InputError, match=says):
            next(asked(served.grpc, reference))


def test_more_rows_than_the_model_takes(served: Server, quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--model", "quickstart-base", "--model", "quickstart", "--run", str(quickstart), "--batch", "9"]
    for url in (served.grpc, served.http):
        assert cli.main(["client", url, *names, *QUICK]) == 2
        assert "refused the request" in capsys.readouterr().err


def test_the_ensemble_answers_an_encoded_image(served: Server, quickstart: Path) -> None:
    """A PNG goes in; out comes what the pruned graph says of that image as the evaluation prepares it."""
    import onnxruntime
    import tritonclient.grpc
    from PIL import Image

    digits = np.load(ROOT / "recipes" / "quickstart" / "digits.npz")["test_images"][:3]
    images, encoded = [Image.fromarray(digit) for digit in digits], []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    config = json.loads((quickstart / "preprocess" / "preprocess.json").read_text())
    pixels = ImageProcessor(config).encode(Examples({"image": images}))["pixel_values"].numpy()
    session = onnxruntime.InferenceSession(quickstart / "onnx" / "pruned.onnx")
    expected = session.run(["logits"], {"pixel_values": pixels})[0]
    client = tritonclient.grpc.InferenceServerClient(served.grpc.removeprefix("grpc://"))
    tensor = tritonclient.grpc.InferInput("IMAGE", [3, 1], "BYTES")
    tensor.set_data_from_numpy(np.array(encoded, object).reshape(3, 1))
    answer = client.infer("quickstart-ensemble", [tensor]).as_numpy("logits")
    assert answer is not None and np.allclose(answer, expected, atol=1e-4 * np.abs(expected).max())
    # Triton's classification extension names the classes by the labels that were shipped.
    wanted = [tritonclient.grpc.InferRequestedOutput("logits", class_count=1)]
    named = client.infer("quickstart-ensemble", [tensor], outputs=wanted).as_numpy("logits")
    assert named is not None
    assert [row[0].decode().rpartition(":")[2] for row in named] == [f"digit-{row.argmax()}" for row in expected]
    tensor.set_data_from_numpy(np.array([b"no image"] * 3, object).reshape(3, 1))
    with pytest.raises(Exception, match="cannot read the image"):
        client.infer("quickstart-ensemble", [tensor])


def test_the_metrics_to_watch_are_there(served: Server) -> None:
    text = fetch(f"{served.metrics}/metrics")
    for name in METRICS:
        assert f'{name}{{model="quickstart"' in text, name


def test_versions_and_a_rollback_without_a_restart(program: Program, quickstart: Path, tmp_path: Path) -> None:
    """A polling server takes up a shipment and its rollback by itself; the old version answers again."""
    place = ship(quickstart, tmp_path / "models", "--set", "ship.layout=versions", "--set", "ship.serve=base")
    polling = ["--model-control-mode=poll", "--repository-poll-secs=1"]
    with running(program, place, arguments=polling) as server:
        connection = Connection(Url.parse(server.grpc), 10)
        connection.ready(Model("quickstart", "1"))
        with pytest.raises(EnvironmentLacks, match="not ready"):
            connection.ready(Model("quickstart", "2"))
        ship(quickstart, place, "--set", "ship.layout=versions")
        for number in ("2", "1"):
            wait_ready(connection, Model("quickstart", number))
        versions = (Model("quickstart", "1"), Model("quickstart", "2"))
        assert next(asked(server.grpc, reference_of(quickstart), versions)).largest_error <= 1e-4
        assert cli.main(["rollback", str(place), "quickstart"]) == 0
        wait_ready(connection, Model("quickstart", "2"), ready=False)
        wait_ready(connection, Model("quickstart", "1"))


def wait_ready(connection: Connection, model: Model, ready: bool = True) -> None:
    for _ in range(100):
        try:
            connection.ready(model)
            if ready:
                return
        except EnvironmentLacks:
            if not ready:
                return
        time.sleep(0.2)
    raise AssertionError(f"{model}: still {'not ' if ready else ''}ready")


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_a_server_killed_in_the_middle(program: Program, quickstart: Path, tmp_path: Path, mode: str) -> None:
    place = ship(quickstart, tmp_path / "models")
    with running(program, place) as server:
        options = {"concurrency": [2]} if mode == "closed" else {"concurrency": [], "rate": 20.0}
        url = server.grpc if mode == "closed" else server.http
        results = asked(url, reference_of(quickstart), blocks=100, seconds=0.5, timeout=5.0, **options)
        threading.Timer(2.0, server.process.kill).start()
        with pytest.raises(EnvironmentLacks) as caught:
            next(results)
        assert alive(server.process.pid)  # the stubs of its python backend
    assert "Traceback" not in str(caught.value) and "127.0.0.1" in caught.value.what
    end = time.monotonic() + 10
    while alive(server.process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(server.process.pid)


def alive(group: int) -> list[str]:
    """Processes of a group that are not only waiting to be reaped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append(path.parent.name)
    return found


def test_a_server_that_cannot_load_a_model_says_why(program: Program, quickstart: Path, tmp_path: Path) -> None:
    place = ship(quickstart, tmp_path / "models")
    (place / "quickstart" / "1" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(EnvironmentLacks, match="exited"), running(program, place):
        pass


def test_a_server_that_is_not_ready_in_time(program: Program, quickstart: Path, tmp_path: Path) -> None:
    place = ship(quickstart, tmp_path / "models")
    with pytest.raises(EnvironmentLacks, match="not ready after"), running(program, place, ready_seconds=0.05):
        pass


def test_serve_starts_announces_and_stops_on_a_signal(program: Program, quickstart: Path, tmp_path: Path) -> None:
    ports = [str(port) for port in free_ports(3)]
    command = [sys.executable, "-m", "optin_export", "serve", str(quickstart), "--json", "--ports", *ports]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["backend"] == "python" and said["models"] == ["quickstart", "quickstart-base"]
        Connection(Url.parse(said["grpc"]), 10).ready(Model("quickstart"))
        # Meanwhile its port is taken.
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert second.returncode == 2 and "cannot be used" in second.stderr and "Traceback" not in second.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0
    finally:
        process.kill()
    with pytest.raises(OSError):
        fetch(f"{said['http']}/v2/health/live")


def test_warm_up_rows_reach_the_model(program: Program, quickstart: Path, tmp_path: Path) -> None:
    """A row that does not fill the input stops the model from loading: the files are really read."""
    place = ship(quickstart, tmp_path / "models")
    rows = load_file(quickstart / "measure" / "reference.safetensors")["input.pixel_values"]
    file = place / "quickstart" / "warmup" / "batch-8.pixel_values"
    assert np.array_equal(np.frombuffer(file.read_bytes(), np.float32), rows[1].reshape(-1))
    file.write_bytes(b"\0" * 8)
    with pytest.raises(EnvironmentLacks, match="exited"), running(program, place):
        pass
    shutil.rmtree(place)
