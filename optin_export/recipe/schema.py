"""The fields of a recipe, version 1, as frozen pydantic models that reject unknown fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    Field,
    JsonValue,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from optin_export.recipe.alignment import Alignment, alignment_of
from optin_export.recipe.budget import Budget
from optin_export.recipe.delivery import ShipSection, Target
from optin_export.recipe.export import ExportSection
from optin_export.recipe.fields import (
    Column,
    Count,
    Number,
    Pattern,
    Positive,
    Section,
)
from optin_export.recipe.gates import Gates
from optin_export.recipe.measurement import MeasureSection
from optin_export.recipe.model import ModelSection
from optin_export.recipe.prune import PruneSection
from optin_export.recipe.tasks import LABELLED, METRICS, OWN_METRIC, TEXT_TASKS, Metric
from optin_export.recipe.tokens import TokensSection


class DataSource(Section):
    source: str = Field(
        description="where the rows are: 'csv:', 'tsv:', 'npz:', 'images:', 'wav:', 'hf-dataset:' or "
        "'py:FILE.py:FUNCTION'",
        examples=["csv:train.csv"],
    )
    columns: dict[Literal["text", "text_pair", "tokens", "question", "context", "image", "audio", "label"], Column] = (
        Field(
            default_factory=dict,
            description="maps our names (text, label, ...) to your columns: by header name, or by index from 0; "
            "default: columns with exactly these names",
            examples=[{"text": "sentence", "label": 1}],
        )
    )
    header: bool | None = Field(
        None, description="whether the first line holds column names; default: guessed from `columns` and that line"
    )
    split: str = Field("train", description="split of an hf-dataset")
    label_pattern: Pattern | None = Field(
        None,
        description="for 'images:' and 'wav:': regular expression; group 1 of a file name is its class; default: one "
        "folder per class; both are matched with the model's class names",
        examples=["^([a-z]+)_"],
    )
    label_folder: str | None = Field(
        None,
        description="for 'images:': folder with the label maps, with the same file names as the images",
        examples=["masks"],
    )
    samples: Count | None = Field(None, description="number of rows, drawn at random with the seed; default: all")


#: Label of what is not evaluated: padding, special tokens, unlabelled pixels.
IGNORED = -100


def _own_or_known(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and re.match(OWN_METRIC, value) else known(value)


_AnyMetric = Annotated[
    Metric,
    WrapValidator(_own_or_known),
    WithJsonSchema(
        {"anyOf": [{"enum": list(get_args(Metric)), "type": "string"}, {"pattern": OWN_METRIC, "type": "string"}]}
    ),
]


class Evaluation(DataSource):
    split: str = Field("test", description="split of an hf-dataset")
    metric: _AnyMetric = Field(
        description="metric of the accuracy; points are 100 times the metric (perplexity: unchanged). "
        "py:FILE.py:FUNCTION names your own: it takes all outputs ([rows, ...]) and labels, and returns points, of "
        "which more is better"
    )
    ignore: Annotated[int, Field(ge=0), Number] = Field(
        255, description="label maps: value of the pixels that are not evaluated"
    )


class DataSection(Section):
    calibration: DataSource = Field(description="unlabelled rows for scoring and repair")
    evaluation: Evaluation | None = Field(
        None, description="held-out, labelled rows; without them no accuracy is measured"
    )


class FinetuneSection(Section):
    """A short fine-tune after the repair. Without this section no weight is trained."""

    source: str | None = Field(
        None,
        description="'py:FILE.py:FUNCTION' (dense model, unpruned model, batches) -> dense model; default: AdamW",
        examples=["py:tune.py:tune"],
    )
    loss: Literal["distill", "labels"] | None = Field(
        None,
        description="distill: match the unpruned model, without labels; labels: the task's loss; default: labels if "
        "`data` is given, else distill",
    )
    data: DataSource | None = Field(None, description="training rows; default: the calibration data")
    steps: Count = Field(200, description="number of AdamW steps, with warm-up and cosine decay")
    learning_rate: Positive | Literal["auto"] = Field(
        1e-4,
        description="learning rate of AdamW at the end of the warm-up; auto: the best of a few on held-out rows, each "
        "tried for a tenth of the steps",
    )
    batch: Count = Field(32, description="rows per step")
    flips: bool = Field(
        True, description="distill, images: mirror each image with probability 1/2, for both models alike"
    )

    @model_validator(mode="after")
    def _has_labels(self) -> FinetuneSection:
        if self.loss == "labels" and self.data is None:
            raise ValueError("loss: labels needs data with labels; calibration data has none")
        return self

    @property
    def labelled(self) -> bool:
        return self.loss == "labels" or (self.loss is None and self.data is not None)


class Recipe(Section):
    """A whole run. Field names are a contract: fields are added, never renamed."""

    recipe: Annotated[Literal[1], Number] = Field(description="version of the recipe format")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="name of the run folder and of the model on the server", examples=["my-model"]
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), Number] = Field(
        0, description="random seed for sampling, probes and bootstrap"
    )
    model: ModelSection = Field(description="the trained model and its task")
    data: DataSection = Field(description="calibration rows and evaluation rows")
    prune: PruneSection = Field(description="what is removed, how much, and by which score")
    tokens: TokensSection = Field(TokensSection(), description="token merging inside the model")
    finetune: FinetuneSection | None = Field(None, description="a short fine-tune after the repair; off by default")
    export: ExportSection = Field(ExportSection(), description="precision and shapes of the ONNX graphs")
    targets: tuple[Target, ...] = Field(
        (Target(),),
        min_length=1,
        description="the engines that are built and measured; the accuracy gate uses the first one",
        examples=[[{"engine": "onnxruntime", "device": "cpu", "threads": 1}]],
    )
    measure: MeasureSection = Field(MeasureSection(), description="how long latency is measured")
    gates: Gates = Field(Gates(), description="limits for the result; if one is missed, nothing ships")
    ship: ShipSection = Field(
        ShipSection(), description="the Triton model repository, written after every gate has passed"
    )
    sweep: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="{dotted field: its values}: one run per combination; the runs share scores and are compared",
        examples=[{"prune.budget.macs": [0.7, 0.5]}],
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.gates.accuracy_drop is not None and self.data.evaluation is None:
            raise ValueError("gates.accuracy_drop needs data.evaluation to measure it on")
        if self.prune.gauss_newton is True and self.prune.compensate is not True:
            raise ValueError("prune.gauss_newton starts from the least-squares repair: it needs prune.compensate: true")
        if self.prune.budget.accuracy_drop is not None and self.data.evaluation is None:
            raise ValueError("prune.budget.accuracy_drop needs data.evaluation to measure it on")
        if self.tokens.keep == "auto" and self.prune.budget.macs is None:
            # Its search compares schedules of equal MACs; equal latency would need a table for every one of them.
            raise ValueError("tokens.keep: auto needs a budget of MACs: set prune.budget.macs")
        if self.model.family is not None and self.tokens.merges:
            raise ValueError("tokens are merged in known families only: remove model.family, or set tokens.keep: 1.0")
        self._check_latency_budget()
        if self.model.pooling is not None and self.model.task != "feature-extraction":
            raise ValueError("model.pooling is only for the task feature-extraction")
        zero_shot = self.model.task == "zero-shot-image-classification"
        if zero_shot != (self.model.classes is not None) or (self.model.prompt is not None and not zero_shot):
            raise ValueError(
                "model.classes is needed by the task zero-shot-image-classification"
                if zero_shot
                else "model.classes and model.prompt are only for the task zero-shot-image-classification"
            )
        evaluation, known = self.data.evaluation, METRICS[self.model.task]
        if evaluation is not None and not known:
            raise ValueError(f"data.evaluation: there is no metric for {self.model.task}")
        if evaluation is not None and evaluation.metric not in known and not re.match(OWN_METRIC, evaluation.metric):
            raise ValueError(f"data.evaluation.metric for {self.model.task} is {' or '.join(known)}")
        if self.finetune is not None and self.finetune.labelled and self.model.task not in LABELLED:
            raise ValueError(f"finetune.loss: labels is for {', '.join(LABELLED)}; use distill")
        if len({target.name for target in self.targets}) != len(self.targets):
            raise ValueError("targets: two entries are the same")
        if sum(target.engine == "auto" for target in self.targets) > 1:
            raise ValueError("targets: only one can have engine: auto")
        if self.prune.budget.kind == "latency" and self.budget_target.engine == "auto":
            raise ValueError("prune.budget.target: the search measures on one engine: name it instead of auto")
        if self.prune.budget.kind == "latency" and self.budget_target.resources:
            raise ValueError("prune.budget.target: the search measures on this machine, but that target has resources")
        for target in self.targets:
            reason = self.export.cannot(target.engine, target.device)
            if reason is not None:
                raise ValueError(f"export.precision: {self.export.precision} on the target {target.name}: {reason}")
        self.ship.check_backend(self.targets, self.export.precision)
        if len(set(self.export.batch)) != len(self.export.batch):
            raise ValueError("export.batch: the same batch size occurs twice")
        return self

    def _check_latency_budget(self) -> None:
        """Check that the target and the batch size of a latency budget are in this recipe."""
        budget, names = self.prune.budget, [target.name for target in self.targets]
        if budget.target is not None and budget.target not in names:
            raise ValueError(f"prune.budget.target: no target is named '{budget.target}'; there is {', '.join(names)}")
        if budget.batch is not None and budget.batch not in self.export.batch:
            shipped = ", ".join(map(str, self.export.batch))
            raise ValueError(
                f"prune.budget.batch: batch size {budget.batch} is not shipped; export.batch has {shipped}"
            )

    @property
    def tuning(self) -> FinetuneSection | None:
        """The fine-tune after the repair, or that of `prune.repair`; None if no weight is trained."""
        if self.finetune is None and self.prune.repair != "closed-form":
            return FinetuneSection(learning_rate="auto")
        return self.finetune

    @property
    def narrows(self) -> bool:
        """Whether queries and keys may lose dimensions.

        By default not for a GPU: TensorRT's fused attention, for one, wants them as wide as the values. Nor for texts,
        where they hardly change what is lost (docs/results.md, trained models of real size).
        """
        by_default = not self.is_text and all(target.device == "cpu" for target in self.targets)
        return self.prune.narrows and (self.prune.lists_dimensions or by_default)

    @property
    def searches_by_building(self) -> bool:
        """Whether the search builds a model for each of several budgets, of units or of tokens."""
        return self.prune.budget.accuracy_drop is not None or self.tokens.keep == "auto"

    @property
    def budget(self) -> Budget:
        """prune.budget with its defaults for target and batch size filled in."""
        budget = self.prune.budget
        if budget.kind != "latency":
            return budget
        defaults = {"target": budget.target or self.targets[0].name, "batch": budget.batch or self.export.batch[0]}
        return budget.model_copy(update=defaults)

    @property
    def budget_target(self) -> Target:
        """The target on which a latency budget is measured."""
        return next(target for target in self.targets if target.name == self.budget.target)

    @property
    def alignment(self) -> Alignment:
        """prune.align, for this recipe's targets and precision."""
        return alignment_of(self.prune.align, self.export.precision, self.targets)

    @property
    def here(self) -> tuple[Target, ...]:
        """Targets that are measured on this machine."""
        return tuple(target for target in self.targets if not target.resources)

    @property
    def fleet(self) -> tuple[Target, ...]:
        """Targets that are measured on cluster nodes with their resources."""
        return tuple(target for target in self.targets if target.resources)

    @property
    def is_text(self) -> bool:
        return self.model.task in TEXT_TASKS

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
