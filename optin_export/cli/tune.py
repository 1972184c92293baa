"""`optin-export tune`: the number of instances of a served model, found by measurement on this machine."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optin_export.cli._group import Real, command, run_argument, ship_option
from optin_export.cli.client import levels
from optin_export.errors import InputError

if TYPE_CHECKING:
    from optin_export.serving.server import Program
    from optin_export.serving.tuning import Row
    from optin_export.ship import Origin

FILE = Path("measure", "serving.json")


@command
@run_argument
@click.option("--environment", metavar="DIR", help="A virtual environment that has nvidia-pytriton.")
@click.option(
    "--instances",
    callback=lambda *given: given[2] and levels(*given),
    metavar="N,...",
    help="Instances to try (default: 1, 2, 4 ... up to one per CPU core).",
)
@click.option("--clients", default="1,4,8", callback=levels, metavar="N,...", help="Requests at a time (1,4,8).")
@click.option(
    "--latency", type=Real(0, min_open=True), metavar="MS", help="Suggest only settings whose p99 is at most this."
)
@click.option("--blocks", type=click.IntRange(2, 200), default=4, metavar="N", help="Blocks of each setting (4).")
@click.option("--seconds", type=Real(0, 60, min_open=True), default=1.0, metavar="S", help="Seconds of a block (1).")
@click.option(
    "--timeout", type=Real(0, 600, min_open=True), default=30.0, metavar="S", help="Limit for one answer (30)."
)
@ship_option
def tune(
    run: Path,
    environment: str | None,
    instances: list[int] | None,
    clients: list[int],
    latency: float | None,
    blocks: int,
    seconds: float,
    timeout: float,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Find the server settings that serve the most rows a second.

    RUN is the folder of a finished run. A local Triton server serves its pruned model once per number of instances; all
    settings are measured in turns, with every answer checked. The table is kept in the run (measure/serving.json).

    Exit code 0: measured; 3: an answer was wrong; 4: no setting has the wanted latency; 5: there is no server.
    """
    from optin_export import ship
    from optin_export.serving import server, tuning
    from optin_export.workdir.lock import held

    program = server.find(environment)
    origin = _origin(run, overrides, program)
    ship.check_tools()
    origin.check(ship.files_of(origin), allow_failed=True)
    tried = instances or _counts(os.cpu_count() or 1)
    load = tuning.Load(origin.recipe.export.batch, clients, blocks, seconds, timeout)
    with tempfile.TemporaryDirectory(prefix="optin-export-tune-") as scratch:
        with held(run, "optin-export tune"):  # until its files are copied
            models = _shipped(origin, tried, Path(scratch) / "models")
        with server.running(program, Path(scratch) / "models") as one:
            rows = _measure(run, one.grpc, models, load)
    chosen = tuning.best(rows, latency)
    described = {
        "backend": origin.recipe.ship.backend,
        "latency_limit_ms": latency,
        "settings": [row.to_json() for row in rows],
        "suggested": None if chosen is None else chosen.to_json(),
    }
    _keep(run, described)
    if as_json:
        print(json.dumps(described))
    else:
        _print(run, rows, chosen, latency, origin)
    return 0 if chosen is not None else 4


def _origin(run: Path, overrides: tuple[str, ...], program: Program) -> Origin:
    from optin_export import ship

    alone = (*overrides, "ship.layout=pruned", "ship.ensemble=false")
    origin = ship.Origin.from_run(run, alone)
    if origin.recipe.ship.config and "instance_group" in str(origin.recipe.ship.config):
        raise InputError(
            "ship.config sets instance_group", "its number of instances would be used for every setting", "leave it out"
        )
    if origin.recipe.ship.backend not in program.backends():
        origin = ship.Origin.from_run(run, [*alone, "ship.backend=python"])
    return origin


def _counts(cores: int) -> list[int]:
    return [count for count in (1, 2, 4, 8, 16, 32) if count <= cores]


def _shipped(origin: Origin, tried: list[int], place: Path) -> dict[int, str]:
    from dataclasses import replace

    from optin_export import ship

    names = {}
    for count in sorted(set(tried)):
        section = origin.recipe.ship.model_copy(update={"instances": count})
        one = replace(origin, recipe=origin.recipe.model_copy(update={"ship": section}))
        names[count] = ship.ship_models(one, place, f"instances-{count}").names[0]
    return names


def _measure(run: Path, url: str, names: dict[int, str], load: Any) -> list[Row]:
    from optin_export.cli.client import reference_of_run
    from optin_export.serving.client import Connection, Model, Url
    from optin_export.serving.tuning import measure

    parsed = Url.parse(url)
    models = {count: Model(name) for count, name in names.items()}
    connection = Connection(parsed, load.timeout)
    try:
        output = next(iter(connection.metadata(next(iter(models.values())))["outputs"]))
    finally:
        connection.close()
    return measure(parsed, models, reference_of_run(run, None, output), load)


def _keep(run: Path, described: dict[str, Any]) -> None:
    from optin_export.ship.manifest import add_files
    from optin_export.workdir.files import write_json
    from optin_export.workdir.lock import held

    with held(run, "optin-export tune", wait=True):
        write_json(run / FILE, described)
        add_files(run, [run / FILE])


def _print(run: Path, rows: list[Row], chosen: Row | None, latency: float | None, origin: Origin) -> None:
    print("instances  rows/request  clients    rows/s (lowest to highest)    p50 ms    p99 ms  rows/batch")
    for row in rows:
        together = "" if row.rows_per_batch is None else f"{row.rows_per_batch:.2f}"
        mark = "  <-" if row == chosen else ""
        print(
            f"{row.instances:>9}  {row.batch:>12}  {row.clients:>7}  {row.throughput:>8.4g}"
            f" ({f'{row.lowest:.4g} to {row.highest:.4g}':<18})  {row.p50:>8.3g}  {row.p99:>8.3g}  {together:>10}{mark}"
        )
    backend = origin.recipe.ship.backend
    print(f"measured with the backend {backend} and clients on this machine, which take a part of its CPUs")
    if chosen is None:
        print(f"no setting has a p99 of at most {latency:g} ms; the lowest is {min(row.p99 for row in rows):.3g} ms")
    else:
        print(
            f"suggested: instances {chosen.instances}, rows in a request {chosen.batch}, clients {chosen.clients}\n"
            f"ship it: optin-export ship {run} --to models --set ship.instances={chosen.instances}"
        )
