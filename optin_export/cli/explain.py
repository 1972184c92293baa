"""`optin-export explain`: what a field of a recipe means, from its schema."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optin_export.recipe.manual import Described

EPILOG = "e.g. explain prune.budget, explain magnitude, explain exit-codes; without FIELD: all sections and fields"
EXIT_CODES = "exit-codes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("field", metavar="FIELD", nargs="?", help="a dotted field, a value, or exit-codes")


def run(options: argparse.Namespace) -> int:
    from optin_export.recipe.manual import describe_fields

    fields = describe_fields()
    if options.field is None:
        return _list(fields, options.json)
    if options.field == EXIT_CODES:
        from optin_export.errors import EXIT_CODES as codes

        print(json.dumps(codes) if options.json else "\n".join(f"{code:>3}  {text}" for code, text in codes.items()))
        return 0
    one = _find(options.field, fields)
    inside = [path for path in fields if path.startswith((f"{one.path}.", f"{one.path}[]."))]
    if options.json:
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
    default = "none, required" if one.required else json.dumps(one.default, ensure_ascii=False)
    if one.section and not one.required:
        default = "left out" if one.default is None else "as its fields say"
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
    """The field that is meant: by its path, by its last names where only one has them, or by a value of its own."""
    from optin_export.errors import InputError
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
    why = "several fields are called so" if len(near) > 1 and near[0].endswith(word) else "no field has this name"
    raise InputError(f"cannot explain '{word:.60}'", why, hint)
