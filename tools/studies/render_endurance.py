"""Sections of docs/results.md on kills and on many runs in one process (study_kills.py, study_soak.py)."""

from __future__ import annotations

from typing import Any

from plots import markdown_table, section

#: Names of what the soak counts, as a reader would call them.
COUNTS = {
    "rss_mib": "memory, MiB",
    "rss_trimmed_mib": "memory after malloc_trim, MiB",
    "open_files": "open files",
    "threads": "threads",
    "children": "child processes",
    "temporary": "temporary files and folders",
    "cache_entries": "entries of caches and containers of the package's modules",
    "objects": "Python objects",
}


def kills(content: dict[str, Any]) -> list[str]:
    runs, shipments, machine = content["run"], content["shipment"], content["environment"]
    compared = content["compared"]["run"]
    states = next(iter(shipments["by_stage"].values()))
    labels = [state.replace("writing beside", "writing next to it") for state in states]
    rows = [
        [step, *(str(counts[state]) for state in states), str(sum(counts.values()))]
        for step, counts in shipments["by_stage"].items()
    ]
    return [
        "## Killed at any moment",
        "",
        f"The quickstart, smaller, killed with SIGKILL {runs['kills']} times ({runs['half_written']} times within a",
        f"write, {content['kills_per_run']} times per run), and `optin-export ship` {shipments['kills']} times, at",
        "seeded moments; then the same command again (`tools/studies/study_kills.py`). Of the resumed runs,",
        f"{runs['identical']} of {runs['resumed']} are those of an undisturbed run, of the repeated shipments",
        f"{shipments['identical']} of {shipments['resumed']}: of a run {len(compared['byte_for_byte'])} files byte for",
        f"byte, {len(compared['without'])} without their times; {len(compared['excluded'])} are times or a lock.",
        f"Remaining files: {len(runs['left']) + len(shipments['left'])}. Exit codes other than 0:",
        f"{_others(runs) + _others(shipments)}. `verify` finds nothing wrong in {runs['verified']} and",
        f"{shipments['verified']}. {machine['cpu']}, torch {machine['packages']['torch']}.",
        "",
        *markdown_table(["run killed in", "kills"], [[stage, str(count)] for stage, count in runs["by_stage"].items()]),
        "",
        *markdown_table(["shipment killed", *labels, "all"], rows),
    ]


def _others(part: dict[str, Any]) -> int:
    return sum(count for code, count in part["exit_codes"].items() if code != "0")


def soak(content: dict[str, Any]) -> list[str]:
    machine, target = content["environment"], content["target"]
    rows = [
        [words, f"{one['first']:g}", f"{one['last']:g}", f"{100 * one['growth']:+.1f} %"]
        for name, words in COUNTS.items()
        for one in [content["growth"][name]]
    ]
    worst = max(one["growth"] for one in content["growth"].values())
    commands = ", ".join(f"`{name}`" for name in dict.fromkeys(content["commands"]) if name != "run")
    prose = [
        f"{content['runs']} complete runs of a tiny model, each in a new folder and followed by {commands}; after",
        "each, everything is deleted and the process's resources are counted",
        "(`tools/studies/study_soak.py`). Growth is from",
        f"run {content['warm_up']} to the last; limit {100 * target:.0f} %: {'met' if worst < target else 'missed'}.",
        f"{machine['cpu']}, torch {machine['packages']['torch']}.",
    ]
    return section(
        "Many runs in one process",
        prose,
        ["held", f"after run {content['warm_up']}", f"after run {content['runs']}", "growth"],
        rows,
    )
