"""`optin-export explain`: what a field of a recipe means, from its schema."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from optin_export.cli._group import command
from optin_export.errors import EXIT_CODES, InputError

if TYPE_CHECKING:
    from optin_export.recipe.manual import Described

#: The word that explains the exit codes instead of a field.
_CODES = "exit-codes"


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from optin_export.recipe.manual import describe_fields

    return [word for word in (*describe_fields(), _CODES) if word.startswith(incomplete)]


@command
@click.argument("field", required=False, shell_complete=_complete)
def explain(field: str | None, as_json: bool) -> int:
    """Explain a field of a recipe: type, default, values, example.

    FIELD is a field with dots, a value that only one field has, or exit-codes: e.g. explain prune.budget, explain
    magnitude, explain exit-codes. Without FIELD, all fields are listed.
    """
    from optin_export.recipe.manual import describe_fields

    fields = describe_fields()
    if field is None:
        return _list(fields, as_json)
    if field == _CODES:
        lines = (f"{code:>3}  {text}" for code, text in EXIT_CODES.items())
        print(json.dumps(EXIT_CODES) if as_json else "\n".join(lines))
        return 0
    one = _find(field, fields)
    inside = [path for path in fields if path.startswith((f"{one.path}.", f"{one.path}[]."))]
    if as_json:
        print(json.dumps({**asdict(one), "override": one.override, "fields": inside}))
    else:
        print("\n".join(_lines(one)))
        if inside:
            print("fields:")
            print("\n".join(f"  {path:<42} {fields[path].description}" for path in inside))
    return 0


def _list(fields: dict[str, Described], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"fields": [asdict(one) for one in fields.values()]}))
        return 0
    for one in fields.values():
        depth = one.path.count(".")
        print(f"{'  ' * depth}{one.path:<{44 - 2 * depth}} {one.description}")
    return 0


def _lines(one: Described) -> list[str]:
    default = "none: the field is required" if one.required else json.dumps(one.default, ensure_ascii=False)
    if one.section and not one.required:
        default = "left out" if one.default is None else "the defaults of its fields"
    lines = [f"{one.path}: {one.description}", f"  type     {one.type}", f"  default  {default}"]
    if one.choices:
        lines.append(f"  values   {', '.join(map(str, one.choices))}")
    if one.limits:
        lines.append(f"  limits   {', '.join(one.limits)}")
    if not one.section:
        lines += [f"  example  {one.path}: {json.dumps(one.example, ensure_ascii=False)}"]
        lines += [f"           --set '{one.override}'"]
    return lines


def _find(word: str, fields: dict[str, Described]) -> Described:
    """The field with this path, the only one whose path ends so, or the only one that has this value."""
    from optin_export.recipe.manual import nearest

    near = nearest(word, fields)
    exact = [path for path in near if path.replace("[]", "") == word.replace("[]", "").replace(".0", "")]
    if exact or (len(near) == 1 and near[0].replace("[]", "").endswith(word)):
        return fields[(exact or near)[0]]
    holders = [one for one in fields.values() if word in one.choices and not near]
    if len(holders) == 1:
        return holders[0]
    near += [one.path for one in holders]
    hint = f"did you mean {' or '.join(near)}?" if near else "`optin-export explain` lists all fields"
    why = "several fields end with this name" if len(near) > 1 and near[0].endswith(word) else "no field has this name"
    raise InputError(f"cannot explain '{word:.60}'", why, hint)
