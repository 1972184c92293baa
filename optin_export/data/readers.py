"""Read data sources: text tables, arrays, image folders, dataset repositories, or the user's own function."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.data.folders import class_folders, list_files, named_classes
from optin_export.data.label_maps import find_maps
from optin_export.data.pixels import FORMATS as IMAGE_FORMATS
from optin_export.errors import InputError, missing_package
from optin_export.recipe import DataSource
from optin_export.tables import Kind, place_of, read_table, wanted_of
from optin_export.workdir.opening import open_regular, regular

__all__ = ["IMAGE_FORMATS", "IMAGE_SUFFIXES", "Column", "Examples", "load_examples", "spare_examples"]

#: Words that pandas takes for a missing value.
_PERHAPS_MISSING = ("NA", "N/A", "null", "NULL", "None", "<NA>")
#: An archive that unpacks to more than this many bytes and more than this many times its size is a decompression bomb.
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200
#: How sources name a data set of the hub.
HUB = "hf-dataset:"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
#: Columns whose texts are paths of files.
_FILES = ("image", "audio")
Column = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Examples:
    """Rows as columns: `text`, `text_pair`, `question`, `context` (str), `tokens` (lists of words), `image` (array
    [N, H, W] / [N, H, W, C] / paths), `audio` (array [N, samples] / arrays / paths), `label` (a number, a name, a list
    of them, or a label map: array [H, W] or path).

    places: position of each row in its source: `place` (line, row) and a number. classes: the source's own class names
    in its order (class folders, features of a dataset), used in `label`. notes: decisions that were inferred from the
    data, one sentence each.
    """

    columns: dict[str, Column]
    places: np.ndarray | None = None
    place: str = "row"
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        at = np.asarray(indices)
        return replace(
            self,
            columns={
                name: column[at] if isinstance(column, np.ndarray) else [column[i] for i in indices]
                for name, column in self.columns.items()
            },
            places=None if self.places is None else self.places[at],
        )

    def where(self, row: int) -> str:
        """The location of a row in its source: an image's path, a line of a file, or its number from 0."""
        for name in _FILES:
            column = self.columns.get(name)
            if column is not None and isinstance(column[row], Path):
                return str(column[row])
        return f"{self.place} {row if self.places is None else self.places[row]}"

    def digest(self) -> str:
        """sha256 of the content (file contents for images given by path)."""
        total = hashlib.sha256(b"" if self.classes is None else repr(self.classes).encode())
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
            with open_regular(value) as file:
                return file.read()
        except OSError as error:
            raise InputError(f"cannot read {value}", error.strerror or str(error), "restore the file") from None
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a PIL image, whose repr holds its memory address
        return f"{value.size}".encode() + value.tobytes()
    return repr(value).encode()


def load_examples(section: DataSource, needs: Sequence[str], seed: int) -> Examples:
    """Read a data source and draw `samples` rows of it under `seed`.

    needs: the required columns. Raises InputError for a missing file or column, no rows, or unusable values.
    """
    prefix, _, rest = section.source.partition(":")
    reader = _READERS.get(prefix)
    if reader is None:
        raise InputError(
            f"unknown data source '{section.source}'", "it has no known prefix", f"use {', '.join(_READERS)}:"
        )
    try:
        read = reader(rest, section, tuple(needs))
    except OSError as error:
        raise InputError(
            f"cannot read {section.source}", error.strerror or str(error), "check the path (relative to the recipe)"
        ) from None
    columns = read.columns
    for name in needs:
        if name not in columns:
            raise InputError(
                f"{section.source} has no '{name}'",
                f"found: {', '.join(columns) or 'nothing'}",
                f"set columns.{name}",
            )
    examples = replace(read, columns={name: _as_column(columns[name], name, section.source) for name in needs})
    lengths = {name: len(column) for name, column in examples.columns.items()}
    if not len(examples) or len(set(lengths.values())) > 1:
        raise InputError(f"{section.source} has no usable rows", f"rows per column: {lengths}", "check the data")
    if examples.places is None:
        examples = replace(examples, places=np.arange(len(examples)))
    if section.samples is not None and section.samples < len(examples):
        chosen = np.random.default_rng(seed).permutation(len(examples))[: section.samples]
        examples = examples.take(np.sort(chosen))
    refuse_bad_values(examples, section.source)
    return examples


def spare_examples(section: DataSource, needs: Sequence[str], seed: int, most: int) -> Examples:
    """Up to `most` rows of a source that `load_examples` does not draw under this seed; none if it draws all."""
    everything = load_examples(section.model_copy(update={"samples": None}), needs, seed)
    drawn = len(everything) if section.samples is None else section.samples
    left = np.random.default_rng(seed).permutation(len(everything))[drawn : drawn + most]
    return everything.take(np.sort(left))


def _as_column(values: Any, name: str, source: str) -> Column:
    """One value per row, as `Examples` holds it: numbers and pixels as an array, everything else as a list."""
    if isinstance(values, np.ndarray) and values.ndim > 0:
        return values if values.dtype.kind in "uif" else values.tolist()
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{source} has no usable '{name}'",
            f"it is a {type(values).__name__}, not one value per row",
            "return lists or numpy arrays",
        )
    if name == "tokens":
        return [value.split() if isinstance(value, str) else value for value in values]
    if name in _FILES:
        return [Path(value) if isinstance(value, str) else value for value in values]
    return list(values)


def refuse_bad_values(examples: Examples, source: str) -> None:
    for name, column in examples.columns.items():
        if isinstance(column, np.ndarray):
            bad = np.argwhere(~np.isfinite(column)) if column.dtype.kind == "f" else np.empty((0, 1))
            row = int(bad[0][0]) if len(bad) else None
        else:
            row = next((i for i, value in enumerate(column) if _is_missing(value)), None)
        if row is not None:
            raise InputError(
                f"{source} has an unusable value",
                f"'{name}' of {examples.where(row)} is empty, NaN or infinite",
                "remove that row",
            )
        kind = next((kind for names, kind, _ in _KINDS if name in names), None)
        fits = next((fits for names, _, fits in _KINDS if name in names), None)
        row = None if fits is None else next((i for i, value in enumerate(column) if not fits(value)), None)
        if row is not None:
            raise InputError(
                f"{source} has an unusable value",
                f"'{name}' of {examples.where(row)} is a {type(column[row]).__name__}, not {kind}",
                f"correct columns.{name}",
            )


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(word, str) and word for word in value)


#: The type that the values of a column must have.
_KINDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("text", "text_pair", "question", "context"), "text", lambda value: isinstance(value, str)),
    (("tokens",), "a list of words", _is_words),
)


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _read_table(path: str, section: DataSource, needs: tuple[str, ...], kind: Kind) -> Examples:
    columns: dict[str, str | int] = dict(section.columns)  # type: ignore[arg-type]
    table = read_table(Path(path), kind, section.header, columns, needs)
    found: dict[str, Column] = {}
    notes = list(table.notes)
    for need in needs:
        wanted = wanted_of(table, columns, need)
        assert wanted is not None  # see read_table
        at = place_of(table, wanted) if table.rows else 0
        found[need] = [row[at] for row in table.rows]
        if need == "audio":  # paths are relative to the table
            found[need] = [Path(path).parent / cell for cell in found[need]]
        words = [row for row, value in enumerate(found[need]) if str(value).strip() in _PERHAPS_MISSING]
        if words and need != "label":
            notes.append(
                f"{len(words)} cells of '{need}' in {table.path.name} read '{found[need][words[0]]}' (the first in "
                f"line {table.lines[words[0]]}): kept as text"
            )
    return Examples(found, np.array(table.lines, dtype=np.int64), "line", notes=tuple(notes))


def _read_csv(path: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    return _read_table(path, section, needs, "csv")


def _read_tsv(path: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    return _read_table(path, section, needs, "tsv")


def _read_npz(path: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    try:
        with zipfile.ZipFile(regular(path)) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            keys = {name: str(section.columns.get(name, _array_of(name, held))) for name in needs}  # type: ignore[call-overload]
            missing = next((name for name, key in keys.items() if key not in held), None)
            for key in () if missing else set(keys.values()):
                _check_member(archive, f"{key}.npy")
        if missing is None:
            with np.load(path, allow_pickle=False) as arrays:
                return Examples({name: arrays[key] for name, key in keys.items()})
    except OSError:
        raise
    except Exception as error:  # damaged archives and pickled objects raise many types
        raise InputError(
            f"cannot read {path}", f"{type(error).__name__}: {error}", "give a .npz file of plain arrays (numpy.savez)"
        ) from None
    raise InputError(
        f"{path} has no array '{keys[missing]}'", f"it holds {', '.join(held)[:300]}", f"set columns.{missing}"
    )


def _array_of(need: str, held: Sequence[str]) -> str:
    """The name of a column's array: `images`, `labels`, or else the column's own name."""
    plural = {"image": "images", "label": "labels"}.get(need, need)
    return need if plural not in held and need in held else plural


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Check that an array is as large as its archive says before allocating it. Raises ValueError or KeyError."""
    entry = archive.getinfo(name)
    if entry.file_size > max(BOMB_BYTES, BOMB_RATIO * entry.compress_size):
        raise ValueError(
            f"{name} is {entry.file_size} bytes packed into {entry.compress_size}: it looks like a decompression bomb"
        )
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is an array of format {version}, which is not a plain array")
        shape, _, dtype = read(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{name} claims the shape {list(shape)} in {entry.file_size} bytes")


def _read_images(path: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    return _read_folder(path, section, needs, "image", IMAGE_SUFFIXES)


def _read_wav(path: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    return _read_folder(path, section, needs, "audio", AUDIO_SUFFIXES)


def _read_folder(
    path: str, section: DataSource, needs: tuple[str, ...], kind: str, suffixes: tuple[str, ...]
) -> Examples:
    """Read a folder of files; classes are sub-folders or matches of `label_pattern`, label maps are in another folder.

    kind: the column of the files.
    """
    root = Path(path)
    files = list_files(root, suffixes)
    if not files:
        everything = sorted(file for file in root.rglob("*") if not file.is_dir())
        others = sorted({file.suffix.lower() for file in everything if file.suffix})
        held = f"it holds {len(everything)} files ({', '.join(others)[:200] or 'without a suffix'})"
        noun = {"image": "images"}.get(kind, "recordings")
        raise InputError(
            f"no {noun} in {root}",
            f"{held}, which are not read as {noun}" if everything else "the folder is missing or holds none",
            f"use {', '.join(suffixes)}",
        )
    columns: dict[str, Column] = {kind: files}
    classes = None
    if "label" in needs:
        if section.label_folder is not None:
            columns["label"] = find_maps(files, root, Path(section.label_folder))
        elif section.label_pattern is not None:
            columns["label"], classes = named_classes(files, section.label_pattern)
        else:
            columns["label"], classes = class_folders(files, root)
    return Examples(columns, classes=classes)


def require_datasets(source: str) -> Any:
    """The package that reads data sets of the hub; raises EnvironmentLacks if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", f"the data source {source}", "datasets") from None
    return datasets


def stand_ins(needs: Sequence[str]) -> Examples:
    """Two synthetic rows with these columns, in place of rows that are not on this machine."""
    from PIL import Image

    made = {"image": Image.new("RGB", (64, 64)), "audio": np.zeros(16000, np.float32), "tokens": ["a"]}
    return Examples({name: [made.get(name, "a")] * 2 for name in needs})


def _read_hub(name: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    datasets = require_datasets(f"{HUB}{name}")
    identifier, _, configuration = name.partition(":")
    try:
        table = datasets.load_dataset(identifier, configuration or None, split=section.split)
    except Exception as error:  # network, names and formats raise many types
        raise InputError(
            f"cannot load hf-dataset:{name}", str(error)[:200], "check the name and the network"
        ) from error
    columns = {n: str(section.columns.get(n, n)) for n in needs}  # type: ignore[call-overload]
    found: dict[str, Column] = {n: list(table[column]) for n, column in columns.items() if column in table.column_names}
    feature = getattr(table, "features", {}).get(columns.get("label"))
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    if "label" not in found or not names:
        return Examples(found)
    # A dataset has its own class numbers; its class names map them to the model's classes.
    found["label"] = [_named(label, names) for label in found["label"]]
    return Examples(found, classes=tuple(map(str, names)))


def _named(label: Any, names: Sequence[str]) -> Any:
    """Replace a dataset's class numbers by its class names; other values stay unchanged."""
    if isinstance(label, list | tuple):
        return [_named(one, names) for one in label]
    return str(names[label]) if isinstance(label, int) and 0 <= label < len(names) else label


def _read_python(reference: str, section: DataSource, needs: tuple[str, ...]) -> Examples:
    from optin_export.models.loading import call_python

    source = f"py:{reference}"
    rows = call_python(source, {})
    columns = {n: section.columns.get(n, n) for n in needs}  # type: ignore[call-overload]
    if isinstance(rows, Mapping):
        return Examples({n: rows[column] for n, column in columns.items() if column in rows})
    try:
        rows = list(rows)
        found = {n: column for n, column in columns.items() if all(column in row for row in rows)}
        return Examples({n: [row[column] for row in rows] for n, column in found.items()})
    except Exception as error:  # rows of the user's own code may be anything, and a generator may raise anything
        raise InputError(
            f"cannot use the rows of '{source}'",
            f"{type(error).__name__}: {error}",
            "return a dictionary of columns, or an iterable of dictionaries",
        ) from error


_READERS: dict[str, Callable[[str, DataSource, tuple[str, ...]], Examples]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "npz": _read_npz,
    "images": _read_images,
    "wav": _read_wav,
    "hf-dataset": _read_hub,
    "py": _read_python,
}
