"""What the export writes elsewhere than in the run folder is found and deleted after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optin_export.export import quantize
from optin_export.recipe import ExportSection


class Killed(BaseException):
    pass


def test_the_graph_that_is_quantised_lies_in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def prepare(source: str, target: str, **options: Any) -> None:
        seen.append(Path(target).parent)
        assert seen[0].name.startswith("optin-export-scratch-") and (seen[0] / "lock").exists()
        raise Killed

    monkeypatch.setattr(quantize, "_import", lambda: (None, prepare))
    monkeypatch.setattr(quantize, "is_external", lambda path: False)
    with pytest.raises(Killed):
        quantize.quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", ExportSection(precision="int8"), [])
    assert seen and not seen[0].exists()
