"""Prepare recordings as a model's input, by the feature extractor that comes with the model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from optin_export.data.readers import Examples
from optin_export.data.recordings import header_of, samples_of
from optin_export.data.transcripts import Listener, make_listener, transcripts
from optin_export.errors import InputError
from optin_export.models.loading import LoadedModel
from optin_export.models.tasks import Inputs
from optin_export.recipe import Recipe


class AudioProcessor:
    """Prepares recordings as float32 `input_values` or `input_features`, all rows with one shape.

    A feature extractor with a fixed length (Whisper, AST) is called as it is. One that passes raw samples on
    (wav2vec2, HuBERT) pads and cuts every row to `samples`; with its own attention mask, if it returns one.

    extractor: a feature extractor of transformers. samples: length of a row, for raw samples; None: as long as the
    longest recording of the first `check`. listener: makes the targets of transcripts.
    """

    def __init__(self, extractor: Any, samples: int | None = None, listener: Listener | None = None) -> None:
        self.extractor, self.rate, self.listener = extractor, int(extractor.sampling_rate), listener
        self.name = str(extractor.model_input_names[0])
        self.raw = _takes_length(extractor)
        self.samples = samples if self.raw else _window(extractor)
        self._read: dict[str, set[str]] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """How recordings were changed beyond what the model's feature extractor does, one sentence each."""
        said = {
            "rate": f"recordings were resampled to the model's {self.rate} Hz",
            "channels": "recordings have several channels: the model takes their mean",
            "longer": f"recordings are longer than {self._seconds} and are cut",
            "shorter": f"recordings are shorter than {self._seconds} and padded with zeros, and the model reads no "
            "mask: what it outputs for them depends on export.seconds",
        }
        return tuple(f"{len(found)} {said[kind]}" for kind, found in self._read.items() if found)

    @property
    def _seconds(self) -> str:
        return f"{(self.samples or 0) / self.rate:.4g} s"

    def check(self, examples: Examples) -> None:
        """Read the header of every recording; raises InputError for one that cannot be read."""
        headers = [header_of(one, self.rate) for one in examples.columns["audio"]]
        if self.samples is None:
            self.samples = max(one.at(self.rate) for one in headers)
        masked = not self.raw or bool(getattr(self.extractor, "return_attention_mask", False))
        for row, one in enumerate(headers):
            length = one.at(self.rate)
            kinds = {
                "rate": one.rate != self.rate,
                "channels": one.channels > 1,
                "longer": length > self.samples,
                "shorter": length < self.samples and not masked,
            }
            for kind, holds in kinds.items():
                self._read.setdefault(kind, set()).update({examples.where(row)} if holds else ())

    def order(self, examples: Examples) -> np.ndarray:
        return np.arange(len(examples))

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        return None if self.listener is None else transcripts(self.listener, examples, inputs)

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        rows = [samples_of(one, self.rate) for one in examples.columns["audio"]]
        length = {"padding": "max_length", "max_length": self.samples, "truncation": True} if self.raw else {}
        try:
            encoded = self.extractor(rows, sampling_rate=self.rate, return_tensors="pt", **length)
            found = {self.name: torch.as_tensor(encoded[self.name]).float().contiguous()}
        except Exception as error:  # a library's code on the user's data may raise anything
            raise InputError(
                f"the {type(self.extractor).__name__} cannot encode the recordings",
                f"{type(error).__name__}: {error}"[:300],
                "check preprocessor_config.json of the model, and export.seconds",
            ) from error
        if self.raw and "attention_mask" in encoded:
            found["attention_mask"] = torch.as_tensor(encoded["attention_mask"]).to(torch.int64)
        return found


def make_audio_processor(loaded: LoadedModel, recipe: Recipe) -> AudioProcessor:
    """The processor around the model's own feature extractor.

    Raises InputError if the model has no feature extractor, if its inputs have no fixed length, or if the recipe asks
    for something that the extractor does not support.
    """
    if recipe.ship.ensemble:
        raise InputError(
            "ship.ensemble cannot preprocess audio",
            "the server has no feature extractor",
            "set ship.ensemble: false, and send what the feature extractor gives",
        )
    extractor = _extractor(loaded, recipe)
    kind, seconds = type(extractor).__name__, recipe.export.seconds
    takes_length, window = _takes_length(extractor), _window(extractor)
    if not takes_length and window is None:
        raise InputError(
            f"a {kind} cannot be used",
            "it has no fixed length and does not pass raw samples on, so an engine would have no fixed shape",
            "use a model whose feature extractor is that of Whisper, AST, wav2vec2 or HuBERT",
        )
    if seconds is not None and not takes_length:
        raise InputError(
            f"export.seconds is {seconds:g}",
            f"the {kind} has its own length, {(window or 0) / extractor.sampling_rate:g} s",
            "leave export.seconds out",
        )
    samples = None if seconds is None else max(1, round(seconds * extractor.sampling_rate))
    return AudioProcessor(extractor, samples, make_listener(loaded, recipe))


def _extractor(loaded: LoadedModel, recipe: Recipe) -> Any:
    """The feature extractor of the model's folder; for an architecture without a checkpoint, its class's default."""
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    config = getattr(loaded.model.model, "config", None)
    try:
        if loaded.origin is not None:
            trust = recipe.model.trust_remote_code
            return transformers.AutoFeatureExtractor.from_pretrained(loaded.origin, trust_remote_code=trust)
        bands = getattr(config, "num_mel_bins", None)
        mapping: Any = FEATURE_EXTRACTOR_MAPPING
        made = mapping[type(config)]
        return made(**({} if bands is None or made.__name__ != "WhisperFeatureExtractor" else {"feature_size": bands}))
    except Exception as error:  # transformers raises many types; the message names the cause
        raise InputError(
            f"{recipe.model.source} has no usable feature extractor",
            f"{type(error).__name__}: {(str(error).strip() or 'none').splitlines()[0]}"[:300],
            "put the preprocessor_config.json of its feature extractor into the model's folder",
        ) from error


def _takes_length(extractor: Any) -> bool:
    """Whether it passes raw samples on, padded and cut to any length."""
    padding = inspect.signature(type(extractor).__call__).parameters.get("padding")
    return extractor.model_input_names[0] == "input_values" and padding is not None


def _window(extractor: Any) -> int | None:
    """Number of samples of the fixed length that a feature extractor pads and cuts to by itself; None without one."""
    padding = inspect.signature(type(extractor).__call__).parameters.get("padding")
    if padding is not None and padding.default == "max_length" and hasattr(extractor, "n_samples"):
        return int(extractor.n_samples)
    frames = getattr(extractor, "max_length", None)
    if padding is None and isinstance(frames, int) and extractor.model_input_names[0] == "input_values":
        return frames * extractor.sampling_rate // 100  # frames of 10 ms
    return None
