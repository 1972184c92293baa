"""`optin-export check`: compare the report of a finished run with limits of a release pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optin_export.cli._group import PATH, command, run_argument
from optin_export.errors import GateError, InputError, ParityError

if TYPE_CHECKING:
    from optin_export.report.schema import GateResult, Report


@command
@run_argument
@click.option("--gates", type=PATH, metavar="FILE", help="YAML file of limits (default: the gates of the recipe).")
@click.option("--junit", type=PATH, metavar="FILE", help="Also write the result as JUnit XML.")
def check(run: Path, gates: Path | None, junit: Path | None, as_json: bool) -> int:
    """Check the report of a run against limits of your own.

    RUN is the folder of a finished run. For release pipelines: nothing is measured again, and nothing is changed.

    Exit code 0: every gate passed; 2: the run is not finished, one of its files has changed, or the gates cannot be
    read; 3: parity failed; 4: a gate was missed, or the report does not have its number.
    """
    from optin_export.recipe import engine_name
    from optin_export.workdir.files import write_text
    from optin_export.workdir.onnx_files import graph_bytes

    # Modules of options are imported where they are used: most checks give none.
    limits = None
    if gates is not None:  # first, because they are quick to check
        from optin_export.cli._gates import judge, load_gates

        limits = load_gates(gates)
    report = read_report(run)
    name = engine_name("pruned", report.precision)
    # OpenVINO's engines are built from a graph of its own in int8, and in bf16 from the fp32 graph.
    graphs = [run / "onnx" / file for file in (f"{name}.onnx", f"{name}.xml", "pruned.onnx")]
    size = next((graph_bytes(graph) for graph in graphs if graph.is_file()), None)
    judged = list(report.verdict.gates) if limits is None else judge(limits, report, size)
    passed = all(gate.passed for gate in judged)
    if junit is not None:
        from optin_export.cli._junit import junit_xml

        write_text(junit, junit_xml(report.name, report.created, judged))
    if as_json:
        described = {"gates": [gate.model_dump(mode="json") for gate in judged], "warnings": list(report.warnings)}
        print(json.dumps({"passed": passed, "quick": report.quick, **described}))
    else:
        _print(report, judged, passed)
    if passed:
        return 0
    return (ParityError if any(g.kind == "parity" and not g.passed for g in judged) else GateError).exit_code


def read_report(folder: Path) -> Report:
    """The report of a finished run, after its files are compared with the manifest and its numbers with measure/.

    Both comparisons are needed, because a program that edits report.json can edit the manifest as well.

    Raises:
        InputError: the run is not finished, or something differs.
    """
    from pydantic import ValidationError

    from optin_export.report.schema import Report
    from optin_export.ship.manifest import check_manifest, read_manifest
    from optin_export.workdir.files import read_json, read_text

    path = folder / "report.json"
    problems = check_manifest(folder)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"the files of {folder} differ from its manifest", "; ".join(problems[:3]) + more, "run it again"
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
            f"{path} does not hold what was measured",
            f"it differs from the manifest and measure/ in {', '.join(differing)}",
            "run the recipe again, which writes the report again",
        )
    return report


def _differences(report: Report, measured: dict[str, Any], passed: bool) -> list[str]:
    """Names of the parts of a report that differ from what its run measured."""
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
    quick = ", by a quick measurement" if report.quick else ""
    print(
        f"{report.name}: {'every gate passed' if passed else 'NOT PASSED'}{quick}"
        + (f", with {count} warning{'s' if count > 1 else ''} of the run" if count else "")
    )
    for text in report.warnings:
        print(f"  warning: {text}")
    for gate in gates:
        measured = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        word = "passed" if gate.passed else "      " if gate.measured is None else "MISSED"
        print(f"  {word}  {gate.name} {gate.condition}: {measured} ({gate.note})")
