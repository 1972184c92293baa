"""Transcripts of a CTC model: what transformers hears in every recording alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torchmetrics.functional.text import word_error_rate

from optin_export.data import Sources, load_sources
from optin_export.data.readers import load_examples
from optin_export.data.transcripts import spoken
from optin_export.errors import InputError
from optin_export.measure import METRICS, predict
from optin_export.measure.chance import chance
from optin_export.measure.transcripts import words
from optin_export.models import as_function
from optin_export.recipe import DataSource, validate
from tests.models.audio_folders import RATE, audio_folder, noise, recordings

LENGTHS = (1600, 400, 1200, 900)
TEXTS = ("ab c", "c a", "d d ba", "a")


def save_tokenizer(folder: Path, kind: str) -> None:
    if kind == "whisper":
        texts = [first + second for first in "abcdefg" for second in "abcdefg"]
        known = {text: index for index, text in enumerate(("<pad>", "<s>", "</s>", *texts[:47]))}
        inner = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
        return
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<unk>", "|", *"abcdefghi"))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", bos_token=None, eos_token=None).save_pretrained(folder)


def sources_of(place: Path, kind: str, metric: str = "wer", **model: Any) -> Sources:
    folder = audio_folder(place / "model", kind)
    save_tokenizer(folder, kind)
    sound = recordings(place / "wav", LENGTHS)
    rows = [f"wav/{'ab'[row % 2]}/{row}.wav,{text}" for row, text in enumerate(TEXTS)]
    (place / "rows.csv").write_text("\n".join(["audio,label", *rows]) + "\n", encoding="utf-8")
    raw = {
        "recipe": 1,
        "name": "speech",
        "model": {"source": str(folder), "task": "automatic-speech-recognition", **model},
        "data": {
            "calibration": {"source": f"wav:{sound}"},
            "evaluation": {"source": f"csv:{place / 'rows.csv'}", "metric": metric},
        },
        "prune": {"budget": {"macs": 0.6}},
        "export": {"batch": [3]},
    }
    return load_sources(validate(raw, place))


def test_the_rate_is_that_of_transformers_on_recordings_alone(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, "wav2vec2-ctc")
    folder = tmp_path / "model"
    library = transformers.Wav2Vec2ForCTC.from_pretrained(folder, attn_implementation="eager").eval()
    processor = transformers.Wav2Vec2Processor.from_pretrained(folder)
    heard = []
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            encoded = processor(noise(length, row), sampling_rate=RATE, return_tensors="pt")
            heard += processor.batch_decode(library(**encoded).logits.argmax(-1))
    assert len(set(heard)) == 4 and all(heard)
    data = sources.evaluation()
    assert data is not None
    statistics = predict(as_function(sources.model), data)
    plain = [" ".join(words(one)) for one in heard]  # the tokenizer also writes <unk>
    assert METRICS["wer"].value(statistics) == pytest.approx(100 * float(word_error_rate(plain, list(TEXTS))))
    assert statistics[:, 1].tolist() == [2, 2, 3, 1]
    assert chance("wer", statistics, data.labels, sources.classes).points == 100.0


def test_an_encoder_is_heard_by_its_own_decoder(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, "whisper")
    folder = tmp_path / "model"
    library = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    prepare = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    features = [
        prepare(noise(length, row), sampling_rate=RATE, return_tensors="pt") for row, length in enumerate(LENGTHS)
    ]
    with torch.no_grad():
        heard = [tokenizer.decode(library.generate(**one)[0], skip_special_tokens=True) for one in features]
    assert any(map(words, heard))
    data = sources.evaluation()
    assert data is not None
    plain = [" ".join(words(one)) for one in heard]
    rate = METRICS["wer"].value(predict(as_function(sources.model), data))
    assert rate == pytest.approx(100 * float(word_error_rate(plain, list(TEXTS))))


def test_a_decoder_of_other_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        sources_of(tmp_path, "whisper", weights="random")
    assert "the decoder that was trained with it" in error.value.why


def test_a_class_folder_is_no_text(tmp_path: Path) -> None:
    examples = load_examples(DataSource(source=f"wav:{recordings(tmp_path)}"), ("audio", "label"), 0)
    with pytest.raises(InputError, match="is not a text"):
        spoken(examples)


def test_other_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wer"):
        sources_of(tmp_path, "wav2vec2-ctc", "accuracy")
    assert np.isfinite(METRICS["wer"].value(np.array([[1.0, 2.0]])))
