"""report.html: the report for people, one file that loads nothing. Takes the Report and, for plots, the run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors.numpy import load_file

from optin_export.engines import MODES
from optin_export.errors import InputError
from optin_export.recipe import model_of, precision_of
from optin_export.report import plots
from optin_export.report.headline import headlines
from optin_export.report.labels import labelled
from optin_export.report.names import meaning, plain, with_unit
from optin_export.report.next_steps import steps_of
from optin_export.report.patches import merged_patches
from optin_export.report.picture import network
from optin_export.report.plots import KEY
from optin_export.report.schema import DeployedResult, EngineResult, GateResult, LatencyResult, Report, Verdict
from optin_export.report.tradeoff import panels_of, tradeoff
from optin_export.workdir.files import MAX_TEXT, read_json, read_text, regular

#: `units.discover.NAME`, whose import would import torch.
_FOUND = "discovered"
NOT_EVALUATED = "not evaluated"


def render_html(report: Report, run: Path) -> str:
    """The page as text; the same report and run folder give the same text.

    run: the run folder. `measure/latency.json`, `scores/scores.safetensors`, `plan/plan.json`,
    `model/places.safetensors`, `manifest.json` and `recipe.yaml` are shown where present.
    Raises InputError if one of them is present but cannot be read.
    """
    scores = _read(run / "scores" / "scores.safetensors", lambda path: load_file(regular(path))) or {}
    samples = _read(run / "measure" / "latency.json", read_json) or []
    places = _read(run / "model" / "places.safetensors", lambda path: load_file(regular(path))) or {}
    speedup_gate = next((gate for gate in report.verdict.gates if gate.name == "speedup"), None)
    groups, accuracy = report.pruning.groups, report.accuracy
    plan = _read(run / "plan" / "plan.json", read_json) or {}
    recipe = _read(run / "recipe.yaml", lambda path: read_text(path, MAX_TEXT))
    judged = [one for one in report.latency if one.judged]
    drawn = {
        "tradeoff": tradeoff(panels_of(report.macs, accuracy, report.latency), accuracy.metric) if accuracy else "",
        "network": network(groups, _kept(plan), report.pruning.merged),
        "latency": plots.latency([entry for entry in samples if entry.get("judged", True)]),
        "importance": plots.importance(scores, groups),
        "speedup": plots.speedup(judged, speedup_gate.required if speedup_gate else None),
        "compensation": plots.compensation(groups),
        "places": merged_patches(places["pixels"], places["places"]) if places else "",
    }
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            plots={name: Markup(svg) for name, svg in drawn.items()},
            recipe=recipe,
            origin=_origin(_read(run / "manifest.json", read_json)),
            version=report.environment.get("optin_export"),
            slowest=max((stage.seconds for stage in report.stages), default=0.0),
            modes=MODES,
            layers=layer_rows(report.engines),
            headlines=headlines(report),
            steps=steps_of(report, run),
        )
    )


def sentence(verdict: Verdict) -> str:
    """The verdict's sentence without its first word if that repeats the badge."""
    return verdict.summary.removeprefix(verdict.outcome).removeprefix(": ").removeprefix(", ")


def layer_rows(engines: Sequence[EngineResult]) -> list[dict[str, Any]]:
    """Layers per engine of TensorRT. lost: the unpruned engine of the target fuses attention, this one does not.

    Counts of the built engine are None if it could not be read without a GPU.
    """
    fused = {(one.target, one.model): one.facts.get("fused_attention") for one in engines}
    return [
        {
            "target": one.target,
            "model": one.model,
            "network": one.facts["network_layers"],
            "built": one.facts.get("layers"),
            "fused": fused[one.target, one.model],
            "lost": fused[one.target, one.model] == 0 and bool(fused.get((one.target, "base"))),
        }
        for one in engines
        if "network_layers" in one.facts
    ]


def milliseconds(value: float | None) -> str:
    """Three significant digits: 0.0512 ms, 3.46 ms, 128 ms."""
    return NOT_EVALUATED if value is None else f"{_significant(value)} ms"


def times(value: float | None) -> str:
    return NOT_EVALUATED if value is None else f"{value:.2f}x"


def points(value: float | None, sign: bool = False) -> str:
    return NOT_EVALUATED if value is None else f"{_minus(format(value, '+.2f' if sign else '.2f'))} points"


def found_by(family: str) -> str:
    """How the units of a structure were found, for people: "family bert", "found by measurement", or both."""
    names = [name for name in family.split(" + ") if name != _FOUND]
    declared = [f"family {' + '.join(names)}"] if names else []
    measured = ["found by measurement"] if _FOUND in family.split(" + ") else []
    return " and ".join([*declared, *measured])


def origin(family: str) -> str:
    """How the units were found, as the beginning of a sentence."""
    found = found_by(family)
    return f"Units {found}" if found.startswith("found") else f"F{found[1:]}"


def signed(value: float) -> str:
    return _minus(f"{value:+.2f}")


def percent(value: float | None) -> str:
    return NOT_EVALUATED if value is None else f"{100 * value:.1f} %"


def count(value: int | None, unit: str = "") -> str:
    """Three significant digits with an SI prefix before the unit: 1.36 GMACs, 22.6 M."""
    if value is None:
        return NOT_EVALUATED
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{_significant(value / size)} {prefix}{unit}"
    return f"{value} {unit}".strip()


def memory(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**20:,.0f} MiB"


def number(value: Any) -> str:
    """Any other value: floats with four significant digits, None as not evaluated, a sequence with commas."""
    if value is None:
        return NOT_EVALUATED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value) or "none"
    return _minus(f"{value:.4g}") if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as rows: {"packages": {"torch": "2.9"}} -> ("packages.torch", "2.9")."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def gate_unit(gate: GateResult) -> str:
    units = {"speedup": "x", "budget.speedup": "x", "accuracy_drop": " points", "budget.latency_ms": " ms"}
    return units.get(gate.name, "")


def gate_measured(gate: GateResult) -> str:
    """The measured value with its unit, rounded, but not so far that it contradicts the verdict."""
    if gate.measured is None:
        return NOT_EVALUATED
    if gate.kind == "parity" or not math.isfinite(gate.measured):
        return f"{gate.measured:.3g}"
    decimals = 2 if gate_unit(gate) else 3
    while decimals < 9 and _holds(round(gate.measured, decimals), gate.relation, gate.required) != gate.passed:
        decimals += 1
    return _minus(f"{gate.measured:.{decimals}f}") + gate_unit(gate)


def deployed_p50(report: Report, measured: LatencyResult, engine: str) -> float | None:
    """Median latency of this engine for a single client at this batch, if the engine was served and measured."""
    if precision_of(engine) != measured.precision:
        return None
    for one in report.deployed:
        if one.batch == measured.batch and one.mode == "closed" and one.concurrency == 1:
            return float(getattr(one, model_of(engine)).p50)
    return None


def how_asked(one: DeployedResult) -> str:
    if one.mode == "closed":
        return f"closed loop, {one.concurrency} at a time"
    return f"open loop, {one.rate:g} requests/s"


def _holds(value: float, relation: str, limit: float) -> bool:
    return value >= limit if relation == ">=" else value <= limit


def _significant(value: float) -> str:
    """Three significant digits, never in exponent notation for the values that are measured here."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def _kept(plan: Any) -> dict[tuple[int, str], list[int]]:
    """(block, kind) -> indices of the units that stay, from plan.json; empty if it holds none."""
    groups = plan.get("groups") if isinstance(plan, Mapping) else None
    found: dict[tuple[int, str], list[int]] = {}
    for key, group in groups.items() if isinstance(groups, Mapping) else ():
        kept = group.get("kept") if isinstance(group, Mapping) else None
        if (match := KEY.fullmatch(key)) and isinstance(kept, list):
            found[int(match[1]), match[2]] = kept
    return found


def _origin(manifest: Any) -> dict[str, Any]:
    """Inputs of a run besides its recipe: the seed, and hashes of the recipe and of all files it reads."""
    if not isinstance(manifest, Mapping):
        return {}
    inputs = {f"sha256 of {name}": value for name, value in manifest.get("inputs", {}).items() if value}
    return {"seed": manifest.get("seed"), "sha256 of the recipe": manifest.get("recipe"), **inputs}


def _read(path: Path, reader: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"cannot read {path}", str(error), "run again, or delete the file to continue without it"
        ) from error


def environment() -> Environment:
    # autoescape=True, not by file name: names in a report come from recipes and file systems.
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = (
        *(sentence, milliseconds, times, points, percent, count, number, flat, gate_unit, gate_measured),
        *(how_asked, deployed_p50, signed, memory, origin, labelled, plain, meaning, with_unit),
    )
    made.filters.update({function.__name__: function for function in shown})
    return made
