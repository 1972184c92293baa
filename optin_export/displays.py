"""Progress displays of the command line: bars on a terminal, plain lines in a log, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from optin_export.errors import printable
from optin_export.terminal import beneath


class Quiet:
    """Shows nothing. A run calls `begin`, then its stages, and always `end`, after `failed` if it did not succeed."""

    #: The stage that is under way.
    stage = ""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None: ...

    def begin(self, name: str, folder: Path, stages: Sequence[str]) -> None: ...

    def start(self, stage: str) -> None:
        self.stage = stage

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None: ...

    def failed(self, event: str, **facts: Any) -> None: ...

    def end(self, exit_code: int) -> None: ...

    def warn(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


class PlainLines(Quiet):
    """One line when a stage starts and one when it ends; with `verbose`, also its progress every five seconds."""

    def __init__(self, stream: TextIO, verbose: bool = False) -> None:
        self.stream, self.verbose = stream, verbose
        self.stage, self.shown = "", 0.0

    def start(self, stage: str) -> None:
        self.stage, self.shown = stage, time.monotonic()
        print(f"{stage} ...", file=self.stream, flush=True)

    def tick(self, done: int, total: int) -> None:
        if self.verbose and time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            print(f"{self.stage}: {done} of {total}", file=self.stream, flush=True)

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        print(f"{stage}: {'reused' if reused else 'done'} in {seconds:.1f} s", file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class JsonLines(Quiet):
    """One JSON object per line, distinguished by "event": begin, then start, progress (once a second) and finish of
    every stage, warnings and notes between them, then possibly error or interrupted, and end with the exit code, which
    is the last line of every run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.stage, self.shown, self.began = stream, "", 0.0, time.monotonic()

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

    def start(self, stage: str) -> None:
        self.stage, self.shown = stage, 0.0
        self._write(event="start", stage=stage)

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


class LiveBars(Quiet):
    """A live bar per stage with elapsed and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=beneath(stream))
        self.bars = self._new_bars(refreshing=True)
        self.task: TaskID | None = None
        self.drawn, self.done = 0.0, 0

    def _new_bars(self, refreshing: bool) -> Progress:
        return Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            auto_refresh=refreshing,
        )

    def __enter__(self) -> LiveBars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error and error[0] is not None and self.task is not None:
            kind = error[0] if isinstance(error[0], type) else Exception
            note = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
            self.bars.update(self.task, note=f"[red]{note}", refresh=True)
            self.bars.stop_task(self.task)
        self.bars.stop()

    def start(self, stage: str) -> None:
        # While latency is measured nothing else may run, not even the thread that redraws the bars.
        refreshing = stage.split()[-1] not in ("measure", "runs")
        if refreshing != self.bars.live.auto_refresh:
            self.bars.stop()
            self.bars = self._new_bars(refreshing)
            self.bars.start()
        self.stage, self.done = stage, 0
        self.task = self.bars.add_task(printable(stage), total=None, note="")

    def tick(self, done: int, total: int) -> None:
        if self.task is not None:
            if done < self.done:
                # The stage's next phase: forget the last phase's speed, which does not predict the time left, but keep
                # the stage's clock running.
                began = self.bars.tasks[-1].start_time
                self.bars.reset(self.task, total=total, completed=done)
                self.bars.tasks[-1].start_time = began
            self.done = done
            self.bars.update(self.task, completed=done, total=total)
            if not self.bars.live.auto_refresh and time.monotonic() - self.drawn > 0.25:
                self.drawn = time.monotonic()
                self.bars.refresh()

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=1, total=1, note="reused" if reused else "", refresh=True)
            self.task = None

    def warn(self, text: str) -> None:
        self.console.print(printable(f"warning: {text}"), markup=False, highlight=False)

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False)


def choose(quiet: bool, verbose: bool, as_json: bool) -> Quiet:
    """The display that fits the options and where standard error goes (standard output is kept for results)."""
    if as_json:
        return JsonLines(sys.stderr)
    if quiet:
        return Quiet()
    return LiveBars(sys.stderr) if sys.stderr.isatty() and not verbose else PlainLines(sys.stderr, verbose)
