"""Models of sound: the task module gives exactly what the library gives for the same recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from optin_export.cli._guess import task_of
from optin_export.data import Batch, Sources, load_sources
from optin_export.errors import InputError
from optin_export.models import block_inputs, build, class_axis, counted_rows
from optin_export.objective import observe
from optin_export.recipe import Recipe, validate
from optin_export.units import few_rows, find_structure, input_rows, layer_inputs
from tests.models.audio_folders import KINDS, RATE, SMALL, audio_folder, noise, recordings

LENGTHS = (1600, 2400, 2000, 2400)


def recipe(folder: Path, source: str, task: str, **more: Any) -> Recipe:
    raw: dict[str, Any] = {
        "recipe": 1,
        "name": "sound",
        "model": {"source": str(folder), "task": task},
        "data": {"calibration": {"source": source}},
        "prune": {"budget": {"macs": 0.6}},
        **more,
    }
    raw["model"]["task"] = task
    return validate(raw, folder)


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Sources]:
    place = tmp_path_factory.mktemp(request.param)
    folder, source = audio_folder(place / "model", request.param), recordings(place / "wav", LENGTHS)
    return request.param, folder, load_sources(recipe(folder, f"wav:{source}", KINDS[request.param][4]))


def by_the_library(kind: str, folder: Path, rows: list[np.ndarray]) -> torch.Tensor:
    """The output of transformers' own model for these recordings, padded to the longest."""
    name, _, extractor, _, _ = KINDS[kind]
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    prepare = getattr(transformers, extractor).from_pretrained(folder)
    padding = {"padding": True} if extractor.startswith("Wav2Vec2") else {}
    with torch.no_grad():
        encoded = prepare(rows, sampling_rate=RATE, return_tensors="pt", **padding)
        if kind == "whisper":
            return model.get_encoder()(**encoded).last_hidden_state
        return model(**encoded).logits


def test_the_output_is_that_of_the_library(loaded: tuple[str, Path, Sources]) -> None:
    kind, folder, sources = loaded
    order = [0, 2, 1, 3]  # the files of a, then those of b
    wanted = by_the_library(kind, folder, [noise(LENGTHS[row], row) for row in order])
    with torch.no_grad():
        given = sources.model(**sources.fixed(4))
    assert given.shape == wanted.shape
    torch.testing.assert_close(given, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_the_description_rebuilds_the_module(loaded: tuple[str, Path, Sources]) -> None:
    _, _, sources = loaded
    rebuilt = build(sources.loaded.architecture)
    rebuilt.load_state_dict(sources.model.state_dict())
    inputs = sources.fixed(2)
    with torch.no_grad():
        assert torch.equal(rebuilt(**inputs), sources.model(**inputs))
    assert (rebuilt.output_name, rebuilt.output_kind) == (sources.model.output_name, sources.model.output_kind)


def test_the_task_is_found_by_the_class(loaded: tuple[str, Path, Sources]) -> None:
    kind, folder, _ = loaded
    assert task_of(str(folder)) == KINDS[kind][4]


def test_only_the_encoder_of_whisper_is_the_module(tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "model", "whisper")
    source = f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(folder, source, "automatic-speech-recognition"))
    model = sources.model
    assert type(model.model).__name__ == "WhisperEncoder"
    assert (model.output_name, model.output_kind, model.output_layout) == ("encoder_states", "embedding", "tokens")
    assert class_axis(model) is None
    assert not any("decoder" in name for name in model.state_dict())
    assert any("the decoder stays as it is" in warning for warning in sources.warnings)


def test_frames_of_padding_are_no_rows_of_the_output(tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "model", "wav2vec2-ctc")
    source = f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(folder, source, "automatic-speech-recognition"))
    inputs = sources.fixed(4)
    with torch.no_grad():
        output = sources.model(**inputs)
    counted = counted_rows(sources.model, output, inputs)
    assert counted is not None
    # Convolutions: a window of 10 samples every 5, then 4 of those every 4.
    frames = [((length - 10) // 5 + 1 - 4) // 4 + 1 for length in (1600, 2000, 2400, 2400)]
    assert counted.sum(1).tolist() == frames
    assert class_axis(sources.model) == -1


def test_a_mask_for_frames_in_training_may_be_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = audio_folder(tmp_path / "model", "wav2vec2")
    weights = load_file(folder / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load_sources(recipe(folder, f"wav:{recordings(tmp_path / 'wav')}", "audio-classification"))


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = audio_folder(tmp_path / "model", "wav2vec2-ctc")
    with pytest.raises(InputError, match="no weights for audio-classification"):
        load_sources(recipe(folder, f"wav:{recordings(tmp_path / 'wav')}", "audio-classification"))


def test_a_model_of_sound_without_a_head_has_no_task(tmp_path: Path) -> None:
    transformers.ASTModel(transformers.ASTConfig(**SMALL)).save_pretrained(tmp_path)
    assert task_of(str(tmp_path)) is None


@pytest.mark.parametrize("more", [{}, {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 32}])
def test_padding_gives_no_rows_of_the_blocks(tmp_path: Path, more: dict[str, Any]) -> None:
    """What the repair and the scores read of a padded batch is what transformers computes for every recording alone."""
    folder = audio_folder(tmp_path / "model", "wav2vec2-ctc", **more)
    source = f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(folder, source, "automatic-speech-recognition"))
    library = transformers.Wav2Vec2ForCTC.from_pretrained(folder, attn_implementation="eager").eval()
    layer = "wav2vec2.encoder.layers.1.feed_forward.output_dense"

    def read(model: torch.nn.Module, path: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with layer_inputs(model, [path]) as seen, torch.no_grad():
            model(**inputs)
        value: torch.Tensor = seen[path]
        return value

    inputs = sources.fixed(4)
    lengths = inputs["attention_mask"].sum(1).tolist()
    alone = [
        read(library, layer, {"input_values": values[None, :length]})[0]
        for values, length in zip(inputs["input_values"], lengths, strict=True)
    ]
    rows = input_rows(
        read(sources.model, f"model.{layer}", inputs), torch.nn.Linear(1, 1), block_inputs(sources.model, inputs), 0
    )
    assert len(set(map(len, alone))) > 1
    torch.testing.assert_close(rows, torch.cat(alone), rtol=0, atol=2e-5 * float(rows.abs().max()))

    structure = find_structure(sources.model, inputs=sources.fixed(2))
    seen = observe(sources.model, structure, Batch(inputs, np.arange(4)), 1000, torch.Generator().manual_seed(0))
    for path in (one for one in structure.observed if ".encoder." in one):
        assert [int(one.any(-1).sum()) for one in seen.rows[path]] == [len(one) for one in alone]


def test_sound_and_its_mask_are_cut_together() -> None:
    lengths: list[tuple[int, ...]] = []

    class Heard(torch.nn.Module):
        def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            lengths.append((*input_values.shape, *attention_mask.shape))
            return input_values * attention_mask

    inputs = {"input_values": torch.randn(3, 20000), "attention_mask": torch.ones(3, 20000, dtype=torch.int64)}
    short = few_rows(Heard(), inputs, rows=2)
    assert lengths == [(2, 10240, 2, 10240)] and short["attention_mask"].shape == (2, 10240)
