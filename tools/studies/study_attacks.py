"""How hostile input is met, by kind: `python tools/studies/study_attacks.py` makes every attempt of tests/attacks.

An attempt is a command line with something hostile in it: another thing in a file's place, a recipe, an image, a
checkpoint or a manifest by anybody. It is refused cleanly if it ends in time with an exit code of a refusal and three
printable lines (what happened, why, what to do), has run none of the input's code, started no process, connected to
nobody and changed no file outside its folder. Where a command may do without a file, or where what is wrong is its
answer (`verify`), that end is as good. One core, about half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from optin_export.environment import describe
from optin_export.workdir.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "studies" / "attacks.json"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attacks-") as folder:
        counted = Path(folder) / "counted.json"
        more = {"OPTIN_EXPORT_ATTACKS": "all", "OPTIN_EXPORT_ATTACKS_OUT": str(counted), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "--tb=short",
            f"--basetemp={folder}/runs",
            "tests/attacks",
        ]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **more})
        kinds = json.loads(counted.read_text(encoding="utf-8"))
    total = {name: sum(kind[name] for kind in kinds) for name in ("attempts", "clean")}
    print(json.dumps(total), flush=True)
    seconds = round(time.monotonic() - began)
    write_json(options.out, {"kinds": kinds, **total, "seconds": seconds, "environment": describe()})
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
