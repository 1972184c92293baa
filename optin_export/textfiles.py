"""Decode text files. Compression and encoding are recognised by the content, never guessed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zipfile
from pathlib import Path
from typing import Protocol

from optin_export.errors import InputError
from optin_export.workdir.opening import open_regular

#: A file that unpacks to more than this many bytes and more than this many times its size is a decompression bomb.
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200
_AT_ONCE = 1 << 20
#: Maximum bytes of text, because it is held in memory as a whole.
MOST_BYTES = 16 << 30
#: First bytes of files that are not text, and what to do about each.
_BINARY = (
    (b"PAR1", "a Parquet file", "convert it: pandas.read_parquet(FILE).to_csv('rows.csv', index=False)"),
    (b"ARROW1", "an Arrow file", "convert it: pandas.read_feather(FILE).to_csv('rows.csv', index=False)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file (.xls)", "save it as CSV in UTF-8"),
    (b"\x89HDF", "an HDF5 file", "export the table as CSV"),
    (b"SQLite format 3", "an SQLite data base", "export the table as CSV"),
    (b"\x93NUMPY", "a NumPy array", "use npz:, or save a table"),
    (b"%PDF", "a PDF", "export the table as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first: unzstd FILE"),
)
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_text_file(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 / UTF-32 with a byte order mark; gzip, bzip2, xz and zip are unpacked.

    Line ends are not changed. Raises OSError for a file that cannot be opened, InputError for other content, with the
    byte at fault, its line, and the probable encoding.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise InputError(f"cannot read {path}", f"it has {size} bytes, more than {MOST_BYTES}", "give fewer rows")
        data = _unpacked(path, file.read())
    kind = next(((kind, fix) for start, kind, fix in _BINARY if data.startswith(start)), None)
    if kind is not None:
        raise InputError(f"cannot parse {path}", f"it is {kind[0]}, not a text table", kind[1])
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(path, data, error) from None
    if "\0" in text:
        raise _with_nul(path, data, text)
    return text


def _unpacked(path: Path, data: bytes) -> bytes:
    openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
    opener = next((opener for start, opener in openers if data.startswith(start)), None)
    try:
        if opener is not None:
            with opener(io.BytesIO(data)) as file:
                return _bounded(path, file, len(data))
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                names = [one for one in archive.namelist() if not one.startswith("__MACOSX") and not one.endswith("/")]
                if len(names) != 1:
                    kind = "an Excel file (.xlsx)" if "[Content_Types].xml" in names else f"a zip of {len(names)} files"
                    raise InputError(f"cannot parse {path}", f"it is {kind}", "save one table as CSV in UTF-8")
                with archive.open(names[0]) as file:
                    return _bounded(path, file, len(data))
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        lzma.LZMAError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"cannot parse {path}", f"its compression is damaged: {error or type(error).__name__}", "copy it again"
        ) from None
    except Exception as error:  # zlib.error, which the standard library does not derive from any of these
        raise InputError(f"cannot parse {path}", f"its compression is damaged: {error}", "copy it again") from None
    return data


def _bounded(path: Path, file: _Readable, packed: int) -> bytes:
    parts, total = [], 0
    while part := file.read(_AT_ONCE):
        parts.append(part)
        total += len(part)
        if total > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise InputError(
                f"cannot parse {path}", f"its {packed} bytes unpack to more than {total}", "unpack it yourself first"
            )
    return b"".join(parts)


def _undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> InputError:
    at, encoding = error.start, error.encoding
    if encoding.replace("_", "-").startswith(("utf-16", "utf-32")):
        return InputError(
            f"cannot parse {path}",
            f"it begins as {encoding.upper()}, but byte {at} does not continue it: {error.reason}",
            "save it again as UTF-8",
        )
    line = len(re.split(rb"\r\n|\r|\n", data[:at]))
    shown = f"byte 0x{data[at]:02x} at position {at} (line {line}) is not UTF-8"
    high = sum(byte >= 0x80 for byte in data)
    if b"\0" in data or high > 0.3 * len(data) > 3:
        probably, fix = "this is no text, or in an encoding of another script", "give a text file saved as UTF-8"
    elif len(data) - at < 4 and error.reason == "unexpected end of data":
        probably, fix = "the file ends within a character: it may be cut off", "copy it again"
    elif any(byte >= 0x80 for byte in data[:at]):
        probably, fix = "what comes before is UTF-8, so that line is damaged or of another file", f"correct line {line}"
    else:
        start = max(data.rfind(b"\n", 0, at), data.rfind(b"\r", 0, at), at - 12) + 1
        excerpt = data[start : at + 9].decode("cp1252", errors="replace").splitlines()[0]
        probably = f"it is probably Windows-1252 (cp1252), by which the place reads '{excerpt}'"
        fix = f"convert it to UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
    return InputError(f"cannot parse {path}", f"{shown}; {probably}", fix)


def _with_nul(path: Path, data: bytes, text: str) -> InputError:
    if data[:4096].count(0) > 0.3 * len(data[:4096]):
        return InputError(
            f"cannot parse {path}",
            "every other byte is zero: it is UTF-16 without a byte order mark, or no text",
            f"convert it to UTF-8: iconv -f UTF-16LE -t UTF-8 {path.name} > utf8-{path.name}",
        )
    at = text.index("\0")
    line = len(re.split(r"\r\n|\r|\n", text[:at]))
    return InputError(
        f"cannot parse {path}",
        f"line {line} holds a NUL character (and {text.count(chr(0)) - 1} more follow)",
        f"correct the text, or drop them all: tr -d '\\000' < {path.name} > clean-{path.name}",
    )
