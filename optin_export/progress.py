"""What the command line shows while it works: bars on a terminal, plain lines in a log, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, stage: str) -> None: ...

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None: ...


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


class JsonLines(Quiet):
    """One JSON object a line: {"event": "start" | "progress" | "finish", "stage": ..., ...}; progress once a second."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.stage, self.shown = stream, "", 0.0

    def _write(self, **event: object) -> None:
        print(json.dumps(event), file=self.stream, flush=True)

    def start(self, stage: str) -> None:
        self.stage = stage
        self._write(event="start", stage=stage)

    def tick(self, done: int, total: int) -> None:
        if time.monotonic() - self.shown > 1:
            self.shown = time.monotonic()
            self._write(event="progress", stage=self.stage, done=done, total=total)

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self._write(event="finish", stage=stage, seconds=seconds, reused=reused)


class LiveBars(Quiet):
    """A live bar per stage with elapsed and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream)
        self.bars = self._new_bars(refreshing=True)
        self.task: TaskID | None = None
        self.drawn = 0.0

    def _new_bars(self, refreshing: bool) -> Progress:
        return Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<10}"),
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
        self.bars.stop()

    def start(self, stage: str) -> None:
        # While latency is measured nothing may run beside it, not even the thread that redraws the bars.
        refreshing = stage.split()[-1] not in ("measure", "runs")
        if refreshing != self.bars.live.auto_refresh:
            self.bars.stop()
            self.bars = self._new_bars(refreshing)
            self.bars.start()
        self.task = self.bars.add_task(stage, total=None, note="")

    def tick(self, done: int, total: int) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=done, total=total)
            if not self.bars.live.auto_refresh and time.monotonic() - self.drawn > 0.25:
                self.drawn = time.monotonic()
                self.bars.refresh()

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=1, total=1, note="reused" if reused else "", refresh=True)


def choose(quiet: bool, verbose: bool, as_json: bool) -> Quiet:
    """The display that fits the options and where standard error goes (standard output is kept for results)."""
    if as_json:
        return JsonLines(sys.stderr)
    if quiet:
        return Quiet()
    return LiveBars(sys.stderr) if sys.stderr.isatty() and not verbose else PlainLines(sys.stderr, verbose)
