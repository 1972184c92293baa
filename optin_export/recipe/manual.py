"""What can be said about every field of a recipe, read from the pydantic models' own JSON schema: nothing here is
written by hand, so it cannot differ from what `validate` accepts."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from optin_export.recipe.schema import Recipe

__all__ = ["Described", "describe_fields", "nearest", "schema_text"]

Node = Mapping[str, Any]
_LIMITS = {
    "exclusiveMinimum": "greater than {}",
    "minimum": "at least {}",
    "exclusiveMaximum": "less than {}",
    "maximum": "at most {}",
    "pattern": "matches {}",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
}


@dataclass(frozen=True)
class Described:
    """One field. path: dotted, `[]` after a list of sections (`targets[].threads`). type: in words.

    choices: the values allowed, if only some are. limits: conditions in words. example: a value it accepts.
    section: it holds further fields.
    """

    path: str
    type: str
    required: bool
    default: Any
    choices: tuple[Any, ...]
    limits: tuple[str, ...]
    description: str
    example: Any
    section: bool

    @property
    def override(self) -> str:
        """The example as `--set` takes it."""
        value = self.example if isinstance(self.example, str) else json.dumps(self.example, ensure_ascii=False)
        return f"{self.path.replace('[]', '.0')}={value}"


@lru_cache
def describe_fields() -> dict[str, Described]:
    """Every field of a recipe by its path, sections before what is in them, in the order of the schema."""
    whole = Recipe.model_json_schema()
    return {one.path: one for one in _walk(whole, "", whole["$defs"])}


def schema_text(model: type[BaseModel]) -> str:
    """The JSON schema of a public file, as it is published in docs/schemas."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def nearest(word: str, known: Mapping[str, object]) -> list[str]:
    """Fields that `word` may mean: those that end in it, else those spelt alike."""
    plain = re.sub(r"\[\]|\.\d+(?=\.|$)", "", word)
    bare = {path.replace("[]", ""): path for path in known}
    ending = [path for name, path in bare.items() if name == plain or name.endswith(f".{plain}")]
    if ending:
        return ending
    alike = difflib.get_close_matches(plain, bare, n=3, cutoff=0.7)
    if not alike:
        last = plain.rpartition(".")[2]
        alike = [name for name in bare if difflib.SequenceMatcher(None, name.rpartition(".")[2], last).ratio() >= 0.75][
            :3
        ]
    return [bare[name] for name in alike]


def _walk(section: Node, prefix: str, shared: Node) -> Iterator[Described]:
    for name, node in section["properties"].items():
        inner, many = _section_of(node, shared)
        path = f"{prefix}{name}"
        yield _describe(path, node, name in section.get("required", ()), inner, many, shared)
        if inner is not None:
            yield from _walk(inner, f"{path}[]." if many else f"{path}.", shared)


def _section_of(node: Node, shared: Node) -> tuple[Node | None, bool]:
    """The section that a field holds, if it holds one, and whether as a list."""
    for option in node.get("anyOf", (node,)):
        many = option.get("type") == "array" and "$ref" in option.get("items", {})
        found = option["items"] if many else option
        if "$ref" in found and "properties" in (section := shared[found["$ref"].rpartition("/")[2]]):
            return section, many
    return None, False


def _describe(path: str, node: Node, required: bool, inner: Node | None, many: bool, shared: Node) -> Described:
    options = [option for option in node.get("anyOf", (node,)) if option.get("type") != "null"]
    choices = tuple(value for option in options for value in _choices(option))
    limits = tuple(
        words.format(option[key]) for option in options for key, words in _LIMITS.items() if key in option
    ) + tuple(
        f"each {words.format(option['items'][key])}"
        for option in options
        if isinstance(option.get("items"), dict)
        for key, words in _LIMITS.items()
        if key in option["items"]
    )
    examples = node.get("examples", ())
    default = node.get("default")
    return Described(
        path=path,
        type=("list of sections" if many else "section")
        if inner is not None
        else " or ".join(dict.fromkeys(_type(option) for option in options)),
        required=required,
        default=default,
        choices=choices,
        limits=limits,
        description=node.get("description", ""),
        example=examples[0] if examples else _example(options, choices, default),
        section=inner is not None,
    )


def _choices(option: Node) -> tuple[Any, ...]:
    if "const" in option:
        return (option["const"],)
    if isinstance(option.get("items"), dict):
        return tuple(option["items"].get("enum", ()))
    return tuple(option.get("enum", ()))


def _type(option: Node) -> str:
    kind = option.get("type", "value")
    if kind == "array":
        items = option.get("items") or (option.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}s"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
    return words.get(kind, str(kind))


def _example(options: list[Node], choices: tuple[Any, ...], default: Any) -> Any:
    """A value to show if the schema has no example: a choice other than the default, or the default."""
    other = next((value for value in choices if value != default), None)
    if other is not None:
        return [other] if options[0].get("type") == "array" else other
    if isinstance(default, bool):
        return not default
    if default is not None:
        return default
    option = options[0]
    if option.get("type") == "array":
        items = option.get("prefixItems") or [option.get("items", {})]
        return [224 if item.get("type") == "integer" else 0.5 for item in items]
    return {"integer": 64, "number": 0.5, "boolean": True, "string": "name"}.get(option.get("type", ""))
