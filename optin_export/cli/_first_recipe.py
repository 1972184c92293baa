"""A first recipe as YAML with comments, which are the descriptions of its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from optin_export.errors import InputError
from optin_export.recipe.manual import describe_fields
from optin_export.recipe.tasks import METRICS

EDITOR_LINE = "# yaml-language-server: $schema={}\n"
#: Sections that are written on one line.
_FLAT = ("prune.budget", "gates", "ship")
_WIDTH = 120


def parse_goal(text: str) -> tuple[str, float]:
    """'macs=0.5' as a kind of budget and its value. Raises InputError."""
    known = [path.rpartition(".")[2] for path in describe_fields() if path.startswith("prune.budget.")][:5]
    name, equals, value = text.partition("=")
    try:
        if not equals or name not in known:
            raise ValueError(f"the goals are {', '.join(known)}")
        return name, float(value)
    except ValueError as error:
        raise InputError(f"cannot read the goal '{text:.60}'", str(error), "write macs=0.5 or speedup=1.5") from None


def compose(
    name: str,
    model: Mapping[str, Any],
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    goal: tuple[str, float],
    target: Mapping[str, Any],
) -> dict[str, Any]:
    """The recipe as a dictionary, with gates that require no more than the goal."""
    kind, value = goal
    measured = evaluation is not None and METRICS[model["task"]]
    gates: dict[str, float] = {"speedup": value if kind == "speedup" else 1.0}
    if measured:
        gates["accuracy_drop"] = value if kind == "accuracy_drop" else 1.0
    data: dict[str, Any] = {"calibration": dict(calibration)}
    if evaluation is not None and measured:
        data["evaluation"] = {**evaluation, "metric": METRICS[model["task"]][0]}
    return {
        "recipe": 1,
        "name": name,
        "model": dict(model),
        "data": data,
        "prune": {"budget": {kind: value}},
        "export": {"precision": "fp32", "batch": [1, 8]},
        "targets": [dict(target)],
        "gates": gates,
        "ship": {"triton": False},
    }


def render(raw: Mapping[str, Any], schema: str | None = None, notes: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML, with a description above each field.

    Args:
        raw: the recipe.
        schema: where an editor finds the JSON schema; None: the file does not name it.
        notes: dotted field -> an additional comment.
    """
    head = EDITOR_LINE.format(schema) if schema else ""
    lines = [
        f"{head}# A recipe of optin-export. Paths are relative to this file. All fields and their meaning:",
        "# optin-export explain. What a run would do: optin-export THIS_FILE --dry-run",
    ]
    _section(raw, "", 0, lines, notes or {})
    if "evaluation" not in raw["data"]:
        at = next(i for i, line in enumerate(lines) if line.startswith("prune:")) - 1
        lines.insert(at, "  # evaluation: held-out, labelled rows; without them accuracy is not measured")
    return "\n".join(lines) + "\n"


def _section(values: Mapping[str, Any], prefix: str, depth: int, lines: list[str], notes: Mapping[str, str]) -> None:
    fields, indent = describe_fields(), "  " * depth
    for name, value in values.items():
        path = f"{prefix}{name}"
        described = fields[path]
        _comment(described.description, indent, lines)
        if path in notes:
            _comment(notes[path], indent, lines)
        if isinstance(value, dict) and described.section and path not in _FLAT:
            lines.append(f"{indent}{name}:")
            _section(value, f"{path}.", depth + 1, lines, notes)
        else:
            if path in _FLAT:
                for inner in value:
                    _comment(f"{inner}: {fields[f'{path}.{inner}'].description}", indent, lines)
            lines.append(f"{indent}{name}: {_flow(value)}")


def _comment(text: str, indent: str, lines: list[str]) -> None:
    import textwrap

    lines += textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")


def _flow(value: Any) -> str:
    """One line of YAML that reads back as the value."""
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    text = written.removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text else json.dumps(value)
