"""Shipments that are killed and repeated, for study_kills.py."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills_compare import contents, differences
from kills_forked import Forked
from kills_process import Victim, made_old, strange, verified

from optin_export.ship.repository import private_folder
from optin_export.ship.verify import check_folder

#: What a shipment finds: an empty place, the models of another run, or its own with a damaged file.
STEPS = ("install", "replace", "repair")
#: When it is killed: evenly over its duration, while it writes beside the repository, or as it begins to rename.
KINDS = ("any time", "writing", "renaming")
#: Where it was when it died.
STATES = ("nothing written", "writing beside", "between renames", "installed")
MODEL = "quickstart/1/model.onnx"


@dataclass
class Step:
    """before, after: folders that hold the repository `models` and what lies beside it. seconds: of the command.
    writing: seconds from its first file to its last."""

    name: str
    run: Path
    before: Path
    after: Path
    seconds: float = 0.0
    writing: float = 0.0

    def words(self, folder: Path) -> list[str]:
        more = ["--replace"] if self.name == "replace" else []
        return ["ship", str(self.run), "--to", str(folder / "models"), *more]


def undisturbed(runs: tuple[Path, Path], place: Path) -> list[Step]:
    """Each step to its end, from what the step before has left."""
    steps, before = [], place / "before-install"
    before.mkdir()
    for name, run in zip(STEPS, (runs[0], runs[1], runs[1]), strict=True):
        after = place / f"after-{name}"
        shutil.copytree(before, after)
        step = Step(name, run, before, after)
        victim = Victim(step.words(after), place, place / "temporary")
        if victim.until(lambda after=after: staged(after / "models"), pause=0.0002):
            began = time.monotonic()
            victim.until(lambda after=after: not staged(after / "models"), pause=0.0002)
            step.writing = time.monotonic() - began
        assert victim.end() == 0, victim.log.read_text()
        step.seconds = victim.age()
        steps.append(step)
        before = after
        if name == "replace":
            before = place / "before-repair"
            shutil.copytree(after, before)
            flip(before / "models" / MODEL)
    return steps


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def staged(repository: Path) -> bool:
    place = private_folder(repository)
    return place.is_dir() and next(place.glob("staging-*"), None) is not None


class Shipments:
    """Kills one shipment after the other, repeats each, and compares what is there with an undisturbed one."""

    def __init__(self, place: Path, generator: random.Random) -> None:
        self.place, self.generator = place, generator
        self.folder, self.temporary = place / "shipped", place / "temporary"
        self.by_stage = {step: dict.fromkeys(STATES, 0) for step in STEPS}
        self.codes: Counter[str] = Counter()
        self.told: dict[str, Any] = dict.fromkeys(("kills", "kills_forked", "missed", "resumed"), 0)
        self.told |= {"identical": 0, "verified": 0, "tracebacks": 0, "survivors": 0}
        self.told |= {"broken_models": [], "different": [], "left": []}

    def kill(self, step: Step, kind: str, share: float) -> bool:
        """One shipment killed and repeated; share: how far into what `kind` says. False if it ended before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(step.before, self.folder)
        repository = self.folder / "models"
        first = repository / "quickstart"
        before = first.stat().st_ino if first.exists() else 0
        victim = (Victim if kind == "any time" else Forked)(step.words(self.folder), self.place, self.temporary)
        if kind == "any time":
            victim.asleep(share * step.seconds)
        elif kind == "writing":
            victim.until(lambda: staged(repository), pause=0)
            victim.asleep(share * step.writing)
        else:
            victim.until(lambda: _inode(first) != before, pause=0)
        if not victim.kill():
            self.told["missed"] += 1
            self._ended(victim)
            return False
        self.told["survivors"] += victim.survivors()
        state = self._state(step)
        self.by_stage[step.name][state] += 1
        self.told["kills"] += 1
        self.told["kills_forked"] += isinstance(victim, Forked)
        if repository.is_dir() and any(repository.iterdir()):
            self.told["broken_models"] += self._broken(step)
        print(f"kill {self.told['kills']}: {step.name}, {state}", flush=True)
        self._repeat(step)
        return True

    def result(self) -> dict[str, Any]:
        return {**self.told, "by_stage": self.by_stage, "exit_codes": dict(self.codes)}

    def _state(self, step: Step) -> str:
        here, before, after = (contents(one / "models") for one in (self.folder, step.before, step.after))
        if here == after:
            return "installed"
        if here != before:
            return "between renames"
        return "writing beside" if staged(self.folder / "models") else "nothing written"

    def _broken(self, step: Step) -> list[str]:
        """What is wrong with models of the repository after the kill; one that is not there has been moved whole."""
        damaged = f"{MODEL}: content differs" if step.name == "repair" else ""
        found = check_folder(self.folder / "models").items()
        told = [f"{model}/{one}" for model, problems in found for one in problems if ": missing, " not in one]
        return [one for one in told if one != damaged]

    def _ended(self, victim: Victim) -> None:
        self.codes[str(victim.end())] += 1
        self.told["tracebacks"] += victim.traceback()

    def _repeat(self, step: Step) -> None:
        made_old(self.temporary)
        victim = Forked(step.words(self.folder), self.place, self.temporary)
        self._ended(victim)
        found = [f"{step.name}: {one}" for one in differences(contents(step.after), contents(self.folder))]
        beside = {path.name for path in private_folder(self.folder / "models").iterdir()} - {"lock", "previous"}
        left = sorted(beside) + strange(self.temporary)
        self.told["resumed"] += 1
        self.told["identical"] += not found
        self.told["different"] += found
        self.told["left"] += left
        self.told["verified"] += verified(self.folder / "models")
        if found or left:
            print(f"repeated: different: {found}, left: {left}", flush=True)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def kill_shipments(steps: list[Step], place: Path, kills: int, seed: int) -> dict[str, Any]:
    generator, index = random.Random(seed), 0
    found = Shipments(place, generator)
    even = -(-kills // len(KINDS))  # of each kind: as many moments, spread evenly
    while found.told["kills"] < kills:
        kind, number = KINDS[index % len(KINDS)], index // len(KINDS)
        share = (number % even + generator.random()) / even
        found.kill(steps[number % len(STEPS)], kind, share)
        index += 1
        assert index < 4 * kills, "shipments end before they can be killed"
    runs = {step.run for step in steps}
    found.told["runs_verified"] = sum(verified(run) for run in runs) == len(runs)
    return found.result()
