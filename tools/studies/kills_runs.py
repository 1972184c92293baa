"""Runs of the quickstart that are killed and resumed, for study_kills.py."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills_compare import contents, differences
from kills_forked import Forked
from kills_process import CODE, Victim, made_old, strange, verified
from short_measuring import settings

from optin_export.workdir.files import HALF_WRITTEN
from optin_export.workdir.run_directory import STAGES, leftovers

#: The command before its first event, and the stages.
PHASES = ("starting", *STAGES)
RUN = "run"


@dataclass(frozen=True, order=True)
class Moment:
    """When to kill: so many seconds into a phase; with `at_write` as soon as a file is being written after that.

    forked: see kills_forked.
    """

    phase: int
    seconds: float
    at_write: bool
    forked: bool


def words(out: Path, place: Path, *more: str) -> list[str]:
    recipe = place / CODE / "recipes" / "quickstart.yaml"
    return [str(recipe), "--out", str(out), *settings(*more), "--json"]


def undisturbed(kept: Path, place: Path, *more: str) -> list[float]:
    """A whole run where others are killed, because a shipment tells its place by a hash; then it is moved to `kept`.

    Returns seconds of each of the PHASES.
    """
    out = place / RUN
    victim = Victim(words(out, place, *more), place, place / "temporary")
    assert victim.until(lambda: victim.stage() != "starting"), victim.log.read_text()
    lengths = {"starting": victim.age()}
    assert victim.end() == 0, victim.log.read_text()
    for line in victim.log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "finish":
            lengths[event["stage"]] = event["seconds"]
    out.rename(kept)
    return [lengths[phase] for phase in PHASES]


def moments(lengths: list[float], kills: int, generator: random.Random) -> list[Moment]:
    """Half spread evenly over the whole duration, half at writes, spread evenly over the stages."""
    found, by_time = [], kills - kills // 2
    for index in range(by_time):
        left, phase = sum(lengths) * (index + generator.random()) / by_time, 0
        while phase < len(PHASES) - 1 and left > lengths[phase]:
            left, phase = left - lengths[phase], phase + 1
        found.append(Moment(phase, left, False, forked=phase > 0 and index % 2 == 0))
    for index in range(kills // 2):
        phase = 1 + index % len(STAGES)
        found.append(Moment(phase, lengths[phase] * generator.random(), True, forked=True))
    generator.shuffle(found)
    return found


def half_written(out: Path) -> bool:
    """Whether a file or a model repository is being written in a run folder."""
    for _, folders, names in os.walk(out):
        if any(HALF_WRITTEN.fullmatch(name) or name.startswith("staging-") for name in (*folders, *names)):
            return True
    return False


class Runs:
    """Kills runs in one folder, resumes them, and compares what comes out with an undisturbed run."""

    def __init__(self, whole: Path, place: Path, lengths: list[float], generator: random.Random) -> None:
        self.place, self.lengths, self.generator = place, lengths, generator
        self.out, self.temporary = place / RUN, place / "temporary"
        self.expected = contents(whole)
        self.by_stage: Counter[str] = Counter(dict.fromkeys(PHASES, 0))
        self.codes: Counter[str] = Counter()
        self.told: dict[str, Any] = dict.fromkeys(
            ("kills", "kills_forked", "half_written", "resumed", "identical", "verified"), 0
        )
        self.told |= {"temporary_after_kill": 0, "tracebacks": 0, "survivors": 0, "different": [], "left": []}

    def series(self, some: list[Moment]) -> list[Moment]:
        """Kill one run again and again, each time further on, then let it end; moments that came too late."""
        shutil.rmtree(self.out, ignore_errors=True)
        missed = [moment for moment in sorted(some) if not self._kill(moment)]
        self._resume()
        return missed

    def result(self) -> dict[str, Any]:
        return {**self.told, "by_stage": dict(self.by_stage), "exit_codes": dict(self.codes)}

    def _kill(self, moment: Moment) -> bool:
        kind = Forked if moment.forked else Victim
        victim = kind(words(self.out, self.place), self.place, self.temporary)
        there = victim.until(lambda: PHASES.index(victim.stage()) >= moment.phase) and victim.asleep(moment.seconds)
        if there and moment.at_write:
            victim.until(lambda: half_written(self.out), pause=0)
        if not victim.kill():
            self._ended(victim)
            return False
        stage, half = victim.stage(), half_written(self.out)
        self.by_stage[stage] += 1
        self.told["kills"] += 1
        self.told["kills_forked"] += isinstance(victim, Forked)
        self.told["half_written"] += half
        self.told["survivors"] += victim.survivors()
        self.told["temporary_after_kill"] += made_old(self.temporary)
        print(f"kill {self.told['kills']}: {stage}{', within a write' if half else ''}", flush=True)
        return True

    def _ended(self, victim: Victim) -> None:
        code = victim.end()
        self.codes[str(code)] += 1
        self.told["tracebacks"] += victim.traceback()

    def _resume(self) -> None:
        victim = Forked(words(self.out, self.place), self.place, self.temporary)
        victim.end()
        self._ended(victim)
        found = differences(self.expected, contents(self.out))
        left = [path.relative_to(self.out).as_posix() for path in leftovers(self.out)] + strange(self.temporary)
        self.told["resumed"] += 1
        self.told["identical"] += not found
        self.told["different"] += found
        self.told["left"] += left
        self.told["verified"] += verified(self.out)
        print(f"resumed: exit code {victim.end()}, different: {found}, left: {left}", flush=True)


def kill_runs(whole: Path, place: Path, lengths: list[float], kills: int, series: int, seed: int) -> dict[str, Any]:
    """`kills` kills, `series` of them per run."""
    generator = random.Random(seed)
    runs = Runs(whole, place, lengths, generator)
    left = moments(lengths, kills, generator)
    while left:
        some, left = left[:series], left[series:]
        left += runs.series(some)
        assert sum(runs.codes.values()) < 2 * kills, "runs end before they can be killed"
    return runs.result()
