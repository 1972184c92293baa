"""NVIDIA's perf_analyzer in addition to our client: its command line for the same rows, and its CSV as results.

CSV columns: docs of perf_analyzer, "Visualizing Latency vs. Throughput"; times there are microseconds.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.serving.client import Model, Url
from optin_export.serving.deployed import Arm, Reference
from optin_export.workdir.files import MAX_TEXT, read_text, write_json


def command_line(url: Url, model: Model, batch: int, concurrency: Sequence[int], data: Path, output: Path) -> str:
    """The command that measures one model in the closed loop at the same settings; writes the CSV `output`."""
    address = f"https://{url.address}" if url.secure and url.protocol == "http" else url.address
    words = ["perf_analyzer", "-m", model.name]
    words += ["-x", model.version] if model.version else []
    words += ["-u", address, "-i", url.protocol, "-b", str(batch), "--input-data", str(data)]
    words += ["--concurrency-range", f"{min(concurrency)}:{max(concurrency)}", "--percentile=99"]
    words += ["--ssl-grpc-use-ssl"] if url.secure and url.protocol == "grpc" else []
    words += ["--verbose-csv", "-f", str(output)]
    return shlex.join(words)


def write_input_data(path: Path, reference: Reference) -> None:
    """The reference rows in perf_analyzer's JSON."""
    count = len(reference.outputs["base"])
    write_json(
        path,
        {
            "data": [
                {
                    name: {"content": array[row].reshape(-1).tolist(), "shape": list(array.shape[1:])}
                    for name, array in reference.inputs.items()
                }
                for row in range(count)
            ]
        },
    )


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of perf_analyzer's CSV: {'mode', 'level' (threads, or requests a second), 'arm'}. Raises InputError."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, MAX_TEXT), newline="")))
        return [_row(row) for row in rows if row]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"cannot read {path} as perf_analyzer's CSV",
            f"{type(error).__name__}: {error}",
            "give the file that its option -f wrote, with p50, p90 and p99 latency",
        ) from None


def _row(row: dict[str, str]) -> dict[str, Any]:
    closed = "Concurrency" in row
    queue, compute = row.get("Server Queue"), row.get("Server Compute Infer")
    return {
        "mode": "closed" if closed else "open",
        "level": float(row["Concurrency" if closed else "Request Rate"]),
        "arm": Arm(
            p50=float(row["p50 latency"]) / 1e3,
            p90=float(row["p90 latency"]) / 1e3,
            p99=float(row["p99 latency"]) / 1e3,
            throughput=float(row["Inferences/Second"]),
            requests=0,
            queue=float(queue) / 1e3 if queue else None,
            compute=float(compute) / 1e3 if compute else None,
        ),
    }


def results_of(base: Path, pruned: Path, protocol: str, batch: int) -> list[dict[str, Any]]:
    """Both models' CSVs as results without intervals, for settings that are in both. Raises InputError for none."""
    first, second = ({(row["mode"], row["level"]): row["arm"] for row in read_csv(path)} for path in (base, pruned))
    common = sorted(set(first) & set(second))
    if not common:
        raise InputError(
            f"{base} and {pruned} have no setting in common", "levels differ", "measure both at the same ones"
        )
    return [
        {
            "setting": {"protocol": protocol, "mode": mode, "batch": batch, "concurrency": int(level), "rate": level},
            "base": asdict(first[mode, level]),
            "pruned": asdict(second[mode, level]),
            "speedup": None,
            "noise_floor": None,
            "blocks": None,
            "largest_error": None,
        }
        for mode, level in common
    ]
