"""prune() on models of sound, with what their feature extractors return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import optin_export
from optin_export.errors import InputError
from tests.models.audio_folders import KINDS, RATE, audio_folder, noise

ROWS = [noise(samples, row) for row, samples in enumerate((1200, 900, 1600, 1100, 1600, 800))]


def given(folder: Path, kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    name, _, extractor, _, _ = KINDS[kind]
    model = getattr(transformers, name).from_pretrained(audio_folder(folder, kind))
    padding = {"padding": True} if extractor.startswith("Wav2Vec2") else {}
    prepare = getattr(transformers, extractor).from_pretrained(folder)
    return model, dict(prepare(ROWS, sampling_rate=RATE, return_tensors="pt", **padding))


@pytest.mark.parametrize("kind", ["wav2vec2-ctc", "whisper"])
def test_a_model_of_sound_is_pruned_in_memory(tmp_path: Path, kind: str) -> None:
    model, inputs = given(tmp_path / "model", kind)
    batches = [{name: tensor[at : at + 2] for name, tensor in inputs.items()} for at in (0, 2, 4)]
    settings: dict[str, Any] = {"units": ["neurons"], "probes": 1, "align": 1}
    small = optin_export.prune(model, batches, macs=0.96, **settings)
    assert small.report["macs"]["ratio"] <= 0.96
    small.to_onnx(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        output = small.model(**inputs)
    wanted = output.last_hidden_state if kind == "whisper" else output.logits
    arrays = {name: (one if one.is_floating_point() else one.long()).numpy() for name, one in inputs.items()}
    [found] = session.run(None, arrays)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
    again = optin_export.load_model(small.save(tmp_path / "small"))
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_paths_are_no_sound(tmp_path: Path) -> None:
    model, _ = given(tmp_path / "model", "wav2vec2-ctc")
    with pytest.raises(InputError, match="has no 'input_values'"):
        optin_export.prune(model, ["a.wav", "b.wav"], macs=0.9)
