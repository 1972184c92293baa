"""The recipe: one YAML file, validated, frozen, with every path made absolute. Knows nothing of torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from optin_export.errors import InputError
from optin_export.strict_yaml import parse_yaml


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True for 1; in a recipe it is a slip
        raise ValueError(f"should be a number, not {value!r}")
    return value


def _column(value: Any) -> int | str:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"should be a column's name or its position from 0, not {value!r:.60}")


def _pattern_with_group(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"should be a regular expression: {error}") from None
    if groups < 1:
        raise ValueError("should have a group (...) that holds the label")
    return value


_Number = BeforeValidator(_no_truth_value)
Fraction = Annotated[float, _Number, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, _Number, Field(gt=0.0)]
Count = Annotated[int, _Number, Field(ge=1)]
Column = Annotated[int | str, BeforeValidator(_column)]
Pattern = Annotated[str, AfterValidator(_pattern_with_group)]
Task = Literal["text-classification", "feature-extraction", "image-classification"]
Metric = Literal["accuracy", "spearman", "pearson"]
#: What a source may start with; "" is a bare path.
MODEL_PREFIXES = ("", "hf", "timm", "py")
DATA_PREFIXES = ("csv", "tsv", "npz", "images", "hf-dataset", "py")
_TEXT_TASKS = ("text-classification", "feature-extraction")
_METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": ("accuracy", "spearman", "pearson"),  # the correlations for models of one output
    "feature-extraction": ("spearman", "pearson"),
    "image-classification": ("accuracy",),
}
_MAX_BYTES = 200_000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Preprocess(_Section):
    """Image preprocessing; a field left out is taken from the checkpoint's own configuration."""

    size: tuple[Count, Count] | None = Field(None, description="height and width in pixels")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="per channel, of pixels in 0..1")
    std: tuple[Positive, ...] | None = Field(None, min_length=1, description="per channel, of pixels in 0..1")
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None


class ModelSection(_Section):
    source: str = Field(description="'hf:ID', 'timm:NAME', 'py:FILE.py:FUNCTION' or a folder")
    task: Task
    weights: str = Field("pretrained", description="'pretrained', 'random', or a .safetensors / .pt checkpoint")
    args: dict[str, JsonValue] = Field(default_factory=dict, description="keyword arguments of the constructor")
    pooling: Literal["mean", "cls"] | None = Field(None, description="feature-extraction only")
    normalize: bool = Field(False, description="L2-normalise the sentence embedding inside the graph")
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not with the model")
    preprocess: Preprocess = Preprocess()
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class DataSource(_Section):
    source: str = Field(description="'csv:', 'tsv:', 'npz:', 'images:', 'hf-dataset:' or 'py:FILE.py:FUNCTION'")
    columns: dict[Literal["text", "text_pair", "image", "label"], Column] = Field(default_factory=dict)
    header: bool | None = Field(None, description="first line holds names; default: yes if columns are named")
    split: str = Field("train", description="split of an hf-dataset")
    label_pattern: Pattern | None = Field(None, description="regular expression; group 1 of an image's file name")
    samples: Count | None = Field(None, description="how many rows to draw (seeded); default: all")


class Evaluation(DataSource):
    split: str = Field("test", description="split of an hf-dataset")
    metric: Metric


class DataSection(_Section):
    calibration: DataSource
    evaluation: Evaluation | None = None


class Budget(_Section):
    """What the smaller model may cost, as a fraction of the unpruned model. Exactly one."""

    macs: Fraction | None = None
    params: Fraction | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if (self.macs is None) == (self.params is None):
            raise ValueError("name exactly one of: macs, params")
        return self

    @property
    def kind(self) -> Literal["macs", "params"]:
        return "macs" if self.macs is not None else "params"

    @property
    def fraction(self) -> float:
        return self.macs if self.macs is not None else self.params  # type: ignore[return-value]


class PruneSection(_Section):
    units: tuple[Literal["heads", "neurons"], ...] = Field(("heads", "neurons"), min_length=1)
    score: Literal["optin", "magnitude", "random"] = "optin"
    budget: Budget
    compensate: bool = Field(True, description="sequential least-squares repair on the calibration data")
    align: Count = Field(8, description="neurons are kept in multiples of this")
    probes: Count = Field(64, description="random probes of the neuron score")
    rows: Count = Field(768, description="token rows compared per batch and block")
    score_samples: Count = Field(64, description="calibration rows used for scoring")
    temperature: Positive = Field(1.0, description="of the distillation term, for logits")


class TokensSection(_Section):
    keep: Fraction = Field(1.0, description="share of tokens kept")

    @model_validator(mode="after")
    def _not_yet(self) -> TokensSection:
        if self.keep != 1.0:
            raise ValueError("token merging is not part of this version; keep must be 1.0")
        return self


class ExportSection(_Section):
    precision: Literal["fp32"] = "fp32"
    batch: tuple[Count, ...] = Field((1, 8), min_length=1, description="batch sizes that are shipped and measured")
    sequence: Count = Field(128, description="text: longest sequence in tokens; latency is measured at it")


class Target(_Section):
    engine: Literal["onnxruntime"] = "onnxruntime"
    device: Literal["cpu"] = "cpu"
    threads: Count = 1

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.device}-{self.threads}t"


class Gates(_Section):
    speedup: Positive | None = Field(None, description="lower end of the 95 % interval")
    accuracy_drop: Annotated[float, _Number] | None = Field(
        None, description="largest loss in points, engine against engine"
    )


class ShipSection(_Section):
    triton: bool = False


class Recipe(_Section):
    """A whole run. Field names are a contract: fields are added, never renamed."""

    recipe: Annotated[Literal[1], _Number]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, _Number, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    prune: PruneSection
    tokens: TokensSection = TokensSection()
    export: ExportSection = ExportSection()
    targets: tuple[Target, ...] = Field((Target(),), min_length=1)
    gates: Gates = Gates()
    ship: ShipSection = ShipSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.gates.accuracy_drop is not None and self.data.evaluation is None:
            raise ValueError("gates.accuracy_drop needs data.evaluation to measure it on")
        if self.model.pooling is not None and self.model.task != "feature-extraction":
            raise ValueError("model.pooling is only for the task feature-extraction")
        evaluation, known = self.data.evaluation, _METRICS[self.model.task]
        if evaluation is not None and evaluation.metric not in known:
            raise ValueError(f"data.evaluation.metric for {self.model.task} is {' or '.join(known)}")
        if len({target.name for target in self.targets}) != len(self.targets):
            raise ValueError("targets: two entries are the same")
        if len(set(self.export.batch)) != len(self.export.batch):
            raise ValueError("export.batch: a batch size is named twice")
        return self

    @property
    def is_text(self) -> bool:
        return self.model.task in _TEXT_TASKS

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override (`a.b=value`) and validate a recipe; paths become absolute.

    Raises InputError for an unreadable file, YAML that is not a mapping, or any field that does not validate.
    """
    path = Path(path)
    text = _read(path)
    try:
        raw = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not a usable YAML file", str(error), "correct the line named above") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a recipe", "its top level is not a mapping", "start it with 'recipe: 1'")
    for override in overrides:
        _apply(raw, override)
    return validate(raw, folder=path.parent)


def validate(raw: dict[str, Any], folder: Path) -> Recipe:
    """Validate a recipe given as a dictionary; relative paths are looked up from `folder`."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError("the recipe is not valid", _explain(error), "correct the field(s) named above") from None
    return _with_absolute_paths(recipe, folder)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputError(f"{path} is not a recipe", f"it is larger than {_MAX_BYTES} bytes", "give a recipe file")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the recipe {path}", str(reason), "give the path of a YAML recipe file") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"cannot read --set {override}", "it is not KEY=VALUE", "write --set prune.budget.macs=0.5")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError:
        parsed = value
    *parents, last = key.split(".")
    node: Any = raw
    try:
        for name in parents:
            if isinstance(node, list):
                node = node[int(name)]
            else:
                if node.get(name) is None:
                    node[name] = {}
                node = node[name]
        node[int(last) if isinstance(node, list) else last] = parsed
    except (AttributeError, TypeError, ValueError, IndexError):
        raise InputError(
            f"cannot apply --set {override}", f"'{key}' does not name a field of the recipe", "check the dotted path"
        ) from None


def _explain(error: ValidationError) -> str:
    """All problems in one line: the dotted field, what is wrong, and the nearest known name for an unknown field."""
    problems = []
    items = error.errors()
    for item in items:
        where = item["loc"]
        # A list whose entries failed is also reported as too short: the entry's own error says it better.
        if any(len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in items):
            continue
        dotted = ".".join(str(part) for part in where)
        if item["type"] == "extra_forbidden":
            known = _fields_at(where[:-1])
            near = difflib.get_close_matches(str(where[-1]), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
            problems.append(f"{dotted}: unknown field ({hint})")
        else:
            got = "" if item["type"] in ("missing", "value_error") else f", not {item['input']!r:.60}"
            message = (
                item["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("tuple", "list")
            )
            problems.append(f"{dotted}: {message}{got}".removeprefix(": "))
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join(problems[:5] + more)


def _fields_at(location: Sequence[int | str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        choices = [annotation, *get_args(annotation)]
        model = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    model = recipe.model
    changes = {"source": absolute_source(model.source, folder, MODEL_PREFIXES)}
    if model.weights not in ("pretrained", "random"):
        changes["weights"] = str(_find(model.weights, folder))
    if model.tokenizer is not None and _find(model.tokenizer, folder).exists():
        changes["tokenizer"] = str(_find(model.tokenizer, folder))
    data = recipe.data
    calibration = _absolute_data(data.calibration, folder)
    evaluation = None if data.evaluation is None else _absolute_data(data.evaluation, folder)
    return recipe.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "data": data.model_copy(update={"calibration": calibration, "evaluation": evaluation}),
        }
    )


def _absolute_data(data: DataSource, folder: Path) -> DataSource:
    return data.model_copy(update={"source": absolute_source(data.source, folder, DATA_PREFIXES)})


def absolute_source(source: str, folder: Path, prefixes: Sequence[str]) -> str:
    """`csv:train.csv` -> `csv:/where/the/recipe/is/train.csv`; hub names and module names stay as they are.

    A bare path gets no prefix. Raises InputError for an unknown prefix, or nothing after it.
    """
    prefix, separator, rest = source.partition(":")
    if not separator and "" in prefixes and source:
        return str(_find(source, folder))
    if prefix not in prefixes:
        known = ", ".join(f"{name}:" for name in prefixes if name)
        fix = "use one of these prefixes" + (", or the path of a folder" if "" in prefixes else "")
        raise InputError(f"unknown source '{source}'", f"it starts with none of {known}", fix)
    if not rest:
        raise InputError(f"cannot read the source '{source}'", "it names nothing", "name what to load")
    if prefix in ("csv", "tsv", "npz", "images"):
        return f"{prefix}:{_find(rest, folder)}"
    if prefix == "py":
        file, colon, function = rest.rpartition(":")
        if not colon or not function.isidentifier():
            raise InputError(f"cannot read the source '{source}'", "it names no function", "write py:FILE.py:FUNCTION")
        return f"py:{_find(file, folder)}:{function}" if file.endswith(".py") else source
    found = _find(rest, folder)
    return f"{prefix}:{found}" if found.exists() and prefix != "timm" else source


def _find(name: str, folder: Path) -> Path:
    """Relative to the recipe; where nothing is there, relative to the working directory (for `--set` on the shell)."""
    try:
        beside_recipe = (folder / Path(name).expanduser()).resolve()
        here = Path(name).expanduser().resolve()
        return beside_recipe if beside_recipe.exists() or not here.exists() else here
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a loop of links, a name too long
        raise InputError(f"cannot use the path '{name:.60}'", str(error)[:200], "correct the path") from None
