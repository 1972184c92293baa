"""What is printed acts on no terminal, and means no markup."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from optin_export import cli
from optin_export.errors import InputError, printable
from optin_export.live_display import LiveStages
from optin_export.terminal import beneath, escaped_output, private_files

HOSTILE = "a\x1b[31mred\x07\x9b2J\udcff\u202e[/red][bold]b\r\x08"


def test_printable() -> None:
    assert printable("plain ä ✓") == "plain ä ✓"
    assert printable("a\x1bb\tc", keep="\t") == "a\\u001bb\tc"
    shown = printable(HOSTILE)
    assert shown.isprintable() and json.loads(f'"{shown}"') == HOSTILE
    shown.encode("utf-8")


def test_errors_are_shown_so() -> None:
    text = str(InputError(f"cannot read {HOSTILE}", "why", "fix"))
    assert text.replace("\n", "").isprintable() and len(text.splitlines()) == 3


def test_output_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print(HOSTILE)
        print(json.dumps({"x": HOSTILE}, ensure_ascii=False), file=sys.stderr)
        assert beneath(sys.stdout) is not sys.stdout and not sys.stdout.isatty()
    out, error = capsys.readouterr()
    assert out.removesuffix("\n").isprintable()
    assert json.loads(error) == {"x": HOSTILE}
    assert beneath(sys.stdout) is sys.stdout


def test_a_text_stream_refuses_bytes() -> None:
    """Libraries try this out: click writes bytes to a stream that takes them."""
    with escaped_output(), pytest.raises(TypeError, match="bytes"):
        sys.stdout.write(b"")  # type: ignore[arg-type]


def test_a_file_name_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path / "x\x1b[2J\x07.yaml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "\\u001b[2J" in error and "\x1b" not in error


def test_bars_take_names_as_they_are() -> None:
    stream = io.StringIO()
    with LiveStages(stream) as bars:
        bars.start("[/nothing] scoring")
        bars.warn("[/red] of a path")
        bars.finish("[/nothing] scoring", 1.0, False)
    assert "[/nothing]\n✓  scoring" in stream.getvalue() and "[/red] of a path" in stream.getvalue()


def test_nothing_that_others_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with private_files():
            (tmp_path / "x").mkdir()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755
