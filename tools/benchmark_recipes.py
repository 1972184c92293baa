"""Run recipes at several budgets, keep what was measured, and render docs/results.md and the README's numbers from it.

    python tools/benchmark_recipes.py quickstart --budgets 0.6 0.5 0.4
    python tools/benchmark_recipes.py minilm_sts --budgets 0.6 0.5 0.4 --set model.source=FOLDER ...
    python tools/benchmark_recipes.py --render

Each run adds docs/measurements/<recipe>.json (the reports without paths); tools/render_results.py renders from them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import render_results

import optin_export
from optin_export.progress import PlainLines
from optin_export.recipe import load_recipe

ROOT, MEASUREMENTS = render_results.ROOT, render_results.MEASUREMENTS
KEPT = ("created", "verdict", "macs", "params", "accuracy", "parity", "latency", "stages", "environment")


def measure(name: str, budgets: list[float], overrides: list[str], out: Path) -> None:
    """Run recipes/<name>.yaml once per budget in one run folder (the scores are shared) and store the results."""
    results: list[dict[str, Any]] = []
    for budget in budgets:
        settings = [*overrides, f"prune.budget.macs={budget}"]
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", settings)
        report = optin_export.run(recipe, out / name, display=PlainLines(sys.stderr))
        assert report is not None
        print(report.verdict.summary)
        content = report.model_dump(mode="json")
        results.append({"budget": budget, **{key: content[key] for key in KEPT}})
    MEASUREMENTS.mkdir(parents=True, exist_ok=True)
    path = MEASUREMENTS / f"{name}.json"
    path.write_text(json.dumps({"recipe": name, "results": results}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="name of a file in recipes/, without .yaml")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.5, 0.4])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--render", action="store_true", help="measure nothing, only render again")
    options = parser.parse_args()
    if not options.render:
        measure(options.recipe, options.budgets, options.set, options.out)
    render_results.write()


if __name__ == "__main__":
    main()
