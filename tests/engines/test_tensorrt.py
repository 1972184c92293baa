"""The TensorRT backend: names against the recorded interfaces, real builds without a GPU, and what is refused."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import optin_export
from optin_export.engines import _device as devices
from optin_export.engines import (
    _polygraphy,
    _tensorrt_engine,
    build,
    files,
    load,
    modes,
    tensorrt,
    unavailable,
    versions,
)
from optin_export.engines import _tensorrt_network as network
from optin_export.engines import _tensorrt_shapes as padding
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.progress import reporting
from optin_export.recipe import Target, load_recipe, validate
from optin_export.workdir.files import write_json
from tests.conftest import ROOT, Make, shared_folder
from tests.engines import fake_tensorrt

MODULES = (tensorrt, network, _tensorrt_engine, _polygraphy)
#: What the code calls its objects, and the class of each.
CLASSES = {
    "definition": "INetworkDefinition",
    "parsed[1]": "INetworkDefinition",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    # The python backend of Triton, in ship/served
    "self.engine": "ICudaEngine",
    "self.context": "IExecutionContext",
    "self.runtime": "Runtime",
}
#: How the code names the library.
LIBRARY = ("trt", "tools.trt", "self.trt", "self._tools.trt")
#: Options that only some versions have; the code asks before it uses them.
GUARDED = {"set_compute_capability", "num_compute_capabilities", "ComputeCapability"}
RTX = Target.model_validate({"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": ["8.9"]}})


def names_used(source: str) -> Iterator[tuple[str, str]]:
    """(class or 'trt', name) of every attribute of the library's objects in the code."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value).partition("(")[0]
        library = next((one for one in LIBRARY if owner == one or owner.startswith(f"{one}.")), None)
        if library is not None:
            yield "trt" + owner.removeprefix(library), node.attr
        elif owner in CLASSES:
            yield CLASSES[owner], node.attr


def recorded() -> list[Path]:
    folder = shared_folder()
    return sorted((folder / "tensorrt_api").glob("tensorrt*.json")) if folder else []


@pytest.mark.shared_data
def test_every_name_is_one_of_the_library() -> None:
    sources = [inspect.getsource(module) for module in MODULES]
    sources.append((Path(optin_export.__file__).parent / "ship/served/tensorrt_model.py").read_text(encoding="utf-8"))
    used = {pair for source in sources for pair in names_used(source)}
    assert {("IExecutionContext", "execute_async_v3"), ("trt.MemoryPoolType", "WORKSPACE")} <= used
    assert {("Runtime", "deserialize_cuda_engine"), ("trt", "Logger")} <= used
    assert len(recorded()) >= 4
    for file in recorded():
        api = json.loads(file.read_text(encoding="utf-8"))
        is_rtx = "rtx" in file.name
        for owner, name in sorted(used):
            if (name in GUARDED and not is_rtx) or (owner == "trt" and name == "__version__"):
                continue
            if owner == "trt":
                assert name in api or name in ("__name__", "nptype"), f"{file.name}: trt.{name}"
            else:
                klass = owner.removeprefix("trt.").split(".")[0]
                known = [one for one in (klass, f"I{klass}") if one in api]
                inner = owner.removeprefix("trt.").split(".")[1:]
                attributes = api[known[0]]["attrs"] + (api[known[0]]["members"] or [])
                assert (inner[0] if inner else name) in attributes, f"{file.name}: {owner}.{name}"


@pytest.mark.shared_data
def test_options_of_the_recipe_are_members_of_the_enums() -> None:
    """What `getattr` reaches for: every choice exists in the latest versions; older ones are told apart by name."""
    latest = json.loads(next(file for file in recorded() if "tensorrt_11" in file.name).read_text(encoding="utf-8"))
    flags = {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "WEIGHT_STREAMING"}
    assert flags <= set(latest["BuilderFlag"]["members"])
    assert {"NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"} <= set(latest["HardwareCompatibilityLevel"]["members"])
    assert {"LAYER_NAMES_ONLY", "DETAILED", "NONE"} <= set(latest["ProfilingVerbosity"]["members"])


SHAPES = [{"ids": (1, 16), "mask": (1, 16)}, {"ids": (8, 16), "mask": (8, 16)}]


def test_a_batch_goes_to_the_smallest_profile_that_holds_it() -> None:
    profiles = [{name: (shape, shape, shape) for name, shape in one.items()} for one in reversed(SHAPES)]
    for batch, sequence, expected in ((1, 16, 1), (1, 9, 1), (2, 16, 0), (8, 16, 0)):
        inputs = {name: np.ones((batch, sequence), np.int64) for name in ("ids", "mask")}
        number, padded = padding.fitted(profiles, inputs)
        assert number == expected
        assert padded["mask"].shape == SHAPES[1 - expected]["mask"] and padded["mask"].sum() == batch * sequence
    with pytest.raises(ParityError, match="no optimization profile covers"):
        padding.fitted(profiles, {name: np.ones((9, 16), np.int64) for name in ("ids", "mask")})


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        (("batch", 16), (3, 16)),  # an embedding as wide as the padded sequence is long
        (("batch", "sequence", 16), (3, 9, 16)),
        (("batch", 2, "sequence"), (3, 2, 9)),
        (("batch", 8, "sequence"), (3, 8, 9)),  # as many classes as rows of the padded batch
        (("sequence", "batch", 16), (9, 3, 16)),
        ((16, "batch"), (16, 3)),
        ((), ()),
    ],
)
def test_an_output_is_cut_where_its_declared_dimensions_are_dynamic(
    dims: tuple[int | str, ...], wanted: tuple[int, ...]
) -> None:
    """Sizes say nothing: batch 8, sequence 16 and the widths of the outputs are equal to one another."""
    from onnx import TensorProto, helper

    def value(name: str, shape: tuple[int | str, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [value("ids", ("batch", "sequence")), value("mask", ("batch", "sequence"))]
    graph = helper.make_graph([], "g", inputs, [value("out", dims)])
    axes = padding.read_axes(json.loads(json.dumps(padding.write_axes(padding.dynamic_axes(helper.make_model(graph))))))
    sizes = {"batch": 8, "sequence": 16}
    padded = np.zeros([sizes.get(str(dim), dim) for dim in dims])
    assert padding.cut(padded, axes["out"], {"ids": (3, 9), "mask": (3, 9)}).shape == wanted


def test_an_exported_graph_declares_its_dynamic_dimensions(tmp_path: Path) -> None:
    """Sequence 32 and width 32: the embedding keeps its width, token outputs lose what was padded."""
    from optin_export.export import export_onnx, read_graph
    from tests.units.models import inputs_for, small_model

    for name, wanted in (
        ("bert-embedding", {0: ("input_ids", 0)}),
        ("gpt2", {0: ("input_ids", 0), 1: ("input_ids", 1)}),
    ):
        model, _ = small_model(name)
        export_onnx(model, inputs_for(model, 2, 0), tmp_path / "m.onnx", max_batch=8, sequence=32)
        assert padding.dynamic_axes(read_graph(tmp_path / "m.onnx")) == {model.output_name: wanted}


def test_a_dynamic_profile_ranges_over_batches_and_sequences() -> None:
    class Input:
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self.name, self.shape = name, shape

    class Definition:
        num_inputs = 2

        def get_input(self, index: int) -> Input:
            return (Input("ids", (-1, -1)), Input("mask", (-1, 16)))[index]

    assert network.profiles_of(Definition(), SHAPES, dynamic=True) == [
        {"ids": ((1, 2), (8, 16), (8, 16)), "mask": ((1, 16), (8, 16), (8, 16))}
    ]


def test_the_trtexec_line_says_what_is_built() -> None:
    options = {
        "workspace": 512,
        "builder_optimization_level": 5,
        "refit": True,
        "hardware_compatibility": "ampere_plus",
    }
    target = Target.model_validate({"engine": "tensorrt", "tensorrt": options})
    profiles = network.profiles_of(None, SHAPES, dynamic=False)
    line = network.trtexec_line(target, Path("m.onnx"), Path("m.plan"), profiles)
    assert line.startswith("trtexec --onnx=m.onnx --saveEngine=m.plan --profile=0 --minShapes=ids:1x16,mask:1x16 ")
    assert "--profile=1 --minShapes=ids:8x16,mask:8x16 --optShapes=ids:8x16,mask:8x16 " in line
    for word in ("--memPoolSize=workspace:512M", "--builderOptimizationLevel=5", "--refit", "--stronglyTyped"):
        assert word in line.split()
    assert "--hardwareCompatibilityLevel=ampere_plus" in line and "--stripWeights" not in line


def test_an_engine_is_only_deserialised_if_its_record_names_it(tmp_path: Path) -> None:
    from optin_export.workdir.files import sha256_file

    plan, record = tmp_path / "base.plan", tmp_path / "base.plan.json"
    plan.write_bytes(b"engine")
    with pytest.raises(ParityError, match="no readable record"):
        tensorrt.check_record(plan, "tensorrt", "10.9", "NVIDIA L4 (sm89)")
    known = {"sha256": sha256_file(plan), "library": "tensorrt", "version": "10.9", "device": "NVIDIA L4 (sm89)"}
    write_json(record, known)
    with pytest.raises(ParityError, match="earlier version"):
        tensorrt.check_record(plan, "tensorrt", "10.9", "NVIDIA L4 (sm89)")
    write_json(record, known | {"axes": {"logits": [[0, "ids", 0]]}})
    tensorrt.check_record(plan, "tensorrt", "10.9", "NVIDIA L4 (sm89)")
    for library, version, device, message in (
        ("tensorrt", "11.4", "NVIDIA L4 (sm89)", "another library"),
        ("tensorrt_rtx", "10.9", "NVIDIA L4 (sm89)", "another library"),
        ("tensorrt", "10.9", "NVIDIA H200 (sm90)", "another GPU"),
    ):
        with pytest.raises(EnvironmentLacks, match=message):
            tensorrt.check_record(plan, library, version, device)
    plan.write_bytes(b"engina")
    with pytest.raises(ParityError, match="not the file that was built"):
        tensorrt.check_record(plan, "tensorrt", "10.9", "NVIDIA L4 (sm89)")


def test_layers_are_counted_and_fused_attention_is_seen() -> None:
    layers = [
        {"Name": "[ONNX Layer: node_attention_1]", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16f16"},
        {"Name": "_gemm_mha_v2_myl0_5", "LayerType": "fusedMHA", "TacticName": "_gemm_mha_v2_0x0f"},
        {"Name": "__myl_AddMeanMul_1", "LayerType": "kgen", "TacticName": "__myl_alpha_0x3"},
    ]
    told = network.layers_of(json.dumps({"Layers": layers, "Bindings": []}))
    assert network.count_layers(told) == {"layers": 3, "fused_attention": 1}
    names = network.layers_of(json.dumps({"Layers": ["__myl_Fmha_1", "alpha_matmul"]}))
    assert network.count_layers(names) == {"layers": 2, "fused_attention": 1}
    for nothing in ("", "no JSON", "[]", "{}"):
        told = network.layers_of(nothing)
        assert set(told) == {"unavailable"} and network.count_layers(told) == {}


@pytest.mark.parametrize(
    ("reason", "code", "message"),
    [
        ("Requested amount of GPU memory (8 bytes) could not be allocated", 5, r"(?s)out of memory.*workspace"),
        ("OutOfMemory (no further information)", 5, "out of memory"),
        ("Could not find any implementation for node node_conv_3", 3, r"(?s)cannot build.*node_conv_3"),
        ("weight_streaming in CreateConfig is not available on TensorRT version 10.9.", 5, "change targets.tensorrt"),
    ],
)
def test_a_build_that_fails_says_why(reason: str, code: int, message: str) -> None:
    error = network.failed(reason, Target.model_validate({"engine": "tensorrt"}))
    assert error.exit_code == code
    with pytest.raises(type(error)) as raised:
        raise error
    assert re.search(message, str(raised.value))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"engine": "tensorrt", "device": "cpu"}, "runs on device: cuda only"),
        ({"engine": "onnxruntime", "device": "gpu"}, "device"),
        ({"engine": "onnxruntime", "provider": "tensorrt"}, "provider is for"),
        ({"engine": "onnxruntime", "compile": True}, "compile is for the engine torch"),
        ({"engine": "torch", "mode": "device"}, "mode is for device: cuda"),
        ({"engine": "torch", "tensorrt": {"refit": True}}, "section tensorrt is for"),
        ({"engine": "onnxruntime", "tensorrt": {"refit": True}}, "section tensorrt is for"),
        ({"engine": "tensorrt", "tensorrt": {"compute_capabilities": ["8.9"]}}, "for the engine tensorrt-rtx"),
        ({"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": ["ada"]}}, "such as 8.9 or sm_89"),
        ({"engine": "tensorrt", "tensorrt": {"builder_optimization_level": 6}}, "builder_optimization_level"),
    ],
)
def test_targets_that_make_no_sense_are_refused(vit_recipe: Make, target: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(vit_recipe(targets=[target]), ROOT)


@pytest.mark.parametrize("given", [8.9, "8.9", "sm_89", "SM89", "compute_89", 89])
def test_a_compute_capability_is_understood_in_every_usual_form(given: object) -> None:
    options = {"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": [given, 12.0, "sm_120"]}}
    assert Target.model_validate(options).tensorrt.compute_capabilities == ("8.9", "12.0", "12.0")


def test_a_plan_without_weights_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_device", lambda: "NVIDIA L4 (sm89)")
    assert unavailable(Target.model_validate({"engine": "tensorrt"})) is None
    stripped = Target.model_validate({"engine": "tensorrt", "tensorrt": {"strip_plan": True}})
    assert "no weights" in (unavailable(stripped) or "")


def test_an_old_library_is_refused() -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__="10.8.0.43")
    with pytest.raises(EnvironmentLacks, match=r"(?s)10\.8\.0\.43 is too old.*10\.9"):
        network.checked_version(old)
    for name, version in (("tensorrt", "10.16.1.11"), ("tensorrt", "11.4.0.106"), ("tensorrt_rtx", "1.7.1.116")):
        module = SimpleNamespace(__name__=name, __version__=version)
        assert network.checked_version(module) is module


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _tensorrt_engine.TensorRTEngine]:
    """Makes an engine for batches 1 and 8 that Polygraphy's own runner executes, with TensorRT and CUDA on the host."""
    pytest.importorskip("polygraphy")
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    library = fake_tensorrt.module()
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    tools = _polygraphy._imported.__wrapped__(library)
    monkeypatch.setattr(sys.modules["polygraphy.cuda.cuda"], "G_CUDA", fake_tensorrt.HostCuda())
    monkeypatch.setattr(devices, "Gpu", devices.Host)
    profiles = [((batch, 4),) * 3 for batch in (1, 8)]

    def make(wrong: float = 0.0) -> _tensorrt_engine.TensorRTEngine:
        engine = fake_tensorrt.ICudaEngine(profiles, wrong)
        return _tensorrt_engine.TensorRTEngine(tools, engine, 100, {"y": {0: ("x", 0)}})

    return make


def test_polygraphys_runner_gives_the_outputs_and_the_same_call_is_timed(
    fake_engine: Callable[..., Any],
) -> None:
    engine = fake_engine()
    assert (engine.inputs, engine.outputs) == (("x",), ("y",))
    calls, previous = engine._engine.calls, []
    for batch, profile in ((1, 0), (3, 1), (8, 1), (1, 0)):
        x = np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float64)
        given = engine.run({"x": x, "unused": x})["y"]
        assert np.array_equal(given, np.maximum(x.astype(np.float32), 0)) and given.dtype == np.float32
        assert calls[-1] == f"run {(1, 8)[profile]}"
        previous.append((given, given.copy()))
    assert all(np.array_equal(*pair) for pair in previous)  # later runs leave the outputs of earlier ones alone
    assert calls == ["context", "run 1", "profile 1", "run 8", "run 8", "profile 0", "run 1"]
    assert engine.memory({"x": x}) == {"model": 100, "activations": 1000}
    once = engine.timer({"x": np.ones((3, 4))}, "call")
    del calls[:]
    assert 0.0 < once() < 1000.0 and calls == ["run 8"]
    assert np.array_equal(engine.run({"x": x})["y"], previous[-1][0])
    with pytest.raises(ParityError, match="no optimization profile covers"):
        engine.run({"x": np.ones((9, 4))})


def test_a_call_that_computes_something_else_is_not_timed(fake_engine: Callable[..., Any]) -> None:
    engine = fake_engine(wrong=0.5)
    x = np.ones((1, 4))
    assert np.array_equal(engine.run({"x": x})["y"], x)
    with pytest.raises(ParityError, match="the timed call gives another 'y'"):
        engine.timer({"x": x}, "call")


@pytest.mark.shared_data
def test_the_stand_in_has_no_name_that_the_library_lacks() -> None:
    for file in recorded():
        api = json.loads(file.read_text(encoding="utf-8"))
        for kind in (fake_tensorrt.ICudaEngine, fake_tensorrt.IExecutionContext):
            named = {name for name in vars(kind) if not name.startswith("_")}
            assert named <= set(api[kind.__name__]["attrs"]), file.name


def test_polygraphy_finds_the_cuda_runtime_of_torch() -> None:
    pytest.importorskip("polygraphy")
    folder = _polygraphy._runtime_folder()
    if folder is None:
        pytest.skip("torch's CUDA runtime is not in a wheel")
    from polygraphy.cuda import cuda

    before = os.environ.get("LD_LIBRARY_PATH")
    with _polygraphy.cuda_runtime():
        assert cuda._find_cuda_lib_dirs()[0] == str(folder)
        assert cuda.Cuda().handle._name.startswith(str(folder))
    assert os.environ.get("LD_LIBRARY_PATH") == before


def test_a_missing_polygraphy_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(_polygraphy, "_imported", _polygraphy._imported.__wrapped__)
    with pytest.raises(EnvironmentLacks, match=r"(?s)polygraphy.*optin-export\[gpu\]"):
        _polygraphy.polygraphy_of(fake_tensorrt.module(), "the target engine: tensorrt", "gpu")


@pytest.mark.rtx
def test_both_libraries_have_a_polygraphy_of_their_own() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    mine = sys.modules.get("polygraphy")
    tools = [_polygraphy._imported.__wrapped__(library) for library in (fake_tensorrt.module(), rtx)]
    assert [one.is_rtx for one in tools] == [False, True]
    assert tools[0].backend is not tools[1].backend
    assert mine is None or sys.modules["polygraphy"] is mine


@pytest.mark.gpu
def test_on_a_gpu_in_every_mode(small_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    target = Target.model_validate({"engine": "tensorrt"})
    if unavailable(target) is not None:
        pytest.skip(str(unavailable(target)))
    path = tmp_path / "small.plan"
    facts = build(small_onnx, target, path, [{"x": (1, 4)}, {"x": (8, 4)}])
    assert facts["layers"] >= 1
    engine = load(path, target)
    for batch in (1, 3, 8):
        x = np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)
        assert np.array_equal(engine.run({"x": x})["y"], np.maximum(x, 0))
        for mode in modes(engine):
            once = engine.timer({"x": x}, mode)  # type: ignore[attr-defined]
            assert all(0.0 < once() < 1000.0 for _ in range(40))
        assert engine.memory({"x": x})["model"] > 0  # type: ignore[attr-defined]


def test_a_missing_library_is_named_with_the_extra_that_brings_it() -> None:
    target = Target.model_validate({"engine": "tensorrt"})
    try:
        import tensorrt as _  # noqa: F401
    except ImportError:
        with pytest.raises(EnvironmentLacks, match=r"(?s)tensorrt.*optin-export\[gpu\]"):
            versions(target)


@pytest.fixture
def small_onnx(tmp_path: Path) -> Path:
    return _onnx(tmp_path / "small.onnx", "Relu")


def _onnx(path: Path, operator: str, domain: str = "") -> Path:
    import onnx
    from onnx import TensorProto, helper

    dims = ["batch", 4]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", domain=domain)
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.rtx
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_engine_is_built_without_a_gpu(small_onnx: Path, tmp_path: Path, dynamic: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = RTX.model_copy(update={"tensorrt": RTX.tensorrt.model_copy(update={"dynamic": dynamic})})
    path, ticks = tmp_path / "small.plan", []
    with reporting(lambda *step: ticks.append(step)):
        facts = build(small_onnx, target, path, [{"x": (1, 4)}, {"x": (8, 4)}])
    assert [file.exists() for file in files(path, target)] == [True, True, True]
    assert facts["network_layers"] >= 1
    assert facts["library"] == "tensorrt_rtx" and facts["compute_capabilities"] == ["8.9"]
    assert len(facts["profiles"]) == (1 if dynamic else 2) and facts["bytes"] == path.stat().st_size
    assert ticks and ticks[-1][0] == ticks[-1][1]
    if unavailable(target) is not None:
        told = json.loads(files(path, target)[2].read_text(encoding="utf-8"))
        assert "no NVIDIA GPU" in told["unavailable"] and "layers" not in facts
        with pytest.raises(EnvironmentLacks, match="no NVIDIA GPU") as error:
            load(path, target)
        assert error.value.exit_code == 5
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ParityError, match="not the file that was built"):
        load(path, target)


@pytest.mark.rtx
def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = _onnx(tmp_path / "strange.onnx", "NoSuchOperator", "com.example")
    with pytest.raises(ParityError, match=r"the_node and operator: NoSuchOperator"):
        build(path, RTX, tmp_path / "strange.plan", [{"x": (1, 4)}])
    assert not (tmp_path / "strange.plan").exists()


@pytest.mark.rtx
def test_a_device_that_the_library_does_not_know_is_refused(small_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = Target.model_validate({"engine": "tensorrt-rtx", "tensorrt": {"compute_capabilities": ["9.0"]}})
    with pytest.raises(EnvironmentLacks, match="has no sm90"):
        build(small_onnx, target, tmp_path / "small.plan", [{"x": (1, 4)}])


@pytest.mark.rtx
@pytest.mark.usefixtures("short_measurement")
def test_built_but_not_measured_never_passes(vit_recipe: Make, tmp_path: Path) -> None:
    """On a machine without a GPU: engines lie in the run folder, the gates say that they were not evaluated."""
    pytest.importorskip("tensorrt_rtx")
    if unavailable(RTX) is None:
        pytest.skip("this machine can run the engine")
    targets = [{"engine": "onnxruntime"}, RTX.model_dump(mode="json")]
    recipe = vit_recipe(targets=targets, gates={"speedup": 0.01, "accuracy_drop": 100.0})
    report = optin_export.run(recipe, tmp_path / "run")
    assert report is not None and not report.verdict.passed
    gates = {gate.name: gate for gate in report.verdict.gates}
    for name in ("parity", "speedup"):
        assert not gates[name].passed and "not evaluated on tensorrt-rtx-cuda" in gates[name].note
    assert gates["accuracy_drop"].passed  # measured on the target that runs here
    assert (tmp_path / "run" / "engines" / "tensorrt-rtx-cuda" / "pruned.plan").exists()
    assert {engine.unmeasured is None for engine in report.engines if "rtx" in engine.target} == {False}
    assert "not measured" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_recipes_name_the_engine(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["targets=[{engine: tensorrt}]"])
    assert recipe.targets[0].name == "tensorrt-cuda" and recipe.targets[0].device == "cuda"
