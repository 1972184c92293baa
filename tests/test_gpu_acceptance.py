"""The one command for a machine with a GPU: its rehearsal runs here for real, and its result is rendered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_docs import load_tool

SCRIPT = ROOT / "tools" / "gpu_acceptance.py"


@pytest.mark.slow
def test_the_rehearsal_measures_what_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--out", out],
        capture_output=True,
        text=True,
        timeout=900,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "all together  at most" in done.stderr and "torch: " in done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["parts"]) == {"scoring", "torch", "onnxruntime", "tensorrt", "tensorrt_rtx"}
    assert all(part["failed"] is None for part in result["parts"].values())
    scored = result["parts"]["scoring"]["entries"]
    assert len(scored) == 4 and all(one["seconds"] > 0 and one["exact_seconds"] > 0 for one in scored)
    render = load_tool("render_gpu")
    cells = [one for one in render.cells(result) if "latency" in one]
    assert {one["part"] for one in cells} >= {"torch", "onnxruntime"}
    assert all(len(one["latency"]["samples"]["pruned"]) == 12 for one in cells)
    assert {one["precision"] for one in cells if one["part"] == "torch"} == {"fp32", "fp16", "bf16"}
    result["rehearsal"] = False  # its tables are those of a GPU's file
    result["machine"]["gpu"] = "none"
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "a.json").write_text(json.dumps(result), encoding="utf-8")
    lines = render.sections(tmp_path / "shown")
    assert {"### Scoring", "### Latency"} <= set(lines) and any(
        "| BERT-base | torch-cpu-1t | bf16" in one for one in lines
    )
    missing = [one for one in render.cells(result) if one["part"] == "tensorrt" and "failed" in one]
    assert not missing or "pip install" in missing[0]["failed"]


def test_a_part_that_fails_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("gpu_acceptance")
    assert tool.in_process("torch", 0.01, True)["failed"] == "stopped after 0.01 s"
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.exit('the GPU fell off the bus')", encoding="utf-8")
    monkeypatch.setattr(tool, "__file__", str(script))
    ended = tool.in_process("torch", 60, True)
    assert ended["entries"] == [] and "exit code 1: the GPU fell off the bus" in ended["failed"]
    with tool._failing({"model": "m"}) as entry:
        raise RuntimeError("out of memory")
    assert entry["failed"] == "RuntimeError: out of memory"


def test_an_interrupted_call_goes_on_after_the_parts_that_are_done(tmp_path: Path) -> None:
    tool, out = load_tool("gpu_acceptance"), tmp_path / "a.json"
    assert tool.done_before(out, "A GPU (sm90)", False) == {}
    out.write_text(json.dumps(result()), encoding="utf-8")
    assert set(tool.done_before(out, "A GPU (sm90)", False)) == {"scoring", "onnxruntime", "tensorrt"}  # torch failed
    assert tool.done_before(out, "Another GPU (sm89)", False) == tool.done_before(out, None, True) == {}
    out.write_text("cut o", encoding="utf-8")
    assert tool.done_before(out, "A GPU (sm90)", False) == {}
    assert tool.told(result()["parts"]["tensorrt"]) == "0 results, 2 missing: no library"


def test_all_parts_together_take_under_eight_minutes() -> None:
    assert sum(load_tool("gpu_acceptance").PARTS.values()) < 480


def result(**changes: Any) -> dict[str, Any]:
    speedup = {"median": 1.8, "ci_low": 1.7, "ci_high": 1.9}
    latency = {"base_ms": {"p50": 2.0}, "pruned_ms": {"p50": 1.1}, "speedup": speedup}
    cell = {"model": "BERT-base", "target": "torch-cuda", "precision": "fp16", "macs": 0.5, "batch": 8, "mode": "call"}
    score = {"model": "BERT-base", "autocast": None, "units": 100, "seconds": 2.0, "exact_seconds": 300.0}
    parts = {
        "scoring": {"failed": None, "entries": [{**score, "info": {"probes": 16.0}}]},
        "torch": {"failed": "stopped after 200 s", "entries": [{**cell, "latency": latency}]},
        "onnxruntime": {"failed": None, "entries": [{"target": "o", "cells": [{**cell, "latency": latency}]}]},
        "tensorrt": {"failed": None, "entries": [{"failed": "no library"}, {"failed": "no library"}]},
    }
    machine = {"gpu": "A GPU (sm90)", "cpu": "A CPU", "packages": {"torch": "2"}}
    by = {"blocks": 12, "block_seconds": 0.01}
    return {
        "version": 2,
        "rehearsal": False,
        "written": "2030-01-01",
        "machine": machine,
        "measured_by": by,
        "parts": parts,
        **changes,
    }


def test_its_result_becomes_tables(tmp_path: Path) -> None:
    render = load_tool("render_gpu")
    assert render.sections(tmp_path / "none") == []
    (tmp_path / "a.json").write_text(json.dumps(result()), encoding="utf-8")
    (tmp_path / "rehearsal.json").write_text(json.dumps(result(rehearsal=True)), encoding="utf-8")
    lines = render.sections(tmp_path)
    assert [line for line in lines if line.startswith("## ")] == ["## A GPU (sm90)"]
    row = "| BERT-base | torch-cuda | fp16 | 0.5 | 8 | call | 2 ms | 1.1 ms | 4000 to 7273 | 1.80x"
    assert lines.count(f"{row} (1.70 to 1.90) | 0.90 |") == 2
    assert "| BERT-base | fp32 | 100 | 16 | 2.00 s | 300.0 s | 150 |" in lines
    assert "- torch: stopped after 200 s" in lines and "- tensorrt: no library (2)" in lines
