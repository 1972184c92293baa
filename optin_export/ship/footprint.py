"""How long one instance of a shipped model takes to load, and how much memory it holds: for its manifest.

Measured once per graph on the machine that ships, and kept in the run's `measure/footprint.json`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

from optin_export.ship.load_alone import LIBRARIES
from optin_export.ship.manifest import NAME, add_files
from optin_export.ship.models import Served, served_as
from optin_export.ship.origin import Origin
from optin_export.workdir.files import read_json, write_json
from optin_export.workdir.onnx_files import sha256_graph

FILE = "measure/footprint.json"
#: Seconds until loading is given up.
PATIENCE = 300.0


def footprints(origin: Origin, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """For 'base' and 'pruned': load_seconds and memory_bytes of one instance on the CPU, or `not_measured`, why.

    memory_bytes: what the process holds more after one run at the largest batch than before loading.
    """
    path = origin.folder / FILE
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(read_json(path))
    found, new = {}, False
    for which in kinds:
        one = served_as(origin, which)
        key = _key(origin, one)
        if key not in known:
            known[key], new = _measure(origin, one), True
        found[which] = known[key]
    if new:
        # A run on a read-only disk ships all the same.
        with contextlib.suppress(OSError):
            write_json(path, known)
            if (origin.folder / NAME).is_file():
                add_files(origin.folder, [path])
    return found


def _key(origin: Origin, one: Served) -> str:
    digest = sha256_graph(one.file)[:16]
    return f"{digest} {one.library} threads={one.target.threads} batch={max(origin.recipe.export.batch)}"


def _measure(origin: Origin, one: Served) -> dict[str, Any]:
    batch, threads = max(origin.recipe.export.batch), one.target.threads
    about = {"library": one.library, "batch": batch, "threads": threads}
    if one.library not in LIBRARIES or one.target.device != "cpu":
        return {**about, "not_measured": "only onnxruntime and openvino on a CPU are"}
    program = [sys.executable, "-m", "optin_export.ship.load_alone"]
    words = [one.library, str(one.file), str(threads), str(origin.reference), str(batch)]
    try:
        done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=PATIENCE, check=True)
        return {**about, **json.loads(done.stdout)}
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    return {**about, "not_measured": reason[:300]}
