"""`optin-export`: find the command, run it, and turn its errors into an exit code.

Results go to standard output, progress and errors to standard error; the exit code shows the verdict (see `errors`).
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING

import click

from optin_export.cli._group import COMMANDS, COMPLETION_VARIABLE, FIRST_HELP, PROGRAM
from optin_export.cli._loading import loading_is_told
from optin_export.cli.run import optin_export
from optin_export.errors import EnvironmentLacks, InputError, OptinError
from optin_export.terminal import escaped_output, private_files

if TYPE_CHECKING:
    from optin_export.displays import Quiet

#: Errors of the system that a path itself causes, in whatever code it is used.
_IMPOSSIBLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
#: Errors of the system about permissions, disks, open files and memory. Others, such as a missing file of the package,
#: are bugs.
_MACHINE_REFUSES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does, with another exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optin-export`; returns the exit code."""
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(optin_export, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(FIRST_HELP, file=sys.stderr)
        return InputError.exit_code
    with escaped_output(), private_files(), _termination_as_interrupt(), loading_is_told(given):
        return _main(given)


def _main(given: list[str]) -> int:
    context = None
    try:
        # The parser consumes the list that it gets.
        context = optin_export.make_context(PROGRAM, list(given))
        with context:
            if not context.params.get("verbose"):
                _silence_libraries()
            code: int = context.command.invoke(context)
    except click.exceptions.Exit as end:  # --help and --version
        return end.exit_code
    except (Exception, KeyboardInterrupt) as error:
        code = _failed(error, given, None if context is None else context.obj)
    if context is not None and context.obj is not None:
        context.obj.end(code)
    return code


def _failed(error: BaseException, given: Sequence[str], display: Quiet | None) -> int:
    """Print an error, and return its exit code. display: the run's display, if a run has begun."""
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(given, display, 143 if isinstance(error, Terminated) else 130)
    if isinstance(error, BrokenPipeError):
        # The reader closed our output (`| head`): flushing it when the interpreter ends must not fail, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    refused = _as_ours(error, given)
    if refused is not None:
        _print_error(refused, "--json" in given, display)
        return refused.exit_code
    if display is not None:
        display.failed("error", what=_first_line(error), why="a bug in optin_export", fix="", exit_code=1)
    traceback.print_exception(error)
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


def _interrupted(given: Sequence[str], display: Quiet | None, code: int) -> int:
    """Print the command that continues the run: the same one without --force and --redo, which would start again."""
    if display is None:
        print("interrupted", file=sys.stderr)
        return code
    command = shlex.join([PROGRAM, *without_repeats(given)])
    if "--json" in given:
        display.failed("interrupted", exit_code=code, command=command)
    else:
        print(f"interrupted in the stage {display.stage or 'sources'}; to continue: {command}", file=sys.stderr)
    return code


def without_repeats(given: Sequence[str]) -> list[str]:
    """The words of a command line without --force and --redo STAGE."""
    kept, words = [], iter(given)
    for word in words:
        if word == "--redo":
            next(words, None)
        elif word != "--force" and not word.startswith("--redo="):
            kept.append(word)
    return kept


def _as_ours(error: BaseException, given: Sequence[str]) -> OptinError | None:
    """The error as one that a user can act on; None if it is a bug."""
    if isinstance(error, OptinError):
        return error
    if isinstance(error, click.UsageError):
        name = f"{PROGRAM} {given[0]}" if given and given[0] in COMMANDS else PROGRAM
        return InputError(f"cannot read the command line of {name}", error.format_message(), f"see {name} --help")
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


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises a RuntimeError: on the CPU one about 'allocate memory', on a GPU 'CUDA out of memory'."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "the model or a batch does not fit")


def _print_error(error: OptinError, as_json: bool, display: Quiet | None) -> None:
    """Text on standard error; with --json a document on standard output, and an event if a run has begun."""
    if as_json:
        print(json.dumps({"error": error.to_json()}))
    if as_json and display is not None:
        display.failed("error", **error.to_json())
    else:
        print(str(error), file=sys.stderr)


def _silence_libraries() -> None:
    """Switch off progress bars and advice that libraries print."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It reads its variables once: a program that calls `main` may have imported it before.
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:
        logging.disable_progress_bar()
    import warnings

    warnings.filterwarnings("ignore")
