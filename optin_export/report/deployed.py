"""measure/deployed.json: clients' measurements of a run's served models, and adding them to the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from optin_export.report.schema import DeployedArm, DeployedResult, Report, SpeedupResult, read_report
from optin_export.ship.manifest import add_reports
from optin_export.workdir.files import read_json, write_json, write_text
from optin_export.workdir.lock import held
from optin_export.workdir.onnx_files import sha256_graph
from optin_export.workdir.run_directory import existing_run


def result_of(
    measured: Mapping[str, Any], server: str, source: Literal["client", "perf_analyzer"] = "client"
) -> DeployedResult:
    """The report's entry for one result of `ship.deployed` (its `to_json`)."""
    setting, speedup = measured["setting"], measured["speedup"]
    closed = setting["mode"] == "closed"
    return DeployedResult(
        source=source,
        server=server,
        protocol=setting["protocol"],
        mode=setting["mode"],
        batch=setting["batch"],
        concurrency=setting["concurrency"] if closed else None,
        rate=None if closed else setting["rate"],
        base=DeployedArm(**measured["base"]),
        pruned=DeployedArm(**measured["pruned"]),
        speedup=None if speedup is None else SpeedupResult(median=speedup[0], ci_low=speedup[1], ci_high=speedup[2]),
        noise_floor=measured["noise_floor"],
        blocks=measured["blocks"],
        largest_error=measured["largest_error"],
    )


def add_deployed(
    run: Path, results: Sequence[DeployedResult], measured: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> Report:
    """Write measure/deployed.json, and add it to report.json and report.html; results of other settings are kept.

    measured: the results with their samples. Raises InputError if the run has no report.
    """
    with held(existing_run(run), "optin-export client", wait=True):  # keep the measurement
        return _add(run, results, measured, about)


def _add(
    run: Path, results: Sequence[DeployedResult], measured: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> Report:
    from optin_export.report.html import render_html  # needs matplotlib, which a client without --run does not

    report = read_report(run)
    merged = {_key(one): one for one in (*report.deployed, *results)}
    path = run / "measure" / "deployed.json"
    entries = [one.model_dump(mode="json") for one in merged.values()]
    write_json(path, {"graphs": _graphs(run), **about, "results": entries, "measured": list(measured)})
    report = report.model_copy(update={"deployed": tuple(merged.values())})
    write_text(run / "report.json", report.model_dump_json(indent=2) + "\n")
    write_text(run / "report.html", render_html(report, run))
    add_reports(run, path)
    return report


def still_deployed(run: Path) -> tuple[DeployedResult, ...]:
    """Earlier results that were measured on the run's current graphs."""
    try:
        stored = read_json(run / "measure" / "deployed.json")
        if stored["graphs"] != _graphs(run):
            return ()
        return tuple(DeployedResult(**one) for one in stored["results"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _graphs(run: Path) -> dict[str, str]:
    return {path.name: sha256_graph(path) for path in sorted((run / "onnx").glob("*.onnx"))}


def _key(one: DeployedResult) -> tuple[Any, ...]:
    return one.source, one.protocol, one.mode, one.batch, one.concurrency
