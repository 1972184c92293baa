"""Run recipes at several budgets, keep what was measured, and render docs/results.md and the README's numbers from it.

    python tools/benchmark_recipes.py quickstart --budgets 0.6 0.5 0.4
    python tools/benchmark_recipes.py minilm_sts --budgets 0.6 0.5 0.4 --set model.source=FOLDER ...
    python tools/benchmark_recipes.py --render

Each run adds docs/measurements/<recipe>.json (the reports without paths); the page is rendered from all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import optin_export
from optin_export.progress import PlainLines
from optin_export.recipe import load_recipe

ROOT = Path(__file__).parent.parent
MEASUREMENTS = ROOT / "docs" / "measurements"
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
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


def stored(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def readme(text: str) -> str:
    """The README with what stands between `<!-- measured: NAME -->` and `<!-- end -->` made from the measurements."""
    budget = load_recipe(ROOT / "recipes" / "quickstart.yaml").prune.budget.fraction
    results = stored("quickstart")["results"]
    verdict = next(one["verdict"]["summary"] for one in results if one["budget"] == budget)
    parts = {"quickstart": f"```text\n{verdict}\n```", "minilm_sts": "\n".join(table(stored("minilm_sts")))}
    for name, content in parts.items():
        start, end = f"<!-- measured: {name} -->\n", "\n<!-- end -->"
        before, _, rest = text.partition(start)
        text = before + start + content + end + rest.partition(end)[2]
    return text


def page() -> str:
    """docs/results.md, from the stored measurements alone."""
    lines = [
        "# Results",
        "",
        "Written by `tools/benchmark_recipes.py` from the files in `docs/measurements/`; nothing is typed by hand.",
        "No retraining anywhere. Drop: points lost against the unpruned engine (negative: gained), with a 95 %",
        "bootstrap interval over the evaluation rows. Speedup: ratio of interleaved median latencies with its 95 %",
        "interval; times the share of MACs kept, it would be 1 if time went with MACs.",
    ]
    for path in sorted(MEASUREMENTS.glob("*.json")):
        lines += ["", f"## `recipes/{path.stem}.yaml`", "", *table(stored(path.stem))]
    return "\n".join(lines) + "\n"


def table(measured: dict[str, Any]) -> list[str]:
    """One recipe's measurements as a Markdown table, with the machine named below it."""
    machine = measured["results"][0]["environment"]
    packages = machine["packages"]
    head = "MACs kept|parameters kept|metric|unpruned|pruned|drop|batch|unpruned p50|pruned p50|speedup"
    columns = [*head.split("|"), "speedup x MACs kept"]
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(row for result in measured["results"] for row in _rows(result)),
        "",
        f"Machine: {machine['cpu']}, {machine['cpus']} cores, {machine['memory_gib']} GiB; "
        f"onnxruntime {packages.get('onnxruntime')}, torch {packages['torch']}, Python {machine['python']}.",
    ]


def _rows(result: dict[str, Any]) -> list[str]:
    accuracy, ratio = result["accuracy"], result["macs"]["ratio"]
    drop = f"{accuracy['drop']:.2f} ({accuracy['drop_low']:.2f} to {accuracy['drop_high']:.2f})"
    head = (
        f"| {ratio:.1%} | {result['params']['ratio']:.1%} | {accuracy['metric']} | {accuracy['base']:.2f} "
        f"| {accuracy['pruned']:.2f} | {drop}"
    )
    rows = []
    for one in result["latency"]:
        speedup = one["speedup"]
        shape = f"{one['batch']} x {one['sequence']}" if one["sequence"] else f"{one['batch']}"
        rows.append(
            f"{head} | {shape} | {one['base_ms']['p50']:.3g} ms | {one['pruned_ms']['p50']:.3g} ms "
            f"| {speedup['median']:.2f}x ({speedup['ci_low']:.2f} to {speedup['ci_high']:.2f}) "
            f"| {speedup['median'] * ratio:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="name of a file in recipes/, without .yaml")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.5, 0.4])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--render", action="store_true", help="only write docs/results.md again")
    options = parser.parse_args()
    if not options.render:
        measure(options.recipe, options.budgets, options.set, options.out)
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE} and the measured parts of {README}")


if __name__ == "__main__":
    main()
