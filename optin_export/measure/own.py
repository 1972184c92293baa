"""`metric: py:FILE.py:FUNCTION`: the user's own metric, of all rows at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from optin_export.errors import InputError


def is_own(metric: str) -> bool:
    return metric.startswith("py:")


def shown(metric: str) -> str:
    """The metric's name without the folders of this machine."""
    if not is_own(metric):
        return metric
    where, _, function = metric.removeprefix("py:").rpartition(":")
    return f"py:{PurePosixPath(where).name}:{function}"


def kept(outputs: np.ndarray, labels: Sequence[Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """object [rows, 2]: the output and the label of each row."""
    found = np.empty((len(outputs), 2), object)
    for row, (output, label) in enumerate(zip(outputs, labels, strict=True)):
        found[row, 0], found[row, 1] = output, label
    return found


def own_value(metric: str, statistics: np.ndarray) -> float:
    """What the user's function returns. Raises InputError if it fails, or returns no finite number."""
    outputs, labels = np.stack(list(statistics[:, 0])), list(statistics[:, 1])
    value = _function(metric)(outputs, labels)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"the metric {shown(metric)} is not defined here",
            f"it returned {value!r:.60}, which is no finite number",
            "return a number of which more is better",
        )
    return number


@functools.cache
def _function(metric: str) -> Any:
    """The file is executed once."""
    from optin_export.models.loading import python_function  # which imports torch

    function = python_function(metric)

    def called(*given: Any) -> Any:
        try:
            return function(*given)
        except InputError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise InputError(
                f"'{shown(metric)}' failed", f"{type(error).__name__}: {error}", "correct that function"
            ) from error

    return called
