"""A sweep: every combination of values for some fields of a recipe, and a name for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optin_export.errors import InputError

if TYPE_CHECKING:
    from optin_export.recipe.schema import Recipe

MAX_RUNS = 1000
#: Fields that make a recipe what it is, rather than one of its variants.
_FIXED = ("recipe", "name", "sweep")


@dataclass(frozen=True)
class Variant:
    """One run of a sweep. label: of its folder. settings: dotted field -> value."""

    label: str
    settings: dict[str, Any]
    recipe: Recipe


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, {dotted field: value}) of every combination; labels are file names, and say nothing of the order.

    Raises InputError for a field that cannot be swept, a value given twice, and more than MAX_RUNS.
    """
    if not sweep:
        return []
    for key, values in sweep.items():
        if key.split(".")[0] in _FIXED:
            raise InputError(f"sweep: {key} cannot be swept", "every run has its own", "sweep another field")
        texts = [json.dumps(value, sort_keys=True) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise InputError(f"sweep: {key} has {twice} twice", "each run would be done twice", "remove one")
    count = 1
    for values in sweep.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise InputError(f"sweep: {count} runs", f"at most {MAX_RUNS} are done at once", "give fewer values")
    last = [key.rpartition(".")[2] for key in sweep]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(sweep, last, strict=True)}
    found = []
    for values in itertools.product(*sweep.values()):
        settings = dict(zip(sweep, values, strict=True))
        found.append(("_".join(f"{short[key]}-{_text(value)}" for key, value in settings.items()), settings))
    labels = [label for label, _ in found]
    return [(label if labels.count(label) == 1 else f"{label}-{_hash(value)}", value) for label, value in found]


def _text(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, dict | list):
        flat = re.sub(r"[^A-Za-z0-9.]+", "-", json.dumps(value, sort_keys=True)).strip("-")
        return flat if len(flat) <= 40 else _hash(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value)).strip("-")[:40] or _hash(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
