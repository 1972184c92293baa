"""Calibration data in the shape that quantisation tools require."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def alike(rows: Iterable[Arrays]) -> list[dict[str, np.ndarray]]:
    """The batches, padded at the end with zeros (masked tokens) to the shape of the longest one [rows, ...]."""
    batches = list(rows)
    result: list[dict[str, np.ndarray]] = [{} for _ in batches]
    for name in batches[0]:
        arrays = [batch[name] for batch in batches]
        shape = np.max([array.shape[1:] for array in arrays], axis=0) if arrays[0].ndim > 1 else ()
        for padded, array in zip(result, arrays, strict=True):
            missing = [(0, int(most) - size) for most, size in zip(shape, array.shape[1:], strict=True)]
            padded[name] = np.pad(array, [(0, 0), *missing])
    return result
