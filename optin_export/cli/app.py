"""The command line: parses, calls the pipeline, prints. Results on standard output, progress and errors on standard
error; the exit code tells the verdict (see `errors`)."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from optin_export import __version__
from optin_export.cli import COMMANDS, parse, refuse_misspelt
from optin_export.cli._cluster import add_cluster_arguments, cluster_options
from optin_export.cli._parser import Parser
from optin_export.errors import EnvironmentLacks, GateError, InputError, OptinError, ParityError, printable
from optin_export.progress import Quiet, choose
from optin_export.recipe import engine_name, expand, load_recipe
from optin_export.terminal import beneath, escaped_output, private_files
from optin_export.workdir.run_directory import STAGES, run_folder

if TYPE_CHECKING:
    from pathlib import Path

    from optin_export.distributed.ray_session import Options
    from optin_export.recipe import Recipe
    from optin_export.report.schema import Report
    from optin_export.stages.sweep import SubRun


#: Errors of the system that a path itself causes, whatever reads it.
_IMPOSSIBLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
#: Errors of the system about permissions, disks, open files and memory. Others, such as a file of ours that is missing,
#: are bugs.
_MACHINE_REFUSES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends like Ctrl-C, so that nothing stays behind, but with the exit code of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optin-export`; returns the exit code."""
    with escaped_output(), private_files():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(given: list[str]) -> int:
    try:
        if given and given[0] not in COMMANDS:
            refuse_misspelt(given[0])
        options = parse(given[0], given[1:]) if given and given[0] in COMMANDS else recipe_parser().parse_args(given)
    except OptinError as error:
        _print_error(error, "--json" in given)
        return error.exit_code
    options.display = None
    with _termination_as_interrupt():
        code = _work(options, given)
    if options.display is not None:
        options.display.end(code)
    return code


def _work(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Do what the options say; every error becomes its exit code."""
    if not options.verbose:
        _silence_libraries()
    try:
        return options.work(options)
    except OptinError as error:
        _print_error(error, options.json, options.display)
        return error.exit_code
    except KeyboardInterrupt as error:
        return _interrupted(options, given, 143 if isinstance(error, Terminated) else 130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing more can be said, not even by the interpreter at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (refused := _refused_by_the_system(error)) is not None:
            _print_error(refused, options.json, options.display)
            return refused.exit_code
        if options.display is not None:
            options.display.failed("error", what=_first_line(error), why="a bug in optin_export", fix="", exit_code=1)
        traceback.print_exc()
        print("error: this is a bug in optin_export; please report it with the lines above", file=sys.stderr)
        return 1


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler, a container that is stopped) ends the work as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupted(options: argparse.Namespace, given: Sequence[str], code: int) -> int:
    """One line that says how to go on; without --force, which would begin again."""
    display = options.display
    if display is None:
        print("interrupted", file=sys.stderr)
        return code
    command = shlex.join(["optin-export", *(word for word in given if word != "--force")])
    if options.json:
        display.failed("interrupted", exit_code=code, command=command)
    else:
        print(f"interrupted in the stage {display.stage or 'sources'}; to continue: {command}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises a RuntimeError for it: a plain one on the CPU, one that says 'CUDA out of memory' on a GPU."""
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in told or "out of memory" in told)
    )


def _refused_by_the_system(error: Exception) -> OptinError | None:
    """The error to tell instead, where a path or the machine is at fault; None where we are."""
    if _is_out_of_memory(error):
        return EnvironmentLacks("out of memory", _first_line(error), "lower prune.score_samples or export.batch")
    if not isinstance(error, OSError):
        return None
    what, why = f"cannot use {error.filename or 'a file'}", error.strerror or str(error)
    if error.errno in _IMPOSSIBLE_PATH:
        return InputError(what, why, "correct the path")
    if error.errno in _MACHINE_REFUSES:
        return EnvironmentLacks(what, why, "check permissions and disk space")
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "the model or a batch does not fit")


def recipe_parser(named: bool = True) -> argparse.ArgumentParser:
    """The parser of a run; `named` without the recipe itself, for what stands in its place."""
    parser = Parser(
        prog="optin-export",
        description="Make a trained transformer smaller without retraining, measure it as engines, and ship or refuse.",
        epilog="\n".join(
            [
                "commands (optin-export COMMAND --help):",
                *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
                "",
                "exit codes: 0 all gates passed, 2 recipe or input wrong, 3 parity failed, 4 gate missed,",
                "5 environment lacks something, 1 bug, 130 and 143 interrupted",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if named:
        parser.add_argument("recipe", help="a YAML recipe, or a command (below)")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/<name>)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field, e.g. prune.budget.macs=0.5"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, model (without weights) and data as a run does, print the plan of work, touch nothing",
    )
    parser.add_argument("--stop-after", choices=STAGES, metavar="STAGE", help=f"end after a stage: {', '.join(STAGES)}")
    parser.add_argument("--force", action="store_true", help="do every stage again, whatever can be reused")
    parser.add_argument("--wait", action="store_true", help="for another process that works in the run folder")
    add_cluster_arguments(parser)
    parser.add_argument("--json", action="store_true", help="report as JSON on stdout, events as JSON lines on stderr")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", "-q", action="store_true", help="only the verdict")
    loudness.add_argument("--verbose", "-v", action="store_true", help="plain progress lines and library warnings")
    parser.add_argument("--version", action="version", version=f"optin-export {__version__}")
    parser.set_defaults(work=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.set)
    folder = run_folder(recipe, options.out)
    if options.dry_run:
        return _dry_run(recipe, folder, options.json)
    cluster = cluster_options(options)
    # From here on the display tells how it ended: `main` takes it from the options.
    options.display = choose(options.quiet, options.verbose, options.json)
    with options.display as display:
        display.begin(recipe.name, folder, STAGES)
        report = _carried_out(recipe, folder, display, cluster, options)
    if isinstance(report, list):
        return _print_sweep(report, folder, options.json)
    if report is None:
        if options.json:
            print(json.dumps({"name": recipe.name, "stopped_after": options.stop_after, "folder": str(folder)}))
        else:
            print(f"stopped after {options.stop_after}; results so far are in {folder}")
        return 0
    if options.json:
        print(report.model_dump_json())
    else:
        _print_verdict(report, str(folder))
    return exit_code(report)


def _carried_out(
    recipe: Recipe, folder: Path, display: Quiet, cluster: Options | None, options: argparse.Namespace
) -> Report | list[SubRun] | None:
    """The report of a run (None if it was to stop before), or the runs of a sweep."""
    # Only now: importing the pipeline imports torch.
    how = {"stop_after": options.stop_after, "force": options.force, "wait": options.wait}
    if cluster is not None:
        from optin_export.distributed.runs import run_on_cluster

        return run_on_cluster(cluster, recipe, folder, display, **how)
    if recipe.sweep:
        from optin_export.stages.sweep import run_sweep

        return run_sweep(recipe, folder, display, **how)
    from optin_export.stages.pipeline import run

    return run(recipe, folder, display=display, **how)


def _dry_run(recipe: Recipe, folder: Path, as_json: bool) -> int:
    """What a run would do and take, after the checks of its start; refuses what the run would refuse."""
    from optin_export.cli.forecast.estimate import estimate
    from optin_export.cli.forecast.outline import outline

    # Only now: importing it imports torch.
    from optin_export.stages.preflight import Known, preflight

    variants = expand(recipe)
    known = Known()
    checked = [preflight(one, known) for one in ([one.recipe for one in variants] or [recipe])]
    wrong = next((one.wrong for one in checked if one.wrong is not None), None)
    if wrong is not None:
        raise wrong
    lack = next((one.refusal for one in checked if one.refusal is not None), None)
    shown, place = (variants[0].recipe, folder / variants[0].label) if variants else (recipe, folder)
    lines, expected = outline(shown, place), estimate(shown, place)
    both = list(zip(lines, expected.stages, strict=True))
    if as_json:
        stages = [{"name": name, "work": work, "estimate": found.to_json()} for (name, work), found in both]
        more: dict[str, Any] = {"sweep": [one.label for one in variants]} if variants else {}
        if lack is not None:
            more["error"] = _described(lack)
        checks = [finding.to_json() for finding in checked[0].findings]
        print(json.dumps({"name": recipe.name, **more, "stages": stages, "checks": checks, **expected.to_json()}))
        return 0 if lack is None else lack.exit_code
    if variants:
        print(f"{recipe.name}: a sweep of {len(variants)} runs in {folder}, of which the first is shown")
        print("\n".join(f"  {one.label}" for one in variants))
    far = " as far as it could be checked (see the end)" if checked[0].not_checked or lack else ""
    print(f"{shown.name}: the recipe is valid{far}; a run in {place} would")
    print("\n".join(f"  {name:<8} {work}\n{'':<11}{found}" for (name, work), found in both))
    print(expected.summary())
    print("\n".join(str(finding) for finding in checked[0].findings if finding.state != "refused"))
    if lack is not None:
        raise lack
    return 0


def exit_code(report: Report) -> int:
    """0 if every gate passed, otherwise that of ParityError or of GateError."""
    if report.verdict.passed:
        return 0
    parity_failed = any(gate.kind == "parity" and not gate.passed for gate in report.verdict.gates)
    return (ParityError if parity_failed else GateError).exit_code


def _print_sweep(runs: Sequence[SubRun], folder: Path, as_json: bool) -> int:
    """One line per run; the exit code: an error of any run before parity before a missed gate."""
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


def _print_verdict(report: Report, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a log nothing has to be wrapped to a terminal's width.
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
    name = engine_name("pruned", report.precision)
    console.print(Text(printable(f"report: {folder}/report.html   model: {folder}/onnx/{name}.onnx")))


def _described(error: OptinError) -> dict[str, Any]:
    return {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}


def _print_error(error: OptinError, as_json: bool, display: Quiet | None = None) -> None:
    """On standard error in words; with --json as a document on standard output, and as an event of a run that began."""
    described = _described(error)
    if as_json:
        print(json.dumps({"error": described}))
    if as_json and display is not None:
        display.failed("error", **described)
    else:
        print(str(error), file=sys.stderr)


def _silence_libraries() -> None:
    """Progress bars and advice of the libraries below are not for the users of this command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore")
