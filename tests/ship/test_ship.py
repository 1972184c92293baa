"""The model repository is what Triton's own protobuf accepts, appears whole, and the manifest notices any change."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship import check_manifest, check_tools, write_manifest, write_repository

pytest.importorskip("tritonclient.grpc")


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", 5])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    return path


def test_config_is_read_back_by_the_protobuf(onnx_file: Path, tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    folder = write_repository(onnx_file, tmp_path / "triton", "my-model", (1, 8, 4))
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("my-model", "onnxruntime", 8)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert [(entry.name, list(entry.dims)) for entry in config.input] == [("input_ids", [-1])]
    assert [(entry.name, list(entry.dims)) for entry in config.output] == [("logits", [5])]
    assert config.input[0].data_type == model_config_pb2.TYPE_INT64
    assert (folder / "1" / "model.onnx").read_bytes() == onnx_file.read_bytes()
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["my-model"]


def test_shipping_again_replaces_the_model_whole(onnx_file: Path, tmp_path: Path) -> None:
    for batches in ((1,), (1, 2)):
        folder = write_repository(onnx_file, tmp_path / "triton", "m", batches)
    assert "max_batch_size: 2" in (folder / "config.pbtxt").read_text()
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b", ".hidden"])
def test_names_triton_refuses(name: str, onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_repository(onnx_file, tmp_path / "triton", name, (1,))
    assert not (tmp_path / "triton").exists()


def test_a_failed_write_leaves_the_repository_as_it_was(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository(onnx_file, tmp_path / "triton", "m", (1,))
    before = (folder / "config.pbtxt").read_text()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(EnvironmentLacks, match="No space left"):
        write_repository(onnx_file, tmp_path / "triton", "m", (1, 8))
    assert (folder / "config.pbtxt").read_text() == before
    assert [path.name for path in (tmp_path / "triton").iterdir()] == ["m"]


def test_missing_tritonclient_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(EnvironmentLacks, match=r"optin-export\[triton\]"):
        check_tools()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "onnx").mkdir(parents=True)
    (run / "onnx" / "pruned.onnx").write_bytes(b"weights")
    (run / "plan.json").write_text("{}")
    write_manifest(run, {"seed": 0})
    return run


def test_an_untouched_run_verifies(run: Path) -> None:
    assert check_manifest(run) == []


def test_a_flipped_bit_and_a_missing_file_are_found(run: Path) -> None:
    (run / "onnx" / "pruned.onnx").write_bytes(b"weightt")
    (run / "plan.json").unlink()
    assert check_manifest(run) == ["onnx/pruned.onnx: content differs", "plan.json: missing"]


def test_a_manifest_may_not_point_outside(run: Path) -> None:
    text = (run / "manifest.json").read_text().replace("plan.json", "../../secret")
    (run / "manifest.json").write_text(text)
    assert "../../secret: points outside the run folder" in check_manifest(run)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json"])
def test_a_damaged_manifest_is_refused(run: Path, content: str) -> None:
    (run / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        check_manifest(run)
