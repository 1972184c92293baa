"""--redo, --quick and what an interrupted command is continued with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from optin_export import cli
from optin_export.cli.app import without_repeats
from optin_export.measure import latency
from optin_export.workdir.run_directory import STAGES, forget
from tests.conftest import Make


def test_a_command_is_continued_without_what_would_repeat_it() -> None:
    given = ["r.yaml", "--redo", "measure", "--force", "--set", "a=b", "--redo=curves", "--quick"]
    assert without_repeats(given) == ["r.yaml", "--set", "a=b", "--quick"]


@pytest.mark.parametrize("stage", ["scoring", "measure", "ship"])
def test_a_stage_is_forgotten_with_all_that_depend_on_it(stage: str, tmp_path: Path) -> None:
    names = ["scoring", "curves", "search.table", "surgery", "export.base", "engines.x.base", "measure", "ship.triton"]
    for place in (tmp_path, tmp_path / "macs-0.5"):
        (place / ".stages").mkdir(parents=True)
        (place / "recipe.yaml").touch()
        for name in (*names, "seconds", "forecast"):
            (place / ".stages" / f"{name}.json").touch()
    (tmp_path / ".shared").mkdir()
    forget(tmp_path, stage)
    kept = {name for name in names if STAGES.index(name.partition(".")[0]) < STAGES.index(stage)}
    for place in (tmp_path, tmp_path / "macs-0.5"):
        assert {path.stem for path in (place / ".stages").iterdir()} == kept | {"seconds", "forecast"}
    assert not (tmp_path / ".shared").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("short_measurement")
def test_a_quick_run_and_its_full_measurement(
    vit_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "BLOCKS", 24)  # of a few milliseconds each
    monkeypatch.setattr(latency, "MAX_BLOCKS", 24)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(vit_recipe(gates={"speedup": 0.01})), encoding="utf-8")
    line = ["recipe.yaml", "--out", "run"]

    def report() -> dict[str, object]:
        found: dict[str, object] = json.loads(Path("run/report.json").read_text(encoding="utf-8"))
        return found

    def stages() -> dict[str, bool]:
        return {one["name"]: one["reused"] for one in report()["stages"]}  # type: ignore[attr-defined]

    assert cli.main([*line, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "PASSED, with " in out and "quick measurement" in out
    assert "next: optin-export recipe.yaml --out run   (a full measurement" in out
    assert report()["quick"] is True
    assert {one["blocks"] for one in report()["latency"]} == {6}  # type: ignore[attr-defined]
    assert "quick" in Path("run/report.html").read_text(encoding="utf-8")
    assert cli.main(["check", "run"]) == 0 and "by a quick measurement" in capsys.readouterr().out
    assert cli.main(["ship", "run", "--to", "models"]) == 0 and "measured quickly" in capsys.readouterr().out
    assert cli.main(line) == 0  # only what was quick is done again
    assert report()["quick"] is False
    assert stages()["measure"] is False and stages()["scoring"] is stages()["engines"] is True
    assert cli.main([*line, "--redo", "export"]) == 0
    assert stages()["surgery"] is True and stages()["export"] is stages()["measure"] is False
    assert cli.main(line) == 0 and stages()["measure"] is True
    # A limit in time ends a measurement after its second round.
    assert cli.main([*line, "--set", "measure.seconds=0.001"]) == 0
    assert {one["blocks"] for one in report()["latency"]} == {4} and report()["quick"] is True  # type: ignore[attr-defined]
