"""Graphs whose weights lie beside them: the numbers of one file, through every step that reads or copies a graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

import optin_export.export
from optin_export.cli import main
from optin_export.data import Sources, load_sources
from optin_export.engines import build, load
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.export import export_onnx, read_graph
from optin_export.export.half import to_half
from optin_export.export.precision import convert
from optin_export.recipe import ExportSection, Target, validate
from optin_export.workdir.onnx_files import atomic_graph, copy_graph, data_file, graph_bytes, graph_files, sha256_graph
from tests.conftest import Make, measured_shortly

#: So few bytes that the small models pass it.
LIMIT = 20_000


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(optin_export.export, "MAX_BYTES", LIMIT)
    yield


@pytest.fixture(scope="module")
def sources(bert_folder: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    raw = {
        "recipe": 1,
        "name": "tiny",
        "model": {"source": str(bert_folder), "task": "feature-extraction", "pooling": "mean"},
        "data": {"calibration": {"source": f"csv:{text_data / 'pairs.csv'}", "columns": {"text": 0}, "samples": 48}},
        "prune": {"budget": {"macs": 0.6}},
        "export": {"batch": [1, 3], "sequence": 16},
    }
    return load_sources(validate(raw, tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def exported(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as one file and as two."""
    folder, paths = tmp_path_factory.mktemp("graphs"), {}
    for name, limit in (("one", optin_export.export.MAX_BYTES), ("two", LIMIT)):
        paths[name] = folder / name / "base.onnx"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optin_export.export, "MAX_BYTES", limit)
            export_onnx(sources.model, sources.fixed(2), paths[name], max_batch=4, sequence=16)
    return paths


@pytest.fixture
def two(exported: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the one with two files, to be changed."""
    (tmp_path / "two").mkdir()
    copy_graph(exported["two"], tmp_path / "two" / "base.onnx")
    return tmp_path / "two" / "base.onnx"


def answers(path: Path, sources: Sources, folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    build(path, Target(), folder / path.name)
    engine = load(folder / path.name, Target())
    return engine.run({name: tensor.numpy() for name, tensor in sources.fixed(3).items()})["sentence_embedding"]


def test_the_same_numbers_as_one_file_in_every_precision(
    sources: Sources, exported: dict[str, Path], tmp_path: Path
) -> None:
    one, two = exported.values()
    assert graph_files(one) == [one] and graph_files(two) == [two, data_file(two)]
    assert two.stat().st_size < one.stat().st_size / 3 and graph_bytes(two) > 0.8 * graph_bytes(one)
    assert b"site-packages" not in two.read_bytes()
    found = answers(two, sources, tmp_path / "engines")
    np.testing.assert_array_equal(found, answers(one, sources, tmp_path / "one-engine"))
    assert [file.name for file in graph_files(tmp_path / "engines" / "base.onnx")] == ["base.onnx", "base.onnx.data"]
    for precision in ("fp16", "bf16", "int8"):
        for quantization in ("static", "dynamic") if precision == "int8" else ("static",):
            section = ExportSection(precision=precision, quantization=quantization, sequence=16)
            made = {}
            for source in (one, two):
                path = source.with_name(f"base.{precision}-{quantization}.onnx")
                facts = convert(source, path, section, _rows(sources))
                assert facts.bytes == graph_bytes(path)
                made[source] = path
            assert data_file(made[two]).is_file() and not data_file(made[one]).exists()
            read_graph(made[two])
            if precision != "bf16":  # onnxruntime has no kernels for it on a CPU
                both = [answers(path, sources, path.parent / "engines") for path in made.values()]
                np.testing.assert_array_equal(*both)
            whole = [onnx.load(path) for path in made.values()]
            first, second = ({t.name: numpy_helper.to_array(t).tobytes() for t in m.graph.initializer} for m in whole)
            assert first == second


def _rows(sources: Sources) -> list[dict[str, np.ndarray]]:
    return [{name: tensor.numpy() for name, tensor in batch.inputs.items()} for batch in sources.quantization]


def test_half_precision_makes_no_message_of_the_weights(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into onnx's own passes is small, whatever the weights are."""
    sizes: list[int] = []
    original = onnx.shape_inference.infer_shapes

    def measured(model: Any, *args: Any, **options: Any) -> Any:
        sizes.append(model.ByteSize())
        return original(model, *args, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", measured)
    to_half(onnx.load(two, load_external_data=False), "fp16", two.parent)
    assert len(sizes) == 1 and sizes[0] < graph_bytes(two) / 2


def test_weights_of_before_go_with_a_graph_that_needs_none(two: Path) -> None:
    path = two
    first = sha256_graph(path)
    with pytest.raises(EnvironmentLacks), atomic_graph(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert sha256_graph(path) == first and len(list(path.parent.iterdir())) == 2
    with atomic_graph(path) as temporary:
        temporary.write_bytes(b"one file")
    assert graph_files(path) == [path] and [file.name for file in path.parent.iterdir()] == ["base.onnx"]


def test_a_copy_under_another_name_finds_its_weights(sources: Sources, two: Path, tmp_path: Path) -> None:
    expected = answers(two, sources, tmp_path / "engine")
    (tmp_path / "served").mkdir()
    copy_graph(two, tmp_path / "served" / "model.onnx")
    shutil.rmtree(two.parent)
    np.testing.assert_array_equal(load(tmp_path / "served" / "model.onnx", Target()).run(
        {name: tensor.numpy() for name, tensor in sources.fixed(3).items()}
    )["sentence_embedding"], expected)  # fmt: skip


# --- graphs that anybody may have written ---------------------------------------------------------------------------


def graph_of(folder: Path, **changes: Any) -> Path:
    """y = x @ w, with w in weights.data unless `changes` say otherwise."""
    (folder / "weights.data").write_bytes(np.ones((4, 4), np.float32).tobytes())
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=changes.pop("dims", [4, 4]))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights.data", "offset": "0", "length": "64"} | changes).items():
        weight.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    path = folder / "graph.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_weights_in_the_graphs_own_folder_are_read(tmp_path: Path) -> None:
    assert read_graph(graph_of(tmp_path)).graph.initializer[0].name == "w"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"location": "../outside.data"}, "outside the graph's folder"),
        ({"location": "/etc/passwd"}, "outside the graph's folder"),
        ({"location": "inner/weights.data"}, "outside the graph's folder"),
        ({"location": ".."}, "outside the graph's folder"),
        ({"location": ""}, "outside the graph's folder"),
        ({"location": "none.data"}, "not a file next to the graph"),
        ({"location": "link.data"}, "not a file next to the graph"),
        ({"length": "65"}, "have the shape"),
        ({"length": "32"}, "have the shape"),
        ({"offset": "4"}, "have the shape"),
        ({"offset": "-64"}, "have the shape"),
        ({"offset": "many"}, "many"),
        ({"dims": [1 << 20, 1 << 20]}, "have the shape"),
    ],
)
def test_weights_elsewhere_or_fewer_than_claimed_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    (tmp_path / "outside.data").write_bytes(bytes(64))
    folder = tmp_path / "graph"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights.data").write_bytes(bytes(64))
    (folder / "link.data").symlink_to(tmp_path / "outside.data")
    with pytest.raises(InputError) as caught:
        read_graph(graph_of(folder, **changes))
    assert says in caught.value.why


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_run_ships_and_is_measured_elsewhere_with_two_files_per_graph(
    bert_recipe: Make, tmp_path: Path, low_limit: None
) -> None:
    raw = bert_recipe(export={"batch": [1, 3], "sequence": 16, "precision": "int8", "quantization": "dynamic"})
    raw["ship"] = {"triton": True, "layout": "models"}
    raw["gates"] = {"speedup": 0.01, "accuracy_drop": 100}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    run = tmp_path / "run"
    with measured_shortly():
        assert main([str(tmp_path / "recipe.yaml"), "--out", str(run), "-q"]) == 0
    names = set(json.loads((run / "manifest.json").read_text())["files"])
    for which in ("base", "pruned", "base.int8", "pruned.int8"):
        assert {f"onnx/{which}.onnx", f"onnx/{which}.onnx.data"} <= names
        assert f"engines/onnxruntime-cpu-1t/{which}.onnx.data" in names
    served = run / "triton" / "tiny-bert" / "1"
    assert {file.name for file in served.iterdir()} == {"model.onnx", "pruned.int8.onnx.data"}
    load(served / "model.onnx", Target())
    assert main(["verify", str(run)]) == 0 and main(["verify", str(run / "triton")]) == 0
    # Nothing is made again as long as both files are what they were; a changed weight is noticed.
    records = {path: path.stat().st_mtime_ns for path in (run / ".stages").glob("export.*.json")}
    assert main([str(tmp_path / "recipe.yaml"), "--out", str(run), "-q"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (run / ".stages").glob("export.*.json")} == records
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    with measured_shortly():
        assert main(["measure", str(copy), "--machine", "other"]) == 0
    data = copy / "onnx" / "pruned.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\7")
    assert main(["verify", str(copy)]) != 0
    assert main(["measure", str(copy), "--machine", "third"]) == 2
    data = run / "onnx" / "base.onnx.data"
    data.write_bytes(bytes(len(data.read_bytes())))
    with measured_shortly():
        assert main([str(tmp_path / "recipe.yaml"), "--out", str(run), "-q"]) == 0
    assert any(data.read_bytes()) and main(["verify", str(run)]) == 0
