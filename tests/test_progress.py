"""What is shown while it works: every display takes the same events, and nothing is drawn while latency is measured."""

from __future__ import annotations

import io
import json
import threading

import pytest

from optin_export.progress import JsonLines, LiveBars, PlainLines, Quiet, choose


def play(display: Quiet) -> None:
    with display:
        for stage in ("scoring", "measure", "ship"):
            display.start(stage)
            display.tick(1, 2)
            display.finish(stage, 1.25, stage == "scoring")


def test_plain_lines() -> None:
    stream = io.StringIO()
    play(PlainLines(stream))
    assert stream.getvalue().splitlines()[:3] == ["scoring ...", "scoring: reused in 1.2 s", "measure ..."]


def test_json_lines_are_events() -> None:
    stream = io.StringIO()
    play(JsonLines(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert events[0] == {"event": "start", "stage": "scoring"}
    assert {"event": "finish", "stage": "ship", "seconds": 1.25, "reused": False} in events
    assert next(event for event in events if event["event"] == "progress")["total"] == 2


def test_live_bars_name_every_stage() -> None:
    stream = io.StringIO()
    play(LiveBars(stream))
    assert all(stage in stream.getvalue() for stage in ("scoring", "measure", "ship", "reused"))


def test_no_thread_redraws_while_latency_is_measured() -> None:
    others = set(threading.enumerate())

    def redrawing() -> bool:
        for thread in set(threading.enumerate()) - others:
            thread.join(0.5)  # a stopped one ends at its next turn; a running one outlasts this
        return bool(set(threading.enumerate()) - others)

    with LiveBars(io.StringIO()) as display:
        display.start("scoring")
        assert redrawing()
        display.start("measure")
        assert not redrawing()
        display.start("ship")
        assert redrawing()
    assert not redrawing()


@pytest.mark.parametrize(
    ("options", "kind"),
    [((True, False, False), Quiet), ((False, True, False), PlainLines), ((True, False, True), JsonLines)],
)
def test_choice_follows_the_options(options: tuple[bool, bool, bool], kind: type[Quiet]) -> None:
    assert type(choose(*options)) is kind
