"""`optin-export measure`: build and measure the engines of a finished run on another machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optin_export.cli._group import command, run_argument, wait_option
from optin_export.errors import GateError, InputError, ParityError

if TYPE_CHECKING:
    from optin_export.recipe import Target
    from optin_export.report.schema import MachineResult


@command
@run_argument
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="A=B,...",
    help="What to build and measure, e.g. engine=tensorrt or engine=torch,device=cuda,compile=true or "
    "engine=tensorrt,tensorrt.workspace=2048; may be repeated (default: the targets of the recipe).",
)
@click.option("--machine", metavar="NAME", help="Name of this machine in the report (default: its GPU or CPU).")
@click.option("--replace", is_flag=True, help="Replace earlier measurements on this machine.")
@click.option(
    "--trust-python", is_flag=True, help="Run Python code that the recipe names, to measure accuracy (default: no)."
)
@wait_option
@click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
def measure(
    run: Path,
    targets: tuple[str, ...],
    machine: str | None,
    replace: bool,
    trust_python: bool,
    wait: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Build and measure the engines of a finished run here.

    RUN is the folder of a finished run, perhaps copied from another machine. Engines are built from its ONNX files. The
    results are added to its report; the run's own results and verdict stay as they are.

    Exit code 0: all gates hold on this machine; 2: the run is not finished, or one of its files has changed; 3: parity
    failed; 4: a gate was missed or not evaluated; 5: this machine lacks something.
    """
    from optin_export.displays import choose
    from optin_export.progress import reporting
    from optin_export.report import add_elsewhere
    from optin_export.stages.other_machines import continue_run
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    wanted = [parse_target(text) for text in targets] or None
    existing_run(run)
    with held(run, "optin-export measure", wait):
        with choose(quiet, False, as_json) as display:
            display.start("measure")
            began = time.perf_counter()
            with reporting(display.tick, display.phase):
                written = continue_run(run, wanted, machine=machine, replace=replace, trust_python=trust_python)
            display.finish("measure", round(time.perf_counter() - began, 3), False)
        report = add_elsewhere(run)
    names = {(path.parent.parent.name, path.stem) for path in written}
    results = [one for one in report.elsewhere if (one.machine, one.target) in names]
    if as_json:
        print(json.dumps({"results": [one.model_dump(mode="json") for one in results]}))
    else:
        for one in results:
            _print(one)
        print(f"report: {run}/report.html")
    missed = [gate for one in results for gate in one.gates if not gate.passed]
    if any(gate.kind == "parity" for gate in missed):
        return ParityError.exit_code
    return GateError.exit_code if missed else 0


def parse_target(text: str) -> Target:
    """'engine=torch,device=cuda' as a target of the recipe; a dot reaches into a section. Raises InputError."""
    import yaml
    from pydantic import ValidationError

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
            why = f"'{part}' does not set a field"
            raise InputError(f"cannot read --target {text}", why, "write engine=onnxruntime") from None
    try:
        return Target.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(name) for name in first["loc"])
        why = f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        raise InputError(f"cannot use --target {text}", why, "see `optin-export explain targets`") from None


def _print(one: MachineResult) -> None:
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
        measured = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        print(f"  {gate.name} {gate.condition}: {measured}, {'passed' if gate.passed else 'MISSED'} ({gate.note})")
