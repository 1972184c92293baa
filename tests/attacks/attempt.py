"""An attempt: the command line is given something hostile, and answers in three lines, soon, and without a traceback.

Attempts count themselves by kind (`attack_kind`, in the properties of a test's report); `conftest.py` adds them up.
"""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_export import cli
from tests.attacks.matrix import ALL
from tests.fuzz.oracle import canary, watched

#: A clean end of a refusal: input wrong, parity failed, gate missed, environment lacks something.
REFUSALS = (2, 3, 4, 5)
SECONDS = 300 if ALL else 120
#: Parts of the paths of what libraries, and the tests' own cache of exports, keep between processes.
KEPT = ("torchinductor_", "/.config/matplotlib", "/.cache/matplotlib", "/exported/")


@dataclass(frozen=True)
class Outcome:
    """code: the exit code. out, error: what was printed. strays: processes, connections, files outside the working
    directory that were written. ran: code of an input did."""

    code: int
    out: str
    error: str
    strays: tuple[str, ...] = ()
    ran: bool = False

    @property
    def told(self) -> str:
        return f"{self.code} {self.strays[:3]} {self.ran}\n{self.out[-1500:]}\n{self.error[-1500:]}"

    @property
    def is_harmless(self) -> bool:
        """Nothing stayed behind, ran or failed, whatever the answer is; memory was not what ended it."""
        return (
            self.code in (0, *REFUSALS)
            and not self.strays
            and not self.ran
            and "Traceback" not in self.error
            and "out of memory" not in self.error
            and self.error.replace("\n", "").isprintable()
            and self.out.replace("\n", "").isprintable()
        )

    @property
    def is_clean(self) -> bool:
        """Refused in three printable lines, each of its own kind."""
        told = [line.split(":")[0].strip() for line in self.error.splitlines() if not line.startswith("warning")]
        return self.is_harmless and self.code in REFUSALS and told[-3:] == ["error", "why", "fix"]


class Hung(BaseException):
    """The command did not end in time. No Exception, so that nothing that is attacked takes it for one of its own."""


@contextlib.contextmanager
def alarm(seconds: int = SECONDS) -> Iterator[None]:
    """Raises Hung in the body after so many seconds, also out of a system call that waits."""

    def ring(number: int, frame: object) -> None:
        raise Hung(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(arguments: Sequence[str | Path], seconds: int = SECONDS) -> Outcome:
    """What the command line answers to these arguments."""
    out, error = io.StringIO(), io.StringIO()
    here = Path.cwd()
    with watched(here) as strays, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), alarm(seconds):
        code = cli.main([str(argument) for argument in arguments])
    seen = tuple(one for one in strays if not any(name in one for name in KEPT))
    return Outcome(code, out.getvalue(), error.getvalue(), seen, canary(here).exists())
