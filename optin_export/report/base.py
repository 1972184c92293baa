"""What every part of report.json is: frozen, with known fields only and numbers that a run can have written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

#: Nothing that a report counts or measures is larger; parity that has no number has this one. What is larger was not
#: written by a run, and what is computed from it for plots overflows.
_LARGEST = 1e100


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    @field_validator("*", mode="after")
    @classmethod
    def _not_absurd(cls, value: Any, info: ValidationInfo) -> Any:
        """Of what is read. Too large a number for it pydantic reads as endless, which a report never has either."""
        if info.mode == "json" and not all(abs(number) <= _LARGEST for number in _numbers(value)):
            raise ValueError("value out of range")
        return value


def _numbers(value: Any) -> Iterator[float | int]:
    """Every number in nested containers; parts have seen to their own."""
    if isinstance(value, float | int):
        yield value
    elif isinstance(value, dict | tuple | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
