"""`optin-export serve`: a local Triton Inference Server with the models of a run, until Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optin_export.cli._group import command, run_argument, ship_option
from optin_export.errors import EnvironmentLacks

if TYPE_CHECKING:
    from optin_export.serving.server import Server


@command
@run_argument
@click.option("--environment", metavar="DIR", help="A virtual environment that has nvidia-pytriton.")
@click.option("--ports", nargs=3, type=int, metavar="HTTP GRPC METRICS", help="Ports (default: free ones).")
@click.option("--ready-seconds", type=float, default=120.0, metavar="S", help="Limit for the server's start (120).")
@click.option("--seconds", type=float, metavar="S", help="Stop after this time.")
@click.option("--allow-failed", is_flag=True, help="Serve a run that failed its gates.")
@ship_option
def serve(
    run: Path,
    environment: str | None,
    ports: tuple[int, int, int] | None,
    ready_seconds: float,
    seconds: float | None,
    allow_failed: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Try a run out on a local Triton Inference Server.

    RUN is the folder of a finished run. The server listens on the loopback address only, without authentication. Ctrl-C
    stops it.
    """
    from optin_export import ship
    from optin_export.serving import server
    from optin_export.workdir.lock import held

    program = server.find(environment)
    origin = ship.Origin.from_run(run, overrides)
    if origin.recipe.ship.backend not in program.backends():
        overrides = (*overrides, "ship.backend=python")
    # By default a text model comes with an ensemble, whose tokenizer would stop a server that cannot import it.
    section = origin.recipe.ship
    if origin.recipe.is_text and section.ensemble is None and not server.can_import(program, "tokenizers"):
        overrides = (*overrides, "ship.ensemble=false")
        print("no model that takes plain text: the server's Python lacks the package tokenizers", file=sys.stderr)
    origin = ship.Origin.from_run(run, overrides)
    ship.check_tools()
    origin.check(ship.files_of(origin), allow_failed)
    with tempfile.TemporaryDirectory(prefix="optin-export-serve-") as scratch:
        with held(run, "optin-export serve"):  # until its files are copied
            shipped = ship.ship_models(origin, Path(scratch) / "models")
        # As Ctrl-C does: the server is stopped, and its temporary files are deleted.
        previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            with server.running(program, shipped.repository, ports, ready_seconds=ready_seconds) as one:
                _announce(as_json, origin.recipe.ship.backend, shipped.names, one)
                return _wait(one, seconds)
        except KeyboardInterrupt:
            return 0
        finally:
            signal.signal(signal.SIGTERM, previous)


def _announce(as_json: bool, backend: str, names: tuple[str, ...], one: Server) -> None:
    urls = {"grpc": one.grpc, "http": one.http, "metrics": f"{one.metrics}/metrics"}
    if as_json:
        print(json.dumps({"models": names, "backend": backend, **urls}), flush=True)
    else:
        lines = [
            f"serving {', '.join(names)} with the backend {backend}",
            *(f"{key}: {url}" for key, url in urls.items()),
        ]
        print("\n".join([*lines, "Ctrl-C stops the server"]), flush=True)


def _wait(one: Server, seconds: float | None) -> int:
    try:
        one.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 0
    raise EnvironmentLacks("the server ended by itself", one.reason(), "read what its log says about the model")
