"""Load and check a recipe's `model` and `data` together: batches, labels, and one batch run through the model."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export.data.audio import AudioProcessor
from optin_export.data.batch_size import MOST, rows_at_once
from optin_export.data.batches import Batch, ImageProcessor, Processor, TextProcessor, batches, make_processor
from optin_export.data.fitness import check_amounts, check_metric, check_training
from optin_export.data.label_maps import LabelMaps
from optin_export.data.labels import Classes, class_indices, numbers, word_indices
from optin_export.data.readers import Examples
from optin_export.data.rows import SELF_SUPERVISED, read_data
from optin_export.data.text import PROCESSORS, answers
from optin_export.data.training import Training, split
from optin_export.data.transcripts import spoken
from optin_export.data.truncation import length_warnings
from optin_export.errors import InputError
from optin_export.models.class_names import ClassNames, names_of
from optin_export.models.loading import LoadedModel, load_model, python_function
from optin_export.models.lookup import Lookup, traced, untraced
from optin_export.models.tasks import (
    Inputs,
    TaskModel,
    as_rows,
    refuse_merging,
)
from optin_export.recipe import Recipe
from optin_export.workdir.files import sha256_file, sha256_json


@dataclass(frozen=True)
class Dataset:
    """Evaluation data: one list of batches per side (two sides for pairs that are embedded apart), and the labels.

    labels: one per row, a number or what the metric takes. classes: features per row of the model's output.
    similarity: how the two sides' embeddings are compared, by its name in sentence-transformers.
    """

    sides: tuple[tuple[Batch, ...], ...]
    labels: Sequence[Any] | np.ndarray
    metric: str
    classes: int | None = None
    similarity: str = "cosine"


#: One batch of calibration rows in CURVES, at most, is judged by the loss curves; the others are fitted.
CURVES = 3


@dataclass(frozen=True)
class Sources:
    """The model and data of a recipe, loaded and checked. notes: warnings for the user."""

    recipe: Recipe
    loaded: LoadedModel
    processor: Processor
    calibration_examples: Examples
    evaluation_examples: Examples | None
    finetune_examples: Examples | None = None
    spare_examples: Examples | None = None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> TaskModel:
        return self.loaded.model

    @cached_property
    def calibration(self) -> tuple[Batch, ...]:
        return tuple(batches(self.processor, self.calibration_examples, self.rows_at_once))

    @cached_property
    def rows_at_once(self) -> int:
        """Rows of a batch of calibration data: fewer if the graph of their backward pass would be large."""
        if self.loaded.looked_up:
            return MOST
        return rows_at_once(self.model, self.processor, self.calibration_examples)

    @cached_property
    def scoring(self) -> tuple[Batch, ...]:
        """`prune.score_samples` calibration rows, drawn under the seed, on which the units are scored."""
        return self._drawn(self.recipe.prune.score_samples)

    @cached_property
    def curves(self) -> tuple[Batch, ...]:
        """Calibration batches with about `prune.curve_samples` rows, evenly spread, on which losses are measured.

        At most a third of the batches, because the refits behind a loss curve are fitted to the other ones.
        """
        every = self.calibration
        wanted = round(self.recipe.prune.curve_samples / len(every[0].rows))
        count = max(min(wanted, len(every) // CURVES), 1)
        return tuple(every[int((place + 0.5) * len(every) / count)] for place in range(count))

    @cached_property
    def quantization(self) -> tuple[Batch, ...]:
        """`export.calibration_rows` of them, drawn in the same way, which set the scales of quantised activations."""
        return self._drawn(self.recipe.export.calibration_rows)

    def _drawn(self, count: int) -> tuple[Batch, ...]:
        count = min(count, len(self.calibration_examples))
        chosen = np.random.default_rng(self.recipe.seed).permutation(len(self.calibration_examples))[:count]
        return tuple(batches(self.processor, self.calibration_examples.take(np.sort(chosen)), self.rows_at_once))

    def training(self) -> tuple[Training, tuple[Batch, ...]]:
        """The training batches of the fine-tune (`finetune.data` or the calibration rows), and held-out batches.

        The repair has seen the calibration rows, so rows of the same source that were not drawn are better to judge on.
        """
        section = self.recipe.tuning
        assert section is not None
        examples = self.calibration_examples if self.finetune_examples is None else self.finetune_examples
        labels = np.asarray(self.labels(examples)) if section.labelled else None
        return split(self.processor, examples, labels, section.batch, self.recipe.seed, self.spare_examples)

    def evaluation(self) -> Dataset | None:
        """Encoded evaluation data in batches of the largest shipped size.

        If the accuracy decides the model's size, only the half of the rows that the search never sees.
        """
        examples = self.evaluation_examples
        if examples is None:
            return None
        return self._dataset(examples.take(self._halves(len(examples))[1]) if self._is_searched else examples)

    def selection(self) -> Dataset:
        """The other half, on which the search for the smallest model is evaluated."""
        assert self.evaluation_examples is not None
        return self._dataset(self.evaluation_examples.take(self._halves(len(self.evaluation_examples))[0]))

    @property
    def _is_searched(self) -> bool:
        return self.recipe.budget.accuracy_drop is not None

    def _halves(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(self.recipe.seed).permutation(rows)
        return np.sort(order[: rows // 2]), np.sort(order[rows // 2 :])

    def _dataset(self, examples: Examples) -> Dataset:
        section = self.recipe.data.evaluation
        assert section is not None
        size, labels = max(self.recipe.export.batch), self.labels(examples)
        sides = [Examples({**examples.columns, "label": labels})]
        if self.recipe.model.task == "feature-extraction":
            sides = _sides(examples)
        encoded = tuple(tuple(batches(self.processor, side, size, targets=True)) for side in sides)
        sentence = self.loaded.sentence
        similarity = "cosine" if sentence is None else sentence.similarity
        return Dataset(encoded, labels, section.metric, self.classes, similarity)

    def labels(self, examples: Examples) -> Sequence[Any] | np.ndarray:
        """Labels as numbers, one per row (or per word); class names are looked up among the model's class names.

        For segmentation: label maps; for question answering: the answers; zeros if targets are made from the data.
        Raises InputError for a label that fits none of these.
        """
        return self._labels(examples)[0]

    def _labels(self, examples: Examples) -> tuple[Sequence[Any] | np.ndarray, list[str]]:
        """`labels`, and notes on decisions that were inferred from the labels."""
        task = self.recipe.model.task
        if task in SELF_SUPERVISED:
            return np.zeros(len(examples)), []
        if task == "question-answering":
            return answers(examples), []
        if task == "automatic-speech-recognition":
            return spoken(examples), []
        if task == "token-classification":
            return word_indices(examples, Classes(self.classes, self.names))
        if task == "image-segmentation":
            if examples.classes is not None:
                raise InputError(
                    f"the label of {examples.where(0)} is not a label map",
                    "it is the name of a class, for the whole image",
                    "set label_folder to the folder of the label maps",
                )
            evaluation = self.recipe.data.evaluation
            ignore = None if evaluation is None else evaluation.ignore
            return LabelMaps(examples.columns["label"], ignore, getattr(self.processor, "reduces_labels", False)), []
        if self.model.output_kind != "logits":
            return numbers(examples), []
        return class_indices(examples, Classes(self.classes, self.names))

    @cached_property
    def names(self) -> ClassNames:
        """The model's class names."""
        return names_of(self.model.model, self.loaded.labels, self.classes)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the model and the data, including guesses about formats, one sentence each."""
        calibration, evaluation, finetune = self.calibration_examples, self.evaluation_examples, self.finetune_examples
        said = [*self.notes, *getattr(self.processor, "notes", ())]
        said += [note for one in (calibration, evaluation, finetune) if one is not None for note in one.notes]
        section = self.recipe.tuning
        for one in (evaluation, finetune if section is not None and section.labelled else None):
            said += [] if one is None else self._labels(one)[1]
        return tuple(dict.fromkeys(said))

    @property
    def problem(self) -> str | None:
        """problem_type of transformers' configuration, if the model has one."""
        return getattr(getattr(self.model.model, "config", None), "problem_type", None)

    def tracing(self, first: bool = False) -> AbstractContextManager[bool]:
        """Context for forward passes that are run only for their shapes; see `lookup.traced`."""
        return traced(self.model, first) if self.loaded.looked_up else contextlib.nullcontext(False)

    @cached_property
    def classes(self) -> int:
        """Features per row of the model's output."""
        with torch.no_grad(), self.tracing():
            return as_rows(self.model, self.model(**self.fixed(1)), self.fixed(1)).shape[-1]

    def fixed(self, batch: int, distinct: bool = True) -> Inputs:
        """`batch` real rows at the shipped shape (text padded to `export.sequence`), the same row if not `distinct`."""
        examples = self.calibration_examples
        rows = np.arange(batch) % len(examples) if distinct else np.zeros(batch, dtype=int)
        with untraced():
            return self.processor.encode(examples.take(rows), pad_to=self.recipe.export.sequence)

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the inputs by name, for every shipped batch size."""
        one = {name: tuple(tensor.shape[1:]) for name, tensor in self.fixed(1).items()}
        return [{name: (batch, *shape) for name, shape in one.items()} for batch in self.recipe.export.batch]

    def _code(self) -> str:
        """The code that computes with the weights, and a family of the user: files by content, a library by version."""
        family = self.recipe.model.family
        declared = "" if family is None else f"{sha256_file(Path(family))} " if Path(family).is_file() else "missing "
        return declared + self._library()

    def _library(self) -> str:
        library = self.loaded.architecture["library"]
        if library != "python":
            return f"{library} {importlib.metadata.version(library)}"
        path = Path(self.recipe.model.source.removeprefix("py:").rpartition(":")[0])
        return sha256_file(path) if path.is_file() else ""

    def _evaluation_digest(self) -> str:
        """The rows, and the file of the user's own metric."""
        section = self.recipe.data.evaluation
        if self.evaluation_examples is None or section is None:
            return ""
        path = Path(section.metric.removeprefix("py:").rpartition(":")[0])
        code = sha256_file(path) if section.metric.startswith("py:") and path.is_file() else ""
        return self.evaluation_examples.digest() + code

    def digest(self) -> dict[str, str]:
        """Content hashes of the weights and of the data, which decide whether a finished stage can be reused."""
        import hashlib

        weights = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        first = self.fixed(1)
        full = b"full length" if self.recipe.is_text and self.recipe.tokens.merges else b""
        full += f"cut at {getattr(self.processor, 'longest', None)}".encode()
        encoded = hashlib.sha256(full + b"".join(tensor.numpy().tobytes() for tensor in first.values())).hexdigest()
        return {
            "weights": weights.hexdigest(),
            "architecture": sha256_json([self.loaded.architecture, self._code()]),
            "calibration": self.calibration_examples.digest(),
            "evaluation": self._evaluation_digest(),
            "finetune": "".join(
                one.digest() for one in (self.finetune_examples, self.spare_examples) if one is not None
            ),
            "preprocessing": encoded,
        }


def load_sources(recipe: Recipe, lookup: Lookup | None = None) -> Sources:
    """Load the model and data of a recipe, and run one batch through it.

    lookup: look up the model without its weights: everything but the weights' values is still checked, as far as this
    machine's files allow; what could not be checked is added to `lookup`. Raises InputError for anything that cannot
    be read, and for calibration data that makes the model's output NaN.
    """
    loaded = load_model(recipe.model, recipe.seed, lookup)
    if lookup is not None:
        lookup.model = loaded.model
    data = read_data(recipe, lookup)
    task, evaluation = recipe.model.task, data.evaluation
    processor = make_processor(loaded, recipe, data.pairs, PROCESSORS.get(task, TextProcessor))
    if isinstance(processor, ImageProcessor | AudioProcessor):
        for one in (data.calibration, evaluation, data.finetune, data.spare):
            if one is not None:
                processor.check(one)
    rows = {"calibration": [data.calibration]}
    if evaluation is not None:
        rows["evaluation"] = _sides(evaluation) if task == "feature-extraction" else [evaluation]
    notes = (*loaded.notes, *length_warnings(processor, rows))
    return checked_sources(
        Sources(recipe, loaded, processor, data.calibration, evaluation, data.finetune, data.spare, notes), lookup
    )


def checked_sources(sources: Sources, lookup: Lookup | None = None) -> Sources:
    """The same sources, after running one batch through the model; see `load_sources`."""
    recipe, loaded, processor = sources.recipe, sources.loaded, sources.processor
    task, evaluation = recipe.model.task, sources.evaluation_examples
    if recipe.tokens.merges:
        refuse_merging(loaded.model)
    _try_one_batch(sources, lookup)
    regression = sources.model.output_kind == "regression"
    if recipe.tuning is not None:
        if recipe.tuning.labelled:
            check_training(sources.classes, regression, sources.problem)
        sources.training()
    if evaluation is not None:
        # A mismatch raises here, not after hours of work.
        assert recipe.data.evaluation is not None
        metric = recipe.data.evaluation.metric
        check_metric(metric, task, sources.classes, regression, sources.problem)
        if metric.startswith("py:"):
            python_function(metric)
        labels = sources.labels(evaluation)
        if metric in ("spearman", "pearson"):
            check_amounts(metric, labels)
        if isinstance(labels, LabelMaps):
            labels.check(classes=sources.classes)
            labels = list(evaluation.columns["label"])
        labelled = Examples({**evaluation.columns, "label": labels})
        if recipe.budget.accuracy_drop is not None and len(evaluation) < 2:
            raise InputError(
                "prune.budget.accuracy_drop needs at least two evaluation rows",
                "one half is for the search, the other for the measurement",
                "give more evaluation data",
            )
        first = labelled.take([0])
        processor.targets(first, processor.encode(first))
        if task == "question-answering":
            processor.order(evaluation)  # a question may be too long for any context
    return sources


def _sides(examples: Examples) -> list[Examples]:
    """The two sides of text pairs that are compared, each side separately."""
    return [Examples({"text": examples.columns[name]}) for name in ("text", "text_pair")]


def _try_one_batch(sources: Sources, lookup: Lookup | None) -> None:
    inputs = sources.fixed(1)
    with sources.tracing() as shapes_alone, torch.no_grad():
        try:
            output = sources.model(**inputs)
            if sources.recipe.is_text:  # a decoder that looks for each row's last token may take one row only
                sources.model(**sources.fixed(2))
        except InputError:
            raise
        except Exception as error:  # a library's checks and the user's own code may raise anything
            if shapes_alone and lookup is not None:  # it may need values that are not there
                lookup.note(f"whether the model runs on the data: it cannot be traced ({type(error).__name__})")
                return
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            raise InputError(
                f"the model does not run on the calibration data ({shapes})",
                f"{type(error).__name__}: {error}"[:300],
                "check model.task, model.args and model.preprocess",
            ) from error
    layout = sources.model.output_layout
    dims = {"vector": 2, "tokens": 3, "spans": 3, "map": 4}[layout]
    if not isinstance(output, torch.Tensor) or output.dim() != dims or len(output) != 1:
        given = f"{list(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"the model's output is not one {layout} per row", f"for one row it gives {given}", "check model.task"
        )
    if lookup is not None:
        return  # no weights, no values
    finite = torch.isfinite(output).all() and all(
        torch.isfinite(t).all() for t in inputs.values() if t.is_floating_point()
    )
    if not finite:
        raise InputError(
            "the model's output is not finite",
            "weights and data are finite, so its arithmetic overflows",
            "check the scale of the data and model.preprocess",
        )
    with torch.no_grad():
        again = sources.model(**inputs)
    if not torch.equal(output, again) and float((output - again).abs().max()) > 1e-3 * float(output.abs().max()):
        raise InputError(
            "the model's output is random",
            "two passes over the same row give different outputs",
            "switch off what draws random numbers at inference (a random mask, functional dropout, noise)",
        )
