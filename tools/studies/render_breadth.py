"""docs/breadth.md, from docs/measurements/studies/breadth.json, which breadth.py writes."""

from __future__ import annotations

import re
from typing import Any

from plots import markdown_table

#: What ran, by group of the page.
TITLES = {"transformers": "transformers", "timm": "timm", "torchvision": "torchvision", "own": "Hand-written modules"}
#: Characters of a reason in the table.
SHORTEST = 160


def page(content: dict[str, Any], discovery: dict[str, Any] | None = None) -> str:
    """The page of measured rows. discovery: the content of discovery.json, which study_discovery.py writes."""
    rows, machine = content["rows"], content["environment"]
    packages = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "transformers", "timm")
        if name in machine["packages"]
    )
    lines = [
        "# Which architectures can be pruned",
        "",
        "`tools/studies/breadth.py` runs `optin-export` on tiny architectures with random weights, and checks",
        "each result with torch, onnxruntime and the model's own library: `base` is the largest difference between",
        "the unpruned graph and the original model, `pruned` between the pruned graph and `optin_export.load_model`,",
        "`masked` between the pruned model and the masked one before the repair, all relative to the largest output,",
        "at batch sizes 1, 2 and 5, texts of three lengths with padding. A graph may differ by more than 1e-3 from a",
        "model that rounds as much itself: by four times its difference from itself in float64. Weights are random:",
        f"nothing here is about accuracy. The budget is {content['budget']:g} of the MACs, or (1 + floor) / 2 if it",
        f"cannot be reached; the floor is the share of MACs with the fewest units. {machine['cpu']}, {packages}.",
        f"Measured: {len(rows)} architectures of those that `python tools/studies/breadth.py --list` prints. They",
        "were measured on several days; the checked-out code measures a row again if it is named.",
        "",
        *summary(rows),
    ]
    if discovery is not None:
        lines += ["", *seconds(discovery)]
    for library, title in TITLES.items():
        part = {name: row for name, row in rows.items() if row["library"] == library}
        if part:
            lines += ["", f"## {title}", "", *_table(part)]
    return "\n".join(lines) + "\n"


def summary(rows: dict[str, Any]) -> list[str]:
    """Lines of the summary, and the table of refusals by reason."""
    ran = [row for row in rows.values() if "unbuilt" not in row]
    attention = [row for row in ran if row["attention"]]
    counts = [
        ["exit code 0", _share(sum(row["code"] == 0 for row in ran), len(ran))],
        ["models with attention whose heads are units", _share(sum(map(has_heads, attention)), len(attention))],
        ["exit code 1", str(sum(row["code"] == 1 for row in ran))],
        ["killed at the time limit", str(sum(row["code"] is None for row in ran))],
        ["exit code 3 or 4", str(sum(row["code"] in (3, 4) for row in ran))],
        ["exit code 0, but a difference above the tolerance", str(sum(map(is_silently_wrong, ran)))],
        ["refusals that are no single sentence", str(sum(row["code"] == 2 and not row["one_sentence"] for row in ran))],
    ]
    refusals = [[text, str(len(names)), ", ".join(names)] for text, names in reasons(rows).items()]
    lines = markdown_table(["architectures", str(len(ran))], counts)
    if refusals:
        lines += ["", "Not pruned, by reason:", "", *markdown_table(["reason", "number", "architectures"], refusals)]
    return lines


def seconds(content: dict[str, Any]) -> list[str]:
    """Lines of the section on the time that measurement takes at the size of models in use."""
    rows, machine, cores = content["rows"], content["environment"], content["cores"]
    loads = [load for row in rows.values() for load in row["load"]]
    busy = (
        f"The machine had other work, a load of {min(loads):g} to {max(loads):g} on {cores} cores: seconds by the "
        "clock say little."
        if max(loads) > cores
        else "The machine had no other work."
    )
    lines = [
        [
            name,
            f"{row['parameters'] / 1e6:.0f} M",
            ", ".join(f"{count} {kind}" for kind, count in row["units"].items()),
            *(f"{row[step]['cpu']:.0f} ({row[step]['clock']:.0f})" for step in ("found", "verified")),
        ]
        for name, row in rows.items()
    ]
    columns = ["model", "parameters", "units", "found, s of CPU (clock)", "verified, s of CPU (clock)"]
    return [
        "## Time of the measurement",
        "",
        "Units of models of usual size with random weights, by measurement alone (a run asks families first): one",
        f"thread, two rows, texts of {content['tokens']} tokens, of which 32 are enough, images of 224 pixels.",
        "Found: by gradients between the layers. Verified: rebuilt models equal the masked ones, with counted costs.",
        f"{machine['cpu']}, torch {machine['packages']['torch']}.",
        busy,
        "",
        *markdown_table(columns, lines),
    ]


def _share(count: int, whole: int) -> str:
    return f"{count} of {whole} ({count / max(whole, 1):.0%})"


def has_heads(row: dict[str, Any]) -> bool:
    return row["code"] == 0 and "heads" in row.get("units", {})


def is_silently_wrong(row: dict[str, Any]) -> bool:
    """Whether a run passed, but the check found a difference, or could not run its models."""
    return row["code"] == 0 and bool(row.get("check", {}).get("failed"))


def reasons(rows: dict[str, Any]) -> dict[str, list[str]]:
    """{reason without names and numbers: architectures}, the most frequent first."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.get("code") not in (0, 3, 4) and row.get("reason"):
            found.setdefault(general(row["reason"]), []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def general(reason: str) -> str:
    """A reason without what differs between architectures: class names, paths and numbers."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "X", reason.partition("; ")[0])
    text = re.sub(r" \([^()]*\)", "", re.sub(r"\([^()]*\)", "", text))
    text = re.sub(r"\b(architecture|a|an) \w+ (is|cannot)\b", r"\1 X \2", text)
    text = re.sub(r"\b\w*[a-z]\w*[A-Z]\w*|\b[A-Z]{2,}\w*[a-z]\w*|\b[\w-]+(?:\.[\w-]+)+|/\S+", "X", text)
    text = re.sub(r"\bX(?:(?:,| or) X)+", "X", re.sub(r"\d+(?:\.\d+)?", "N", text))
    return _cell(text)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= SHORTEST else f"{text[: SHORTEST - 4]} ..."


def _table(rows: dict[str, Any]) -> list[str]:
    columns = [
        "architecture",
        "task",
        "exit",
        "units (removed of)",
        "MACs kept",
        "base",
        "pruned",
        "masked",
        "CPU s",
        "reason",
    ]
    return markdown_table(columns, [_line(name, row) for name, row in rows.items()])


def _line(name: str, row: dict[str, Any]) -> list[str]:
    if "unbuilt" in row:
        return [f"`{name}`", row["task"], "-", *["-"] * 6, _cell(f"its library cannot build it: {row['unbuilt']}")]
    check = row.get("check", {})
    floor = f" (floor {row['floor']:.2f})" if row.get("floor") is not None else ""
    notes = [row.get("reason"), *check.get("failed", []), *row.get("refused", [])]
    return [
        f"`{name}`",
        row["task"],
        "killed" if row["code"] is None else str(row["code"]),
        _units(row),
        (f"{row['macs']:.2f}" if "macs" in row else "-") + floor,
        *(_number(check.get(key)) for key in ("base", "pruned", "masked")),
        f"{row['seconds']:.0f}",
        _cell("; ".join(note for note in notes if note)),
    ]


def _units(row: dict[str, Any]) -> str:
    texts = [
        f"{count} {kind}" if row.get("quick") else f"{removed} of {count} {kind}"
        for kind, (count, removed) in row.get("units", {}).items()
    ]
    return ", ".join(texts) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def described(row: dict[str, Any]) -> str:
    """One line of progress."""
    if "unbuilt" in row:
        return f"not built: {row['unbuilt'][:120]}"
    failed = "; ".join(row.get("check", {}).get("failed", []))
    words = [f"exit {row['code']}", _units(row), failed or (row["reason"] or "")[:160], f"{row['seconds']:.0f} s"]
    return ", ".join(word for word in words if word and word != "-")
