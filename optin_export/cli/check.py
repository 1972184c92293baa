"""`optin-export check`: a finished run against gates of a release pipeline. Nothing is measured, nothing changed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_export.report.schema import GateResult, Report

EPILOG = (
    "exit code 0: every gate passed; 2: no finished run, a file of it has changed, or the gates cannot be read; "
    "3: parity failed; 4: a gate was missed, or the report cannot answer it"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("--gates", metavar="FILE", type=Path, help="YAML (default: the gates of the run's recipe)")
    parser.add_argument("--junit", metavar="FILE", type=Path, help="also write the result as JUnit XML")


def run(options: argparse.Namespace) -> int:
    from optin_export.cli._gates import judge, load_gates
    from optin_export.cli._junit import junit
    from optin_export.errors import GateError, ParityError
    from optin_export.recipe import engine_name
    from optin_export.workdir.files import write_text
    from optin_export.workdir.onnx_files import graph_bytes

    # The gates first: a slip in them is told before anything heavy is loaded.
    gates = None if options.gates is None else load_gates(options.gates)
    report = read_report(options.run)
    shipped = options.run / "onnx" / f"{engine_name('pruned', report.precision)}.onnx"
    size = graph_bytes(shipped) if shipped.is_file() else None
    judged = list(report.verdict.gates) if gates is None else judge(gates, report, size)
    passed = all(gate.passed for gate in judged)
    if options.junit is not None:
        write_text(options.junit, junit(report.name, report.created, judged))
    if options.json:
        described = {"gates": [gate.model_dump(mode="json") for gate in judged], "warnings": list(report.warnings)}
        print(json.dumps({"passed": passed, **described}))
    else:
        _print(report, judged, passed)
    if passed:
        return 0
    return (ParityError if any(g.kind == "parity" and not g.passed for g in judged) else GateError).exit_code


def read_report(folder: Path) -> Report:
    """The report of a finished run whose files are those of its manifest, and whose numbers are those measured.

    Whoever changes report.json can change the manifest as well: what it says of the run itself is held against the
    files in measure/. Raises InputError where anything differs.
    """
    from pydantic import ValidationError

    from optin_export.errors import InputError
    from optin_export.report.schema import Report
    from optin_export.ship.manifest import check_manifest, read_manifest
    from optin_export.workdir.files import read_json, read_text

    path = folder / "report.json"
    problems = check_manifest(folder)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"the files of {folder} are not those of its manifest", "; ".join(problems[:3]) + more, "run it again"
        )
    try:
        report = Report.model_validate_json(read_text(path))
        measured = {name: read_json(folder / "measure" / f"{name}.json") for name in ("parity", "accuracy", "latency")}
        differing = _differences(report, measured, bool(read_manifest(folder)["passed"]))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the report of {folder}", str(error), "give the folder of a finished run"
        ) from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{path} is not a report of this version", why, "run the recipe again") from None
    if differing:
        raise InputError(
            f"{path} does not say what was measured",
            f"it differs from the run's manifest and measure/ in {', '.join(differing)}",
            "run the recipe again: the report is written again",
        )
    return report


def _differences(report: Report, measured: dict[str, Any], passed: bool) -> list[str]:
    """Names of the parts of a report that are not what its run measured and concluded."""
    from optin_export.report.schema import NeighboursResult

    found = [] if report.verdict.passed == passed else ["verdict"]
    if report.verdict.passed != all(gate.passed for gate in report.verdict.gates):
        found.append("gates")
    said, known = report.accuracy, measured["accuracy"]
    numbers = ("base", "pruned", "drop", "drop_low", "drop_high")
    if (said is None) != (known is None) or (
        said is not None and any(getattr(said, name) != known[name] for name in numbers)
    ):
        found.append("accuracy")
    rows = [
        (row.target, row.batch, row.mode, row.speedup.model_dump(), row.pruned_ms.p50, row.neighbours)
        for row in report.latency
    ]
    counted = (row.get("neighbours") for row in measured["latency"])
    others = [None if one is None else NeighboursResult(**one) for one in counted]
    if rows != [
        (row["target"], row["batch"], row.get("mode", "call"), row["speedup"], row["pruned_ms"]["p50"], other)
        for row, other in zip(measured["latency"], others, strict=True)
    ]:
        found.append("latency")
    cases = [(case.target, case.model, case.batch, case.max_error) for case in report.parity.cases]
    if cases != [(case["target"], case["model"], case["batch"], case["max_error"]) for case in measured["parity"]]:
        found.append("parity")
    return found


def _print(report: Report, gates: list[GateResult], passed: bool) -> None:
    count = len(report.warnings)
    print(
        f"{report.name}: {'every gate passed' if passed else 'NOT PASSED'}"
        + (f", with {count} warning{'s' if count > 1 else ''} of the run" if count else "")
    )
    for text in report.warnings:
        print(f"  warning: {text}")
    for gate in gates:
        measured = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        word = "passed" if gate.passed else "      " if gate.measured is None else "MISSED"
        print(f"  {word}  {gate.name} {gate.condition}: {measured} ({gate.note})")
