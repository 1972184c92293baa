"""`optin-export init`: a first recipe, validated before it is written."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from optin_export.errors import InputError

EPILOG = "on a terminal what is missing is asked for; with --yes, or without a terminal, nothing is"
_PATHS = ("csv", "tsv", "npz", "images")
_QUESTIONS = {
    "model": "Model: a folder, hf:ID, timm:NAME or py:FILE.py:FUNCTION",
    "task": "Task",
    "data": "Data to calibrate on, unlabelled: csv:FILE, tsv:FILE, npz:FILE, images:FOLDER, hf-dataset:NAME",
    "evaluation": "Held-out, labelled data to judge by (empty: no accuracy is measured)",
    "goal": "Goal: macs=0.5, params=0.5, speedup=1.5, latency_ms=2 or accuracy_drop=0.5",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="SOURCE", help=_QUESTIONS["model"])
    parser.add_argument("--task", help="what the model is for (default: by the model's configuration)")
    parser.add_argument("--data", metavar="SOURCE", help=_QUESTIONS["data"])
    parser.add_argument("--evaluation", metavar="SOURCE", help=_QUESTIONS["evaluation"])
    parser.add_argument("--columns", metavar="A=B,...", help="where the columns are, e.g. text=sentence,label=1")
    parser.add_argument("--evaluation-columns", metavar="A=B,...", help="the same, where --evaluation has others")
    parser.add_argument("--goal", metavar="KIND=VALUE", help=_QUESTIONS["goal"])
    parser.add_argument(
        "--target", metavar="ENGINE", default="onnxruntime", help="an engine, or engine=torch,device=cpu"
    )
    parser.add_argument("--weights", help="pretrained (default), random, or a checkpoint")
    parser.add_argument("--name", help="of the run (default: by the model)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("recipe.yaml"), help="default: recipe.yaml")
    parser.add_argument("--schema", action="store_true", help="also write recipe.schema.json, and name it for editors")
    parser.add_argument("--yes", "-y", action="store_true", help="ask nothing")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(options: argparse.Namespace) -> int:
    from optin_export.cli import _first_recipe
    from optin_export.recipe import Recipe
    from optin_export.recipe.manual import schema_text
    from optin_export.recipe.strict_yaml import parse_yaml
    from optin_export.workdir.files import write_text

    out, schema = options.out, options.out.parent / "recipe.schema.json"
    if os.path.lexists(out) and not options.force:
        raise InputError(f"{out} is already there", "it would be overwritten", "choose another --out, or add --force")
    _fill(options)
    raw, notes = _composed(options)
    told = _fitted(raw, out.parent)
    text = _first_recipe.render(raw, schema.name if options.schema else None, notes)
    if parse_yaml(text) != raw:
        raise AssertionError("the YAML that was composed does not read back")
    if options.schema:
        write_text(schema, schema_text(Recipe))
    write_text(out, text)
    if options.json:
        print(json.dumps({"recipe": str(out), "content": raw, "notes": told}))
    else:
        print("\n".join([*told, f"{out} is written; next: optin-export {out} --dry-run, optin-export {out}"]))
    return 0


def _fitted(raw: dict[str, Any], folder: Path) -> list[str]:
    """Fit the recipe to its model and data, in place; returns what there is to say about it.

    Raises InputError where a run would refuse the recipe all the same.
    """
    from optin_export.data.lengths import fitting_length, positions
    from optin_export.recipe import validate
    from optin_export.recipe.schema import METRICS
    from optin_export.stages.preflight import Known, preflight, usable_units

    told: list[str] = []
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
        raw["data"]["evaluation"]["metric"] = metric  # the usual one is not defined for this model
        found = preflight(recipe := validate(raw, folder), known)
    if found.model is not None and any(one.name == "units" and one.state == "refused" for one in found.findings):
        units = usable_units(found.model, recipe)
        if units and found.wrong is not None:
            raw["prune"]["units"] = list(units)
            told.append(f"prune.units is {', '.join(units)}: {found.wrong.what} ({found.wrong.why})")
            found = preflight(recipe := validate(raw, folder), known)
    if found.wrong is None and found.sources is not None:
        length = fitting_length(found.sources)
        if length is not None and length.sequence != recipe.export.sequence:
            raw["export"]["sequence"] = length.sequence
            found = preflight(recipe := validate(raw, folder), known)
        if length is not None:
            why = "all that the model takes" if length.limited else "by the texts' lengths"
            told.append(
                f"export.sequence is {length.sequence}, {why}: {length.cut:.1%} of the calibration rows are cut"
            )
    if found.wrong is not None:
        raise found.wrong
    if found.refusal is not None:
        told.append(f"not on this machine: {found.refusal.what}: {found.refusal.why}")
    return told + [str(one) for one in found.findings if one.state != "refused"]


def _fill(options: argparse.Namespace) -> None:
    """Complete the options by asking. Raises InputError where something is missing and nobody can be asked."""
    from optin_export.cli._guess import task_of
    from optin_export.recipe.manual import describe_fields

    asking = not options.yes and not options.json and sys.stdin is not None and sys.stdin.isatty()
    asked = False
    for name in ("model", "task", "data", "evaluation", "goal"):
        if getattr(options, name) is not None:
            continue
        guess = task_of(options.model) if name == "task" and options.model else None
        if asking:
            known = describe_fields()["model.task"].choices if name == "task" else ()
            setattr(options, name, _ask(_QUESTIONS[name], guess, known, optional=name == "evaluation"))
            asked = True
        else:
            setattr(options, name, guess)
    missing = [f"--{name}" for name in ("model", "task", "data", "goal") if not getattr(options, name)]
    if missing:
        tried = " (the task cannot be told from the model)" if "--task" in missing and options.model else ""
        raise InputError(
            "cannot write a recipe yet", f"missing: {', '.join(missing)}{tried}", "give these flags, or use a terminal"
        )
    if asked and not options.evaluation:
        options.evaluation = None


def _ask(question: str, guess: str | None, known: tuple[Any, ...], optional: bool) -> str | None:
    """An answer from the terminal; asked again until it is usable. Raises InputError where the input ends."""
    while True:
        if known:
            print(f"  {', '.join(known)}", file=sys.stderr)
        print(f"{question}{f' [{guess}]' if guess else ''}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise InputError(
                "cannot write a recipe yet", "the input ended before the last answer", "give flags instead"
            )
        answer = line.strip() or guess
        if answer is None and optional:
            return None
        if answer and (not known or answer in known):
            return answer
        print("  please answer" + (" with one of them" if known else ""), file=sys.stderr)


def _composed(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe, and what is said above its fields besides their description."""
    from optin_export.cli import _first_recipe
    from optin_export.cli._guess import COLUMNS, columns_of, sentence_of
    from optin_export.cli.measure import parse_target

    if options.task not in COLUMNS:
        raise InputError(
            f"unknown task '{options.task:.60}'", f"the tasks are {', '.join(COLUMNS)}", "name one of them"
        )
    given = options.target if "=" in options.target else f"engine={options.target}"
    target = parse_target(given).model_dump(mode="json", exclude_defaults=True)

    def source(value: str, labelled: bool) -> dict[str, Any]:
        told = (options.evaluation_columns if labelled else None) or options.columns
        found = columns_of(value, options.task, labelled) if told is None else _columns(told)
        found = {name: place for name, place in found.items() if labelled or name != "label"}
        return {"source": _moved(value, options.out.parent), **({"columns": found} if found else {})}

    weights = {} if options.weights is None else {"weights": _moved_path(options.weights, options.out.parent)}
    sentence, longest = sentence_of(options.model, options.task)
    model: dict[str, Any] = {}
    notes: dict[str, str] = {}
    if sentence is not None:
        at = "" if longest is None else f"; it cuts texts at {longest} tokens"
        if sentence.steps:
            model = {"pooling": sentence.poolings[0]} if len(sentence.poolings) == 1 else {}
            model["normalize"] = sentence.normalizes
            notes["model.source"] = f"modules.json of sentence-transformers says: {sentence.describe()}{at}"
        else:
            notes["model.source"] = f"a CrossEncoder of sentence-transformers: {sentence.activation} of its logits{at}"
    name = options.name or re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", options.model.rstrip("/"))[-1]).strip(
        "-._"
    )
    composed = _first_recipe.compose(
        name or "model",
        {"source": _moved(options.model, options.out.parent), "task": options.task, **weights, **model},
        {**source(options.data, labelled=False), "samples": 512},
        None if not options.evaluation else source(options.evaluation, labelled=True),
        _first_recipe.parse_goal(options.goal),
        {"engine": "onnxruntime", "device": "cpu", **target},
    )
    return composed, notes


def _columns(text: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for part in text.split(","):
        name, equals, place = part.partition("=")
        if not equals or not name or not place:
            raise InputError(
                f"cannot read --columns {text}", f"'{part}' is not NAME=PLACE", "write text=sentence,label=1"
            )
        found[name.strip()] = int(place) if place.isdigit() else place.strip()
    return found


def _moved(source: str, folder: Path) -> str:
    """A source whose path is as seen from the recipe's folder, where it is there as seen from here."""
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
