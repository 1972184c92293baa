"""What `init` asks on a terminal, with the check and the default of each question."""

from __future__ import annotations

from functools import partial

import click

from optin_export.cli._questions import (
    TARGETS,
    Check,
    ask,
    check_data,
    check_model,
    check_one_of,
    parse_batches,
)
from optin_export.errors import InputError

#: Options so far: None is not answered.
Known = dict[str, str | None]


def answer(name: str, known: Known) -> None:
    """Ask for one option, and put the answer into `known`."""
    from optin_export.cli._first_recipe import parse_gates
    from optin_export.cli._guess import COLUMNS
    from optin_export.cli.measure import parse_target

    choices = {"task": dict.fromkeys(COLUMNS, ""), "target": TARGETS}.get(name)
    checks: dict[str, Check] = {
        "model": check_model,
        "task": partial(check_one_of, list(COLUMNS)),
        "data": partial(_check_rows, known, "columns"),
        "evaluation": partial(_check_rows, known, "evaluation_columns"),
        "goal": partial(_check_goal, known),
        "target": lambda text: parse_target(text if "=" in text else f"engine={text}"),
        "batch": parse_batches,
        "gates": parse_gates,
    }
    defaults = {"evaluation": "", "goal": "50%", "target": "1", "batch": "1,8"}
    default = _usual_gates(known) if name == "gates" else defaults.get(name)
    known[name] = ask(name, default, checks[name], choices)


def _check_goal(known: Known, text: str) -> None:
    from optin_export.cli._first_recipe import parse_goal

    kind, _ = parse_goal(text)
    if kind == "accuracy_drop" and not known["evaluation"]:
        raise InputError("accuracy_drop cannot be searched", "there is no evaluation data", "name another goal")


def _usual_gates(known: Known) -> str:
    from optin_export.cli._first_recipe import parse_goal, usual_gates

    found = usual_gates(parse_goal(known["goal"] or ""), bool(known["evaluation"]))
    return ",".join(f"{name}={value:g}" for name, value in found.items())


def _check_rows(known: Known, option: str, source: str) -> None:
    """Check a source of rows, and find the columns of a table; ask for them if their names say nothing.

    option: what holds the columns; the evaluation takes those of the calibration rows if they name all that it needs.
    """
    from optin_export.cli._guess import COLUMNS, columns_of

    labelled = option == "evaluation_columns"
    if labelled and not source:
        return
    check_data(source)
    task, shared = known["task"] or "", known["columns"]
    if known[option] is not None or (labelled and shared and set(COLUMNS[task]) <= parse_columns(shared).keys()):
        return
    try:
        found = columns_of(source, task, labelled)
        if shared and found:
            known[option] = ",".join(f"{name}={place}" for name, place in found.items())
    except InputError as error:
        click.echo(f"  {error.what}: {error.why}", err=True)
        known[option] = ask("columns", None, partial(_check_columns, source))


def _check_columns(source: str, text: str) -> None:
    from optin_export.cli._guess import names_of

    columns, known = parse_columns(text), names_of(source)
    for place in columns.values():
        there = place < len(known) if isinstance(place, int) else place in [one.strip() for one in known]
        if not there:
            raise InputError(f"{source} has no column {place}", f"it has {', '.join(known)[:300]}", "name one of them")


def parse_columns(text: str) -> dict[str, str | int]:
    """'text=review,label=1' -> the place of each column. Raises InputError."""
    found: dict[str, str | int] = {}
    for part in text.split(","):
        name, equals, place = part.partition("=")
        if not equals or not name or not place:
            raise InputError(
                f"cannot read --columns {text}", f"'{part}' is not NAME=PLACE", "write text=sentence,label=1"
            )
        found[name.strip()] = int(place) if place.isdigit() else place.strip()
    return found
