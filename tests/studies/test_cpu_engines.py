"""tools/studies/study_cpu_engines.py on a tiny run: every form is built, and compared with the unpruned fp32 model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from optin_export import engines
from optin_export.recipe import Target
from tests.test_docs import load_tool

pytest.importorskip("nncf")
study = load_tool("study_cpu_engines")


def test_all_forms_of_a_small_run(
    finished_vit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_measurement: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["study_files"], "FOLDER", tmp_path)
    monkeypatch.setattr(study, "BLOCK_SECONDS", 0.002)
    name = study.NAMES[not study.sums_of_int8_overflow()]
    facts = study.machine("onnxruntime", "openvino", "nncf") | {"threads": 1}
    facts |= {"int8_instructions": not study.sums_of_int8_overflow()}
    facts |= {"bf16_instructions": not engines.lacks(Target(engine="openvino"), "bf16")}
    saved = {**facts, "rows": [{"run": "another", "batch": 3}]}
    (tmp_path / f"{name}.json").write_text(json.dumps({**saved, "cpu": "another"}))
    monkeypatch.setattr(sys, "argv", ["study", str(finished_vit), "--batches", "3", "--blocks", "4"])
    with pytest.raises(SystemExit):
        study.main()
    assert f"{name}.json is of another machine (cpu another, now" in capsys.readouterr().err
    (tmp_path / f"{name}.json").write_text(json.dumps(saved))
    study.main()
    content = json.loads((tmp_path / f"{name}.json").read_text())
    other, *rows = content["rows"]
    assert other == {"run": "another", "batch": 3} and {"cpu", "onnxruntime", "openvino", "nncf"} <= content.keys()
    forms = set(study.FORMS) - ({"openvino bf16"} if engines.lacks(Target(engine="openvino"), "bf16") else set())
    assert {(row["model"], row["form"]) for row in rows} == {(m, f) for m in ("base", "pruned") for f in forms}
    (against,) = (row for row in rows if (row["model"], row["form"]) == study.AGAINST)
    assert against["lost"] == 0.0 and against["speedup"]["median"] == against["speedup_cpu"]["median"] == 1.0
    for row in rows:
        assert all(len(row[clock]) == 2 and {len(one) for one in row[clock]} == {4} for clock in ("ms", "cpu_ms"))
        assert row["lost_low"] <= row["lost"] <= row["lost_high"] and row["speedup"]["median"] > 0
    # The same function, but for rounding: no point is lost by another library in fp32.
    plain = [row for row in rows if row["model"] == "base" and row["form"].endswith(("fp32", "defaults"))]
    assert len(plain) == 3 and all(row["lost"] == 0.0 for row in plain)


def test_a_speedup_is_the_ratio_of_medians_over_both_instances() -> None:
    found = study.speedup([[4.0, 4.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert found == {"median": 3.0, "low": 3.0, "high": 3.0}
