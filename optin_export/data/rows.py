"""Read the rows that a recipe names, for calibration, evaluation and training."""

from __future__ import annotations

from dataclasses import dataclass

from optin_export.data.readers import HUB, Examples, load_examples, require_datasets, spare_examples, stand_ins
from optin_export.data.training import MOST_HELD_OUT
from optin_export.errors import InputError
from optin_export.models.loading import python_function
from optin_export.models.lookup import Lookup
from optin_export.models.tasks import AUDIO_TASKS
from optin_export.recipe import Recipe

#: Columns of a row for each task of text; columns of pairs and labels are added.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text-classification": ("text",),
    "feature-extraction": ("text",),
    "token-classification": ("tokens",),
    "question-answering": ("question", "context"),
    "fill-mask": ("text",),
    "text-generation": ("text",),
}
#: The column of a row for each task of sound; that of all others is an image.
AUDIO = dict.fromkeys(AUDIO_TASKS, ("audio",))
#: Tasks whose labels are made from the data.
SELF_SUPERVISED = ("fill-mask", "text-generation")


@dataclass(frozen=True)
class Data:
    """The rows that a recipe names. pairs: whether two texts are one row of the model's input."""

    calibration: Examples
    evaluation: Examples | None
    finetune: Examples | None
    spare: Examples | None
    pairs: bool


def read_data(recipe: Recipe, lookup: Lookup | None = None) -> Data:
    """The rows that a recipe names, drawn under its seed. Raises InputError for unreadable or missing data.

    lookup: download nothing; stand-ins replace rows of hub data sets, and evaluation rows are left out.
    """
    data, task = recipe.data, recipe.model.task
    pairs = task in ("text-classification", "feature-extraction") and "text_pair" in data.calibration.columns
    classify_pairs = task == "text-classification" and pairs
    needs = ("text", "text_pair") if pairs else {**COLUMNS, **AUDIO}.get(task, ("image",))
    apart = pairs and not classify_pairs  # embedded separately: each sentence is a row
    elsewhere = {
        one.source for one in (data.calibration, data.evaluation) if lookup and one and one.source.startswith(HUB)
    }
    for source in sorted(elsewhere):
        require_datasets(source)
        assert lookup is not None
        lookup.note(f"the rows of {source}: a run downloads or reads them")
    if data.calibration.source in elsewhere:
        calibration = stand_ins(needs)
    else:
        calibration = load_examples(data.calibration, needs, recipe.seed)
    evaluation = None
    if data.evaluation is not None:
        if task == "text-classification" and pairs != ("text_pair" in data.evaluation.columns):
            raise InputError(
                "calibration and evaluation differ in kind",
                "columns.text_pair is set in one of them only",
                "set columns.text_pair in both, or in neither",
            )
        sides = ("text", "text_pair") if task == "feature-extraction" or classify_pairs else needs
        label = () if task in SELF_SUPERVISED else ("label",)
        if data.evaluation.source not in elsewhere:
            evaluation = load_examples(data.evaluation, (*sides, *label), recipe.seed)
    tuned = _finetune_examples(recipe, needs, lookup)
    finetune, spare = (None if one is None else _texts_apart(one, apart) for one in tuned)
    is_pair = classify_pairs or task == "question-answering"
    return Data(_texts_apart(calibration, apart), evaluation, finetune, spare, is_pair)


def _texts_apart(examples: Examples, apart: bool) -> Examples:
    columns = examples.columns
    return Examples({"text": [*columns["text"], *columns["text_pair"]]}) if apart else examples


def _finetune_examples(
    recipe: Recipe, needs: tuple[str, ...], lookup: Lookup | None
) -> tuple[Examples | None, Examples | None]:
    """Rows of `finetune.data`; without it, rows of the calibration source that were not drawn."""
    section = recipe.tuning
    if section is not None and section.source is not None:
        python_function(section.source)  # a function that cannot be called raises here, not after hours of work
    if section is None:
        return None, None
    if lookup is not None and (section.data or recipe.data.calibration).source.startswith(HUB):
        return None, None
    if section.data is None:
        return None, spare_examples(recipe.data.calibration, needs, recipe.seed, MOST_HELD_OUT)
    return load_examples(section.data, (*needs, "label") if section.labelled else needs, recipe.seed), None
