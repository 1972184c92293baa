"""Checked types of recipe fields, and the base class of sections, which rejects unknown fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # in Python True == 1; in a recipe it is a mistake
        raise ValueError(f"should be a number, not {value!r}")
    return value


#: No table has more columns.
MOST_COLUMNS = 1_000_000


def _column(value: Any) -> int | str:
    if isinstance(value, str) or (type(value) is int and 0 <= value <= MOST_COLUMNS):
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


def _text_keys(value: Any) -> Any:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def _class_names(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name.strip() for name in value):
        raise ValueError("should be a list of class names, each quoted text, or a text file with one name per line")
    twice = next((name for name in value if list(value).count(name) > 1), None)
    if not value or twice is not None:
        raise ValueError("should name at least one class" if twice is None else f"names '{twice}' twice")
    return value


def _prompts(value: Any) -> Any:
    templates = [value] if isinstance(value, str) else value
    if not isinstance(templates, list | tuple) or not templates:
        raise ValueError("should be a prompt, or a list of them")
    wrong = next((one for one in templates if not isinstance(one, str) or one.count("{}") != 1), None)
    if wrong is not None:
        raise ValueError(f"should have one {{}} where the class name goes, not {wrong!r:.60}")
    return value


def _compute_capability(value: Any) -> str:
    """'8.9' for 8.9, '8.9', 'sm_89', 'SM89' and 89."""
    text = "" if isinstance(value, bool) else str(value).strip().lower()
    found = re.fullmatch(r"(?:sm|compute)?_?(\d{1,2})(?:\.(\d)|(\d))", text)
    if found is None:
        raise ValueError(f"should be a compute capability such as 8.9 or sm_89, not {value!r:.60}")
    return f"{found[1]}.{found[2] or found[3]}"


Number = BeforeValidator(_no_truth_value)
Fraction = Annotated[float, Field(gt=0.0, le=1.0), Number]
Positive = Annotated[float, Field(gt=0.0), Number]
Count = Annotated[int, Field(ge=1, le=10**15), Number]
#: Larger batches fit no machine, and the missing memory would only show at the end of a run.
BatchSize = Annotated[int, Field(ge=1, le=65_536), Number]
Column = Annotated[int | str, BeforeValidator(_column)]
#: Where a part of a model is kept: a GPU number, host memory, or a file.
Place = Annotated[
    Annotated[int, Field(ge=0), Number] | Annotated[str, Field(pattern=r"^(cpu|disk|cuda(:\d+)?)$")],
    Field(union_mode="left_to_right"),
]
#: YAML reads number-like keys as numbers.
TextKeys = BeforeValidator(_text_keys)
#: How token states become one embedding, as sentence-transformers names it (last: lasttoken).
Pooling = Literal["mean", "cls", "max", "last", "weightedmean", "mean_sqrt_len"]
Pattern = Annotated[str, AfterValidator(_pattern_with_group)]
ClassNames = Annotated[tuple[str, ...] | str, BeforeValidator(_class_names)]
Prompts = Annotated[tuple[str, ...] | str, BeforeValidator(_prompts)]


#: The generation of a GPU, e.g. '8.9', as NVIDIA's tools write it.
ComputeCapability = Annotated[
    str,
    BeforeValidator(_compute_capability),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 1},
                {"type": "string", "pattern": r"^([sS][mM]|compute)?_?[0-9]{1,2}\.?[0-9]$"},
            ]
        }
    ),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
