"""Map the data's labels to the model's class indices, or refuse them with the rows at fault."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optin_export.data.folders import natural_order
from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.class_names import AmbiguousName, ClassNames, as_number
from optin_export.models.tasks import IGNORED

#: Names of folders that hold a split of a data set rather than a class.
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation", "holdout")
_BOOLEAN = {"true": 1, "false": 0}


@dataclass(frozen=True)
class Classes:
    """The classes of a model: how many, and their names."""

    count: int
    names: ClassNames

    def __str__(self) -> str:
        called = f": {self.names.shown()}" if self.names.real else ""
        return f"the model has {self.count} classes, 0 to {self.count - 1}{called}"


def class_indices(examples: Examples, classes: Classes) -> tuple[np.ndarray, list[str]]:
    """The class index of every row, int64 [rows], and notes on inferred decisions.

    A label is the name of a class, or its index; if classes are named by numbers, a number is a name.
    Raises InputError for other labels, with the rows.
    """
    column = examples.columns["label"]
    _refuse_lists(column, examples)
    keys = [_key(value) for value in column]
    if examples.classes is not None:
        lookup, notes = match_classes(examples.classes, set(keys), classes)
        chosen = {key: lookup.get(key) for key in set(keys)}
    else:
        chosen, notes = _match_values(keys, classes)
    _refuse_unknown(chosen, keys, examples.where, classes, {})
    return np.array([chosen[key] for key in keys], dtype=np.int64), notes


def word_indices(examples: Examples, classes: Classes) -> tuple[list[np.ndarray], list[str]]:
    """One class index per word, int64 [words] for every row; a row's labels: a list, or text separated by blanks.

    IGNORED is kept. Raises InputError for a row without one label per word, and for unknown labels.
    """
    rows: list[list[str]] = []
    for row, (words, labels) in enumerate(zip(examples.columns["tokens"], examples.columns["label"], strict=True)):
        given = labels.split() if isinstance(labels, str) else labels
        if not isinstance(given, list | tuple | np.ndarray) or len(given) != len(words):
            count = len(given) if isinstance(given, list | tuple | np.ndarray) else "no list of"
            raise InputError(
                f"the labels of {examples.where(row)} do not fit its words",
                f"{len(words)} words, {count} labels",
                "give one label per word, as a list or separated by blanks",
            )
        rows.append([_key(label) for label in given])
    flat = [key for keys in rows for key in keys]
    places = [row for row, keys in enumerate(rows) for _ in keys]
    ignored: dict[str, int | None] = {str(IGNORED): IGNORED}
    known = [key for key in flat if key not in ignored]
    if not known:
        raise InputError(
            "no word has a label", f"all labels are {IGNORED}, which is not evaluated", "check columns.label"
        )
    if examples.classes is not None:
        lookup, notes = match_classes(examples.classes, set(known), classes)
        chosen = {key: lookup.get(key) for key in set(known)}
    else:
        chosen, notes = _match_values(known, classes)
    chosen |= ignored
    _refuse_unknown(chosen, flat, lambda at: examples.where(places[at]), classes, ignored)
    return [np.array([chosen[key] for key in keys], dtype=np.int64) for keys in rows], notes


def numbers(examples: Examples) -> np.ndarray:
    """Numeric labels, float64 [rows]. Raises InputError for a label that is not a finite number."""
    _refuse_lists(examples.columns["label"], examples)
    values = []
    for row, label in enumerate(examples.columns["label"]):
        try:
            values.append(float(label))
            if not math.isfinite(values[-1]):
                raise ValueError
        except (TypeError, ValueError):
            raise InputError(
                f"label {label!r} of {examples.where(row)} is not a number",
                "the model outputs one number per row",
                "check columns.label and header",
            ) from None
    return np.asarray(values, dtype=np.float64)


def match_classes(own: Sequence[str], used: set[str], classes: Classes) -> tuple[dict[str, int], list[str]]:
    """Map each class of the data to one of the model's classes: by name, by number, or in order.

    own: all classes of the data in its order. used: the classes that rows have. Classes are matched in order only if
    there are as many as in the model, with a note. Raises InputError if only some of the classes are the model's.
    """
    own = tuple(map(_key, own))
    found: dict[str, int] = {}
    for name in own:
        index = _find(name, classes, used)
        if index is not None:
            found[name] = index
    missing = [name for name in own if name in used and name not in found]
    if not missing:
        return found, _twice(found, used) + (list(classes.names.notes) if classes.names.real else [])
    if all(name.casefold() in SPLITS for name in used):
        raise InputError(
            "the folders are parts of a data set, not classes",
            f"they are called {', '.join(natural_order(used))}",
            "name one of them in source: its sub-folders are the classes",
        )
    indices = {name: as_number(name) for name in own}
    if not classes.names.numeric and all(
        (value := indices[name]) is not None and value == int(value) and 0 <= value < classes.count for name in used
    ):
        whole = {name: int(value) for name, value in indices.items() if value is not None}
        return whole, _order_note(own, "by the number that it is") if tuple(own) != tuple(sorted(own)) else []
    if any(name in found for name in used):
        raise InputError(
            f"{len(missing)} classes of the data are not classes of the model: {_some(missing)}",
            f"others are, such as {_some([name for name in own if name in found][:1])}; {classes}",
            "rename them to the model's names, or leave them out",
        )
    there = [name for name in own if name in used]
    order = own if len(own) == classes.count else there
    if len(order) != classes.count:
        raise InputError(
            f"the {len(own)} classes of the data cannot be matched with the model's: {_some(own)}",
            f"{classes}; the numbers differ, so the order cannot be used",
            "name the folders (or labels) like the model's classes, or by their indices from 0",
        )
    listed = ", ".join(f"'{name}' is {index}" for index, name in enumerate(order[:10]))
    more = f" and {len(order) - 10} more" if len(order) > 10 else ""
    called = (
        f"none of them is a class name of the model ({classes.names.shown(4)})"
        if classes.names.real
        else "the model has no names for them"
    )
    note = f"the classes of the data were numbered in their order, for {called}: {listed}{more}"
    return {name: index for index, name in enumerate(order)}, [note, *_order_note(order, "in natural order")]


def _order_note(order: Sequence[str], how: str) -> list[str]:
    if tuple(order) == tuple(sorted(order)):
        return []
    listed = ", ".join(order[:12]) + (", ..." if len(order) > 12 else "")
    return [
        f"class folders were numbered {how} ({listed}); torchvision's ImageFolder sorts them as text "
        f"({', '.join(sorted(order)[:4])}, ...): if the model was trained by it, rename them"
    ]


def _twice(found: Mapping[str, int], used: set[str]) -> list[str]:
    same: dict[int, list[str]] = {}
    for name, index in found.items():
        if name in used:
            same.setdefault(index, []).append(name)
    return [
        f"the classes {_some(names)} of the data are one class of the model"
        for names in same.values()
        if len(names) > 1
    ]


def _match_values(keys: Sequence[str], classes: Classes) -> tuple[dict[str, int | None], list[str]]:
    """Single labels: names first, then indices; true and false as 1 and 0 of two classes."""
    names, notes = classes.names, []
    distinct = dict.fromkeys(keys)
    chosen: dict[str, int | None] = {}
    for key in distinct:
        number = as_number(key)
        index = None if number is not None and not names.numeric else _find(key, classes, distinct)
        if index is None and number is not None and not names.numeric and number == int(number):
            index = int(number) if 0 <= number < classes.count else None
        chosen[key] = index
    boolean = {key.casefold() for key in distinct} <= set(_BOOLEAN) and all(index is None for index in chosen.values())
    if boolean and classes.count == 2 and not names.numeric:
        chosen = {key: _BOOLEAN[key.casefold()] for key in distinct}
        called = f" ('{names.names[1]}' and '{names.names[0]}')" if names.real else ""
        notes.append(f"the labels true and false were taken as the classes 1 and 0{called}")
    _refuse_counted_from_one(distinct, classes)
    if names.notes and any(as_number(key) is None for key in distinct):
        notes += names.notes
    return chosen, notes


def _refuse_counted_from_one(distinct: Mapping[str, None], classes: Classes) -> None:
    """'1 star' is class 0: refuse a label 1 that may mean either class 0 or class 1."""
    parts = [re.findall(r"\d+", name) for name in classes.names.names]
    if classes.names.numeric or not parts or any(len(one) != 1 for one in parts):
        return
    called = [float(one[0]) for one in parts]
    known = all((number := as_number(key)) is not None and number in called for key in distinct)
    if not known or called == list(range(len(called))) or len(set(called)) < len(called):
        return
    if all(0 <= float(key) < classes.count for key in distinct):
        raise InputError(
            f"the labels {_some(natural_order(distinct))} could be indices or parts of names",
            f"the model's classes 0 to {classes.count - 1} are named {classes.names.shown()}",
            "give the names as labels",
        )


def _find(name: str, classes: Classes, given: Mapping[str, Any] | set[str]) -> int | None:
    try:
        index = classes.names.find(name)
    except AmbiguousName as error:
        if name not in given:
            return None
        raise InputError(
            f"the label '{name}' matches several classes of the model",
            f"{error}: {', '.join(classes.names.names[at] for at in error.classes[:4])}",
            "give class indices, or for ImageNet WordNet numbers such as n01440764",
        ) from None
    return index if index is not None and index < classes.count else None


def _refuse_lists(column: Any, examples: Examples) -> None:
    for row, value in enumerate(column):
        if isinstance(value, list | tuple | dict | set) or (isinstance(value, np.ndarray) and value.size != 1):
            raise InputError(
                f"the label of {examples.where(row)} is a {type(value).__name__}, not one value",
                f"it reads {value!s:.80}",
                "give one class (or number) per row; for one-hot labels give the argmax",
            )


def _key(value: Any) -> str:
    """A label as text: whole numbers without a point, so that 1, 1.0, '1' and '1.0' are one label."""
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    text = str(value).strip()
    number = as_number(text)
    if number is None or not math.isfinite(number) or number != int(number) or abs(number) > 2**53:
        return text
    return str(int(number)) if not isinstance(value, str) or "." in text or "e" in text.casefold() else text


def _refuse_unknown(
    chosen: Mapping[str, int | None],
    keys: Sequence[str],
    where: Callable[[int], str],
    classes: Classes,
    ignored: Mapping[str, Any],
) -> None:
    bad = [at for at, key in enumerate(keys) if chosen[key] is None]
    if not bad:
        return
    wrong = natural_order({keys[at] for at in bad})
    values = [as_number(key) for key in chosen if key not in ignored]
    shown = repr(keys[bad[0]]) if as_number(keys[bad[0]]) is None else keys[bad[0]]
    more = (
        f", nor are {len(bad) - 1} more ({_some([where(at) for at in bad[1:4]], quote=False)})" if len(bad) > 1 else ""
    )
    what = f"label {shown} of {where(bad[0])} is not a class of the model{more}"
    if all(value is not None for value in values):
        low, high = min(values), max(values)  # type: ignore[type-var]
        span = f"labels run from {low:g} to {high:g}; {classes}"
        if classes.names.numeric:
            raise InputError(what, f"its class names are numbers: {classes.names.shown()}", "give these as labels")
        if any(value != int(value) for value in values):  # type: ignore[arg-type]
            raise InputError(what, f"it is not a whole number; {span}", "give one class index or name per row")
        named = ", or give the class names" if classes.names.real else ""
        if low == 1 and high == classes.count:
            raise InputError(what, span, f"subtract one from every label{named}")
        if set(values) == {-1, 1} and classes.count == 2:
            raise InputError(what, span, f"write 0 for -1{named}")
        raise InputError(what, span, f"give indices from 0 to {classes.count - 1}{named}; check columns.label")
    why = f"labels without a class: {_some(wrong)}; {classes}"
    raise InputError(
        what,
        why,
        "give class indices, or the model's class names; check columns.label, and header for a first line",
    )


def _some(names: Sequence[str], quote: bool = True) -> str:
    listed = [f"'{name}'" if quote else name for name in names[:8]]
    return ", ".join(listed) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
