"""What is shown while it works: every display takes the same events, and nothing is drawn while latency is measured."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import yaml

from optin_export import cli
from optin_export.displays import JsonLines, LiveBars, PlainLines, Quiet, choose
from optin_export.workdir.run_directory import STAGES
from tests.conftest import Make


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


@pytest.mark.usefixtures("short_measurement")
def test_a_whole_run_as_events(vit_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage starts, ticks and finishes; the first line says which run, the last how it ended."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vit_recipe()), encoding="utf-8")
    line = [str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--json"]
    code = cli.main(line)
    events = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert events[0]["event"] == "begin" and events[0]["folder"] == str(tmp_path / "run")
    assert events[0]["stages"] == list(STAGES) and len(events[0]["id"]) == 32
    assert events[-1]["event"] == "end" and events[-1]["exit_code"] == code
    for stage in STAGES:
        kinds = [event["event"] for event in events if event.get("stage") == stage]
        assert kinds[0] == "start" and kinds[-1] == "finish" and "progress" in kinds, stage
    assert all(0 <= event["done"] <= event["total"] for event in events if event["event"] == "progress")
    # What was done before is reused, and told as such.
    assert cli.main([*line, "--set", "model.weights=none.safetensors"]) == 2
    captured = capsys.readouterr()
    events = [json.loads(text) for text in captured.err.splitlines()]
    assert [event["event"] for event in events][-2:] == ["error", "end"]
    told = events[-2]
    assert told["stage"] == "sources" and told["exit_code"] == events[-1]["exit_code"] == 2
    assert {key: told[key] for key in ("what", "why", "fix", "exit_code")} == json.loads(captured.out)["error"]


def test_a_bar_that_begins_anew_forgets_its_speed() -> None:
    display = LiveBars(io.StringIO())
    with display:
        display.start("scoring")
        for done in (1, 50, 100):
            display.tick(done, 100)
        began = display.bars.tasks[0].start_time
        display.tick(1, 100)
        task = display.bars.tasks[0]
        assert task.completed == 1 and task.total == 100 and task.speed is None
        assert not task.finished and task.start_time == began  # the stage's clock goes on


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_bars_say_which_stage_did_not_come_through(error: type[BaseException], word: str) -> None:
    stream = io.StringIO()
    with pytest.raises(error), LiveBars(stream) as display:
        display.start("scoring")
        raise error
    assert word in stream.getvalue()
