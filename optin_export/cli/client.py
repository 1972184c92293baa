"""`optin-export client`: two served models, measured from where their clients are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_export.serving.client import Model, Url
    from optin_export.serving.deployed import LoadSettings, Reference

EPILOG = "connects to the URLs given and to nothing else; exit code 3 if an answer is wrong"
#: Beyond these the measurement itself would be the load.
MOST_THREADS, MOST_BLOCKS, MOST_SECONDS = 256, 200, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", metavar="URL", nargs="+", help="grpc://HOST:PORT or http://HOST:PORT; one or both")
    parser.add_argument("--model", action="append", default=[], help="NAME or NAME:VERSION; first base, then pruned")
    parser.add_argument("--run", metavar="RUN", type=Path, help="its rows are sent, and its report takes the results")
    parser.add_argument("--reference", metavar="FILE", type=Path, help="instead: a run's measure/reference.safetensors")
    parser.add_argument("--tolerance", type=float, help="of answers (default: the run's parity tolerance)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows per request (1)")
    parser.add_argument("--concurrency", default="1,2,4,8", metavar="N,...", help="of the closed loop (1,2,4,8)")
    parser.add_argument("--rate", type=float, default=0.0, metavar="R", help="requests/s of the open loop (chosen)")
    parser.add_argument("--no-open-loop", action="store_true", help="closed loop only")
    parser.add_argument("--blocks", type=int, default=12, metavar="N", help="per setting (12)")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="per block and model (0.5)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for any answer (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shadow", action="store_true", help="the same rows to both models: compare their answers")
    parser.add_argument(
        "--import-perf-analyzer",
        nargs=2,
        type=Path,
        metavar=("BASE.CSV", "PRUNED.CSV"),
        help="put perf_analyzer's results into the run's report; measures nothing",
    )


def run(options: argparse.Namespace) -> int:
    from optin_export.serving.client import Connection, Model, Url

    urls = [Url.parse(text) for text in options.urls]
    models = _models([Model.parse(text) for text in options.model])
    concurrency = _checked(options)
    if options.import_perf_analyzer:
        return _import_csv(options, urls[0])
    connection = Connection(urls[0], options.timeout)
    try:
        for model in models:
            connection.ready(model)
        output, server = _output(connection.metadata(models[1])["outputs"], models[1]), connection.server()
    finally:
        connection.close()
    reference = _reference(options, output)
    if options.shadow:
        return _shadow(options, urls[0], models, reference, concurrency[0])
    return _measure(options, urls, models, reference, concurrency, server)


def _measure(
    options: argparse.Namespace,
    urls: list[Url],
    models: tuple[Model, Model],
    reference: Reference,
    concurrency: list[int],
    server: str,
) -> int:
    from optin_export.report import add_deployed, result_of
    from optin_export.serving import deployed

    found = []
    for result in deployed.measure(urls, models, reference, _load(options, concurrency)):
        found.append(result)
        if not options.json:
            _print(result)
    measured = [result.to_json() for result in found]
    results = [result_of(one, server) for one in measured]
    report = None
    if options.run is not None:
        about = {"server": server, "models": [str(model) for model in models]}
        report = add_deployed(options.run, results, measured, about)
    lines = _perf_analyzer(options, urls, models, reference, concurrency)
    if options.json:
        entries = [one.model_dump(mode="json") for one in results]
        print(json.dumps({"server": server, "results": entries, "perf_analyzer": lines}))
        return 0
    print(f"every answer of {server} was right: largest relative difference {max(r.largest_error for r in found):.2g}")
    if report is not None:
        for text in report.warnings:
            print(f"warning of the run itself: {text}")
        print(f"report: {options.run / 'report.html'}")
    print("\n".join(["the same with NVIDIA's perf_analyzer:", *lines]))
    return 0


def _print(result: Any) -> None:
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
    options: argparse.Namespace, url: Url, models: tuple[Model, Model], reference: Reference, concurrency: int
) -> int:
    from optin_export.serving.shadow import compare

    found = compare(url, models, reference, _load(options, [concurrency]))
    if options.json:
        print(json.dumps(found.to_json()))
        return 0
    print(f"{found.rows} rows to {models[0]} and {models[1]}:")
    print(f"  same largest value (class): {found.same_largest:.2%} of the rows")
    print(f"  cosine of the answers: {found.cosine[0]:.4f} on average, {found.cosine[1]:.4f} at least")
    print(f"  largest difference, relative to a row's largest value: {found.largest_difference:.3g}")
    low, high = found.speedup[1:]
    print(
        f"  p50 {found.base_p50:.3g} and {found.pruned_p50:.3g} ms: {found.speedup[0]:.2f}x ({low:.2f} to {high:.2f})"
    )
    return 0


def _load(options: argparse.Namespace, concurrency: list[int]) -> LoadSettings:
    from optin_export.serving.deployed import LoadSettings

    rate = None if options.no_open_loop else options.rate
    return LoadSettings(
        options.batch, concurrency, options.blocks, options.seconds, options.timeout, options.seed, rate
    )


def _perf_analyzer(
    options: argparse.Namespace,
    urls: list[Url],
    models: tuple[Model, Model],
    reference: Reference,
    concurrency: list[int],
) -> list[str]:
    """Its command lines; the rows are written beside the run's measurements, so that the lines work as they are."""
    from optin_export.serving.perf_analyzer import command_line, write_input_data
    from optin_export.ship.manifest import add_files
    from optin_export.workdir.lock import held

    data = Path("ROWS.json")
    if options.run is not None:
        data = options.run / "measure" / "perf_analyzer.json"
        with held(options.run, "optin-export client", wait=True):
            write_input_data(data, reference)
            add_files(options.run, [data])
    outputs = (Path("base.csv"), Path("pruned.csv"))
    return [
        command_line(urls[0], model, options.batch, concurrency, data, output)
        for model, output in zip(models, outputs, strict=True)
    ]


def _import_csv(options: argparse.Namespace, url: Url) -> int:
    from optin_export.errors import InputError
    from optin_export.report import add_deployed, result_of
    from optin_export.serving.perf_analyzer import results_of

    if options.run is None:
        raise InputError("--import-perf-analyzer has nowhere to put the results", "no run is given", "add --run RUN")
    base, pruned = options.import_perf_analyzer
    measured = results_of(base, pruned, url.protocol, options.batch)
    results = [result_of(one, "measured by perf_analyzer", "perf_analyzer") for one in measured]
    add_deployed(options.run, results, [], {"server": str(url), "models": options.model})
    if options.json:
        print(json.dumps({"results": [one.model_dump(mode="json") for one in results]}))
    else:
        print(f"{len(results)} settings imported; report: {options.run / 'report.html'}")
    return 0


def _models(given: list[Model]) -> tuple[Model, Model]:
    from optin_export.errors import InputError

    if len(given) != 2:
        raise InputError(
            f"{len(given)} models are named", "two are compared", "write --model BASE --model PRUNED, in this order"
        )
    if given[0] == given[1]:
        raise InputError(
            f"{given[0]} would be compared with itself",
            "both --model name it; of `ship: {layout: pruned}` no unpruned model is served",
            "name the unpruned model first (ship it with ship.layout: models or versions)",
        )
    return given[0], given[1]


def _checked(options: argparse.Namespace) -> list[int]:
    """The levels of concurrency. Raises InputError for numbers that make no measurement."""
    from optin_export.errors import InputError

    try:
        levels = [int(word) for word in options.concurrency.split(",")]
    except ValueError:
        levels = []
    limits = [
        ("--concurrency", bool(levels) and all(1 <= level <= MOST_THREADS for level in levels), f"1 to {MOST_THREADS}"),
        ("--blocks", 2 <= options.blocks <= MOST_BLOCKS, f"2 to {MOST_BLOCKS}"),
        ("--seconds", 0 < options.seconds <= MOST_SECONDS, f"more than 0, at most {MOST_SECONDS:g}"),
        ("--timeout", 0 < options.timeout <= 600, "more than 0, at most 600"),
        ("--batch", options.batch >= 1, "1 or more"),
        ("--rate", 0 <= options.rate <= 1e5, "0 (chosen) to 100000"),
        ("--tolerance", options.tolerance is None or 0 < options.tolerance < 1e3, "more than 0, less than 1000"),
        ("--seed", options.seed >= 0, "0 or more"),
    ]
    for name, fits, wanted in limits:
        if not fits:
            value = getattr(options, name.strip("-"))
            raise InputError(f"{name} is {value}", "no measurement can be made of it", f"give {wanted}")
    return levels


def _reference(options: argparse.Namespace, output: str) -> Reference:
    from optin_export.errors import InputError
    from optin_export.measure import TOLERANCES
    from optin_export.serving.deployed import Reference
    from optin_export.workdir.files import read_json

    if (options.run is None) == (options.reference is None):
        raise InputError("it is open which rows to send", "they come from a run", "give --run RUN or --reference FILE")
    tolerance = TOLERANCES["fp32"].error
    if options.run is not None:
        try:
            parity = read_json(options.run / "report.json")["parity"]
            # What is served is in the recipe's precision, whose tolerance is the widest of the run.
            tolerance = max(parity["tolerance"], *(one["error"] for one in parity["tolerances"].values()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {options.run}/report.json", str(error), "give a finished run") from None
    path = options.reference or options.run / "measure" / "reference.safetensors"
    return Reference.load(path, output, options.tolerance or tolerance)


def _output(outputs: dict[str, Any], model: Model) -> str:
    from optin_export.errors import InputError

    if len(outputs) != 1:
        raise InputError(
            f"{model} has {len(outputs)} outputs", ", ".join(outputs) or "none", "serve a model of this package"
        )
    return next(iter(outputs))
