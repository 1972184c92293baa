"""Progress displays of the command line: plain lines in a log, JSON lines for machines (see also `live_display`)."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from optin_export.terminal import beneath

#: Seconds between two lines about the same stage in a log, and in one with --verbose.
QUIET_SECONDS, VERBOSE_SECONDS = 60.0, 5.0


class Quiet:
    """Shows nothing. A run calls `begin`, then its stages, and always `end`, after `failed` if it did not succeed."""

    #: The stage that is under way, and the phase of it.
    stage, phase_name = "", ""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None: ...

    def begin(self, name: str, folder: Path, stages: Sequence[str]) -> None: ...

    def expect(self, seconds: Mapping[str, float | None]) -> None:
        """Stage -> the seconds that it is expected to take; None if nobody knows."""

    def start(self, stage: str) -> None:
        self.stage, self.phase_name = stage, ""

    def phase(self, name: str, until: float | None) -> None:
        """See `progress.phase`."""
        self.phase_name = name

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None: ...

    def failed(self, event: str, **facts: Any) -> None: ...

    def end(self, exit_code: int) -> None: ...

    def warn(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


class PlainLines(Quiet):
    """One line when a stage starts and one when it ends; between them its progress, every minute, or with `verbose`
    every five seconds."""

    def __init__(self, stream: TextIO, verbose: bool = False) -> None:
        self.stream, self.verbose = stream, verbose
        self.shown = 0.0

    def start(self, stage: str) -> None:
        super().start(stage)
        self.shown = time.monotonic()
        print(f"{stage} ...", file=self.stream, flush=True)

    def tick(self, done: int, total: int) -> None:
        if time.monotonic() - self.shown > (VERBOSE_SECONDS if self.verbose else QUIET_SECONDS):
            self.shown = time.monotonic()
            what = f"{self.stage}, {self.phase_name}" if self.phase_name else self.stage
            print(f"{what}: {done} of {total}", file=self.stream, flush=True)

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        print(f"{stage}: {'reused' if reused else 'done'} in {seconds:.1f} s", file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class JsonLines(Quiet):
    """One JSON object per line, distinguished by "event": begin, expected, then start, phase, progress (once a second)
    and finish of every stage, warnings and notes between them, then possibly error or interrupted, and end with the
    exit code, which is the last line of every run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.shown, self.began = stream, 0.0, time.monotonic()

    def _write(self, **event: object) -> None:
        print(json.dumps(event), file=self.stream, flush=True)

    def begin(self, name: str, folder: Path, stages: Sequence[str]) -> None:
        """id: identifies this attempt; folder: absolute path of the run folder, in which a later attempt continues."""
        whole = str(Path(folder).absolute())
        self._write(event="begin", id=uuid.uuid4().hex, name=name, folder=whole, stages=list(stages))

    def failed(self, event: str, **facts: Any) -> None:
        self._write(event=event, stage=self.stage, **facts)

    def end(self, exit_code: int) -> None:
        self._write(event="end", exit_code=exit_code, seconds=round(time.monotonic() - self.began, 3))

    def expect(self, seconds: Mapping[str, float | None]) -> None:
        self._write(event="expected", seconds=dict(seconds))

    def start(self, stage: str) -> None:
        super().start(stage)
        self.shown = 0.0
        self._write(event="start", stage=stage)

    def phase(self, name: str, until: float | None) -> None:
        if name != self.phase_name:
            super().phase(name, until)
            self._write(event="phase", stage=self.stage, phase=name)

    def tick(self, done: int, total: int) -> None:
        if time.monotonic() - self.shown > 1 or done == total:
            self.shown = time.monotonic()
            self._write(event="progress", stage=self.stage, done=done, total=total)

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self._write(event="finish", stage=stage, seconds=seconds, reused=reused)

    def warn(self, text: str) -> None:
        self._write(event="warning", stage=self.stage, text=text)

    def note(self, text: str) -> None:
        self._write(event="note", text=text)


def choose(quiet: bool, verbose: bool, as_json: bool) -> Quiet:
    """The display that fits the options and where standard error goes (standard output is kept for results)."""
    if as_json:
        return JsonLines(sys.stderr)
    if quiet:
        return Quiet()
    if sys.stderr.isatty() and not verbose:
        from optin_export.live_display import LiveStages

        return LiveStages(beneath(sys.stderr))
    return PlainLines(sys.stderr, verbose)
