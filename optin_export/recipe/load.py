"""From a file and overrides to a valid Recipe, or to one line that says what is wrong with it."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from optin_export.errors import InputError
from optin_export.recipe.manual import describe_fields
from optin_export.recipe.paths import with_absolute_paths
from optin_export.recipe.schema import Recipe
from optin_export.recipe.strict_yaml import parse_yaml
from optin_export.recipe.sweep import Variant, combinations
from optin_export.workdir.files import open_regular

_MAX_BYTES = 200_000
#: What pydantic adds to a field's name for each of its alternatives ("prune.align.literal['auto']").
_ALTERNATIVE = re.compile(r"(function-\w+|literal|constrained-\w+)(\[.*\])?$")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override (`a.b=value`) and validate a recipe; paths become absolute.

    Raises InputError for an unreadable file, YAML that is not a mapping, or any field that does not validate.
    """
    path = Path(path)
    raw = read_mapping(path, "recipe")
    for override in overrides:
        _apply(raw, override)
    return validate(raw, folder=path.parent)


def validate(raw: dict[str, Any], folder: Path) -> Recipe:
    """Validate a recipe given as a dictionary; relative paths are looked up from `folder`."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError("the recipe is not valid", explain(error), "correct the field(s) named above") from None
    recipe = with_absolute_paths(recipe, folder)
    expand(recipe)
    return recipe


def expand(recipe: Recipe) -> list[Variant]:
    """The runs of a sweep, in the order of its lists, the last one fastest; none for a recipe without `sweep`.

    Paths among the values are looked up from the working directory. Raises InputError that names the first combination
    which is no valid recipe.
    """
    found = []
    for label, settings in combinations(recipe.sweep):
        raw = recipe.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
        named = ", ".join(f"{key}={value}" for key, value in settings.items())
        try:
            for key, value in settings.items():
                put(raw, key, copy.deepcopy(value))
            raw["name"] = f"{recipe.name}-{label}"[:100]
            one = with_absolute_paths(Recipe.model_validate(raw), Path.cwd())
        except ValidationError as error:
            raise InputError(f"sweep: {named} is not valid", explain(error), "correct the values of sweep") from None
        except (AttributeError, TypeError, ValueError, IndexError):
            raise InputError(f"sweep: {named} cannot be set", "no such field", "check the dotted paths") from None
        found.append(Variant(label, settings, one))
    return found


def read_mapping(path: Path, noun: str, key: str = "recipe") -> dict[str, Any]:
    """Parse a YAML mapping, unvalidated. noun: what the file should be; key: the field of its version.

    Raises InputError for an unreadable file, or YAML that is not a mapping.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the {noun} {path}", str(reason), "give the path of a YAML file") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is not a {noun}", f"it is larger than {_MAX_BYTES} bytes", f"give a {noun}")
    try:
        raw = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not a usable YAML file", str(error), "correct the line named above") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a {noun}", "its top level is not a mapping", f"start it with '{key}: 1'")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"cannot read --set {override}", "it is not KEY=VALUE", "write --set prune.budget.macs=0.5")
    try:
        parsed = parse_yaml(value)
    except yaml.constructor.ConstructorError as error:  # YAML, with a value in it that is refused
        why = f"{error.problem}"
        raise InputError(f"cannot read --set {override:.200}", why, "correct the value, or quote it") from None
    except yaml.YAMLError:
        parsed = value
    try:
        put(raw, key, parsed)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise InputError(
            f"cannot apply --set {override}", f"'{key}' does not name a field of the recipe", "check the dotted path"
        ) from None


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the field at a dotted path; sections on the way are made."""
    *parents, last = key.split(".")
    node: Any = raw
    for name in parents:
        if isinstance(node, list):
            node = node[int(name)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
    node[int(last) if isinstance(node, list) else last] = value


def explain(error: ValidationError, model: type[BaseModel] = Recipe) -> str:
    """All problems in one line: the dotted field, what is wrong, and the nearest known name for an unknown one.

    model: what was validated.
    """
    problems = []
    items = error.errors()
    for item in items:
        where = item["loc"]
        # A list whose entries failed is also reported as too short: the entry's own error says it better.
        if any(len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in items):
            continue
        dotted = ".".join(str(part) for part in where if not _ALTERNATIVE.match(str(part)))
        if item["type"] == "extra_forbidden":
            problems.append(f"{dotted}: unknown field ({_hint(str(where[-1]), _fields_at(model, where[:-1]), model)})")
        else:
            got = "" if item["type"] in ("missing", "value_error") else f", not {_shown(item['input'])}"
            message = (
                item["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("tuple", "list")
            )
            allowed = re.findall(r"'([^']+)'", message) if item["type"] == "literal_error" else []
            near = difflib.get_close_matches(str(item["input"]), allowed, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            problems.append(f"{dotted}: {message}{got}{hint}".removeprefix(": "))
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join(problems[:5] + more)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"a {type(value).__name__} too long to show"


def _hint(name: str, known: Sequence[str], model: type[BaseModel]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    elsewhere = [path for path in describe_fields() if path.rpartition(".")[2] == name] if model is Recipe else []
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"known here: {', '.join(known)}"


def _fields_at(model: Any, location: Sequence[int | str]) -> list[str]:
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = next(_models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation is made of: itself, or in a list or an alternative."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
