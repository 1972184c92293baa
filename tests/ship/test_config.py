"""config.pbtxt is what Triton's own protobuf reads back, with the graph's or engine's own names, types and dims."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship.config import (
    ModelSpec,
    Step,
    Warmup,
    config_text,
    ensemble_text,
    read_config,
)
from optin_export.ship.images import ONNXRUNTIME, docker_line, server_image
from optin_export.ship.names import check_name
from optin_export.ship.protobuf import check_tools
from optin_export.ship.signature import Signature, Tensor, of_engine, of_onnx

pytest.importorskip("tritonclient.grpc")
TOKENS = Signature((Tensor("input_ids", "TYPE_INT64", (-1, -1)),), (Tensor("logits", "TYPE_FP32", (-1, 5)),))


def save_graph(path: Path, kind: int = TensorProto.FLOAT, dims: Any = ("batch", 3, 4)) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("pixels", kind, list(dims))],
        [helper.make_tensor_value_info("logits", kind, list(dims))],
    )
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.FLOAT, "TYPE_FP32"),
        (TensorProto.FLOAT16, "TYPE_FP16"),
        (TensorProto.BFLOAT16, "TYPE_BF16"),
        (TensorProto.INT8, "TYPE_INT8"),
        (TensorProto.UINT8, "TYPE_UINT8"),
        (TensorProto.INT32, "TYPE_INT32"),
        (TensorProto.INT64, "TYPE_INT64"),
        (TensorProto.BOOL, "TYPE_BOOL"),
    ],
)
def test_types_and_dims_are_those_of_the_graph(kind: int, name: str, tmp_path: Path) -> None:
    signature = of_onnx(save_graph(tmp_path / "g.onnx", kind))
    assert signature.inputs == (Tensor("pixels", name, (-1, 3, 4)),)
    config = read_config(config_text(ModelSpec("m", "onnxruntime", signature, (1, 8))))
    assert list(config.input[0].dims) == [3, 4] and config.max_batch_size == 8
    assert (
        type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[config.input[0].data_type].name
        == name
    )


def test_types_that_triton_lacks_and_files_that_are_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Triton has no such type"):
        of_onnx(save_graph(tmp_path / "g.onnx", TensorProto.COMPLEX64))
    (tmp_path / "x.onnx").write_bytes(b"\xff" * 9)
    for name in ("x.onnx", "none.onnx"):
        with pytest.raises(InputError, match="cannot read"):
            of_onnx(tmp_path / name)


def test_an_engine_has_the_dims_its_profiles_allow(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "g.onnx", TensorProto.FLOAT, ("batch", "sequence"))
    profile = [{"pixels": [[1, 64], [8, 64], [8, 64]]}]
    signature = of_engine(graph, profile)
    assert signature.inputs[0].dims == (-1, 64)
    assert of_engine(graph, [{"pixels": [[4, 64]] * 3}]).inputs[0].dims == (4, 64)
    text = config_text(ModelSpec("m", "tensorrt", signature, (1, 8), "model.plan", "cuda", cuda_graphs=True))
    config = read_config(text)
    assert config.platform == "tensorrt_plan" and config.backend == "" and config.optimization.cuda.graphs
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert config.default_model_filename == "model.plan"


def test_batching_instances_versions_labels_and_warm_up() -> None:
    warm = Warmup(8, {"input_ids": "batch-8.input_ids"}, {"input_ids": (16,)})
    spec = ModelSpec("m", "python", TOKENS, (8, 1, 4), "model.onnx", instances=2, queue_delay=250, versions=(2,))
    spec = ModelSpec(**{**vars(spec), "labels": True, "warmup": (warm,), "parameters": {"file": "model.onnx"}})
    config = read_config(config_text(spec))
    assert config.backend == "python" and config.default_model_filename == ""
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert config.instance_group[0].count == 2
    assert list(config.version_policy.specific.versions) == [2]
    assert config.output[0].label_filename == "labels.txt"
    sample = config.model_warmup[0].inputs["input_ids"]
    assert (config.model_warmup[0].batch_size, list(sample.dims), sample.input_data_file) == (
        8,
        [16],
        "batch-8.input_ids",
    )
    assert config.parameters["file"].string_value == "model.onnx"


def test_without_a_batch_the_dims_are_whole() -> None:
    signature = Signature((Tensor("x", "TYPE_FP16", (4, 3)),), (Tensor("y", "TYPE_FP16", (4, 2)),))
    config = read_config(config_text(ModelSpec("m", "tensorrt", signature, (), device="cuda")))
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [4, 3]
    assert not config.HasField("dynamic_batching")


def test_an_ensemble_names_its_steps() -> None:
    steps = (
        Step("prepare", {"TEXT": "TEXT"}, {"input_ids": "input_ids"}),
        Step("m", {"input_ids": "input_ids"}, {"logits": "logits"}),
    )
    given = Signature((Tensor("TEXT", "TYPE_STRING", (-1, 1)),), TOKENS.outputs)
    config = read_config(ensemble_text("m-ensemble", given, steps, 8, labels=False))
    assert config.platform == "ensemble"
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["prepare", "m"]
    assert dict(config.ensemble_scheduling.step[1].output_map) == {"logits": "logits"}


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b", ".hidden", "ü", "a" * 300, "a\n"])
def test_names_triton_refuses(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a Triton model"):
        check_name(name)


def test_missing_tritonclient_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(EnvironmentLacks, match=r"optin-export\[triton\]"):
        check_tools()


def test_the_image_is_the_one_that_holds_the_version_or_the_next_known() -> None:
    for version in ONNXRUNTIME.values():
        image = server_image("onnxruntime", "onnxruntime", version)
        assert image.exact and f"onnxruntime {version}, as measured" in image.note
    assert server_image("onnxruntime", "onnxruntime", "1.23.2").tag == "nvcr.io/nvidia/tritonserver:26.01-py3"
    # An older onnxruntime need not read a newer one's graph: the next release that is newer, or the newest known.
    for version, release in (("1.26.0", "26.07"), ("1.24.3", "26.04"), ("1.99.0", "26.08"), (None, "26.08")):
        image = server_image("onnxruntime", "onnxruntime", version)
        assert image.tag == f"nvcr.io/nvidia/tritonserver:{release}-py3" and not image.exact
    assert "TensorRT is 10.13.2" in server_image("tensorrt", "tensorrt", "10.13.2").note
    image = server_image("python", "onnxruntime", "1.32.0", ("tokenizers==0.22.0",))
    assert image.packages == ("onnxruntime==1.32.0", "tokenizers==0.22.0")


def test_the_docker_line_installs_what_the_image_lacks_and_quotes_the_folder() -> None:
    image = server_image("onnxruntime", "onnxruntime", "1.28.0", ("tokenizers==0.22.0",))
    words = shlex.split(docker_line("/my models", image, gpu=False))
    assert words[-2:] == ["-c", "pip install tokenizers==0.22.0 && exec tritonserver --model-repository=/models"]
    assert "/my models:/models:ro" in words and image.tag in words and "--gpus=all" not in words
    plain = shlex.split(docker_line("/m", server_image("onnxruntime", "onnxruntime", "1.28.0"), gpu=True))
    assert plain[-2:] == ["tritonserver", "--model-repository=/models"] and "--gpus=all" in plain
