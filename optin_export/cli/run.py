"""`optin-export RECIPE`: run a recipe and print its verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optin_export import __version__
from optin_export.cli._group import CONTEXT, PATH, PROGRAM, RecipeOrCommand, complete_recipe, wait_option
from optin_export.errors import GateError, InputError, ParityError, printable
from optin_export.terminal import beneath
from optin_export.workdir.run_directory import STAGES, run_folder

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Options
    from optin_export.recipe import Recipe
    from optin_export.report.schema import Report
    from optin_export.stages.pipeline import Display
    from optin_export.stages.sweep import SubRun


@click.command(
    PROGRAM,
    cls=RecipeOrCommand,
    context_settings=CONTEXT,
    no_args_is_help=False,
    subcommand_metavar=f"| {PROGRAM} COMMAND [ARGS]...",
    epilog="Exit codes: 0 all gates passed, 2 wrong recipe or input, 3 parity failed, 4 gate missed or not evaluated, "
    "5 the environment lacks something, 1 bug, 130 and 143 interrupted.",
)
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--out", type=PATH, metavar="DIR", help="The run folder (default: runs/NAME).")
@click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Override a field, e.g. prune.budget.macs=0.5."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the recipe, the model (without its weights) and the data, print what each stage would do, and stop.",
)
@click.option(
    "--stop-after",
    type=click.Choice(STAGES),
    metavar="STAGE",
    help=f"Stop after a stage: {', '.join(STAGES)}.",
)
@click.option("--force", is_flag=True, help="Ignore results of earlier runs in the folder.")
@click.option(
    "--redo", type=click.Choice(STAGES), metavar="STAGE", help="Execute a stage again, and the stages after it."
)
@click.option(
    "--quick",
    is_flag=True,
    help="Measure latency shortly, for a first look: the result is marked as quick (the recipe's measure.quick).",
)
@click.option(
    "--log",
    multiple=True,
    type=click.Choice(["mlflow", "wandb", "tensorboard"]),
    help="Also write the finished run's parameters, metrics and files into this tracker.",
)
@wait_option
@click.option(
    "--cluster",
    metavar="WHERE",
    help="Work with Ray (pip install 'optin-export[ray]'): 'local' starts processes on this machine, 'auto' joins the "
    "cluster of this machine, ray://HOST:PORT or HOST:PORT another one.",
)
@click.option("--workers", type=int, metavar="N", help="With --cluster: processes (default: one for each CPU).")
@click.option(
    "--cluster-timeout",
    type=float,
    default=600.0,
    metavar="SECONDS",
    help="With --cluster: limit for joining it (60 at most), for the start of a worker, and for a shard (600).",
)
@click.option(
    "--shared-files", is_flag=True, help="With --cluster: all nodes see the files of this machine at the same paths."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as JSON on stdout, and events as JSON lines on stderr."
)
@click.option("--quiet", "-q", is_flag=True, help="Print only the verdict.")
@click.option("--verbose", "-v", is_flag=True, help="Print plain progress lines and the warnings of libraries.")
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def optin_export(
    context: click.Context,
    recipe: str,
    out: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    stop_after: str | None,
    force: bool,
    redo: str | None,
    quick: bool,
    log: tuple[str, ...],
    wait: bool,
    cluster: str | None,
    workers: int | None,
    cluster_timeout: float,
    shared_files: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Prune a trained transformer without retraining, build engines, measure them, and ship the model or refuse it.

    RECIPE is a YAML file. A first word from the list of commands below does something else.
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other", context)
    from optin_export.recipe import load_recipe

    loaded = load_recipe(recipe, (*overrides, *(("measure.quick=true",) if quick else ())))
    folder = run_folder(loaded, out)
    if dry_run:
        from optin_export.cli.dry_run import print_dry_run

        return print_dry_run(loaded, folder, as_json)
    for tracker in log:
        from optin_export.tracking import check

        check(tracker)
    options = cluster_options(cluster, workers, cluster_timeout, shared_files)
    # Loads torch before the display begins, below which the line that says so would be lost.
    import optin_export.stages.pipeline  # noqa: F401
    from optin_export.displays import choose

    # The display reports errors from here on: `app` finds it in the context.
    context.obj = choose(quiet, verbose, as_json)
    with context.obj as display:
        display.begin(loaded.name, folder, STAGES)
        how = {"stop_after": stop_after, "force": force, "redo": redo, "wait": wait}
        report = _carry_out(loaded, folder, options, display, **how)
    from optin_export.report.next_steps import Command, next_steps

    command = Command(recipe, folder if out else None, overrides)
    if isinstance(report, list):
        code = _print_sweep(report, folder, as_json)
        _log([one.folder for one in report if (one.folder / "report.json").is_file()], log)
        return code
    if report is None:
        if as_json:
            print(json.dumps({"name": loaded.name, "stopped_after": stop_after, "folder": str(folder)}))
        else:
            print(f"stopped after {stop_after}; results so far are in {folder}")
            print(f"next: {command}   (continues after {stop_after})")
        return 0
    if as_json:
        print(report.model_dump_json())
    else:
        _print_verdict(report, folder, next_steps(report, folder, command))
    _log([folder], log)
    return exit_code(report)


def _log(runs: Sequence[Path], trackers: Sequence[str]) -> None:
    """Write finished runs into trackers, and say on standard error where they are now."""
    for tracker in trackers:
        from optin_export.tracking import log_run

        for run in runs:
            print(f"logged: {log_run(tracker, run)}", file=sys.stderr)


def _carry_out(
    recipe: Recipe, folder: Path, cluster: Options | None, display: Display, **how: Any
) -> Report | list[SubRun] | None:
    """Execute a run or sweep; returns the report (None if it stopped before), or the runs. The imports load torch."""
    if cluster is not None:
        from optin_export.distributed.runs import run_on_cluster
        from optin_export.stages.sweep import RunOptions

        return run_on_cluster(cluster, recipe, folder, display, RunOptions(**how))
    if recipe.sweep:
        from optin_export.stages.sweep import RunOptions, run_sweep

        return run_sweep(recipe, folder, display, RunOptions(**how))
    from optin_export.stages.pipeline import run

    return run(recipe, folder, display=display, **how)


def exit_code(report: Report) -> int:
    """0 if every gate passed, otherwise that of ParityError or of GateError."""
    if report.verdict.passed:
        return 0
    parity_failed = any(gate.kind == "parity" and not gate.passed for gate in report.verdict.gates)
    return (ParityError if parity_failed else GateError).exit_code


def cluster_options(where: str | None, workers: int | None, timeout: float, shared_files: bool) -> Options | None:
    """The options for Ray; None without --cluster. Raises InputError for values that cannot be used."""
    if where is None:
        if workers is not None or shared_files:
            raise InputError(
                "--workers and --shared-files need --cluster", "without it there are no workers", "add --cluster local"
            )
        return None
    from optin_export.distributed.ray_session import Options

    if where not in ("local", "auto") and not where.rpartition(":")[2].isdigit():
        raise InputError(f"--cluster {where} is no address", "it has no port", "write local, auto or ray://HOST:PORT")
    if (workers is not None and workers < 1) or not timeout > 0:
        raise InputError("cannot use --workers or --cluster-timeout", "they have to be above 0", "leave them out")
    return Options(where, workers, timeout, shared_files)


def _print_sweep(runs: Sequence[SubRun], folder: Path, as_json: bool) -> int:
    """One line per run. Returns the exit code: any run's error, else parity failed, else a missed gate."""
    codes = {one.exit_code for one in runs}
    if as_json:
        print(json.dumps({"folder": str(folder), "runs": [one.to_json() for one in runs]}))
    else:
        for one in runs:
            print(f"{one.label}: {one.summary}")
        page = folder / "compare.html"
        print(f"{'compared: ' + str(page) if page.exists() else 'runs'}: {len(runs)} runs in {folder}")
    errors = codes - {0, 3, 4}
    return min(errors) if errors else 3 if 3 in codes else max(codes, default=0)


def _print_verdict(report: Report, folder: Path, steps: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from optin_export.recipe import engine_name

    # A log has no width at which lines must be wrapped.
    width = None if sys.stdout.isatty() else 200
    console = Console(file=beneath(sys.stdout), soft_wrap=True, highlight=False, width=width)
    style = "bold red" if not report.verdict.passed else "bold yellow" if report.warnings else "bold green"
    console.print(Text(printable(report.verdict.summary), style=style))
    for text in report.warnings:
        console.print(Text(printable(f"warning: {text}"), style="yellow"))
    gates = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("gate", "required", "measured", "", "how"):
        gates.add_column(column, justify="right" if column == "measured" else "left")
    for gate in report.verdict.gates:
        measured = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        passed = "passed" if gate.passed else "" if gate.measured is None else "MISSED"
        cells = (gate.name, gate.condition, measured, passed, gate.note)
        gates.add_row(*(Text(printable(cell)) for cell in cells))
    latency = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("latency", "batch", "base p50 ms", "pruned p50 ms", "speedup", "95 % interval", "noise floor"):
        latency.add_column(column, justify="left" if column == "latency" else "right")
    for one in report.latency:
        latency.add_row(
            Text(printable(one.target if one.judged else f"{one.target} ({one.mode})")),
            str(one.batch),
            f"{one.base_ms.p50:.3g}",
            f"{one.pruned_ms.p50:.3g}",
            f"{one.speedup.median:.2f}x",
            f"{one.speedup.ci_low:.2f} to {one.speedup.ci_high:.2f}",
            f"{one.noise_floor:.1%}",
        )
    console.print(gates)
    if report.latency:
        console.print(latency)
    if taken := _taken(report):
        console.print(Text(taken))
    name = engine_name("pruned", report.precision)
    console.print(Text(printable(f"report: {folder}/report.html   model: {folder}/onnx/{name}.onnx")))
    for step in steps:
        console.print(Text(printable(f"next: {step}")))


def _taken(report: Report) -> str:
    """Actual and expected seconds of all stages that have a forecast; "" if none has one."""
    known = [one for one in report.stages if one.expected_seconds is not None]
    if not known:
        return ""
    seconds = sum(one.seconds if one.first_seconds is None else one.first_seconds for one in known)
    expected = sum(one.expected_seconds or 0 for one in known)
    return f"{', '.join(one.name for one in known)}: took {seconds:.0f} s, expected {expected:.0f} s"
