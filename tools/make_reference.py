"""Write the pages in docs/reference/ from the code: recipe, gates, commands, exit codes, run folder, report."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from optin_export.cli._gates import GatesFile
from optin_export.cli._group import COMMANDS, PROGRAM, command_of
from optin_export.cli.run import optin_export
from optin_export.errors import EXIT_CODES
from optin_export.pruning import Architecture
from optin_export.recipe.manual import Described, describe_fields
from optin_export.report.schema import Report
from optin_export.search import Plan
from optin_export.workdir.run_directory import CONTENTS, STAGES

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
NOTE = "<!-- written by tools/make_reference.py: change the code, not this page -->"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


def pages() -> dict[str, str]:
    """File name -> text."""
    return {
        "recipe.md": recipe_page(),
        "gates.md": _schema_page(
            "Gates",
            "A file for `optin-export check --gates` ([release pipelines](../ci.md)); "
            "[JSON schema](../schemas/gates.schema.json), which `optin-export schema gates` prints.",
            GatesFile,
        ),
        "commands.md": commands_page(),
        "exit-codes.md": _page(
            "Exit codes",
            "The exit codes of all commands. `optin-export explain exit-codes` prints them. A sweep ends with the code "
            "of its worst run: an error first, then parity, then a missed gate.",
            _table(("exit code", "meaning"), ((str(code), text) for code, text in EXIT_CODES.items())),
        ),
        "run-folder.md": _page(
            "Run folder",
            "The files that a run writes into its folder, by default `runs/NAME`; `*` is any name. Not every run has "
            f"all of them. The stages in order: {', '.join(f'`{stage}`' for stage in STAGES)}.",
            _table(("path", "what it is"), ((f"`{path}`", text) for path, text in CONTENTS.items())),
        ),
        "report.md": _schema_page(
            "Report",
            "`report.json` of a run: the public contract for programs. [JSON schema](../schemas/report.schema.json).",
            Report,
        ),
        "plan.md": _schema_page(
            "Plan and architecture",
            "`plan/plan.json` and `model/architecture.json` of a run. JSON schemas: "
            "[plan](../schemas/plan.schema.json), [architecture](../schemas/architecture.schema.json).",
            Plan,
            Architecture,
        ),
    }


def recipe_page() -> str:
    """Every field of a recipe, a table per section; the texts are those of `optin-export explain`."""
    fields = describe_fields()
    parts = [
        "All fields, as printed by `optin-export explain`; [JSON schema](../schemas/recipe.schema.json). The "
        "[notes on the recipe](../reference.md#notes-on-the-recipe) have more details. Paths are relative to the "
        "recipe file, or else to the current directory.",
    ]
    for section in [None, *(one for one in fields.values() if one.section)]:
        inside = [one for one in fields.values() if _holder(one.path) == (section.path if section else "")]
        if section is not None:
            parts += [
                f"## {section.path.replace('[]', '[ ]')}",
                f"{_sentence(section.description)}{_left_out(section)}",
            ]
        rows = ((f"`{one.path}`", _kind(one), _default(one), _cell(one.description), _example(one)) for one in inside)
        parts.append(_table(("field", "type", "default", "meaning", "example"), rows))
    return _page("Recipe, version 1", *parts)


def commands_page() -> str:
    commands = {name: command for name in COMMANDS if (command := command_of(name)) is not None}
    summaries = ((f"[`{name}`](#{name})", command.get_short_help_str(200)) for name, command in commands.items())
    parts = [
        "`optin-export RECIPE` runs a recipe; the name of a command as the first word does something else. The "
        "verdict goes to standard output, progress and errors to standard error. `optin-export COMMAND --help` prints "
        "what is on this page.",
        _table(("command", "what it does"), summaries),
        *_command("RECIPE", PROGRAM, optin_export),
    ]
    for name, command in commands.items():
        parts += _command(name, f"{PROGRAM} {name}", command)
    return _page("Commands", *parts)


def _command(title: str, path: str, command: click.Command) -> list[str]:
    """A section with the help of one command."""
    usage = " ".join([path, *(_usage(one) for one in command.params)])
    options = [one for one in command.params if isinstance(one, click.Option)]
    rows = ((f"`{_signature(one, *one.opts)}`", _cell(one.help or "")) for one in options)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return [
        f"## {title}",
        # click does not wrap a paragraph that begins with a backspace: it is a table or code.
        *(f"```text{one[1:]}\n```" if one.startswith("\b") else _docs(one) for one in paragraphs),
        f"```text\n{_wrapped(usage)}\n```",
        _table(("option", "meaning"), rows),
    ]


def _usage(parameter: click.Parameter) -> str:
    if not isinstance(parameter, click.Option):
        return parameter.make_metavar(click.Context(optin_export))
    word = _signature(parameter, parameter.opts[0])
    return (word if parameter.required else f"[{word}]") + ("..." if parameter.multiple else "")


def _signature(option: click.Option, *names: str) -> str:
    """How an option is written: `--set A.B=C`."""
    return ", ".join(names) + ("" if option.is_flag else f" {option.metavar}")


def _schema_page(title: str, intro: str, *models: type[BaseModel]) -> str:
    """A model and every model that it uses, a table each, in the order of their first use."""
    parts = [intro]
    for model in models:
        whole = model.model_json_schema()
        found = {model.__name__: whole}
        todo = [model.__name__]
        while todo:
            name = todo.pop(0)
            section = found[name]
            parts += [f"## {name}", *([_docs(section["description"])] if section.get("description") else [])]
            rows = []
            for field, node in section["properties"].items():
                for used in _references(node):
                    if used not in found and "properties" in whole["$defs"][used]:
                        found[used] = whole["$defs"][used]
                        todo.append(used)
                required = field in section.get("required", ())
                rows.append((f"`{field}`", _type(node), "" if required else "yes", _cell(node.get("description", ""))))
            parts.append(_table(("field", "type", "may be absent", "meaning"), rows))
    return _page(title, *parts)


def _references(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _type(node: dict[str, Any]) -> str:
    """A JSON schema's type in words; models are links to their table on the page."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(one) for one in node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{json.dumps(value)}`" for value in node.get("enum", [node.get("const")]))
    kind = node.get("type", "any")
    if kind == "array":
        if "prefixItems" in node:
            return f"list ({', '.join(_type(one) for one in node['prefixItems'])})"
        return f"list of {_type(node.get('items', {}))}"
    if kind == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"mapping to {_type(node['additionalProperties'])}"
    return {"object": "mapping", "integer": "whole number", "boolean": "true or false", "string": "text"}.get(
        kind, kind
    )


def _kind(one: Described) -> str:
    if one.section:
        return f"[{one.type}](#{one.path.replace('[]', '').replace('.', '')})"
    parts = [", ".join(f"`{value}`" for value in one.choices) or one.type, *map(_cell, one.limits)]
    return "; ".join(parts)


def _default(one: Described) -> str:
    if one.required:
        return "required"
    if one.section:
        return "left out" if one.default is None else "see there"
    return "none" if one.default is None else f"`{_code(one.default)}`"


def _example(one: Described) -> str:
    return "" if one.section else f"`{_code(one.example)}`"


def _left_out(one: Described) -> str:
    return " Left out by default." if not one.required and one.default is None else ""


def _holder(path: str) -> str:
    """The section that a field stands in: '' for the top."""
    return path.rpartition(".")[0]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _docs(text: str) -> str:
    return _cell(text, "\n")


def _code(value: Any) -> str:
    """A value inside backticks in a table's cell."""
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")


def _cell(text: str, blank: str = " ") -> str:
    """Text that a table's cell can hold as it is."""
    plain = blank.join(line.strip() for line in text.strip().splitlines())
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("{}", "`{}`")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _wrapped(text: str) -> str:
    """A usage line broken between its words in brackets."""
    lines, indent = [""], " " * 8
    for word in text.replace("] [", "]\n[").replace(" [", "\n[").split("\n"):
        if lines[-1] and len(lines[-1]) + len(word) > 100:
            lines.append(indent + word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip() if lines[-1] else word
    return "\n".join(lines)


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *parts]) + "\n"


if __name__ == "__main__":
    main()
