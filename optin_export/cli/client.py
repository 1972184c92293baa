"""`optin-export client`: measure two served models from a client's machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optin_export.cli._group import PATH, Real, command
from optin_export.errors import InputError

if TYPE_CHECKING:
    from optin_export.serving.client import Model, Url
    from optin_export.serving.deployed import LoadSettings, Reference, Result

#: With more threads, the clients themselves would be the load that is measured.
MOST_THREADS = 256


def levels(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """'1,2,4' as numbers of threads."""
    level = click.IntRange(1, MOST_THREADS)
    return [int(level(word, parameter, context)) for word in value.split(",")]


@command
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option("--model", "names", multiple=True, metavar="MODEL", help="NAME or NAME:VERSION; first base, then pruned.")
@click.option("--run", type=PATH, metavar="RUN", help="Send the rows of this run, and add the results to its report.")
@click.option(
    "--reference", "rows", type=PATH, metavar="FILE", help="Instead of --run: a run's measure/reference.safetensors."
)
@click.option(
    "--tolerance",
    type=Real(0, 1e3, min_open=True, max_open=True),
    metavar="TOLERANCE",
    help="Allowed error of an answer (default: the parity tolerance of the run).",
)
@click.option("--batch", type=click.IntRange(1), default=1, metavar="N", help="Rows in each request (1).")
@click.option(
    "--concurrency",
    default="1,2,4,8",
    callback=levels,
    metavar="N,...",
    help="Closed loop: numbers of clients that each wait for an answer before the next request (1,2,4,8).",
)
@click.option(
    "--rate",
    type=Real(0, 1e5),
    default=0.0,
    metavar="R",
    help="Open loop: requests per second, sent without waiting (default: 70 % of what one client of the closed loop "
    "reaches with the slower model).",
)
@click.option("--no-open-loop", is_flag=True, help="Measure the closed loop only.")
@click.option("--blocks", type=click.IntRange(2, 200), default=12, metavar="N", help="Blocks of each setting (12).")
@click.option(
    "--seconds",
    type=Real(0, 60, min_open=True),
    default=0.5,
    metavar="S",
    help="Seconds for each model in a block (0.5).",
)
@click.option(
    "--timeout", type=Real(0, 600, min_open=True), default=10.0, metavar="S", help="Limit for one answer (10)."
)
@click.option("--seed", type=click.IntRange(0), default=0, metavar="SEED", help="Seed of the order of blocks (0).")
@click.option("--shadow", is_flag=True, help="Send the same rows to both models and compare the answers.")
@click.option(
    "--import-perf-analyzer",
    "tables",
    nargs=2,
    type=PATH,
    metavar="BASE.CSV PRUNED.CSV",
    help="Add the results of perf_analyzer to the report of the run; measure nothing.",
)
def client(
    urls: tuple[str, ...],
    names: tuple[str, ...],
    run: Path | None,
    rows: Path | None,
    tolerance: float | None,
    concurrency: list[int],
    rate: float,
    no_open_loop: bool,
    shadow: bool,
    tables: tuple[Path, Path] | None,
    as_json: bool,
    **load: Any,
) -> int:
    """Measure two served models as their clients see them.

    URL is grpc://HOST:PORT or http://HOST:PORT; give one or both. The command connects to these addresses only. It
    measures latency and throughput of the unpruned and the pruned model, in turns, and compares every answer with the
    answer of torch.

    Exit code 0: every answer was right; 3: an answer was wrong.
    """
    from optin_export.serving.client import Connection, Model, Url

    parsed = [Url.parse(text) for text in urls]
    models = _two_models([Model.parse(text) for text in names])
    if tables:
        return _import_tables(run, names, tables, parsed[0], load["batch"], as_json)
    connection = Connection(parsed[0], load["timeout"])
    try:
        for model in models:
            connection.ready(model)
        output, server = _output(connection.metadata(models[1])["outputs"], models[1]), connection.server()
    finally:
        connection.close()
    reference = _reference(run, rows, tolerance, output)
    if shadow:
        return _shadow(parsed[0], models, reference, concurrency[0], load, as_json)
    from optin_export.serving import deployed

    found = []
    settings = _load(load, concurrency, None if no_open_loop else rate)
    for result in deployed.measure(parsed, models, reference, settings):
        found.append(result)
        if not as_json:
            _print(result)
    lines = _perf_analyzer(run, parsed[0], models, reference, load["batch"], concurrency)
    _report(run, models, server, found, lines, as_json)
    return 0


def _report(
    run: Path | None,
    models: tuple[Model, Model],
    server: str,
    found: Sequence[Result],
    lines: list[str],
    as_json: bool,
) -> None:
    """Add the measurements to the run's report, and print the rest. lines: perf_analyzer commands."""
    from optin_export.report import add_deployed, result_of

    measured = [result.to_json() for result in found]
    results = [result_of(one, server) for one in measured]
    report = None
    if run is not None:
        report = add_deployed(run, results, measured, {"server": server, "models": [str(model) for model in models]})
    if as_json:
        entries = [one.model_dump(mode="json") for one in results]
        print(json.dumps({"server": server, "results": entries, "perf_analyzer": lines}))
        return
    print(f"every answer of {server} was right: largest relative difference {max(r.largest_error for r in found):.2g}")
    if report is not None:
        for text in report.warnings:
            print(f"warning of the run: {text}")
        print(f"report: {run}/report.html")
    print("\n".join(["the same with NVIDIA's perf_analyzer:", *lines]))


def _print(result: Result) -> None:
    setting, speedup = result.setting, result.speedup
    how = f"{setting.concurrency} at a time" if setting.mode == "closed" else f"open loop, {setting.rate:g}/s"
    print(
        f"{setting.protocol}, {how}: {speedup[0]:.2f}x ({speedup[1]:.2f} to {speedup[2]:.2f}, noise floor "
        f"{result.noise_floor:.1%})" + (": no measurable difference" if speedup[1] <= 1 <= speedup[2] else "")
    )
    for name, arm in (("base", result.base), ("pruned", result.pruned)):
        inside = "" if arm.queue is None else f"; in the server: queue {arm.queue:.3g}, compute {arm.compute:.3g} ms"
        unsent = f"; {arm.unsent} UNSENT: the server is too slow for this rate" if arm.unsent else ""
        print(
            f"  {name:<7} p50 {arm.p50:.3g}  p90 {arm.p90:.3g}  p99 {arm.p99:.3g} ms, {arm.throughput:.4g} rows/s"
            f"{inside}{unsent}",
            flush=True,
        )


def _shadow(
    url: Url,
    models: tuple[Model, Model],
    reference: Reference,
    concurrency: int,
    load: dict[str, Any],
    as_json: bool,
) -> int:
    from optin_export.serving.shadow import compare

    found = compare(url, models, reference, _load(load, [concurrency], None))
    if as_json:
        print(json.dumps(found.to_json()))
        return 0
    print(f"{found.rows} rows to {models[0]} and {models[1]}:")
    print(f"  same largest value (class): {found.same_largest:.2%} of the rows")
    print(f"  cosine similarity of the answers: mean {found.cosine[0]:.4f}, least {found.cosine[1]:.4f}")
    print(f"  largest difference, relative to a row's largest value: {found.largest_difference:.3g}")
    low, high = found.speedup[1:]
    print(
        f"  p50 {found.base_p50:.3g} and {found.pruned_p50:.3g} ms: {found.speedup[0]:.2f}x ({low:.2f} to {high:.2f})"
    )
    return 0


def _load(load: dict[str, Any], concurrency: Sequence[int], rate: float | None) -> LoadSettings:
    """The options of the measurement. load: batch, blocks, seconds, timeout and seed."""
    from optin_export.serving.deployed import LoadSettings

    return LoadSettings(concurrency=concurrency, rate=rate, **load)


def _perf_analyzer(
    run: Path | None,
    url: Url,
    models: tuple[Model, Model],
    reference: Reference,
    batch: int,
    concurrency: list[int],
) -> list[str]:
    """perf_analyzer command lines. Their input data is written into the run, so that they work unchanged."""
    from optin_export.serving.perf_analyzer import command_line, write_input_data
    from optin_export.ship.manifest import add_files
    from optin_export.workdir.lock import held

    data = Path("ROWS.json")
    if run is not None:
        data = run / "measure" / "perf_analyzer.json"
        with held(run, "optin-export client", wait=True):
            write_input_data(data, reference)
            add_files(run, [data])
    outputs = (Path("base.csv"), Path("pruned.csv"))
    return [
        command_line(url, model, batch, concurrency, data, output)
        for model, output in zip(models, outputs, strict=True)
    ]


def _import_tables(
    run: Path | None, names: Sequence[str], tables: tuple[Path, Path], url: Url, batch: int, as_json: bool
) -> int:
    from optin_export.report import add_deployed, result_of
    from optin_export.serving.perf_analyzer import results_of

    if run is None:
        raise InputError("--import-perf-analyzer needs a run", "its report takes the results", "add --run RUN")
    results = [
        result_of(one, "measured by perf_analyzer", "perf_analyzer") for one in results_of(*tables, url.protocol, batch)
    ]
    add_deployed(run, results, [], {"server": str(url), "models": list(names)})
    if as_json:
        print(json.dumps({"results": [one.model_dump(mode="json") for one in results]}))
    else:
        print(f"{len(results)} settings imported; report: {run / 'report.html'}")
    return 0


def _two_models(given: list[Model]) -> tuple[Model, Model]:
    if len(given) != 2:
        raise InputError(
            f"{len(given)} models are named", "two are compared", "write --model BASE --model PRUNED, in this order"
        )
    if given[0] == given[1]:
        raise InputError(
            f"{given[0]} would be compared with itself",
            "both --model name it; with `ship: {layout: pruned}` the unpruned model is not served",
            "name the unpruned model first (ship it with ship.layout: models or versions)",
        )
    return given[0], given[1]


def _reference(run: Path | None, rows: Path | None, tolerance: float | None, output: str) -> Reference:
    """The rows to send, and the answers of torch."""
    from optin_export.measure import TOLERANCES
    from optin_export.serving.deployed import Reference

    if rows is not None and run is None:
        return Reference.load(rows, output, tolerance or TOLERANCES["fp32"].error)
    if run is None or rows is not None:
        raise InputError("which rows to send?", "they come from one run", "give either --run RUN or --reference FILE")
    return reference_of_run(run, tolerance, output)


def reference_of_run(run: Path, tolerance: float | None, output: str) -> Reference:
    """The rows of a run, and the answers of torch. Raises InputError if the run has none."""
    from optin_export.serving.deployed import Reference
    from optin_export.workdir.files import read_json

    try:
        parity = read_json(run / "report.json")["parity"]
        # The served model has the recipe's precision, which has the widest tolerance of the run.
        known = max(parity["tolerance"], *(one["error"] for one in parity["tolerances"].values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {run}/report.json", str(error), "give a finished run") from None
    return Reference.load(run / "measure" / "reference.safetensors", output, tolerance or known)


def _output(outputs: dict[str, Any], model: Model) -> str:
    if len(outputs) != 1:
        raise InputError(
            f"{model} has {len(outputs)} outputs", ", ".join(outputs) or "none", "serve a model of this package"
        )
    return next(iter(outputs))
