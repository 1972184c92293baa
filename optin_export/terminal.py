"""What the command prints reaches a terminal as text: control characters of names are written as escapes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from optin_export.errors import printable


class EscapedStream:
    """A text stream that writes what is not printable as escapes, line ends and tabs aside; the rest is the stream's.

    beneath: the stream itself, for who draws with control characters of their own.
    """

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # as every text stream does: callers find out by it what a stream takes
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        return self.beneath.write(printable(text, keep="\n\t"))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Within it, standard output and standard error are `EscapedStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (EscapedStream(beneath(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def beneath(stream: Any) -> TextIO:
    """The stream itself, of one that may be escaped."""
    found: TextIO = getattr(stream, "beneath", stream)
    return found


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Within it, nothing is made that other users may write, whatever the umask is."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
