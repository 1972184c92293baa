"""`optin-export init`: write a first recipe that a run accepts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from optin_export.cli._group import PATH, command
from optin_export.cli._interview import answer, parse_columns
from optin_export.cli._questions import QUESTIONS, completed_paths, parse_batches
from optin_export.errors import InputError

#: Sources whose name is a path.
_PATHS = ("csv", "tsv", "npz", "images", "wav")


@dataclass(frozen=True)
class _Wanted:
    """The recipe's content: the options of the command, completed by answers and guesses."""

    model: str
    task: str
    data: str
    evaluation: str | None
    goal: str
    columns: str | None
    evaluation_columns: str | None
    target: str | None
    batch: str | None
    gates: str | None
    weights: str | None
    name: str | None


@command
@click.option("--model", metavar="SOURCE", help=f"{QUESTIONS['model']}.")
@click.option("--task", metavar="TASK", help=f"{QUESTIONS['task']} (default: as its configuration says).")
@click.option("--data", metavar="SOURCE", help=f"{QUESTIONS['data']}.")
@click.option("--evaluation", metavar="SOURCE", help=f"{QUESTIONS['evaluation']}.")
@click.option("--columns", metavar="A=B,...", help="Columns of the data, e.g. text=sentence,label=1.")
@click.option("--evaluation-columns", metavar="A=B,...", help="Columns of --evaluation, if they differ.")
@click.option("--goal", metavar="KIND=VALUE", help=f"{QUESTIONS['goal']}.")
@click.option(
    "--target",
    metavar="ENGINE",
    help="An engine (auto: the fastest on this CPU), or fields of a target: engine=torch,device=cpu "
    "(default: onnxruntime).",
)
@click.option("--batch", metavar="N,...", help=f"{QUESTIONS['batch']} (default: 1,8).")
@click.option(
    "--gates",
    metavar="A=B,...",
    help=f"{QUESTIONS['gates']}: speedup=1.3,accuracy_drop=0.5 (default: the goal, or not slower and one point).",
)
@click.option("--weights", metavar="WEIGHTS", help="pretrained (default), random, or a checkpoint.")
@click.option("--name", metavar="NAME", help="Name of the run (default: that of the model).")
@click.option("--out", type=PATH, metavar="FILE", default="recipe.yaml", help="The recipe (default: recipe.yaml).")
@click.option("--schema", is_flag=True, help="Also write recipe.schema.json, which editors read.")
@click.option("--yes", "-y", is_flag=True, help="Ask no questions.")
@click.option("--force", is_flag=True, help="Overwrite files.")
def init(out: Path, schema: bool, yes: bool, force: bool, as_json: bool, **given: str | None) -> int:
    """Write a first recipe with comments; ask for what is missing.

    Questions are asked on a terminal only, and not with --yes or --json. The recipe is checked as a run checks it
    before it is written.
    """
    from optin_export.cli import _first_recipe
    from optin_export.recipe import Recipe
    from optin_export.recipe.manual import schema_text
    from optin_export.recipe.strict_yaml import parse_yaml
    from optin_export.workdir.files import write_text

    schema_file = out.parent / "recipe.schema.json"
    if os.path.lexists(out) and not force:
        raise InputError(f"{out} exists", "it would be overwritten", "choose another --out, or add --force")
    asking = not yes and not as_json and sys.stdin is not None and sys.stdin.isatty()
    wanted = _completed(given, asking, lambda text: click.echo(text, err=True) if asking else None)
    raw, comments = _composed(wanted, out.parent)
    notes = _fitted(raw, out.parent)
    text = _first_recipe.render(raw, schema_file.name if schema else None, comments)
    if parse_yaml(text) != raw:
        raise AssertionError("the YAML text does not read back as the recipe")
    if schema:
        write_text(schema_file, schema_text(Recipe))
    write_text(out, text)
    if as_json:
        print(json.dumps({"recipe": str(out), "content": raw, "notes": notes}))
    else:
        print("\n".join([*notes, f"wrote {out}; next: optin-export {out} --dry-run, then optin-export {out}"]))
    return 0


def _completed(given: dict[str, str | None], asking: bool, told: Callable[[str], None]) -> _Wanted:
    """The options, with questions asked or values guessed where one is missing. told: receives what was guessed.

    Raises:
        InputError: something is missing and no question can be asked.
    """
    from optin_export.cli._guess import task_of

    known = dict(given)
    with completed_paths() if asking else contextlib.nullcontext():
        for name in QUESTIONS:
            if known[name] is not None:
                continue
            if name == "task" and known["model"] and (guess := task_of(known["model"])) is not None:
                known["task"] = guess
                told(f"task: {guess}, by the model's configuration (another one: --task)")
            elif asking:
                answer(name, known)
    missing = [f"--{name}" for name in ("model", "task", "data", "goal") if not known[name]]
    if missing:
        why = " (the model does not say what its task is)" if "--task" in missing and known["model"] else ""
        raise InputError(
            "cannot write a recipe yet",
            f"missing: {', '.join(missing)}{why}",
            "give these options, or answer the questions on a terminal",
        )
    return _Wanted(**known)  # type: ignore[arg-type]  # those that may not be None are not missing


def _composed(wanted: _Wanted, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe, whose paths are relative to `folder`, and comments for some of its fields."""
    from optin_export.cli import _first_recipe
    from optin_export.cli._guess import COLUMNS, columns_of, sentence_of
    from optin_export.cli.measure import parse_target

    if wanted.task not in COLUMNS:
        raise InputError(f"unknown task '{wanted.task:.60}'", f"the tasks are {', '.join(COLUMNS)}", "name one of them")
    engine = wanted.target or "onnxruntime"
    fields = engine if "=" in engine else f"engine={engine}"
    target = parse_target(fields).model_dump(mode="json", exclude_defaults=True)

    def source(value: str, labelled: bool) -> dict[str, Any]:
        written = (wanted.evaluation_columns if labelled else None) or wanted.columns
        found = columns_of(value, wanted.task, labelled) if written is None else parse_columns(written)
        found = {name: place for name, place in found.items() if labelled or name != "label"}
        return {"source": _moved(value, folder), **({"columns": found} if found else {})}

    weights = {} if wanted.weights is None else {"weights": _moved_path(wanted.weights, folder)}
    sentence, longest = sentence_of(wanted.model, wanted.task)
    model: dict[str, Any] = {}
    comments: dict[str, str] = {}
    if sentence is not None:
        cut = "" if longest is None else f"; it cuts texts at {longest} tokens"
        if sentence.steps:
            model = {"pooling": sentence.poolings[0]} if len(sentence.poolings) == 1 else {}
            model["normalize"] = sentence.normalizes
            comments["model.source"] = f"modules.json of sentence-transformers says: {sentence.describe()}{cut}"
        else:
            comments["model.source"] = (
                f"a CrossEncoder of sentence-transformers: {sentence.activation} of its logits{cut}"
            )
    last = re.split(r"[/:]", wanted.model.rstrip("/"))[-1]
    composed = _first_recipe.compose(
        wanted.name or re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "model",
        {"source": _moved(wanted.model, folder), "task": wanted.task, **weights, **model},
        {**source(wanted.data, labelled=False), "samples": 512},
        source(wanted.evaluation, labelled=True) if wanted.evaluation else None,
        _first_recipe.parse_goal(wanted.goal),
        {"engine": "onnxruntime", "device": "cpu", **target},
        parse_batches(wanted.batch or "1,8"),
        None if wanted.gates is None else _first_recipe.parse_gates(wanted.gates),
    )
    return composed, comments


def _fitted(raw: dict[str, Any], folder: Path) -> list[str]:
    """Fit units, metric and length of the recipe to its model and data, in place; returns notes for the user.

    Raises:
        InputError: a run would refuse the recipe.
    """
    from optin_export.data.lengths import fitting_length, positions
    from optin_export.recipe import validate
    from optin_export.recipe.tasks import METRICS
    from optin_export.stages.preflight import Known, preflight, usable_units

    notes: list[str] = []
    known = Known()
    recipe = validate(raw, folder)
    found = preflight(recipe, known)
    most = positions(found.model) if found.model is not None and recipe.is_text else None
    if most is not None and most < recipe.export.sequence:
        raw["export"]["sequence"] = most
        found = preflight(recipe := validate(raw, folder), known)
    for metric in METRICS[recipe.model.task][1:]:
        if found.wrong is None or not found.wrong.what.startswith("the metric "):
            break
        raw["data"]["evaluation"]["metric"] = metric  # the default metric is not defined for this model
        found = preflight(recipe := validate(raw, folder), known)
    if found.model is not None and any(one.name == "units" and one.state == "refused" for one in found.findings):
        units = usable_units(found, recipe, known)
        if units and found.wrong is not None:
            raw["prune"]["units"] = list(units)
            notes.append(f"prune.units is {', '.join(units)}: {found.wrong.what} ({found.wrong.why})")
            found = preflight(recipe := validate(raw, folder), known)
    if found.wrong is None and found.sources is not None:
        length = fitting_length(found.sources)
        if length is not None and length.sequence != recipe.export.sequence:
            raw["export"]["sequence"] = length.sequence
            found = preflight(recipe := validate(raw, folder), known)
        if length is not None:
            why = "the most that the model takes" if length.limited else "chosen by the lengths of the texts"
            notes.append(
                f"export.sequence is {length.sequence}, {why}: {length.cut:.1%} of the calibration rows are cut"
            )
    if found.wrong is not None:
        raise found.wrong
    if found.refusal is not None:
        notes.append(f"this machine cannot run it: {found.refusal.what}: {found.refusal.why}")
    return notes + [str(one) for one in found.findings if one.state != "refused"]


def _moved(source: str, folder: Path) -> str:
    """A source whose path, if it exists, is made relative to the folder of the recipe."""
    prefix, colon, rest = source.partition(":")
    if not colon:
        return _moved_path(source, folder)
    if prefix in _PATHS or (prefix in ("hf", "hf-dataset") and Path(rest).exists()):
        return f"{prefix}:{_moved_path(rest, folder)}"
    if prefix == "py":
        file, _, function = rest.rpartition(":")
        return f"py:{_moved_path(file, folder)}:{function}" if file.endswith(".py") else source
    return source


def _moved_path(text: str, folder: Path) -> str:
    path = Path(text).expanduser()
    return text if path.is_absolute() or not path.exists() else os.path.relpath(path, folder)
