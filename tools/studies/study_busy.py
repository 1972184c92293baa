"""The quickstart beside other work: python tools/studies/study_busy.py [--runs 5] [--processes 4]

Starts processes that compute without pause, runs the quickstart beside them, and notes what it printed. Two things must
hold in every run: no verdict of PASSED while the speedup times the share of MACs exceeds 1.3, and no PASSED whose line
does not name its warnings. Runs go into a temporary folder. Writes docs/measurements/studies/busy.json; exit code 1
where a run breaks a rule.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optin_export.environment import describe
from optin_export.measure.doubts import MOST_EFFICIENCY
from optin_export.report.schema import Report, read_report
from optin_export.workdir.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "studies" / "busy.json"
WORK = "import numpy as np\nx = np.ones((256, 256), np.float32)\nwhile True: x @ x"


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """So many processes that multiply matrices, each on one thread, until the end of the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", WORK], env=environment) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def quickstart(folder: Path, settings: list[str]) -> tuple[int, str]:
    """The exit code, and the last line that names the verdict."""
    command = [sys.executable, "-m", "optin_export", str(ROOT / "recipes" / "quickstart.yaml"), "--out", str(folder)]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    verdicts = [line for line in said if line.startswith(("PASSED", "FAILED", "NOT EVALUATED"))]
    return done.returncode, verdicts[-1] if verdicts else "\n".join(said[-5:])


def row_of(report: Report, code: int, line: str, seconds: float) -> dict[str, Any]:
    """One run: what it printed, and what it measured."""
    explained = [one.judged_speedup.median * report.macs.ratio for one in report.latency]
    return {
        "exit_code": code,
        "verdict": report.verdict.outcome,
        "line": line,
        "warnings": len(report.warnings),
        "speedups": [round(one.judged_speedup.median, 3) for one in report.latency],
        "largest_speedup_times_macs": round(max(explained), 3),
        "other_work": [round(one.neighbours.share, 3) for one in report.latency if one.neighbours is not None],
        "seconds": round(seconds, 1),
    }


def broken(row: dict[str, Any]) -> list[str]:
    """The rules that a run breaks; none where it was right to say what it said."""
    if row["verdict"] != "PASSED":
        return []
    rules = {
        "PASSED although the speedup is more than the MACs explain": row["largest_speedup_times_macs"]
        > MOST_EFFICIENCY,
        "PASSED without its warnings in the same line": bool(row["warnings"]) and "warning" not in row["line"],
    }
    return [name for name, is_broken in rules.items() if is_broken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as of optin-export")
    args = parser.parse_args()
    settings = [word for one in args.settings for word in ("--set", one)]
    rows: list[dict[str, Any]] = []
    machine = describe()
    about = {
        "processes": args.processes,
        "machine": {name: machine[name] for name in ("cpu", "cpus", "system")},
        "packages": machine["packages"],
    }
    with tempfile.TemporaryDirectory() as folder:
        # Half of the runs accept other work (`gates.other_work: 1`), so that their speedup is judged at all.
        for number in range(args.runs):
            accepted = number % 2 == 1
            more = ["--set", "gates.other_work=1"] if accepted else []
            with other_work(args.processes):
                start = time.perf_counter()
                code, line = quickstart(Path(folder) / str(number), [*settings, *more])
                seconds = time.perf_counter() - start
            row = row_of(read_report(Path(folder) / str(number)), code, line, seconds)
            rows.append({"other_work_accepted": accepted, **row, "broken_rules": broken(row)})
            print(json.dumps(rows[-1]), flush=True)
            write_json(RESULT, {**about, "rows": rows})
    sys.exit(any(row["broken_rules"] for row in rows))


if __name__ == "__main__":
    main()
