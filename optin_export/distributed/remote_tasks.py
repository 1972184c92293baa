"""Tasks that a node runs for another machine: a whole run of a sweep, or one target of a run. Files are transferred as
bytes unless the node sees the requesting machine's files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optin_export.data import Dataset, Sources
from optin_export.distributed.file_transfer import PackedFiles, hashes_of, pack, unpack
from optin_export.errors import OptinError
from optin_export.recipe import Recipe, Target
from optin_export.stages.context import Surroundings
from optin_export.stages.pipeline import run
from optin_export.stages.sweep import Outcome, failed, outcome_of
from optin_export.workdir.measurement_lock import Machine


class Messenger:
    """The display of a run on another node: reports which stages are done."""

    def __init__(self, messages: Any, label: str) -> None:
        self.messages, self.label = messages, label

    def expect(self, seconds: Mapping[str, float | None]) -> None: ...

    def start(self, stage: str) -> None:
        print(f"{self.label}: {stage}")

    def phase(self, name: str, until: float | None) -> None: ...

    def tick(self, done: int, total: int) -> None: ...

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        print(f"{self.label}: {stage} {'reused' if reused else 'done'} in {seconds:.1f} s")
        with contextlib.suppress(Exception):  # the requesting process may have ended
            self.messages.put((self.label, stage))

    def warn(self, text: str) -> None:
        print(f"{self.label}: warning: {text}")

    def note(self, text: str) -> None:
        print(f"{self.label}: {text}")


def run_on_worker(
    recipe: Recipe, sources: Sources | None, place: Path | PackedFiles, shared: Path | None, messages: Any
) -> tuple[Outcome, PackedFiles | None]:
    """Execute one run of a sweep, after its scoring. place: its run folder, or the files in it."""
    machine = Machine()
    with machine.busy(), _folder(place) as folder:
        before = hashes_of(folder)
        around = Surroundings(quiet=machine.quiet, shared=shared, sources=sources)
        try:
            found = run(recipe, folder, display=Messenger(messages, recipe.name), around=around)
            outcome = outcome_of(found)
        except OptinError as error:
            outcome = failed(error)
        if isinstance(place, Path):
            return outcome, None
        return outcome, pack(folder, [path for path in folder.rglob("*") if path.is_file()], before)


def measure_on_node(packed: PackedFiles, target: Target, data: Dataset | None) -> tuple[str | None, PackedFiles]:
    """Build and measure one target of a finished run on this node; returns (reason for failure, resulting files)."""
    from optin_export.stages.other_machines import continue_run

    with Machine().quiet(), _folder(packed) as folder:
        try:
            continue_run(folder, [target], data=data)
        except OptinError as error:
            return f"{error.what}: {error.why}", PackedFiles({}, {})
        return None, pack(folder, [path for path in (folder / "machines").rglob("*") if path.is_file()])


@contextlib.contextmanager
def _folder(place: Path | PackedFiles) -> Iterator[Path]:
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="optin-export-") as name:
        unpack(place, Path(name))
        yield Path(name)
