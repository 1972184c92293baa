"""The ONNX file is valid, dynamic where it must be, and says nothing of the machine that wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from optin_export.data import Sources, load_sources
from optin_export.engines import artefact, build, load, versions
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.export import OPSET, export_onnx
from optin_export.recipe import Target, validate
from tests.conftest import Make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture
def sources(bert_recipe: Make, tmp_path: Path) -> Sources:
    return load_sources(validate(bert_recipe(), tmp_path))


def test_names_shapes_and_silence_about_the_machine(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "base.onnx"
    facts = export_onnx(sources.model, sources.fixed(2), path, max_batch=4, sequence=16)
    model = onnx.load(path)
    assert facts.inputs == ("input_ids", "attention_mask")
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in model.graph.output] == ["sentence_embedding"]
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {OPSET}
    dims = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence"]
    assert str(Path(__file__).parent.parent.parent).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def test_the_same_model_gives_the_same_file(sources: Sources, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        export_onnx(sources.model, sources.fixed(2), tmp_path / name, max_batch=4, sequence=16)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_every_batch_and_length_up_to_the_maximum(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "base.onnx"
    export_onnx(sources.model, sources.fixed(2), path, max_batch=4, sequence=16)
    build(path, Target(), tmp_path / "engine.onnx")
    engine = load(tmp_path / "engine.onnx", Target())
    for batch, length in ((1, 2), (1, 16), (3, 7), (4, 16)):
        ids = torch.randint(5, 20, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = sources.model(**inputs).numpy()
        got = engine.run({name: tensor.numpy() for name, tensor in inputs.items()})["sentence_embedding"]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_model_that_cannot_be_exported_is_an_input_error(tmp_path: Path) -> None:
    class DataDependent(torch.nn.Module):
        output_name = "logits"

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values if pixel_values.sum().item() > 0 else -pixel_values

    inputs = {"pixel_values": torch.ones(2, 1, 4, 4)}
    with pytest.raises(InputError, match="ONNX"):
        export_onnx(DataDependent(), inputs, tmp_path / "no.onnx", max_batch=2, sequence=None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_onnx_file_is_a_parity_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a protobuf")
    with pytest.raises(ParityError):
        build(tmp_path / "bad.onnx", Target(), tmp_path / "engine.onnx")
    assert not (tmp_path / "engine.onnx").exists()


def test_artefacts_of_targets_do_not_collide(tmp_path: Path) -> None:
    paths = {artefact(tmp_path, Target(threads=n), which) for n in (1, 2) for which in ("base", "pruned")}
    assert len(paths) == 4


def test_a_missing_engine_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EnvironmentLacks, match=r"optin-export\[cpu\]") as error:
        versions(Target())
    assert error.value.exit_code == 5
