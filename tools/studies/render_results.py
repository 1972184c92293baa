"""Render docs/results.md, its plots in docs/figures/, docs/breadth.md and the README's numbers from docs/measurements/.

    python tools/studies/render_results.py

docs/measurements/accuracy/<case>.json comes from benchmark_accuracy.py (torch models, every scorer and repair),
docs/measurements/<recipe>.json from benchmark_recipes.py (engines, with latency), docs/measurements/studies/ from
the studies that `render_studies` names, docs/measurements/gpu/ from tools/gpu_acceptance.py. What is not there is left
out.
"""

from __future__ import annotations

import json
from pathlib import Path

import plot_accuracy
import render_accuracy
import render_breadth
import render_cost
import render_cpu_engines
import render_engines
import render_gpu
import render_real_models
import render_studies
from accuracy_tables import cases
from render_engines import recipes

from optin_export.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"
BREADTH = ROOT / "docs" / "breadth.md"
#: The README's first table: run, what the reader calls it, share of the MACs that its pruned model keeps.
CHOICES = (
    ("minilm-sts", "MiniLM-L6", 0.5),
    ("mpnet-sts", "all-mpnet-base-v2", 0.4),
    ("deit-tiny-photos", "DeiT-Tiny", 0.7),
)
PAGE, FIGURES, README = ROOT / "docs" / "results.md", ROOT / "docs" / "figures", ROOT / "README.md"


def page(measurements: Path = MEASUREMENTS) -> str:
    """docs/results.md, from the stored measurements alone."""
    measured = cases(measurements)
    lines = [
        "# Results",
        "",
        "`tools/studies/render_results.py` writes this page from `docs/measurements/`; no number is typed by hand.",
        "No model was retrained, except in the section on fine-tuning.",
        *render_engines.summary(recipes(measurements), measured),
        *render_accuracy.sections(measured),
        *render_engines.sections(recipes(measurements), measured),
        *render_studies.sections(measurements / "studies"),
        *render_gpu.sections(measurements / "gpu"),
    ]
    return "\n".join(lines) + "\n"


def breadth_page(measurements: Path = MEASUREMENTS) -> str:
    """docs/breadth.md, from the stored measurements alone."""
    breadth, discovery = (measurements / "studies" / f"{name}.json" for name in ("breadth", "discovery"))
    timed = json.loads(discovery.read_text(encoding="utf-8")) if discovery.is_file() else None
    return render_breadth.page(json.loads(breadth.read_text(encoding="utf-8")), timed)


def readme(text: str, measurements: Path = MEASUREMENTS) -> str:
    """The README with the text between `<!-- measured: NAME -->` and `<!-- end -->` rendered from the measurements.

    Raises ValueError if the README has no place for a part.
    """
    stored = recipes(measurements)
    engines = json.loads((measurements / "studies" / "cpu_engines.json").read_text(encoding="utf-8"))
    real = json.loads((measurements / "studies" / "real_models.json").read_text(encoding="utf-8"))
    costs = json.loads((measurements / "studies" / "cost.json").read_text(encoding="utf-8"))
    budget = load_recipe(ROOT / "recipes" / "quickstart.yaml").prune.budget.fraction
    verdict = next(one["verdict"]["summary"] for one in stored["quickstart"]["results"] if one["budget"] == budget)
    parts = {
        "quickstart": f"```text\n{verdict}\n```",
        "choices": "\n".join(render_cpu_engines.choices(engines, CHOICES)),
        "expectations": "\n".join(render_engines.expectations(stored, cases(measurements))),
        "real": "\n".join(render_real_models.expected(real)),
        "cost": "\n".join(render_cost.expected(costs)),
    }
    for name, content in parts.items():
        start, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise ValueError(f"the README has no place for the numbers of {name}: {start.strip()}")
        text = before + start + content + "\n" + end + rest.partition(end)[2]
    return text


def figures(measurements: Path = MEASUREMENTS) -> dict[str, str]:
    """{file name: SVG} of every plot on the page."""
    plots = plot_accuracy.figures(cases(measurements))
    plots |= render_studies.figures(measurements / "studies")
    return plots | render_engines.figures(recipes(measurements))


def write() -> None:
    """Write the pages, their plots and the measured parts of the README."""
    PAGE.write_text(page(), encoding="utf-8")
    BREADTH.write_text(breadth_page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    plots = figures()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, drawn in plots.items():
        (FIGURES / name).write_text(drawn, encoding="utf-8")
    print(f"wrote {PAGE}, {BREADTH}, {len(plots)} plots in {FIGURES} and the measured parts of {README}")


if __name__ == "__main__":
    write()
