"""Text tables as people save them: what is read equals what was written, or the user is told why it cannot be."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from optin_export.data.readers import Examples, load_examples
from optin_export.errors import InputError
from optin_export.recipe import DataSource
from optin_export.tables import read_head

TEXTS = ["red dog runs", "blue cat, green bird", 'a "big" dog', "cat sleeps", "two\nlines", "semi; colon"]
LABELS = ["positive", "negative"] * 3
NAMED: dict[str, str | int] = {"text": "text", "label": "label"}
PLACED: dict[str, str | int] = {"text": 0, "label": 1}


def written(
    delimiter: str = ",", end: str = "\n", header: Sequence[str] = ("text", "label"), quoting: int = csv.QUOTE_MINIMAL
) -> str:
    """As pandas.to_csv writes it."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([header] * bool(header) + [list(row) for row in zip(TEXTS, LABELS, strict=True)])
    return out.getvalue()


def zipped(content: bytes, *names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return out.getvalue()


def load(
    folder: Path,
    content: str | bytes,
    kind: str = "csv",
    columns: dict[str, str | int] | None = None,
    needs: tuple[str, ...] = ("text", "label"),
    header: bool | None = None,
) -> Examples:
    path = folder / f"rows.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"source": f"{kind}:{path}", "columns": NAMED if columns is None else columns, "header": header}
    return load_examples(DataSource.model_validate(given), needs, 0)


def refused(folder: Path, content: str | bytes, *args: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, content, *args, **options)  # type: ignore[arg-type]
    assert str(caught.value).count("\n") == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "content", "note"),
    [
        ("csv", written().encode("utf-8-sig"), ""),
        ("csv", written(end="\r\n"), ""),
        ("csv", written(end="\r", quoting=csv.QUOTE_ALL), ""),
        ("csv", written().encode("utf-16"), ""),
        ("csv", written().encode("utf-32"), ""),
        ("csv", gzip.compress(written().encode()), ""),
        ("csv", bz2.compress(written().encode()), ""),
        ("csv", lzma.compress(written().encode()), ""),
        ("csv", zipped(written().encode(), "rows.csv", "__MACOSX/._rows.csv"), ""),
        ("csv", written(quoting=csv.QUOTE_ALL), ""),
        ("csv", written(header=("text ", " label")), ""),
        ("csv", written(header=("Text", "LABEL")), ""),
        ("csv", written().replace("\n", ",\n").replace("two,\n", "two\n"), ""),
        ("csv", written().replace("red", "\n  \nred"), ""),
        ("csv", written(";"), "semicolons"),
        ("csv", written("|"), "vertical bars"),
        ("csv", written("\t"), "tabs"),
        ("tsv", written("\t"), ""),
        ("tsv", written("\t", quoting=csv.QUOTE_ALL), ""),
        ("tsv", written(","), "commas"),
    ],
    ids=lambda value: value if value in ("csv", "tsv") else "",
)
def test_what_was_written_is_read(kind: str, content: str | bytes, note: str, tmp_path: Path) -> None:
    examples = load(tmp_path, content, kind)
    assert examples.columns["text"] == TEXTS
    assert [str(label).strip() for label in examples.columns["label"]] == LABELS
    assert len(examples.notes) == bool(note) and all(note in one for one in examples.notes)
    assert read_head(tmp_path / f"rows.{kind}", "csv" if kind == "csv" else "tsv")[0].strip().casefold() == "text"


def test_other_columns_and_a_header_of_the_usual_names(tmp_path: Path) -> None:
    content = "id,text,label\n1,red,0\n2,blue,1\n"
    for columns in ({}, NAMED, {"text": "text"}, {"text": 1, "label": "label"}):
        examples = load(tmp_path, content, columns=columns)  # type: ignore[arg-type]
        assert examples.columns == {"text": ["red", "blue"], "label": ["0", "1"]}
        assert examples.where(1) == "line 3"
    assert load(tmp_path, "text\nred\nblue\n", columns={}, needs=("text",)).columns == {"text": ["red", "blue"]}
    assert "has no 'text'" in refused(tmp_path, "red,0\nblue,1\n", columns={})
    assert "has no 'label'" in refused(tmp_path, "text,class\nred,0\n", columns={"text": "text"})


def test_delimiters_that_no_header_names_are_taken_where_every_row_agrees(tmp_path: Path) -> None:
    content = "red, dog;0\nblue;1\ngreen;0\n"
    assert load(tmp_path, content, columns=PLACED).columns["text"] == ["red, dog", "blue", "green"]
    # Without a column that is missing either reading would do.
    assert "semicolons part every line into 2" in refused(
        tmp_path, "red;0\nblue;1\n", columns={"text": 0}, needs=("text",)
    )
    one = load(tmp_path, '"red;0"\n"blue;1"\n', columns={"text": 0}, needs=("text",))
    assert one.columns["text"] == ["red;0", "blue;1"]
    # Two delimiters that both would do prove nothing.
    assert "has no column 1" in refused(tmp_path, "red;0|1\nblue;1|0\n", columns=PLACED)


def test_quotes_of_a_tsv_by_evidence(tmp_path: Path) -> None:
    """GLUE's unbalanced quotes are text; those that pandas writes are quoting; a few whole fields may be either."""
    glue = 'text\tlabel\n"Quoted" start\t0\nan " unbalanced\t1\n"begins\t1\nends"\t0\n'
    examples = load(tmp_path, glue, "tsv")
    assert examples.columns["text"] == ['"Quoted" start', 'an " unbalanced', '"begins', 'ends"'] and not examples.notes
    swallowing = 'text\tlabel\n"begins\t1\nends"\t0\n'  # one row, if quotes counted
    assert load(tmp_path, swallowing, "tsv").columns["text"] == ['"begins', 'ends"']
    examples = load(tmp_path, 'text\tlabel\n"whole"\t0\nplain\t1\nplain\t1\n', "tsv")
    assert examples.columns["text"][0] == '"whole"' and "line 2" in examples.notes[0]
    assert load(tmp_path, 'text\tlabel\n"a ""b"""\t0\nplain\t1\n', "tsv").columns["text"] == ['a "b"', "plain"]


def test_long_documents_and_words_that_pandas_drops(tmp_path: Path) -> None:
    long = "red dog " * 40_000
    examples = load(tmp_path, f"text,label\n{long},0\nNA,1\nnull,0\nNone,1\n")
    assert examples.columns["text"] == [long, "NA", "null", "None"]
    assert "3 cells of 'text'" in examples.notes[0] and "line 3" in examples.notes[0]
    assert "'text' of line 3 is empty, NaN" in refused(tmp_path, "text,label\nred,0\nNaN,1\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            written().replace("red", "rød").encode("cp1252"),
            "position 12 (line 2) is not UTF-8; it is probably Windows-1252",
        ),
        (written().replace("dog", "døg").encode() + b"r\xf8d,positive\n", "line 9) is not UTF-8; what comes before is"),
        (written().encode()[:-2] + "ø".encode()[:1], "may be cut off"),
        ("рыжий пёс,0\n".encode("cp1251") * 20, "another script"),
        (written().encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (written().encode("utf-16")[:-1], "UTF-16-LE, but byte"),
        (written().replace("cat", "c\0t"), "line 3 holds a NUL"),
        (gzip.compress(written().encode())[:-12], "compression is damaged"),
        (zipped(b"a", "a.csv", "b.csv"), "a zip of 2 files"),
        (zipped(b"a", "[Content_Types].xml", "xl/sheet.xml"), "Excel file"),
        (b"PAR1\x15\x04", "Parquet"),
        ('{"text": "red", "label": 1}\n{"text": "blue", "label": 0}\n', "it is JSON"),
        ('[\n {"text": "red", "label": 1}\n]\n', "it is JSON"),
        ("text,label\nred, dog,0\n", "line 2 has 3, the first line has 2"),
        ('text,label\nred,0\n\n"blue,1\ngreen,0\n', "begins in line 4 do not fit"),
        ('text,label\n"say \\"hi\\"",0\n', "line 2 do not fit"),
        ("text,label\nred,0\nblue\n", "line 3 has no column 1: it reads 'blue'"),
        ('text,label\n"two\nlines",0\nblue\n', "line 4 has no column 1"),
        ("text,text,label\na,b,0\n", "2 columns 'text'"),
        ("TEXT,Text,label\na,b,0\n", "2 columns 'text'"),
        ("sentence,label\na,0\n", "no column 'text'"),
        ("", "no column 'text'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) and value.isascii() and value.isprintable() else "",
)  # fmt: skip
def test_what_cannot_be_read_is_said(content: str | bytes, says: str, tmp_path: Path) -> None:
    assert says in refused(tmp_path, content)


def test_an_archive_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_export.textfiles.BOMB_BYTES", 1000)
    assert "unpack to more than" in refused(tmp_path, gzip.compress(b"a" * 10_000_000))


def test_a_header_that_would_be_read_as_data(tmp_path: Path) -> None:
    content = "text,label\nred,0\nblue,1\n"
    assert "looks like a header" in refused(tmp_path, content, columns=PLACED)
    assert "looks like a header" in refused(tmp_path, "x,class\nred,good\nblue,bad\n", columns=PLACED)
    examples = load(tmp_path, content, columns={"text": 0}, needs=("text",))
    assert "header: true" in examples.notes[0] and len(examples) == 3
    assert load(tmp_path, content, columns=PLACED, header=True).columns["text"] == ["red", "blue"]
    assert len(load(tmp_path, content, columns=PLACED, header=False)) == 3
    assert "header is false" in refused(tmp_path, content, header=False)
    assert not load(tmp_path, "red,good\nblue,bad\n", columns=PLACED).notes
