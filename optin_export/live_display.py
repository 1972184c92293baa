"""The display on a terminal: every stage from the start, what the current one does, one bar for the whole run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from optin_export.displays import Quiet
from optin_export.errors import printable
from optin_export.remaining import Remaining

#: Seconds between two frames that are drawn by hand.
FRAME_SECONDS = 0.25
#: Rows of the terminal that are not for stages.
OTHER_ROWS = 3


class LiveStages(Quiet):
    """A list of the stages that is drawn again and again; in a sweep, one list for each run."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream)
        self.planned: Sequence[str] = ()
        self.remaining = Remaining(())
        self.label, self.counted, self.failure = "", "", ""
        self.notes: dict[str, str] = {}
        self.began = time.monotonic()
        self.spinner = Spinner("dots")
        self.drawn = 0.0
        self.live = self._new_live(refreshing=True)

    def _new_live(self, refreshing: bool) -> Live:
        return Live(get_renderable=self.frame, console=self.console, auto_refresh=refreshing, refresh_per_second=8)

    def __enter__(self) -> LiveStages:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if error and error[0] is not None:
            kind = error[0] if isinstance(error[0], type) else Exception
            self.failure = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.live.stop()

    def begin(self, name: str, folder: Path, stages: Sequence[str]) -> None:
        self.planned = tuple(stages)
        self.remaining = Remaining(self.planned)
        self._draw()

    def expect(self, seconds: Mapping[str, float | None]) -> None:
        self.remaining.expect(seconds)

    def start(self, stage: str) -> None:
        super().start(stage)
        label, _, name = stage.rpartition(" ")
        if label != self.label:
            self._next_run(label)
        self._switch(refreshing=name not in ("measure", "runs"))
        self.counted = ""
        self.remaining.start(name)
        self._draw()

    def _next_run(self, label: str) -> None:
        """The next run of a sweep: the last one's list stays on the screen, and another begins below it."""
        if self.label:
            self.live.stop()
            self.live = self._new_live(self.live.auto_refresh)
        self.label, self.notes, self.remaining = label, {}, Remaining(self.planned)
        self.began = time.monotonic()
        if not self.live.is_started:
            self.live.start()

    def _switch(self, refreshing: bool) -> None:
        """While latency is measured nothing else may run, not even the thread that draws."""
        if refreshing != self.live.auto_refresh:
            self.live.transient = True  # the same frame is drawn again at once
            self.live.stop()
            self.live = self._new_live(refreshing)
            self.live.start()

    def phase(self, name: str, until: float | None) -> None:
        super().phase(name, until)
        self.counted = ""
        self.remaining.phase(until)
        self._draw()

    def tick(self, done: int, total: int) -> None:
        self.counted = f"{done} of {total}" if total > 1 else ""
        self.remaining.tick(done, total)
        if not self.live.auto_refresh and time.monotonic() - self.drawn > FRAME_SECONDS:
            self._draw()

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        name = stage.rpartition(" ")[2]
        self.notes[name] = "reused" if reused else ""
        self.remaining.finish(name, seconds, reused)
        self.stage = self.phase_name = ""
        self._draw()

    def warn(self, text: str) -> None:
        self.console.print(printable(f"warning: {text}"), markup=False, highlight=False)

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False)

    def _draw(self) -> None:
        if self.live.is_started:
            self.drawn = time.monotonic()
            self.live.refresh()

    def frame(self) -> RenderableType:
        """What is on the screen now."""
        stages = self.remaining.stages
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        ended = self.remaining.ended
        shown = [one for one in stages if one in ended or one == self.remaining.stage]
        to_come = [one for one in stages if one not in shown]
        space = self.console.height - OTHER_ROWS - bool(self.label)
        for one in shown if len(stages) <= space else shown[-1:]:
            table.add_row(*self._row(one))
        rows: list[RenderableType] = [Text(printable(self.label), style="bold")] if self.label else []
        rows.append(table)
        if len(stages) <= space:
            for one in to_come:
                table.add_row(Text("·", style="dim"), Text(printable(one), style="dim"), "", "")
        elif to_come:
            rows.append(Text(f"  to come: {', '.join(map(printable, to_come))}", style="dim", no_wrap=True))
        rows.append(self._whole())
        return Group(*rows)

    def _row(self, stage: str) -> tuple[RenderableType, ...]:
        name = Text(printable(stage))
        if stage in self.remaining.ended:
            time_taken = Text(clock(self.remaining.ended[stage]))
            return Text("✓", style="green"), name, time_taken, Text(self.notes.get(stage, ""), style="dim")
        doing = ", ".join(printable(one) for one in (self.phase_name, self.counted) if one)
        if self.failure:
            return Text("✗", style="red"), name, Text(clock(self.remaining.elapsed())), Text(self.failure, style="red")
        return self.spinner, name, Text(clock(self.remaining.elapsed())), Text(doing)

    def _whole(self) -> RenderableType:
        """The bar of the run, the time since it began, and the time that is left."""
        share, left = self.remaining.share, self.remaining.left
        took = clock(time.monotonic() - self.began)
        if self.failure or len(self.remaining.ended) == len(self.remaining.stages):
            text = f"{took} in all"
        elif left is None:
            text = f"{took} so far"
        else:
            text = f"{took} so far, {'at least' if self.remaining.at_least else 'about'} {clock(left)} left"
        if not self.stage and self.phase_name:
            text += f"   {printable(self.phase_name)}"
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(ProgressBar(total=1.0, completed=share, width=30), Text(f"{share:4.0%}"), Text(text))
        return line


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
