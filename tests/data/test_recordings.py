"""Recordings as rows: files and arrays, rates, channels and lengths, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers

from optin_export.data import load_sources
from optin_export.data.audio import AudioProcessor
from optin_export.data.readers import Examples, load_examples
from optin_export.data.recordings import header_of, samples_of
from optin_export.errors import InputError
from optin_export.recipe import DataSource
from tests.models.audio_folders import RATE, WHISPER, audio_folder, noise, recordings
from tests.models.test_audio import recipe


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def wav2vec2(**more: Any) -> Any:
    return transformers.Wav2Vec2FeatureExtractor(**{"return_attention_mask": True, "do_normalize": False, **more})


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"one.{kind}"
    soundfile.write(path, noise(500, 1), RATE, subtype="PCM_16")
    np.testing.assert_array_equal(samples_of(path, RATE), noise(500, 1))


def test_another_rate_is_resampled_without_aliases(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "low.wav", tone(8000), 8000, subtype="FLOAT")
    found = samples_of(tmp_path / "low.wav", RATE)
    assert len(found) == RATE // 2 == header_of(tmp_path / "low.wav", RATE).at(RATE)
    np.testing.assert_allclose(found[200:-200], tone(RATE)[200:-200], atol=2e-3)
    soundfile.write(tmp_path / "high.wav", tone(44100, frequency=15000.0), 44100, subtype="FLOAT")
    assert np.abs(samples_of(tmp_path / "high.wav", RATE)[200:-200]).max() < 0.01  # above 8 kHz


def test_several_channels_are_averaged(tmp_path: Path) -> None:
    both = noise(300, 2, channels=2)
    soundfile.write(tmp_path / "stereo.wav", both, RATE, subtype="PCM_16")
    np.testing.assert_allclose(samples_of(tmp_path / "stereo.wav", RATE), both.mean(1), atol=1e-7)


def test_arrays_are_at_the_models_rate_or_name_their_own() -> None:
    np.testing.assert_array_equal(samples_of(noise(100, 0), RATE), noise(100, 0))
    given = {"array": tone(8000).astype(np.float64), "sampling_rate": 8000}
    np.testing.assert_allclose(samples_of(given, RATE)[200:-200], tone(RATE)[200:-200], atol=2e-3)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.zeros(10, np.int16), "int16"),
        (np.zeros((2, 3, 4), np.float32), "float32 [2, 3, 4]"),
        (b"RIFF", "a bytes"),
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros(3601 * 10, np.float32), "longer than 3600 seconds"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(value: Any, why: str) -> None:
    with pytest.raises(InputError) as error:
        samples_of(value, 10)
    assert why in error.value.why


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound at all")
    with pytest.raises(InputError, match=r"bad\.wav"):
        header_of(tmp_path / "bad.wav", RATE)


def test_a_folder_gives_files_and_their_classes(tmp_path: Path) -> None:
    found = load_examples(DataSource(source=f"wav:{recordings(tmp_path)}"), ("audio", "label"), 0)
    assert [str(path.relative_to(tmp_path)) for path in found.columns["audio"]] == [
        "a/0.wav", "a/2.wav", "b/1.wav", "b/3.wav"
    ]  # fmt: skip
    assert (list(found.columns["label"]), found.classes) == (["a", "a", "b", "b"], ("a", "b"))
    with pytest.raises(InputError, match="no recordings in"):
        load_examples(DataSource(source=f"wav:{tmp_path / 'nowhere'}"), ("audio",), 0)


def test_a_table_names_files_relative_to_itself(tmp_path: Path) -> None:
    recordings(tmp_path / "sound")
    (tmp_path / "rows.csv").write_text("audio,label\nsound/a/0.wav,x\nsound/b/1.wav,y\n", encoding="utf-8")
    found = load_examples(DataSource(source=f"csv:{tmp_path / 'rows.csv'}"), ("audio", "label"), 0)
    np.testing.assert_array_equal(samples_of(found.columns["audio"][1], RATE), noise(2400, 1))


def test_rows_are_padded_and_cut_to_one_length() -> None:
    examples = Examples({"audio": [noise(50, 0), noise(80, 1)]})
    processor = AudioProcessor(wav2vec2(), 60)
    processor.check(examples)
    inputs = processor.encode(examples)
    np.testing.assert_array_equal(inputs["input_values"][0], np.pad(noise(50, 0), (0, 10)))
    np.testing.assert_array_equal(inputs["input_values"][1], noise(80, 1)[:60])
    assert inputs["attention_mask"].sum(1).tolist() == [50, 60]
    assert processor.notes == ("1 recordings are longer than 0.00375 s and are cut",)


def test_padding_without_a_mask_is_reported() -> None:
    processor = AudioProcessor(wav2vec2(return_attention_mask=False))
    processor.check(Examples({"audio": [noise(50, 0), noise(80, 1)]}))
    assert processor.samples == 80
    assert processor.notes[0].startswith("1 recordings are shorter than 0.005 s and padded")


def test_a_fixed_length_is_the_extractors(tmp_path: Path) -> None:
    folder, source = audio_folder(tmp_path / "model", "whisper"), f"wav:{recordings(tmp_path / 'wav', (40000, 800))}"
    sources = load_sources(recipe(folder, source, "automatic-speech-recognition"))
    assert [tuple(tensor.shape) for tensor in sources.fixed(2).values()] == [(2, 16, 100)]
    assert "1 recordings are longer than 1 s and are cut" in sources.warnings
    with pytest.raises(InputError, match=r"export\.seconds is 2"):
        load_sources(recipe(folder, source, "automatic-speech-recognition", export={"seconds": 2}))


def test_seconds_set_the_length_of_raw_samples(tmp_path: Path) -> None:
    folder, source = audio_folder(tmp_path / "model", "wav2vec2"), f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(folder, source, "audio-classification", export={"seconds": 0.125}))
    assert sources.fixed(1)["input_values"].shape == (1, 2000)


def test_a_model_without_a_feature_extractor_is_refused(tmp_path: Path) -> None:
    folder, source = audio_folder(tmp_path / "model", "ast"), f"wav:{recordings(tmp_path / 'wav')}"
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="no usable feature extractor"):
        load_sources(recipe(folder, source, "audio-classification"))


def test_an_architecture_without_a_checkpoint_has_its_classs_extractor(tmp_path: Path) -> None:
    fields = {**WHISPER, "max_source_positions": 1500}
    model = {"source": "hf:model_type=whisper", "weights": "random", "args": fields}
    source = f"wav:{recordings(tmp_path / 'wav')}"
    sources = load_sources(recipe(tmp_path, source, "automatic-speech-recognition", model=model))
    assert sources.fixed(1)["input_features"].shape == (1, 16, 3000)


def test_the_server_cannot_prepare_recordings(tmp_path: Path) -> None:
    folder, source = audio_folder(tmp_path / "model", "ast"), f"wav:{recordings(tmp_path / 'wav')}"
    with pytest.raises(InputError, match="cannot preprocess audio"):
        load_sources(recipe(folder, source, "audio-classification", ship={"triton": True, "ensemble": True}))


def test_an_extractor_that_pads_to_the_longest_row_is_refused(tmp_path: Path) -> None:
    folder, source = audio_folder(tmp_path / "model", "whisper-classes"), f"wav:{recordings(tmp_path / 'wav')}"
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
    with pytest.raises(InputError, match="a SeamlessM4TFeatureExtractor cannot be used"):
        load_sources(recipe(folder, source, "audio-classification"))
