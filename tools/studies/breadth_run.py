"""One architecture of breadth.py: build it, run the command on it, and say how that ended."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
import traceback
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import breadth_check
import numpy as np
import yaml
from breadth_build import SEQUENCE, Case, Made, sentences
from short_measuring import command

#: Share of MACs that is asked for first.
BUDGET = 0.6
#: Rows of calibration data.
ROWS = 64
_FLOOR = re.compile(r"the model still has ([0-9.]+) of its macs")


def write_data(folder: Path) -> None:
    """Calibration rows of every kind, random: tables of texts, tokens and questions, images, sounds."""
    folder.mkdir(parents=True)
    texts = sentences(2 * ROWS)
    tables = {
        "text": ["text", *texts],
        "tokens": ["tokens", *texts],
        "questions": ["question,context", *map(",".join, zip(texts[:ROWS], texts[ROWS:], strict=True))],
    }
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "sounds").mkdir()
    for index in range(ROWS):
        small = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / "images" / f"{index:03}.png")
        with wave.open(str(folder / "sounds" / f"{index:03}.wav"), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes(generator.normal(0, 3000, breadth_check.SAMPLES).astype("<i2").tobytes())


def recipe(name: str, case: Case, made: Made, data: Path, budget: float = BUDGET) -> dict[str, Any]:
    """The recipe of a run with short measurements."""
    export: dict[str, Any] = {"batch": [1, 2]}
    if case.modality == "text":
        export["sequence"] = SEQUENCE
    return {
        "recipe": 1,
        "name": name,
        "model": {**made.model, "task": case.task},
        "data": {"calibration": {**_calibration(case, data), "samples": ROWS}},
        "prune": {"budget": {"macs": budget}, "score_samples": 32, "curve_samples": ROWS, "rows": 128},
        "export": export,
        "targets": [{"engine": "onnxruntime", "device": "cpu", "threads": 1}],
    }


def _calibration(case: Case, data: Path) -> dict[str, Any]:
    if case.modality == "image":
        return {"source": f"images:{data / 'images'}"}
    if case.modality == "audio":
        return {"source": f"wav:{data / 'sounds'}"}
    tables = {"token-classification": "tokens", "question-answering": "questions"}
    return {"source": f"csv:{data / tables.get(case.task, 'text')}.csv"}


def measure(name: str, case: Case, place: Path, data: Path, quick: bool) -> dict[str, Any]:
    """The row of an architecture.

    Args:
        name: of the architecture.
        case: how it is built.
        place: a folder for its files; emptied before.
        data: the folder that `write_data` wrote.
        quick: stop after the check of the units.

    Returns:
        `code` (exit code), `reason` (what and why of a refusal, or the last line of a traceback), `one_sentence`
        (whether a refusal has the three lines and no traceback), `family` and `units` ({kind: [count, removed]}),
        `refused` (kinds of units that the model has, but that cannot be removed: the reasons), `floor` and `budget`
        (shares of MACs), `macs` (the share kept), `check` (see `breadth_check.check`), CPU `seconds` of the command.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    row: dict[str, Any] = {"library": case.library, "task": case.task, "attention": case.attention, "quick": quick}
    try:
        made = case.make(place / "model")
    except Exception as error:  # of the library: no architecture to run
        return row | {"unbuilt": f"{type(error).__name__}: {str(error)[:300]}"}
    began = time.process_time()
    row |= run_once(recipe(name, case, made, data), place, quick) | {"budget": BUDGET}
    found = _FLOOR.search(row["reason"] or "")
    if found is not None:
        row["floor"] = float(found.group(1))
        if row["floor"] < 1 and not quick:
            row["budget"] = round((1 + row["floor"]) / 2, 3)
            row |= run_once(recipe(name, case, made, data, row["budget"]), place, quick)
    row["seconds"] = round(time.process_time() - began, 1)
    if row["code"] in (0, 3, 4) and not quick:
        row |= finished(place / "run")
        row["check"] = _checked(case, made, place / "run")
    return row


def _checked(case: Case, made: Made, run: Path) -> dict[str, Any]:
    try:
        return breadth_check.check(case, made, run)
    except Exception as error:  # a result that cannot be used at all
        return {"failed": [f"the check fails: {type(error).__name__}: {str(error)[:300]}"]}


def run_once(fields: dict[str, Any], place: Path, quick: bool) -> dict[str, Any]:
    """Run the command; what it says of the model's units is noted on the side, before anything is removed."""
    path, units = place / "recipe.yaml", {}
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    words = [str(path), "--out", str(place / "run"), "--json", "--force"]
    output, errors = io.StringIO(), io.StringIO()
    with noting_units(units), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = command([*words, "--stop-after", "sources"] if quick else words)
        except BaseException:  # nothing may escape the command
            traceback.print_exc()
            code = 1
    return {"code": code, **ending(code, output.getvalue(), errors.getvalue()), **units}


def ending(code: int, output: str, errors: str) -> dict[str, Any]:
    """`reason` and `one_sentence` of what a command with --json printed."""
    crashed = "Traceback (most recent call last)" in errors
    if code in (0, 3, 4):
        return {"reason": None, "one_sentence": not crashed}
    if crashed:
        frames = [line for line in errors.splitlines() if line and not line.startswith(("error: this is a bug", "{"))]
        return {"reason": frames[-1][:500], "one_sentence": False}
    try:
        error = json.loads(output.splitlines()[-1])["error"]
    except (ValueError, KeyError, IndexError):
        return {"reason": None, "one_sentence": False}
    lines = [error[name] for name in ("what", "why", "fix")]
    return {"reason": f"{error['what']}: {error['why']}"[:1000], "one_sentence": all(map(_is_line, lines))}


def _is_line(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text


@contextlib.contextmanager
def noting_units(found: dict[str, Any]) -> Any:
    """Let the check of the units, the command's own, also put what it found into `found`."""
    from optin_export.stages import load

    def noted(check: Any) -> Any:
        def run(work: Any) -> str:
            text: str = check(work)
            counts = Counter[str]()
            for group in work.structure.groups:
                counts[group.kind] += group.count
            found["family"], found["units"] = work.structure.family, {kind: [n, 0] for kind, n in counts.items()}
            refused = {f"{one.kind}: {one.error.what}: {one.error.why}"[:500] for one in work.structure.refused}
            found["refused"] = sorted(refused)
            return text

        return run

    before = load.CHECKS
    load.CHECKS = tuple((name, noted(one) if name == "units" else one) for name, one in before)
    try:
        yield
    finally:
        load.CHECKS = before


def finished(run: Path) -> dict[str, Any]:
    """What a complete run reports and plans."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    plan = json.loads((run / "plan" / "plan.json").read_text(encoding="utf-8"))
    return {
        "family": report["pruning"]["family"],
        "macs": round(report["macs"]["ratio"], 4),
        "units": planned(plan["groups"]),
        "notes": report["warnings"],
    }


def planned(groups: dict[str, Any]) -> dict[str, list[int]]:
    """{kind: [count, removed]} of a plan's groups, whose keys are BLOCK.KIND and, perhaps, a part."""
    units: dict[str, list[int]] = {}
    for key, group in groups.items():
        kind = re.split(r"[^a-z]", key.partition(".")[2])[0]
        one = units.setdefault(kind, [0, 0])
        one[0] += group["count"]
        one[1] += group["count"] - len(group["kept"])
    return units
