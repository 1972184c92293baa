"""What the export leaves elsewhere than in the run folder: files go after a kill, what torch knew of shapes at once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from optin_export.data import load_sources
from optin_export.export import export_onnx, export_program, quantize
from optin_export.recipe import ExportSection, validate
from tests.conftest import Make


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


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, ".onnx"), (export_program, ".pt2")])
def test_exports_do_not_add_up_in_memory(export: Any, suffix: str, vit_recipe: Make, tmp_path: Path) -> None:
    """What torch knew of the shapes of one is let go; libraries hold the last graph of all, and the one before."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    sources = load_sources(validate(vit_recipe(), tmp_path))
    counts = []
    for _ in range(3):
        export(sources.model, sources.fixed(2), tmp_path / f"a{suffix}", max_batch=2, sequence=None)
        gc.collect()
        counts.append(sum(isinstance(one, ShapeEnv) for one in gc.get_objects()))
    assert counts[2] <= counts[1]
