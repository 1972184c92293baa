"""Label maps: a class per pixel, read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.data.pixels import FORMATS
from optin_export.errors import InputError
from optin_export.models.tasks import IGNORED
from optin_export.workdir.opening import regular

MAP_SUFFIXES = (".png", ".bmp", ".webp")


class LabelMaps(Sequence[np.ndarray]):
    """Label maps, int64 [H, W] each, with IGNORED where the source has `ignore`.

    maps: arrays, images or paths. reduced: the image processor's `do_reduce_labels`: classes count from 1 in the maps,
    and 0 and 255 are not evaluated. Raises InputError when an invalid map is read.
    """

    def __init__(self, maps: Any, ignore: int | None, reduced: bool = False) -> None:
        self.maps, self.ignore, self.reduced = maps, ignore, reduced

    def where(self, row: int) -> str:
        """The location of a map, for messages."""
        return str(self.maps[row]) if isinstance(self.maps[row], Path) else f"row {row}"

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        values = _read(self.maps[index], self.where(int(index)))
        if self.ignore is not None:
            values = np.where(values == self.ignore, IGNORED, values)
        if self.reduced:
            values = np.where(np.isin(values, (0, 255, IGNORED)), IGNORED, values - 1)
        if values.min(initial=0) < 0 and (values[values != IGNORED] < 0).any():
            raise InputError(
                f"the label map of {self.where(index)} holds {values[values != IGNORED].min()}",
                "classes are numbers from 0",
                "set data.evaluation.ignore to the value of pixels that are not evaluated",
            )
        return values

    def check(self, classes: int) -> None:
        """Raises InputError if a map cannot be read, has an unknown class, or if no map has any class."""
        labelled = False
        for row in range(len(self)):
            values = self[row]
            highest = int(values.max(initial=IGNORED))
            labelled |= highest != IGNORED
            if highest >= classes:
                raise InputError(
                    f"the label map of {self.where(row)} holds class {highest}",
                    f"the model has {classes} classes, 0 to {classes - 1}",
                    "set data.evaluation.ignore to the value of pixels that are not evaluated",
                )
        if not labelled:
            raise InputError(
                "no pixel has a label",
                f"all label maps contain only {self.ignore}, which is not evaluated",
                "correct data.evaluation.ignore, or the label maps",
            )


def _read(value: Any, where: str) -> np.ndarray:
    if isinstance(value, str | Path):
        from PIL import Image

        try:
            value = Image.open(regular(value), formats=FORMATS)
            value.load()
        except Exception as error:  # for damaged files each format raises its own types
            raise InputError(
                f"cannot read the label map of {where}", f"{type(error).__name__}: {error}", "remove or repair it"
            ) from None
    values = np.asarray(value)
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise InputError(
            f"the label of {where} is not a label map",
            f"it is {values.dtype} of shape {list(values.shape)}, not one whole number per pixel",
            "give arrays [H, W] or images of one channel whose values are class indices",
        )
    return values.astype(np.int64)


def find_maps(images: Sequence[Path], root: Path, folder: Path) -> list[Path]:
    """The label map of every image: at the same place below `folder`, with the same name except for the suffix.

    Raises InputError for an image without one.
    """
    found = []
    for image in images:
        place = (folder / image.relative_to(root)).with_suffix("")
        maps = [place.with_name(place.name + suffix) for suffix in MAP_SUFFIXES]
        existing = next((one for one in maps if one.is_file()), None)
        if existing is None:
            raise InputError(
                f"no label map for '{image.name}'", f"{maps[0]} is missing", "check label_folder and the names in it"
            )
        found.append(existing)
    return found
