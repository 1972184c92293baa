"""Where data comes from: text tables, arrays, image folders, dataset repositories, or the user's own function."""

from __future__ import annotations

import csv
import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optin_export.errors import InputError, missing_package
from optin_export.recipe import DataSource
from optin_export.sources.maps import IMAGE_FORMATS, find_maps

__all__ = ["IMAGE_FORMATS", "IMAGE_SUFFIXES", "Column", "Examples", "load_examples", "spare_examples"]

#: An archive that grows beyond so many bytes, and so many times its size, is a bomb rather than data.
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200
#: How sources name a data set of the hub.
HUB = "hf-dataset:"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Column = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Examples:
    """Rows as columns: `text`, `text_pair`, `question`, `context` (str), `tokens` (lists of words), `image` (array
    [N, H, W] / [N, H, W, C] / paths), `label` (a number, a name, a list of them, or a label map: array [H, W] or
    path)."""

    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        return Examples(
            {
                name: column[np.asarray(indices)] if isinstance(column, np.ndarray) else [column[i] for i in indices]
                for name, column in self.columns.items()
            }
        )

    def digest(self) -> str:
        """sha256 of the content (file contents for images given by path)."""
        total = hashlib.sha256()
        for name, column in self.columns.items():
            total.update(f"{name}:{len(column)};".encode())
            if isinstance(column, np.ndarray):
                total.update(f"{column.dtype}{column.shape}".encode() + np.ascontiguousarray(column).tobytes())
                continue
            for value in column:
                total.update(hashlib.sha256(_content(value)).digest())
        return total.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, Path):
        try:
            return value.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {value}", error.strerror or str(error), "put the file back") from None
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image, whose repr is its address
        return f"{value.size}".encode() + value.tobytes()
    return repr(value).encode()


def load_examples(section: DataSource, needs: Sequence[str], seed: int) -> Examples:
    """Read a data source and draw `samples` rows of it under `seed`.

    needs: the columns that must be there. Raises InputError for a missing file or column, no rows, or unusable values.
    """
    prefix, _, rest = section.source.partition(":")
    reader = _READERS.get(prefix)
    if reader is None:
        raise InputError(
            f"unknown data source '{section.source}'", "it has no known prefix", f"use {', '.join(_READERS)}:"
        )
    try:
        columns = reader(rest, section, tuple(needs))
    except OSError as error:
        raise InputError(
            f"cannot read {section.source}", error.strerror or str(error), "check the path (relative to the recipe)"
        ) from None
    for name in needs:
        if name not in columns:
            raise InputError(
                f"{section.source} gives no '{name}'",
                f"found: {', '.join(columns) or 'nothing'}",
                f"set columns.{name}",
            )
    examples = Examples({name: _as_column(columns[name], name, section.source) for name in needs})
    lengths = {name: len(column) for name, column in examples.columns.items()}
    if not len(examples) or len(set(lengths.values())) > 1:
        raise InputError(f"{section.source} has no usable rows", f"rows per column: {lengths}", "check the data")
    if section.samples is not None and section.samples < len(examples):
        chosen = np.random.default_rng(seed).permutation(len(examples))[: section.samples]
        examples = examples.take(np.sort(chosen))
    _refuse_bad_values(examples, section.source)
    return examples


def spare_examples(section: DataSource, needs: Sequence[str], seed: int, most: int) -> Examples:
    """Up to `most` rows of a source that `load_examples` under this seed does not draw; none where it draws all."""
    everything = load_examples(section.model_copy(update={"samples": None}), needs, seed)
    drawn = len(everything) if section.samples is None else section.samples
    left = np.random.default_rng(seed).permutation(len(everything))[drawn : drawn + most]
    return everything.take(np.sort(left))


def _as_column(values: Any, name: str, source: str) -> Column:
    """One value per row, as `Examples` holds it: numbers and pixels as an array, all else as a list."""
    if isinstance(values, np.ndarray) and values.ndim > 0:
        return values if values.dtype.kind in "uif" else values.tolist()
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{source} gives no usable '{name}'",
            f"it is a {type(values).__name__}, not one value per row",
            "return lists or numpy arrays",
        )
    if name == "tokens":
        return [value.split() if isinstance(value, str) else value for value in values]
    if name == "image":
        return [Path(value) if isinstance(value, str) else value for value in values]
    return list(values)


def _refuse_bad_values(examples: Examples, source: str) -> None:
    for name, column in examples.columns.items():
        if isinstance(column, np.ndarray):
            bad = np.argwhere(~np.isfinite(column)) if column.dtype.kind == "f" else np.empty((0, 1))
            row = int(bad[0][0]) if len(bad) else None
        else:
            row = next((i for i, value in enumerate(column) if _is_missing(value)), None)
        if row is not None:
            raise InputError(
                f"{source} has an unusable value", f"'{name}' of row {row} is empty, NaN or infinite", "remove that row"
            )
        kind = next((kind for names, kind, _ in _KINDS if name in names), None)
        fits = next((fits for names, _, fits in _KINDS if name in names), None)
        row = None if fits is None else next((i for i, value in enumerate(column) if not fits(value)), None)
        if row is not None:
            raise InputError(
                f"{source} has an unusable value",
                f"'{name}' of row {row} is a {type(column[row]).__name__}, not {kind}",
                f"correct columns.{name}",
            )


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(word, str) and word for word in value)


#: What the values of a column have to be.
_KINDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("text", "text_pair", "question", "context"), "text", lambda value: isinstance(value, str)),
    (("tokens",), "a list of words", _is_words),
)


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _read_table(
    path: str, section: DataSource, needs: tuple[str, ...], delimiter: str, quoting: Literal[0, 3]
) -> dict[str, Column]:
    by_name = any(isinstance(column, str) for column in section.columns.values())
    header = section.header if section.header is not None else by_name
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        try:
            # strict: an unbalanced quote would otherwise swallow the rest of the file as one field.
            rows = [row for row in csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True) if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"cannot parse {path}", str(error), "save it as UTF-8 text with one row a line") from None
    names = rows.pop(0) if header and rows else []
    columns: dict[str, Column] = {}
    for name in needs:
        wanted = section.columns.get(name)  # type: ignore[call-overload]
        if wanted is None:
            continue
        if isinstance(wanted, str) and wanted not in names:
            raise InputError(f"{path} has no column '{wanted}'", f"its header: {', '.join(names)}", "correct columns")
        index = names.index(wanted) if isinstance(wanted, str) else wanted
        short = next((i for i, row in enumerate(rows) if len(row) <= index), None)
        if short is not None:
            raise InputError(
                f"{path} has a short row", f"row {short} has no column {index}", "check the separator and quotes"
            )
        columns[name] = [row[index] for row in rows]
    return columns


def _read_csv(path: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    return _read_table(path, section, needs, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    # GLUE's files hold unbalanced quotes that are text, not quoting.
    return _read_table(path, section, needs, "\t", csv.QUOTE_NONE)


def _read_npz(path: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    defaults = {"image": "images", "label": "labels"}
    keys = {name: str(section.columns.get(name, defaults.get(name, name))) for name in needs}  # type: ignore[call-overload]
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            missing = next((name for name, key in keys.items() if key not in held), None)
            for key in () if missing else set(keys.values()):
                _check_member(archive, f"{key}.npy")
        if missing is None:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[key] for name, key in keys.items()}
    except OSError:
        raise
    except Exception as error:  # damaged archives and pickled objects raise many types
        raise InputError(
            f"cannot read {path}", f"{type(error).__name__}: {error}", "give a .npz file of plain arrays (numpy.savez)"
        ) from None
    raise InputError(
        f"{path} has no array '{keys[missing]}'", f"it holds {', '.join(held)[:300]}", f"set columns.{missing}"
    )


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """That an array is as large as its archive says, before memory is given to it. Raises ValueError or KeyError."""
    entry = archive.getinfo(name)
    if entry.file_size > max(BOMB_BYTES, BOMB_RATIO * entry.compress_size):
        raise ValueError(f"{name} is {entry.file_size} bytes packed into {entry.compress_size}: it looks like a bomb")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is an array of format {version}, which plain arrays are not")
        shape, _, dtype = read(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{name} claims the shape {list(shape)} in {entry.file_size} bytes")


def _read_images(path: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    """One sub-folder per class in alphabetical order, flat files with the class index found by `label_pattern`, or
    label maps in a folder of their own."""
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(
            f"no images in {root}", "the folder is missing or holds none", f"use {', '.join(IMAGE_SUFFIXES)}"
        )
    columns: dict[str, Column] = {"image": files}
    if "label" in needs:
        if section.label_folder is not None:
            columns["label"] = find_maps(files, root, Path(section.label_folder))
        elif section.label_pattern is not None:
            found = [re.search(section.label_pattern, file.name) for file in files]
            missed = next((file for file, match in zip(files, found, strict=True) if not match), None)
            if missed is not None:
                raise InputError(
                    f"no label in '{missed.name}'", "label_pattern does not match", "correct label_pattern"
                )
            columns["label"] = [match.group(1) for match in found if match]
        else:
            stray = next((file for file in files if file.parent == root), None)
            if stray is not None:
                raise InputError(
                    f"no label for '{stray.name}'", "it is in no class folder", "set label_pattern, or use sub-folders"
                )
            classes = sorted({file.parent.name for file in files})
            columns["label"] = [classes.index(file.parent.name) for file in files]
    return columns


def require_datasets(source: str) -> Any:
    """The package that reads data sets of the hub; raises EnvironmentLacks where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", f"the data source {source}", "datasets") from None
    return datasets


def stand_ins(needs: Sequence[str]) -> Examples:
    """Two made-up rows with these columns, in place of rows that are not on this machine."""
    from PIL import Image

    made = {"image": Image.new("RGB", (64, 64)), "tokens": ["a"]}
    return Examples({name: [made.get(name, "a")] * 2 for name in needs})


def _read_hub(name: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    datasets = require_datasets(f"{HUB}{name}")
    identifier, _, configuration = name.partition(":")
    try:
        table = datasets.load_dataset(identifier, configuration or None, split=section.split)
    except Exception as error:  # network, names and formats fail as many types
        raise InputError(
            f"cannot load hf-dataset:{name}", str(error)[:200], "check the name and the network"
        ) from error
    columns = {n: str(section.columns.get(n, n)) for n in needs}  # type: ignore[call-overload]
    return {n: list(table[column]) for n, column in columns.items() if column in table.column_names}


def _read_python(reference: str, section: DataSource, needs: tuple[str, ...]) -> dict[str, Column]:
    from optin_export.sources.models import call_python

    source = f"py:{reference}"
    rows = call_python(source, {})
    columns = {n: section.columns.get(n, n) for n in needs}  # type: ignore[call-overload]
    if isinstance(rows, Mapping):
        return {n: rows[column] for n, column in columns.items() if column in rows}
    try:
        rows = list(rows)
        return {n: [row[column] for row in rows] for n, column in columns.items() if all(column in row for row in rows)}
    except Exception as error:  # rows of the user's own code may be anything, and a generator may raise anything
        raise InputError(
            f"cannot use the rows of '{source}'",
            f"{type(error).__name__}: {error}",
            "return a dictionary of columns, or an iterable of dictionaries",
        ) from error


_READERS: dict[str, Callable[[str, DataSource, tuple[str, ...]], dict[str, Column]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "npz": _read_npz,
    "images": _read_images,
    "hf-dataset": _read_hub,
    "py": _read_python,
}
