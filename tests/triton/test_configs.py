"""The real server reads configs of backends it does not have up to the point where it looks for their library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from optin_export.serving.server import Program, Server, running
from optin_export.ship.config import ModelSpec, config_text
from optin_export.ship.signature import Signature, Tensor

pytestmark = pytest.mark.triton
SIGNATURE = Signature(
    (Tensor("input_ids", "TYPE_INT64", (-1, -1)), Tensor("attention_mask", "TYPE_INT64", (-1, -1))),
    (Tensor("sentence_embedding", "TYPE_FP16", (-1, 384)),),
)
SPECS = {
    "onnxruntime": ModelSpec("m", "onnxruntime", SIGNATURE, (1, 8), "model.onnx"),
    "tensorrt": ModelSpec("m", "tensorrt", SIGNATURE, (1, 8), "model.plan", "cuda", cuda_graphs=True),
}


@pytest.fixture(scope="module")
def server(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    place = tmp_path_factory.mktemp("configs") / "models"
    place.mkdir()
    with running(program, place, arguments=["--model-control-mode=explicit"]) as one:
        yield one, place


def refusal(server: tuple[Server, Path], text: str, file: str) -> str:
    """Why the server does not load a model with this config.pbtxt."""
    import tritonclient.grpc

    (server[1] / "m" / "1").mkdir(parents=True, exist_ok=True)
    (server[1] / "m" / "1" / file).write_bytes(b"")
    (server[1] / "m" / "config.pbtxt").write_text(text)
    client = tritonclient.grpc.InferenceServerClient(server[0].grpc.removeprefix("grpc://"))
    with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
        client.load_model("m")
    return str(caught.value)


@pytest.mark.parametrize("backend", SPECS)
def test_a_right_config_is_read_up_to_the_backend(server: tuple[Server, Path], backend: str) -> None:
    spec = SPECS[backend]
    assert "unable to find backend library" in refusal(server, config_text(spec), spec.file)


@pytest.mark.parametrize("backend", SPECS)
def test_wrong_configs_fail_earlier(server: tuple[Server, Path], backend: str) -> None:
    """What makes the test above mean something: the server does look at types and batch sizes."""
    spec = replace(SPECS[backend], device="cpu")
    right = config_text(spec)
    for before, after in (
        ("preferred_batch_size: 8", "preferred_batch_size: 9"),
        ("TYPE_INT64", "TYPE_NONE"),
    ):
        assert before in right
        assert "unable to find backend library" not in refusal(server, right.replace(before, after, 1), spec.file), (
            after
        )
