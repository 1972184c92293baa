"""`optin-export measure`: a run folder, taken to another machine, is measured there."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optin_export.recipe import Target

EPILOG = (
    "the run's own results and verdict stay; exit code 0: all gates hold on this machine; 2: no finished run, or a "
    "file of it has changed; 3: parity failed; 4: a gate was missed or not evaluated; 5: this machine lacks something"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--target",
        action="append",
        metavar="A=B,...",
        help="what to build and measure, e.g. engine=tensorrt or engine=torch,device=cuda,compile=true or "
        "engine=tensorrt,tensorrt.workspace=2048; may be repeated (default: the recipe's targets)",
    )
    parser.add_argument("--machine", metavar="NAME", help="this machine's name in the report (default: its GPU or CPU)")
    parser.add_argument("--replace", action="store_true", help="measure again what this machine has measured before")
    parser.add_argument(
        "--trust-python", action="store_true", help="run Python that the recipe names, for the accuracy (default: no)"
    )
    parser.add_argument("--wait", action="store_true", help="for another process that works in the run folder")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    from optin_export.displays import choose
    from optin_export.errors import GateError, ParityError
    from optin_export.progress import reporting
    from optin_export.report import add_elsewhere
    from optin_export.stages.other_machines import continue_run
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    targets = None if options.target is None else [parse_target(text) for text in options.target]
    existing_run(options.run)
    with held(options.run, "optin-export measure", options.wait):
        with choose(options.quiet, False, options.json) as display:
            display.start("measure")
            began = time.perf_counter()
            with reporting(display.tick):
                written = continue_run(
                    options.run,
                    targets,
                    machine=options.machine,
                    replace=options.replace,
                    trust_python=options.trust_python,
                )
            display.finish("measure", round(time.perf_counter() - began, 3), False)
        report = add_elsewhere(options.run)
    names = {(path.parent.parent.name, path.stem) for path in written}
    results = [one for one in report.elsewhere if (one.machine, one.target) in names]
    if options.json:
        print(json.dumps({"results": [one.model_dump(mode="json") for one in results]}))
    else:
        for one in results:
            _print(one)
        print(f"report: {options.run}/report.html")
    missed = [gate for one in results for gate in one.gates if not gate.passed]
    if any(gate.kind == "parity" for gate in missed):
        return ParityError.exit_code
    return GateError.exit_code if missed else 0


def parse_target(text: str) -> Target:
    """'engine=torch,device=cuda' as a target of the recipe; a dot reaches into a section. Raises InputError."""
    import yaml
    from pydantic import ValidationError

    from optin_export.errors import InputError
    from optin_export.recipe import Target
    from optin_export.recipe.strict_yaml import parse_yaml

    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InputError(f"cannot read --target {text}", f"'{part}' is not KEY=VALUE", "write engine=onnxruntime")
        *sections, last = key.strip().split(".")
        node: Any = values
        try:
            for name in sections:
                node = node.setdefault(name, {})
            node[last] = parse_yaml(value)
        except (yaml.YAMLError, AttributeError, TypeError):
            why = f"'{part}' is no field"
            raise InputError(f"cannot read --target {text}", why, "write engine=onnxruntime") from None
    try:
        return Target.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(name) for name in first["loc"])
        why = f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        raise InputError(f"cannot use --target {text}", why, "see `targets` in docs/reference.md") from None


def _print(one: Any) -> None:
    print(f"{one.target} on {one.machine}:")
    for row in one.latency:
        how = "" if row.judged else f" ({row.mode})"
        print(
            f"  batch {row.batch}{how}: {row.base_ms.p50:.3g} -> {row.pruned_ms.p50:.3g} ms, {row.speedup.median:.2f}x "
            f"(95 % interval {row.speedup.ci_low:.2f} to {row.speedup.ci_high:.2f})"
        )
    if one.accuracy is None:
        print(f"  accuracy not measured: {one.accuracy_note}")
    for gate in one.gates:
        found = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        print(f"  {gate.name} {gate.condition}: {found}, {'passed' if gate.passed else 'MISSED'} ({gate.note})")
