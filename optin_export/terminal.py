"""Make output safe for a terminal: control characters in names are written as escapes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from optin_export.errors import printable


class EscapedStream:
    """A text stream that escapes unprintable characters except for line ends and tabs, and delegates everything else.

    beneath: the underlying stream, for callers that draw with control characters.
    """

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # as in every text stream: callers use it to detect what a stream accepts
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        return self.beneath.write(printable(text, keep="\n\t"))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """A context in which standard output and standard error are `EscapedStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (EscapedStream(beneath(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def beneath(stream: Any) -> TextIO:
    """The underlying stream of a stream that may be escaped."""
    found: TextIO = getattr(stream, "beneath", stream)
    return found


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """A context in which new files are not writable for other users, whatever the umask is."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
