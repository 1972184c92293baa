"""A first recipe as YAML with comments, which are the descriptions of its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    """'macs=0.5' as a kind of budget and its value. Raises InputError.

    '50%' is a share of the MACs, '2x' a speedup; values may have the units that they are written with.
    """
    known = [path.rpartition(".")[2] for path in describe_fields() if path.startswith("prune.budget.")][:5]
    name, equals, value = text.strip().partition("=")
    if not equals and name.endswith("%"):
        name, equals, value = "macs", "=", name
    elif not equals and name.lower().endswith("x"):
        name, equals, value = "speedup", "=", name
    try:
        if not equals or name not in known:
            raise ValueError(f"the goals are {', '.join(known)}; 50% is macs=0.5, 2x is speedup=2")
        return name, _quantity(name, value)
    except ValueError as error:
        raise InputError(f"cannot read the goal '{text:.60}'", str(error), "write macs=0.5 or speedup=1.5") from None


def _quantity(name: str, text: str) -> float:
    """The value of a goal or a gate: '50%' of a share is 0.5, '2x' of a speedup 2, '5ms' of a latency 5."""
    value = text.strip().lower()
    if name in ("macs", "params") and value.endswith("%"):
        number = float(value[:-1]) / 100
    elif name == "speedup":
        number = float(value.removesuffix("x"))
    elif name == "latency_ms":
        number = float(value.removesuffix("ms"))
    else:
        number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text} is not a number from 0 on")
    if name in ("macs", "params") and not 0 < number <= 1:
        raise ValueError(f"prune.budget.{name} is a share from 0 to 1")
    if name == "speedup" and number == 0:
        raise ValueError("a speedup is above 0")
    return number


def parse_gates(text: str) -> dict[str, float]:
    """'speedup=1.3,accuracy_drop=0.5' as gates. Raises InputError."""
    known = [path.rpartition(".")[2] for path in describe_fields() if path.startswith("gates.")]
    gates: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        try:
            if not equals or name not in known:
                raise ValueError(f"the gates are {', '.join(known)}")
            gates[name] = _quantity(name, value)
        except ValueError as error:
            fix = "write speedup=1.3,accuracy_drop=0.5"
            raise InputError(f"cannot read the limit '{part:.60}'", str(error), fix) from None
    return gates


def usual_gates(goal: tuple[str, float], measured: bool) -> dict[str, float]:
    """Gates that require no more than the goal. measured: whether accuracy is."""
    kind, value = goal
    gates = {"speedup": value if kind == "speedup" else 1.0}
    return {**gates, "accuracy_drop": value if kind == "accuracy_drop" else 1.0} if measured else gates


def compose(
    name: str,
    model: Mapping[str, Any],
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    goal: tuple[str, float],
    target: Mapping[str, Any],
    batches: Sequence[int] = (1, 8),
    gates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The recipe as a dictionary. gates: None: those that require no more than the goal."""
    kind, value = goal
    measured = evaluation is not None and bool(METRICS[model["task"]])
    data: dict[str, Any] = {"calibration": dict(calibration)}
    if evaluation is not None and measured:
        data["evaluation"] = {**evaluation, "metric": METRICS[model["task"]][0]}
    return {
        "recipe": 1,
        "name": name,
        "model": dict(model),
        "data": data,
        "prune": {"budget": {kind: value}},
        "export": {"precision": "fp32", "batch": list(batches)},
        "targets": [dict(target)],
        "gates": usual_gates(goal, measured) if gates is None else dict(gates),
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
