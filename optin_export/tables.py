"""Read text tables, `csv:` and `tsv:`: detect delimiter, quoting and header, and record the line of each row.

A well-formed file is read as by pandas.read_csv, except that words such as NA stay text. A malformed file is refused
with the line at fault, and inferred decisions are listed in `notes`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from optin_export.errors import InputError
from optin_export.textfiles import read_text_file

Kind = Literal["csv", "tsv"]
DELIMITERS: dict[Kind, str] = {"csv": ",", "tsv": "\t"}
_NAMED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
#: Common names of columns in files.
ALIASES = {
    "text": r"text|sentence|sentence1|review|content|query",
    "text_pair": r"text_pair|sentence2|text2|pair",
    "tokens": r"tokens|words",
    "question": r"question",
    "context": r"context|passage",
    "image": r"images?|pixels|x",
    "audio": r"audio|wav|file|path",
    "label": r"labels?|target|score|class|answers?|masks?|y|tags|ner_tags",
}


@dataclass(frozen=True)
class Table:
    """Rows of text. names: the header, empty without one. lines: where each row begins in the file, counted from 1 as
    an editor does. notes: what was decided by evidence, one sentence each."""

    path: Path
    names: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return len(self.names) if self.names else max(map(len, self.rows[:1]), default=0)


class _Broken(Exception):
    """The quotes of a file are unbalanced: the line, and the reason."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


def read_table(
    path: Path, kind: Kind, header: bool | None, columns: Mapping[str, str | int], needs: Sequence[str]
) -> Table:
    """The table of a file.

    header: whether the first line holds names; None: where a column is named, or the first line holds the name of
    every column that is needed and none is placed. columns: need -> name or position from 0. needs: what will be
    taken. Raises OSError for a file that cannot be opened, InputError for one that is no table of this kind.
    """
    text = read_text_file(path)
    _refuse_json(path, text)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a field cannot be longer than its file
    problem: InputError | None = None
    try:
        own: Table | None = _headed(_parsed(path, text, DELIMITERS[kind]), header, columns, needs)
        assert own is not None
        _check(own, columns, needs)
    except _Broken as broken:
        own = None
        problem = InputError(
            f"cannot parse {path}",
            f"the quotes of the row that begins in line {broken.line} do not fit: {broken.reason}",
            'put fields that hold a delimiter, a line end or a quote in quotes, and write a quote in them as ""',
        )
    except InputError as error:
        own, problem = None, error
    if own is not None and (own.width > 1 or len(own.rows) < 2):
        return own
    others = _other_delimiters(path, text, kind, header, columns, needs)
    if own is not None and not others:
        return own
    if own is not None:
        delimiter, table = next(iter(others.items()))
        raise InputError(
            f"cannot tell the columns of {path}",
            f"no line holds {_NAMED[DELIMITERS[kind]]}, but {_NAMED[delimiter]} part every line into {table.width}",
            f"save it with {_NAMED[DELIMITERS[kind]]} between columns; if it is one column, put the texts in quotes",
        )
    if len(others) == 1:
        delimiter, table = next(iter(others.items()))
        note = f"{path.name} is separated by {_NAMED[delimiter]}, not {_NAMED[DELIMITERS[kind]]}: read as such"
        return replace(table, notes=(note, *table.notes))
    assert problem is not None
    raise problem


def read_head(path: Path, kind: Kind) -> tuple[str, ...]:
    """The cells of the first line, by the delimiter that gives most of them; read by the code that reads the data."""
    text = read_text_file(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    heads: list[list[str]] = []
    for delimiter in (DELIMITERS[kind], *(one for one in _NAMED if one != DELIMITERS[kind])):
        try:
            heads.append(_parsed(path, text, delimiter).rows[0])
        except (_Broken, IndexError):
            continue
    widest = max([len(head) for head in heads], default=0)
    return tuple(next((head for head in heads if len(head) == widest), []))


def place_of(table: Table, wanted: str | int) -> int:
    """Position of a column. A name is matched exactly, else without blanks around it, else in any case.

    Raises InputError for a name that is missing or there twice, and for a position beyond the columns.
    """
    if isinstance(wanted, int):
        if wanted >= table.width:
            raise InputError(
                f"{table.path} has no column {wanted}",
                f"its first line has {table.width}: {_shown(table.names or (table.rows[0] if table.rows else ()))}",
                "positions count from 0; check columns and the delimiter",
            )
        return wanted
    for form in (str, str.strip, lambda name: name.strip().casefold()):
        found = [at for at, name in enumerate(table.names) if form(name) == form(wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{table.path} has {len(found)} columns '{wanted}'",
                f"its header: {_shown(table.names)}",
                f"rename one, or give a position: {' or '.join(map(str, found))}, with header: true",
            )
    raise InputError(f"{table.path} has no column '{wanted}'", f"its header: {_shown(table.names)}", "correct columns")


def wanted_of(table: Table, columns: Mapping[str, str | int], need: str) -> str | int | None:
    """The position of a needed column: as the recipe says, or under its own name in the header; None if missing."""
    if need in columns:
        return columns[need]
    own = [name for name in table.names if name.strip().casefold() == need]
    return need if own else None


def _shown(cells: Sequence[str]) -> str:
    return ", ".join(repr(cell) for cell in cells)[:300] or "nothing"


def _headed(table: Table, header: bool | None, columns: Mapping[str, str | int], needs: Sequence[str]) -> Table:
    """The table with its first row as names, if that is a header."""
    named = any(isinstance(one, str) for one in columns.values())
    if header is False and named:
        raise InputError(
            f"columns of {table.path} are named, but header is false",
            "without a header they have no names",
            "set header: true, or give positions from 0",
        )
    first = tuple(table.rows[0]) if table.rows else ()
    cells = {cell.strip().casefold() for cell in first}
    if header or named or (header is None and not columns and first and set(needs) <= cells):
        return replace(table, names=first, rows=table.rows[1:], lines=table.lines[1:])
    return table if header is False else _suspect_header(table, columns, needs)


def _suspect_header(table: Table, columns: Mapping[str, str | int], needs: Sequence[str]) -> Table:
    """Columns are given by position. Raises InputError if the first row cannot be data but is taken as such."""
    first = table.rows[0] if table.rows else []
    at = {need: place for need in needs if isinstance(place := columns.get(need), int) and place < len(first)}
    alike = [need for need, place in at.items() if re.fullmatch(ALIASES[need], first[place].strip(), re.IGNORECASE)]
    label = at.get("label")
    if label is not None and len(table.rows) > 1:
        others = [row[label].strip() for row in table.rows[1:] if label < len(row)]
        words = first[label].strip() and not _is_number(first[label])
        numbers = len(others) > 1 and "context" not in needs and all(_is_number(one) for one in others)
        if (numbers and words) or ("label" in alike and first[label].strip() not in others):
            raise InputError(
                f"the first line of {table.path} looks like a header",
                f"it reads {_shown(first)}, and '{first[label]}' is no label of any other row",
                "set header: true, or remove that line",
            )
    if alike and len(table.rows) > 1 and len(alike) == len(at):
        note = (
            f"line {table.lines[0]} of {table.path.name}, {_shown(first)}, was read as data: set header: true if it "
            "holds names"
        )
        return replace(table, notes=(*table.notes, note))
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check(table: Table, columns: Mapping[str, str | int], needs: Sequence[str]) -> None:
    """Raises InputError for a row that has other columns than the first line, or lacks one that is needed."""
    places = []
    for need in needs:
        wanted = wanted_of(table, columns, need)
        if wanted is None:
            first = table.names or (table.rows[0] if table.rows else ())
            raise InputError(
                f"{table.path} has no '{need}'", f"its first line reads {_shown(first)}", f"set columns.{need}"
            )
        if table.rows or isinstance(wanted, str):
            places.append(place_of(table, wanted))
    most = max(places, default=-1)
    for row, line in zip(table.rows, table.lines, strict=True):
        if len(row) > table.width and any(cell.strip() for cell in row[table.width :]):
            raise InputError(
                f"{table.path} has a row of other columns",
                f"line {line} has {len(row)}, the first line has {table.width}",
                "put fields that hold the delimiter in quotes",
            )
        if len(row) <= most:
            raise InputError(
                f"{table.path} has a short row",
                f"line {line} has no column {most}: it reads {_shown(row)}",
                "check the delimiter and the quotes",
            )


def _other_delimiters(
    path: Path, text: str, kind: Kind, header: bool | None, columns: Mapping[str, str | int], needs: Sequence[str]
) -> dict[str, Table]:
    """Tables by other delimiters that give every row as many columns, two or more, and all that is needed."""
    found = {}
    for delimiter in _NAMED:
        if delimiter == DELIMITERS[kind]:
            continue
        try:
            parsed = _parsed(path, text, delimiter)
            widths = {len(row) for row in parsed.rows}
            if len(widths) != 1 or widths == {1}:
                continue
            table = _headed(parsed, header, columns, needs)
            _check(table, columns, needs)
        except (_Broken, InputError):
            continue
        found[delimiter] = table
    return found


def _parsed(path: Path, text: str, delimiter: str) -> Table:
    """All rows by one delimiter, without empty lines; no header yet. Raises _Broken for quotes that do not fit."""
    return _tabbed(path, text) if delimiter == "\t" else _rows(path, text, delimiter, csv.QUOTE_MINIMAL)


def _rows(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> Table:
    # strict: an unbalanced quote would otherwise swallow the rest of the file as one field.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    before = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise _Broken(before + 1, str(error)) from None
        if row:
            rows.append(row)
            lines.append(before + 1)
        before = reader.line_num
    width = len(rows[0]) if rows else 0
    if width > 1:  # a line of blanks is an empty line, a delimiter at the end of each line is no column
        kept = [at for at, row in enumerate(rows) if len(row) > 1 or row[0].strip()]
        rows, lines = [rows[at] for at in kept], [lines[at] for at in kept]
    rows = [row[:width] if len(row) > width and not any(map(str.strip, row[width:])) else row for row in rows]
    return Table(path, (), rows, lines)


def _tabbed(path: Path, text: str) -> Table:
    """Rows between tabs. GLUE's files hold unbalanced quotes that are text; pandas writes quotes that are quoting.

    Quoting it is where it is needed to make rows of one width, or where a quoted field holds a doubled quote, or where
    all texts are quoted. A few fields within quotes may be either: they stay as they are, and it is said.
    """
    plain = _rows(path, text, "\t", csv.QUOTE_NONE)
    opened = [(row, line) for row, line in zip(plain.rows, plain.lines, strict=True) if any(c[:1] == '"' for c in row)]
    if not opened:
        return plain
    try:
        quoted = _rows(path, text, "\t", csv.QUOTE_MINIMAL)
    except _Broken:
        return plain
    widths = [[len(row) for row in one.rows] for one in (plain, quoted)]
    if widths[0] != widths[1]:
        return quoted if len(set(widths[1])) == 1 < len(set(widths[0])) else plain
    pairs = [
        (c, q) for one, other in zip(plain.rows, quoted.rows, strict=True) for c, q in zip(one, other, strict=True)
    ]
    fields = [c for c, q in pairs if c != q]
    whole = (
        [all(c[:1] == '"' for c in column) for column in zip(*plain.rows[1:], strict=False)]
        if len(plain.rows) > 2
        else []
    )
    if any('""' in field[1:-1] for field in fields) or any(whole):
        return quoted
    note = (
        f"{len(opened)} rows of {path.name} hold a field that begins and ends with a quote (the first in line "
        f"{opened[0][1]}): the quotes were kept as text"
    )
    return replace(plain, notes=(note,))


def _refuse_json(path: Path, text: str) -> None:
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return
    for part in (start.splitlines()[0], start):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if (isinstance(value, dict) and value) or (
            isinstance(value, list) and value and isinstance(value[0], dict | list)
        ):
            raise InputError(
                f"cannot parse {path}",
                "it is JSON, not a text table",
                "convert it (pandas.read_json(FILE, lines=True).to_csv('rows.csv', index=False)), or read it by "
                "py:FILE.py:FUNCTION",
            )
