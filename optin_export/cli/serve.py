"""`optin-export serve`: a run on a local server, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

EPILOG = "for a try-out on this machine only: loopback, no authentication"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("--environment", metavar="DIR", help="virtual environment with nvidia-pytriton")
    parser.add_argument("--ports", nargs=3, type=int, metavar=("HTTP", "GRPC", "METRICS"), help="default: free ones")
    parser.add_argument("--ready-seconds", type=float, default=120.0, metavar="S", help="to wait for it (120)")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop by itself after so long")
    parser.add_argument("--allow-failed", action="store_true", help="serve a run that failed its gates")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SHIP.B=C", help="override a field of the recipe's section ship"
    )


def run(options: argparse.Namespace) -> int:
    import tempfile

    from optin_export import ship
    from optin_export.serving import server
    from optin_export.workdir.lock import held

    program = server.find(options.environment)
    chosen = list(options.set)
    origin = ship.Origin.from_run(options.run, chosen)
    if origin.recipe.ship.backend not in program.backends():
        origin = ship.Origin.from_run(options.run, [*chosen, "ship.backend=python"])
    ship.check_tools()
    origin.check(ship.files_of(origin), options.allow_failed)
    with tempfile.TemporaryDirectory(prefix="optin-export-serve-") as scratch:
        with held(options.run, "optin-export serve"):  # until its files are copied
            shipped = ship.ship_models(origin, Path(scratch) / "models")
        # As Ctrl-C does: the server is stopped, and nothing stays behind.
        previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            with server.running(program, shipped.repository, options.ports, ready_seconds=options.ready_seconds) as one:
                _announce(options.json, origin.recipe.ship.backend, shipped.names, one)
                return _wait(one, options.seconds)
        except KeyboardInterrupt:
            return 0
        finally:
            signal.signal(signal.SIGTERM, previous)


def _announce(as_json: bool, backend: str, names: tuple[str, ...], one) -> None:  # type: ignore[no-untyped-def]
    urls = {"grpc": one.grpc, "http": one.http, "metrics": f"{one.metrics}/metrics"}
    if as_json:
        print(json.dumps({"models": names, "backend": backend, **urls}), flush=True)
    else:
        lines = [f"{', '.join(names)} by the backend {backend}", *(f"{name}: {url}" for name, url in urls.items())]
        print("\n".join([*lines, "Ctrl-C stops the server"]), flush=True)


def _wait(one, seconds: float | None) -> int:  # type: ignore[no-untyped-def]
    import subprocess

    from optin_export.errors import EnvironmentLacks

    try:
        one.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 0
    raise EnvironmentLacks("the server ended by itself", one.reason(), "see what it says of the model")
