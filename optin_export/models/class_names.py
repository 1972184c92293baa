"""The class names of a model, and the class that a name means, for every task and library."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_GENERIC = re.compile(r"LABEL_\d+")
#: Share of classes that must have ImageNet's names for a model to count as an ImageNet model.
_ALIKE = 0.9


class AmbiguousName(ValueError):
    """A name that several classes have. classes: their indices."""

    def __init__(self, name: str, classes: Sequence[int]) -> None:
        super().__init__(f"'{name}' is the name of the classes {', '.join(map(str, classes))}")
        self.name, self.classes = name, classes


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes by index; empty if the model has none. An index beyond `names` is a class without a name.

    others: further names of each class, such as WordNet's numbers. notes: what is odd about the names.
    """

    names: tuple[str, ...] = ()
    others: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def real(self) -> bool:
        """Whether the names say more than the index, unlike transformers' LABEL_0."""
        return any(name and not _GENERIC.fullmatch(name) for name in self.names)

    @cached_property
    def numeric(self) -> bool:
        """Whether the classes have numbers as names, so that a number is a name."""
        return any(as_number(name) is not None for name in self.names)

    def find(self, label: str) -> int | None:
        """Index of the class that a label names: literally, else but for case, blanks and underscores, else by the
        first of several synonyms, else by any. None if no class is called so; raises AmbiguousName."""
        number = as_number(label)
        forms = (label.strip(), f"#{number:g}" if number is not None else fold(label))
        for level, form in zip(self._levels, (*forms, forms[1], forms[1]), strict=True):
            found = level.get(form, ())
            if len(found) > 1:
                raise AmbiguousName(label, found)
            if found:
                return found[0]
        return None

    @cached_property
    def _levels(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        exact: dict[str, list[int]] = {}
        folded: dict[str, list[int]] = {}
        first: dict[str, list[int]] = {}
        every: dict[str, list[int]] = {}

        def add(level: dict[str, list[int]], form: str, index: int) -> None:
            if form and index not in level.setdefault(form, []):
                level[form].append(index)

        for index, name in enumerate(self.names):
            add(exact, name.strip(), index)
            number = as_number(name)
            add(folded, fold(name) if number is None else f"#{number:g}", index)
            synonyms = [fold(part) for part in name.split(",")]
            if len(synonyms) > 1:
                add(first, synonyms[0], index)
                for synonym in synonyms:
                    add(every, synonym, index)
        for index, names in enumerate(self.others):
            for name in names:
                add(every, fold(name), index)
        return tuple({form: tuple(at) for form, at in level.items()} for level in (exact, folded, first, every))

    def shown(self, most: int = 8) -> str:
        """The first names, for a message."""
        names = [f"'{name}'" for name in self.names[:most]]
        return ", ".join(names) + (f" and {len(self.names) - most} more" if len(self.names) > most else "")


def fold(name: str) -> str:
    """A name without differences in spelling: case, blanks, underscores, hyphens."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_\-]+", " ", plain).strip()


def as_number(text: str) -> float | None:
    """The number that a text is, such as '1', '1.0' or '-1'; None for words, and for NaN and infinity."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def names_of(module: nn.Module, given: Mapping[str, int], classes: int) -> ClassNames:
    """The class names of a loaded model with this many outputs.

    given: the recipe's names (zero-shot), which take precedence. Otherwise transformers' or timm's configuration.
    """
    if given:
        return ClassNames(tuple(sorted(given, key=given.__getitem__)))
    config = getattr(module, "config", None)
    maps = [getattr(config, name, None) or {} for name in ("id2label", "label2id")]
    if any(maps) and all(isinstance(one, Mapping) for one in maps):
        return _with_imagenet(_of_config(maps[0], maps[1], classes), classes)
    if isinstance(getattr(module, "pretrained_cfg", None), Mapping):
        return _of_timm(module.pretrained_cfg, classes)  # type: ignore[arg-type]
    return ClassNames()


def repaired_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Missing fields of a configuration: id2label, if it has only label2id, which transformers would discard."""
    inverse = raw.get("label2id")
    if raw.get("id2label") or not isinstance(inverse, Mapping) or not inverse:
        return {}
    indices = [index for index in inverse.values() if isinstance(index, int) and not isinstance(index, bool)]
    if len(indices) != len(inverse) or sorted(indices) != list(range(len(indices))):
        return {}
    return {"id2label": {index: str(name) for name, index in inverse.items()}, "label2id": dict(inverse)}


def _of_config(id2label: Mapping[Any, Any], label2id: Mapping[Any, Any], classes: int) -> ClassNames:
    """id2label is what transformers' pipelines say; label2id counts where id2label has nothing but LABEL_0."""
    forward = {int(index): str(name) for index, name in id2label.items() if str(index).lstrip("-").isdigit()}
    inverse: dict[int, list[str]] = {}
    for name, at in label2id.items():
        if str(at).isdigit():
            inverse.setdefault(int(at), []).append(str(name))
    names = tuple(forward.get(index, "") for index in range(classes))
    others = tuple(tuple(inverse.get(index, ())) for index in range(classes))
    backward = ClassNames(tuple((inverse.get(index) or [""])[0] for index in range(classes)))
    if not backward.real:
        return ClassNames(names)
    if not ClassNames(names).real:
        return ClassNames(backward.names, tuple((*more, name) for more, name in zip(others, names, strict=True)))
    known: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        known.setdefault(fold(name), []).append(index)
    for index, given in enumerate(others):
        for name in given:
            if index not in known.get(fold(name), ()) and not _GENERIC.fullmatch(name):
                note = (
                    f"the model's class names contradict each other: class {index} is '{names[index]}' by id2label and "
                    f"'{name}' by label2id; id2label was taken, as transformers' pipelines do"
                )
                return ClassNames(names, notes=(note,))
    return ClassNames(names)


def _of_timm(config: Mapping[str, Any], classes: int) -> ClassNames:
    """label_names and label_descriptions of a checkpoint; else ImageNet's, by the number of classes, as timm does."""
    names, described = config.get("label_names"), config.get("label_descriptions")
    if isinstance(names, Mapping):
        names = [names.get(index, names.get(str(index), "")) for index in range(len(names))]
    if names is not None and len(names) == classes:
        keys = [str(name) for name in names]
        lookup = described if isinstance(described, Mapping) else {}
        return ClassNames(tuple(str(lookup.get(key, key)) for key in keys), tuple((key,) for key in keys))
    if names is not None:
        return ClassNames()  # of the head that the checkpoint was trained with
    return _imagenet(classes) or ClassNames()


def _imagenet(classes: int) -> ClassNames | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return ClassNames(tuple(info.label_descriptions()), tuple((wnid,) for wnid in info.label_names()))


def _with_imagenet(found: ClassNames, classes: int) -> ClassNames:
    """With WordNet's numbers, where the classes are ImageNet's by their names, or by their number if they have none."""
    known = _imagenet(classes)
    if known is None:
        return found
    if not found.real:
        return ClassNames(
            found.names, tuple((*wnid, name) for wnid, name in zip(known.others, known.names, strict=True))
        )
    own, theirs = ([fold(name.split(",")[0]) for name in one.names] for one in (found, known))
    alike = sum(one == other for one, other in zip(own, theirs, strict=True))
    return ClassNames(found.names, known.others, found.notes) if alike >= _ALIKE * classes else found
