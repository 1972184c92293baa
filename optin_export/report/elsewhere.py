"""Other machines' measurements of a run (machines/<machine>/measure/<target>.json), and adding them to the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.measure import Measured
from optin_export.report.compose import accuracy_result, latency_results, parity_of
from optin_export.report.html import render_html
from optin_export.report.schema import EngineResult, GateResult, MachineResult, Report, read_report
from optin_export.ship.manifest import add_reports
from optin_export.workdir.files import read_json, write_text
from optin_export.workdir.onnx_files import sha256_graph


def still_elsewhere(run: Path) -> tuple[MachineResult, ...]:
    """Results of other machines that were measured on the run's current graphs, in the order of their names."""
    found = []
    for path in sorted((run / "machines").glob("*/measure/*.json")):
        try:
            stored = read_json(path)
            current = {which: _hash(run, which, digest) for which, digest in stored["graphs"].items()}
            if stored["graphs"] == current:
                found.append(_result(stored))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged file, or one of another version, is not a result
    return tuple(found)


def add_elsewhere(run: Path) -> Report:
    """Add other machines' measurements to report.json and report.html, without changing the run's own results.

    Raises InputError if the run has no report.
    """
    report = read_report(run).model_copy(update={"elsewhere": still_elsewhere(run)})
    write_text(run / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(run / "report.html", render_html(report, run))
    add_reports(run)
    return report


def _result(stored: dict[str, Any]) -> MachineResult:
    measured = Measured.from_json(stored)
    return MachineResult(
        machine=stored["machine"],
        target=stored["target"],
        created=stored["created"],
        environment=stored["environment"],
        gates=tuple(GateResult(**gate) for gate in stored["gates"]),
        parity=parity_of(measured) if measured.parity else None,
        accuracy=accuracy_result(measured),
        accuracy_note=stored["accuracy_note"],
        latency=latency_results(measured),
        engines=tuple(EngineResult(**engine) for engine in stored["engines"]),
    )


def _hash(run: Path, which: str, digest: str) -> str | None:
    """The hash of the run's graph that the engine was built from: `digest` if one of its forms still has it."""
    paths = [run / "onnx" / f"{which}{suffix}" for suffix in (".onnx", ".pt2")]
    return digest if digest in [sha256_graph(path) for path in paths if path.is_file()] else None
