"""The fields of a recipe, version 1, as pydantic models: frozen, and nothing unknown is accepted."""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import (
    Field,
    JsonValue,
    model_validator,
)

from optin_export.recipe.budget import Budget
from optin_export.recipe.delivery import ShipSection, Target
from optin_export.recipe.export import ExportSection
from optin_export.recipe.fields import (
    ClassNames,
    Column,
    Count,
    Fraction,
    Number,
    Pattern,
    Place,
    Pooling,
    Positive,
    Prompts,
    Section,
    TextKeys,
)
from optin_export.recipe.gates import Gates

Task = Literal[
    "text-classification",
    "feature-extraction",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "image-classification",
    "image-feature-extraction",
    "zero-shot-image-classification",
    "image-segmentation",
]
Metric = Literal["accuracy", "f1", "spearman", "pearson", "squad_f1", "exact_match", "perplexity", "mean_iou"]
_TEXT_TASKS = (
    "text-classification",
    "feature-extraction",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
)
#: Tasks whose labels the built-in fine-tune can train on: one class, or one number, per row.
_LABELLED = ("text-classification", "image-classification", "zero-shot-image-classification")
METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": ("accuracy", "f1", "spearman", "pearson"),  # the correlations for models of one output
    "feature-extraction": ("spearman", "pearson"),
    "token-classification": ("accuracy", "f1"),
    "question-answering": ("squad_f1", "exact_match"),
    "fill-mask": ("accuracy", "perplexity"),
    "text-generation": ("accuracy", "perplexity"),
    "image-classification": ("accuracy",),
    "image-feature-extraction": (),
    "zero-shot-image-classification": ("accuracy",),
    "image-segmentation": ("mean_iou",),
}


class Preprocess(Section):
    """Image preprocessing; a field left out is taken from the checkpoint's own configuration."""

    size: tuple[Count, Count] | None = Field(None, description="height and width in pixels")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="per channel, of pixels in 0..1")
    std: tuple[Positive, ...] | None = Field(None, min_length=1, description="per channel, of pixels in 0..1")
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None = Field(
        None, description="how an image is resized to `size`"
    )


class ModelSection(Section):
    source: str = Field(
        description="the model: 'hf:ID', 'timm:NAME', 'py:FILE.py:FUNCTION' or a folder with a config.json",
        examples=["hf:sentence-transformers/all-MiniLM-L6-v2"],
    )
    task: Task = Field(description="what the model is for: decides what a row is, the output and the metrics")
    weights: str = Field(
        "pretrained",
        description="'pretrained', 'random', or a checkpoint: a file of safetensors or torch.save, an index of shards, "
        "or a folder with one; PATH#KEY names the entry with the weights where a file holds several",
        examples=["weights.safetensors"],
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="keyword arguments of the constructor", examples=[{"num_classes": 10}]
    )
    pooling: Pooling | None = Field(
        None, description="feature-extraction: how tokens become one embedding; default: as modules.json says, or mean"
    )
    normalize: bool | None = Field(
        None, description="L2-normalise the embedding inside the graph; default: as modules.json says, or false"
    )
    classes: ClassNames | None = Field(
        None, description="zero-shot: class names, or a text file with one a line", examples=[["cat", "dog"]]
    )
    prompt: Prompts | None = Field(
        None, description="zero-shot: template(s) with {} for the class name", examples=["a photo of a {}."]
    )
    tokenizer: str | None = Field(
        None, description="where the tokenizer is, if not with the model", examples=["bert-base-uncased"]
    )
    preprocess: Preprocess = Field(
        Preprocess(), description="how images become inputs; default: as the checkpoint's configuration says"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, Place] | None = Field(
        None,
        description="of scoring and repair: where the model's parts are kept, by accelerate's names; {module: GPU "
        "number, 'cpu' or 'disk'}; default: all in this process's memory, computed on the CPU",
        examples=["auto"],
    )
    max_memory: Annotated[dict[Annotated[str, Field(pattern=r"^(\d+|cpu|disk)$")], Count | str], TextKeys] = Field(
        default_factory=dict,
        description="of a device_map that is named: most bytes per GPU number and 'cpu', such as '20GiB'",
        examples=[{"0": "20GiB", "cpu": "60GiB"}],
    )

    @model_validator(mode="after")
    def _memory_of_a_map(self) -> ModelSection:
        if self.max_memory and not isinstance(self.device_map, str):
            raise ValueError("model.max_memory is for a device_map that is named, such as auto")
        return self

    @property
    def gpus(self) -> int:
        """GPUs that the device map takes; of a map that is named those of max_memory, or one."""
        if self.device_map is None:
            return 0
        if isinstance(self.device_map, str):
            return len(self.max_memory.keys() - {"cpu", "disk"}) or (0 if self.max_memory else 1)
        return len({str(one).removeprefix("cuda:") for one in self.device_map.values()} - {"cpu", "disk"})


class DataSource(Section):
    source: str = Field(
        description="the rows: 'csv:', 'tsv:', 'npz:', 'images:', 'hf-dataset:' or 'py:FILE.py:FUNCTION'",
        examples=["csv:train.csv"],
    )
    columns: dict[Literal["text", "text_pair", "tokens", "question", "context", "image", "label"], Column] = Field(
        default_factory=dict,
        description="where each column is: its name, or its position from 0; default: by these names",
        examples=[{"text": "sentence", "label": 1}],
    )
    header: bool | None = Field(None, description="first line holds names; default: by columns, or by the usual names")
    split: str = Field("train", description="split of an hf-dataset")
    label_pattern: Pattern | None = Field(
        None,
        description="of 'images:': regular expression, group 1 of a file name is its class; default: class "
        "folders; either by the names that the model has for them",
        examples=["^([a-z]+)_"],
    )
    label_folder: str | None = Field(
        None, description="of 'images:': folder of the label maps, named as the images", examples=["masks"]
    )
    samples: Count | None = Field(None, description="how many rows to draw (seeded); default: all")


class Evaluation(DataSource):
    split: str = Field("test", description="split of an hf-dataset")
    metric: Metric = Field(description="what accuracy is; `points` are 100 times it (perplexity: as it is)")
    ignore: Annotated[int, Field(ge=0), Number] = Field(
        255, description="label maps: value of pixels that are not evaluated"
    )


class DataSection(Section):
    calibration: DataSource = Field(description="unlabelled rows that units are scored and the model is repaired on")
    evaluation: Evaluation | None = Field(
        None, description="held-out, labelled rows; without them no accuracy is measured"
    )


class PruneSection(Section):
    units: tuple[Literal["heads", "neurons", "channels"], ...] = Field(
        ("heads", "neurons", "channels"),
        min_length=1,
        description="what may be removed: attention heads, FFN neurons, channels of convolutions",
        examples=[["heads", "neurons"]],
    )
    score: Literal[
        "auto", "optin", "optin-exact", "optin-reference", "obs", "fisher", "magnitude", "activation", "random"
    ] = Field(
        "auto",
        description="what a unit is worth: auto (what was measured to keep most: optin, but for channels of "
        "convolutional networks under repair), optin, obs (optimal brain surgeon: what the others can replace), or to "
        "compare with them optin-exact (a forward pass per unit), optin-reference (the published code), fisher, "
        "magnitude, activation, random",
    )
    budget: Budget = Field(description="what the smaller model may cost, or lose: exactly one limit")
    allocation: Literal["joint", "additive"] = Field(
        "joint", description="joint: by the measured loss of keeping k units per sub-layer; additive: by sums of scores"
    )
    compensate: bool | Literal["rescale"] = Field(
        True, description="least-squares repair on the calibration data; 'rescale': one factor per kept unit only"
    )
    gauss_newton: bool | Literal["auto"] = Field(
        "auto",
        description="after the least squares, gains and biases of all layers are refitted together to the output, on "
        "the same data; auto: for channels of convolutional networks (needs prune.compensate: true)",
    )
    rounds: Annotated[int, Number, Field(ge=1, le=8)] = Field(
        1,
        description="times that units are scored, removed and the rest repaired on the way to the budget, part of "
        "it each; the last plan is carried out on the unpruned model (needs prune.budget.macs or params)",
    )
    coupled: bool = Field(False, description="also channels of residual streams, out of all layers that share them")
    align: Count = Field(8, description="neurons and channels are kept in multiples of this")
    probes: Count | Literal["auto"] = Field("auto", description="random probes of the sketch; auto: until it is stable")
    rows: Count = Field(768, description="token rows compared per batch of 32 and block, shared evenly by samples")
    score_samples: Count = Field(64, description="calibration rows used for scoring")
    curve_samples: Count = Field(256, description="calibration rows on which `allocation: joint` measures its losses")
    temperature: Positive = Field(1.0, description="of the distillation term, for logits")
    autocast: Literal["bfloat16", "float16"] | None = Field(None, description="precision of the sketch's passes")


class TokensSection(Section):
    """Tokens that are merged inside the model. Give `keep` or `schedule`, not both."""

    keep: Fraction | Literal["auto"] = Field(
        1.0,
        description="average over blocks of the share of tokens left behind the attention; 1: none is merged; "
        "auto: the search decides how much of the budget merging saves (needs prune.budget.macs)",
    )
    schedule: tuple[Annotated[int, Field(ge=0), Number], ...] | None = Field(
        None, min_length=1, description="tokens merged in each block; none in blocks beyond its end", examples=[[8, 8]]
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> TokensSection:
        if self.schedule is not None and "keep" in self.model_fields_set and self.keep != 1.0:
            raise ValueError("name keep or schedule, not both")
        return self

    @property
    def merges(self) -> bool:
        """Whether any token is merged, or may be."""
        return self.keep != 1.0 or any(self.schedule or ())


class FinetuneSection(Section):
    """A short fine-tune after the repair. Without this section no weight is trained."""

    source: str | None = Field(
        None,
        description="'py:FILE.py:FUNCTION' (dense model, unpruned model, batches) -> dense model; default: AdamW",
        examples=["py:tune.py:tune"],
    )
    loss: Literal["distill", "labels"] | None = Field(
        None, description="distill: from the unpruned model, needs no labels; default: labels if data is given"
    )
    data: DataSource | None = Field(None, description="rows to train on; default: the calibration data")
    steps: Count = Field(200, description="of AdamW, with warm-up and cosine decay")
    learning_rate: Positive = Field(1e-4, description="of AdamW, at the end of the warm-up")
    batch: Count = Field(32, description="rows per step")

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

    recipe: Annotated[Literal[1], Number] = Field(description="version of the recipe's format")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="names the run folder and the model on the server", examples=["my-model"]
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), Number] = Field(0, description="of samples, probes and bootstrap")
    model: ModelSection = Field(description="the trained model, and what it is for")
    data: DataSection = Field(description="rows to calibrate on, and rows to judge by")
    prune: PruneSection = Field(description="how much is removed, of what, and by which score")
    tokens: TokensSection = Field(
        TokensSection(), description="tokens that are merged inside the model; none by default"
    )
    finetune: FinetuneSection | None = Field(
        None, description="a short fine-tune after the repair; off by default: nothing is trained"
    )
    export: ExportSection = Field(ExportSection(), description="the graphs that are written: precision and shapes")
    targets: tuple[Target, ...] = Field(
        (Target(),),
        min_length=1,
        description="the engines that are built and measured; the first one's accuracy is judged",
        examples=[[{"engine": "onnxruntime", "device": "cpu", "threads": 1}]],
    )
    gates: Gates = Field(Gates(), description="what the result has to reach, or nothing ships")
    ship: ShipSection = Field(ShipSection(), description="what is written for Triton once every gate has passed")
    sweep: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="dotted field -> its values: one run for each combination; scores are shared, runs are compared",
        examples=[{"prune.budget.macs": [0.7, 0.5]}],
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.gates.accuracy_drop is not None and self.data.evaluation is None:
            raise ValueError("gates.accuracy_drop needs data.evaluation to measure it on")
        if self.prune.gauss_newton is True and self.prune.compensate is not True:
            raise ValueError("prune.gauss_newton goes on from the least squares: it needs prune.compensate: true")
        if self.prune.budget.accuracy_drop is not None and self.data.evaluation is None:
            raise ValueError("prune.budget.accuracy_drop needs data.evaluation to measure it on")
        if self.tokens.keep == "auto" and self.prune.budget.macs is None:
            # Its search compares schedules of equal MACs; equal latency would need a table for every one of them.
            raise ValueError("tokens.keep: auto shares out a budget of MACs: set prune.budget.macs")
        shared = self.prune.budget.macs is not None or self.prune.budget.params is not None
        if self.prune.rounds > 1 and (self.tokens.merges or not shared):
            raise ValueError("prune.rounds needs prune.budget.macs or params, and merges no tokens")
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
        if evaluation is not None and evaluation.metric not in known:
            raise ValueError(f"data.evaluation.metric for {self.model.task} is {' or '.join(known)}")
        if self.finetune is not None and self.finetune.labelled and self.model.task not in _LABELLED:
            raise ValueError(f"finetune.loss: labels is for {', '.join(_LABELLED)}; use distill")
        if len({target.name for target in self.targets}) != len(self.targets):
            raise ValueError("targets: two entries are the same")
        if self.prune.budget.kind == "latency" and self.budget_target.resources:
            raise ValueError("prune.budget.target: the search needs its clock here, but that target has resources")
        for target in self.targets:
            reason = self.export.cannot(target.engine, target.device)
            if reason is not None:
                raise ValueError(f"export.precision: {self.export.precision} on the target {target.name}: {reason}")
        if len(set(self.export.batch)) != len(self.export.batch):
            raise ValueError("export.batch: a batch size is named twice")
        return self

    def _check_latency_budget(self) -> None:
        """A latency budget names a target of this recipe and a shipped batch size, or none."""
        budget, names = self.prune.budget, [target.name for target in self.targets]
        if budget.target is not None and budget.target not in names:
            raise ValueError(f"prune.budget.target: no target is named '{budget.target}'; there is {', '.join(names)}")
        if budget.batch is not None and budget.batch not in self.export.batch:
            shipped = ", ".join(map(str, self.export.batch))
            raise ValueError(
                f"prune.budget.batch: batch size {budget.batch} is not shipped; export.batch has {shipped}"
            )

    @property
    def budget(self) -> Budget:
        """prune.budget with the target and the batch size that it means: what all code outside this file reads."""
        budget = self.prune.budget
        if budget.kind != "latency":
            return budget
        defaults = {"target": budget.target or self.targets[0].name, "batch": budget.batch or self.export.batch[0]}
        return budget.model_copy(update=defaults)

    @property
    def budget_target(self) -> Target:
        """The target by whose clock a latency budget is spent."""
        return next(target for target in self.targets if target.name == self.budget.target)

    @property
    def here(self) -> tuple[Target, ...]:
        """Targets of this machine."""
        return tuple(target for target in self.targets if not target.resources)

    @property
    def fleet(self) -> tuple[Target, ...]:
        """Targets of those nodes of a cluster that have their resources."""
        return tuple(target for target in self.targets if target.resources)

    @property
    def is_text(self) -> bool:
        return self.model.task in _TEXT_TASKS

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
