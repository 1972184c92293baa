"""What can be said of a server before it is started."""

from __future__ import annotations

import sys
from pathlib import Path

from optin_export.serving.server import Program, can_import


def test_what_the_servers_python_can_import(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    program = Program(tmp_path / "tritonserver", tmp_path)
    assert can_import(program, "json") and not can_import(program, "no_such_module")
    assert not can_import(Program(tmp_path / "tritonserver", tmp_path / "nothing"), "json")
