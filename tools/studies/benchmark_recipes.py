"""Run recipes at several budgets, keep what was measured, and render docs/results.md and the README's numbers from it.

    python tools/studies/benchmark_recipes.py quickstart --budgets 0.6 0.5 0.4
    python tools/studies/benchmark_recipes.py minilm_sts --budgets 0.6 0.5 0.4 --set model.source=FOLDER ...
    python tools/studies/benchmark_recipes.py minilm_sts --budgets 0.3 --precision int8 \\
        --set export.quantization=dynamic ...
    python tools/studies/benchmark_recipes.py --render

Each run adds to docs/measurements/<recipe>.json (the reports without paths), or with `--precision` to
<recipe>_<precision>.json beside it; a budget that is there already is measured again, the others stay.
render_results.py renders from them. What is measured runs in a process of its own, behind the engines' builds:
`--timer 'taskset -c 0'` puts a command before it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import render_results

import optin_export
from optin_export.displays import PlainLines
from optin_export.recipe import load_recipe
from optin_export.report.schema import read_report

ROOT, MEASUREMENTS = render_results.ROOT, render_results.MEASUREMENTS
KEPT = ("created", "verdict", "precision", "macs", "params", "accuracy", "parity", "latency", "stages", "environment")
#: Exit codes of a run that ended with a report: every gate passed, or a gate (not parity) failed.
REPORTED = (0, 4)


def measure(
    name: str, budgets: list[float], overrides: list[str], out: Path, precision: str | None, timer: list[str]
) -> None:
    """Run recipes/<name>.yaml once per budget in one run folder (the scores are shared) and store the results."""
    stored = f"{name}_{precision}" if precision else name
    path, folder = MEASUREMENTS / f"{stored}.json", out / stored
    file = ROOT / "recipes" / f"{name}.yaml"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    for budget in budgets:
        settings = [
            *overrides,
            f"prune.budget.macs={budget}",
            *([f"export.precision={precision}"] if precision else []),
        ]
        recipe = load_recipe(file, settings)
        optin_export.run(recipe, folder, stop_after="engines", display=PlainLines(sys.stderr))
        command = [*timer, sys.executable, "-m", "optin_export", str(file), "--out", str(folder)]
        code = subprocess.run([*command, *(word for one in settings for word in ("--set", one))]).returncode
        if code not in REPORTED:
            sys.exit(code)
        report = read_report(folder)
        content = report.model_dump(mode="json")
        export = recipe.export.model_dump(mode="json", include={"quantization", "calibration", "calibration_rows"})
        row = {"budget": budget, **({"export": export} if precision else {}), **{key: content[key] for key in KEPT}}
        results = sorted([*(old for old in results if old["budget"] != budget), row], key=lambda row: -row["budget"])
        MEASUREMENTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"recipe": name, "results": results}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="name of a file in recipes/, without .yaml")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.5, 0.4])
    parser.add_argument("--precision", choices=("fp16", "bf16", "int8", "fp8"), help="default: the recipe's own")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--timer", default="", help="command before the process that measures")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--render", action="store_true", help="measure nothing, only render again")
    options = parser.parse_args()
    if not options.render:
        timer = shlex.split(options.timer)
        measure(options.recipe, options.budgets, options.set, options.out, options.precision, timer)
    render_results.write()


if __name__ == "__main__":
    main()
