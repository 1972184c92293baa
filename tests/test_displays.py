"""What is shown while it works: every display takes the same events, and nothing is drawn while latency is measured."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from optin_export import cli
from optin_export.displays import JsonLines, PlainLines, Quiet, choose
from optin_export.live_display import LiveStages
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
    play(LiveStages(stream))
    assert all(stage in stream.getvalue() for stage in ("scoring", "measure", "ship", "reused"))


def test_no_thread_redraws_while_latency_is_measured() -> None:
    others = set(threading.enumerate())

    def redrawing() -> bool:
        for thread in set(threading.enumerate()) - others:
            thread.join(0.5)  # a stopped one ends at its next turn; a running one outlasts this
        return bool(set(threading.enumerate()) - others)

    with LiveStages(io.StringIO()) as display:
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
        kinds = [event["event"] for event in events if event.get("stage") == stage and event["event"] != "phase"]
        assert kinds[0] == "start" and kinds[-1] == "finish" and "progress" in kinds, stage
    named = {(event["stage"], event["phase"]) for event in events if event["event"] == "phase"}
    assert {("sources", "units"), ("measure", "accuracy"), ("measure", "parity with torch")} <= named
    expected = next(event["seconds"] for event in events if event["event"] == "expected")
    assert expected["scoring"] >= 0 and set(expected) <= set(STAGES)
    assert all(0 <= event["done"] <= event["total"] for event in events if event["event"] == "progress")
    # What was done before is reused, and told as such.
    assert cli.main([*line, "--set", "model.weights=none.safetensors"]) == 2
    captured = capsys.readouterr()
    events = [json.loads(text) for text in captured.err.splitlines()]
    assert [event["event"] for event in events][-2:] == ["error", "end"]
    told = events[-2]
    assert told["stage"] == "sources" and told["exit_code"] == events[-1]["exit_code"] == 2
    assert {key: told[key] for key in ("what", "why", "fix", "exit_code")} == json.loads(captured.out)["error"]


def shown(display: LiveStages, height: int = 40) -> str:
    """What is on a terminal of 100 columns."""
    display.console = Console(file=io.StringIO(), width=100, height=height)
    display.console.print(display.frame())
    text = display.console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def test_every_stage_is_listed_from_the_start_and_a_phase_has_a_name() -> None:
    display = LiveStages(io.StringIO())
    display.begin("run", Path("run"), STAGES)
    lines = shown(display).splitlines()
    assert all(f"· {stage}" in " ".join(line.split()) for stage, line in zip(STAGES, lines, strict=False))
    for stage in ("sources", "scoring"):
        display.start(stage)
        display.finish(stage, 65.0, True)
    display.start("curves")
    display.phase("losses by measurement", None)
    display.tick(4, 12)
    lines = [" ".join(line.split()) for line in shown(display).splitlines()]
    assert lines[1] == "✓ scoring 1:05 reused" and lines[2].endswith("curves 0:00 losses by measurement, 4 of 12")
    assert lines[3] == "· search" and "so far" in lines[-1] and "left" not in lines[-1]
    assert "to come: search, surgery" in shown(display, height=8)  # a low terminal


def test_one_bar_and_one_time_left_for_the_whole_run() -> None:
    display = LiveStages(io.StringIO())
    display.begin("run", Path("run"), STAGES)
    display.expect({"scoring": 100.0, "measure": 200.0})
    text = shown(display)
    assert "about 5:16 left" in text and text.count("%") == 1  # 300 s, and 2 s for each of the eight others
    display.expect({"scoring": 100.0, "measure": 200.0, "engines": None})
    assert "at least 5:16 left" in shown(display)


def test_each_run_of_a_sweep_has_a_list_of_its_own() -> None:
    display = LiveStages(io.StringIO())
    display.begin("sweep", Path("sweep"), STAGES)
    with display:
        for label in ("macs-0.6", "macs-0.3"):
            display.start(f"{label} sources")
            display.finish(f"{label} sources", 1.0, False)
        assert "macs-0.3" in shown(display) and "macs-0.6" not in shown(display)
        assert display.remaining.ended == {"sources": 1.0}


def test_a_log_gets_a_line_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("optin_export.displays.time.monotonic", lambda: now[0])
    display = PlainLines(stream)
    display.start("measure")
    display.phase("accuracy", 0.3)
    for second in (1, 61, 62, 130):
        now[0] = second
        display.tick(second, 200)
    assert stream.getvalue().splitlines() == [
        "measure ...",
        "measure, accuracy: 61 of 200",
        "measure, accuracy: 130 of 200",
    ]


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_bars_say_which_stage_did_not_come_through(error: type[BaseException], word: str) -> None:
    stream = io.StringIO()
    with pytest.raises(error), LiveStages(stream) as display:
        display.start("scoring")
        raise error
    assert word in stream.getvalue()
