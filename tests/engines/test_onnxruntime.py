"""onnxruntime on a GPU: what is refused here, and the binding of its buffers, which works on the CPU as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optin_export.engines import CALL, MODES, _device, build, load, modes, onnxruntime, versions
from optin_export.errors import EnvironmentLacks
from optin_export.recipe import Target

GPU = Target.model_validate({"engine": "onnxruntime", "device": "cuda"})
X = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}


@pytest.fixture
def small_onnx(tmp_path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def bound(small_onnx: Path) -> onnxruntime.BoundEngine:
    """The engine of a GPU, on the CPU."""
    runtime = onnxruntime._import()

    def open_session(graph: bool) -> Any:
        return onnxruntime._session(runtime, small_onnx, onnxruntime._options(runtime, Target()))

    return onnxruntime.BoundEngine(open_session, _device.Host())


def test_bound_buffers_hold_what_a_plain_run_gives(bound: onnxruntime.BoundEngine) -> None:
    assert modes(bound) == (CALL,)
    expected = np.maximum(X["x"], 0)
    assert np.array_equal(bound.run(X)["y"], expected)
    held = {"x": torch.from_numpy(X["x"].copy())}
    launch = bound._bind(held, False)
    assert np.array_equal(launch()["y"].numpy(), expected)
    held["x"].neg_()  # read where it lies at every call
    assert np.array_equal(launch()["y"].numpy(), np.maximum(-X["x"], 0))
    for mode in (CALL, "device"):
        assert bound.timer(X, mode)() > 0.0


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_missing_provider_names_the_pip_line(provider: str) -> None:
    target = GPU.model_copy(update={"provider": provider})
    if f"{provider}executionprovider" in [name.lower() for name in onnxruntime._import().get_available_providers()]:
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(EnvironmentLacks, match=r"(?s)overwrites.*pip uninstall -y onnxruntime && pip install") as error:
        versions(target)
    assert error.value.exit_code == 5 and f"no {provider} provider" in error.value.what


def test_where_there_is_a_provider_and_no_gpu_it_is_built(
    small_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    runtime = onnxruntime._import()
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    path = tmp_path / "base.onnx"
    facts = build(small_onnx, GPU, path)
    assert facts["provider"] == "cuda" and path.read_bytes() == small_onnx.read_bytes()
    with pytest.raises(EnvironmentLacks, match="no NVIDIA GPU"):
        load(path, GPU)


def test_names_tell_providers_apart() -> None:
    assert GPU.name == "onnxruntime-cuda"
    assert GPU.model_copy(update={"provider": "tensorrt"}).name == "onnxruntime-cuda-tensorrt"


@pytest.mark.gpu
def test_on_a_gpu_in_every_mode(small_onnx: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    versions(GPU)
    build(small_onnx, GPU, tmp_path / "base.onnx")
    engine = load(tmp_path / "base.onnx", GPU)
    assert modes(engine) == tuple(MODES)
    expected = np.maximum(X["x"], 0)
    assert np.array_equal(engine.run(X)["y"], expected)
    for mode in MODES:
        once = engine.timer(X, mode)  # type: ignore[attr-defined]
        assert all(0.0 < once() < 1000.0 for _ in range(40))
    graphed = engine._bind({"x": torch.from_numpy(X["x"]).cuda()}, True)  # type: ignore[attr-defined]
    outputs = graphed()
    torch.cuda.synchronize()
    assert np.array_equal(outputs["y"].cpu().numpy(), expected)


def test_a_norm_behind_a_sum_stays_in_its_vectorised_kernel(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 8]) for name in ("x", "z", "y")]
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [8], [1.0] * 8)
    nodes = [
        helper.make_node("Add", ["x", "z"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "ones", "ones"], ["y"], axis=-1),
    ]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:], [ones])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "norm.onnx")
    build(tmp_path / "norm.onnx", Target(), tmp_path / "engine.onnx", [])
    assert [node.op_type for node in onnx.load(tmp_path / "engine.onnx").graph.node] == ["Add", "LayerNormalization"]
