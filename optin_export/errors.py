"""Errors that a user can act on. Each states what happened, why, and what to do, and has the process's exit code."""

from __future__ import annotations

import json
from typing import Any

#: The meaning of the process's exit codes, a public contract.
EXIT_CODES = {
    0: "all gates passed, or the command did what it was asked to",
    1: "a bug in this package",
    2: "the recipe or its inputs are wrong",
    3: "parity failed: an engine does not compute what its model computes",
    4: "a gate was missed (speedup, accuracy or budget), or could not be evaluated",
    5: "the environment lacks something: a package, disk space, memory",
    130: "interrupted (Ctrl-C); a run continues with the same command",
    143: "terminated (SIGTERM); a run continues with the same command",
}


#: Maximum characters of a line. Libraries put whole headers of damaged files into their messages.
LONGEST = 1500


class OptinError(Exception):
    """A failure that the user can fix.

    what: what happened, one line. why: the reason, one line. fix: what to do, one line. Each is cut at LONGEST.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = (_line(str(part)) for part in (what, why, fix))

    def __reduce__(self) -> tuple[Any, ...]:
        """Make errors picklable, because other processes return them."""
        return type(self), (self.what, self.why, self.fix)

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {"what": self.what, "why": self.why, "fix": self.fix, "exit_code": self.exit_code}

    def __str__(self) -> str:
        return f"error: {self.what}\n  why: {self.why}\n  fix: {self.fix}"


def printable(text: object, keep: str = "") -> str:
    r"""The text in a form that is safe to print: control characters (in a file's name, in a server's answer) and
    surrogate halves are written as in JSON (\u001b), so they neither act on the terminal nor fail to be encoded.

    keep: characters that are not escaped.
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(one if one.isprintable() or one in keep else json.dumps(one)[1:-1] for one in whole)


def _line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


class InputError(OptinError):
    """The recipe, the model or the data is wrong."""

    exit_code = 2


class ParityError(OptinError):
    """An engine does not reproduce the model it was built from."""

    exit_code = 3


class GateError(OptinError):
    """A gate of the recipe was missed."""

    exit_code = 4


class EnvironmentLacks(OptinError):
    """A package, a device or disk space is missing."""

    exit_code = 5


def missing_package(package: str, purpose: str, extra: str) -> EnvironmentLacks:
    """The error for an optional package that is not installed."""
    return EnvironmentLacks(
        f"{purpose} needs the package '{package}'",
        f"'{package}' cannot be imported in this environment",
        f"pip install 'optin-export[{extra}]'",
    )
