"""The unpruned modules of sound, of encoders, detections and depth as ONNX graphs: the same outputs at every batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from optin_export.data import load_sources
from optin_export.export import export_onnx
from optin_export.models import Inputs, TaskModel
from tests.models.audio_folders import KINDS, audio_folder, recordings
from tests.models.test_audio import recipe
from tests.models.test_encoders import loaded as encoder
from tests.models.test_image_outputs import PIXELS, detectors, saved
from tests.models.test_image_outputs import loaded as image_model


def agrees(model: TaskModel, inputs: Inputs, path: Path, sequence: int | None = None) -> None:
    exported = export_onnx(model, inputs, path, max_batch=4, sequence=sequence)
    assert (exported.inputs, exported.output) == (tuple(inputs), model.output_name)
    session = onnxruntime.InferenceSession(str(path))
    for rows in (1, 2):
        fed = {name: tensor[:rows] for name, tensor in inputs.items()}
        with torch.no_grad():
            wanted = model(**fed).numpy()
        (given,) = session.run(None, {name: tensor.numpy() for name, tensor in fed.items()})
        np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-ctc", "ast"])
def test_sound(tmp_path: Path, kind: str) -> None:
    folder, source = audio_folder(tmp_path / "model", kind), f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(folder, source, KINDS[kind][4]))
    agrees(sources.model, sources.fixed(2), tmp_path / "model.onnx")


def test_an_encoder_of_text(tmp_path: Path) -> None:
    _, found = encoder(tmp_path / "bart", "bart")
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    agrees(found.model, {"input_ids": ids, "attention_mask": mask}, tmp_path / "model.onnx", sequence=16)


def test_detections(tmp_path: Path) -> None:
    saved(tmp_path / "detr", *detectors()["detr"])
    agrees(image_model(tmp_path / "detr", "object-detection").model, {"pixel_values": PIXELS}, tmp_path / "model.onnx")
