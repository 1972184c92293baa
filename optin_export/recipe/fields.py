"""What the sections of a recipe share: nothing unknown is accepted, and numbers are not truth values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True for 1; in a recipe it is a slip
        raise ValueError(f"should be a number, not {value!r}")
    return value


Number = BeforeValidator(_no_truth_value)
Fraction = Annotated[float, Number, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Number, Field(gt=0.0)]
Count = Annotated[int, Number, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
