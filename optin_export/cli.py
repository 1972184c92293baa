"""The command line: parses, calls the pipeline, prints. Results on standard output, progress and errors on standard
error; the exit code tells the verdict (see `errors`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optin_export import __version__
from optin_export.cluster.options import add_cluster_arguments, cluster_options, print_sweep
from optin_export.commands import COMMANDS, parse
from optin_export.errors import EnvironmentLacks, GateError, OptinError, ParityError
from optin_export.folder import STAGES, run_folder
from optin_export.progress import choose
from optin_export.recipe import engine_name, expand, load_recipe

if TYPE_CHECKING:
    from optin_export.report.schema import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optin-export`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given[0], given[1:]) if given and given[0] in COMMANDS else _parser().parse_args(given)
    if not options.verbose:
        _silence_libraries()
    try:
        return options.work(options)
    except OptinError as error:
        _print_error(error, options.json)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing more can be said, not even by the interpreter at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _is_out_of_memory(error):
            lack = EnvironmentLacks("out of memory", _first_line(error), "lower prune.score_samples or export.batch")
            _print_error(lack, options.json)
            return lack.exit_code
        traceback.print_exc()
        print("error: this is a bug in optin_export; please report it with the lines above", file=sys.stderr)
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises a RuntimeError for it: a plain one on the CPU, one that says 'CUDA out of memory' on a GPU."""
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in told or "out of memory" in told)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "the model or a batch does not fit")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optin-export",
        description="Make a trained transformer smaller without retraining, measure it as engines, and ship or refuse.",
        epilog="\n".join(
            [
                "commands (optin-export COMMAND --help):",
                *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
                "",
                "exit codes: 0 all gates passed, 2 recipe or input wrong, 3 parity failed, 4 gate missed,",
                "5 environment lacks something, 1 bug",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML recipe, or a command (below)")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/<name>)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field, e.g. prune.budget.macs=0.5"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan of work, touch nothing")
    parser.add_argument("--stop-after", choices=STAGES, metavar="STAGE", help=f"end after a stage: {', '.join(STAGES)}")
    parser.add_argument("--force", action="store_true", help="do every stage again, whatever can be reused")
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
        from optin_export.outline import outline

        variants = expand(recipe)
        if variants and not options.json:
            print(f"{recipe.name}: a sweep of {len(variants)} runs in {folder}, of which the first is shown")
            print("\n".join(f"  {one.label}" for one in variants))
        for one in reversed(variants):
            recipe, lines = one.recipe, outline(one.recipe, folder / one.label)
        lines = lines if variants else outline(recipe, folder)
        if options.json:
            print(json.dumps({"name": recipe.name, "stages": [{"name": name, "work": work} for name, work in lines]}))
        else:
            print(f"{recipe.name}: the recipe is valid; a run in {folder} would")
            print("\n".join(f"  {name:<8} {work}" for name, work in lines))
        return 0
    # Only now: importing the pipeline imports torch.
    from optin_export.cluster.run import Order, carry_out

    order = Order(recipe, folder, options.stop_after, options.force)
    with choose(options.quiet, options.verbose, options.json) as display:
        report = carry_out(order, cluster_options(options), display)
    if isinstance(report, list):
        return print_sweep(report, folder, options.json)
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


def exit_code(report: Report) -> int:
    """0 if every gate passed, otherwise that of ParityError or of GateError."""
    if report.verdict.passed:
        return 0
    parity_failed = any(gate.kind == "parity" and not gate.passed for gate in report.verdict.gates)
    return (ParityError if parity_failed else GateError).exit_code


def _print_verdict(report: Report, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a log nothing has to be wrapped to a terminal's width.
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(Text(report.verdict.summary, style="bold green" if report.verdict.passed else "bold red"))
    gates = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("gate", "required", "measured", "", "how"):
        gates.add_column(column, justify="right" if column == "measured" else "left")
    for gate in report.verdict.gates:
        measured = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        gates.add_row(gate.name, gate.condition, measured, "passed" if gate.passed else "MISSED", gate.note)
    latency = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("latency", "batch", "base p50 ms", "pruned p50 ms", "speedup", "95 % interval", "noise floor"):
        latency.add_column(column, justify="left" if column == "latency" else "right")
    for one in report.latency:
        latency.add_row(
            one.target if one.judged else f"{one.target} ({one.mode})",
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
    console.print(f"report: {folder}/report.html   model: {folder}/onnx/{name}.onnx")


def _print_error(error: OptinError, as_json: bool) -> None:
    if as_json:
        described = {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}
        print(json.dumps({"error": described}))
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
