"""Continue a finished run on another machine: build engines from its ONNX files and measure them.

Needs from the run: onnx/, measure/reference.safetensors (rows, and the torch models' outputs), recipe.yaml, report.json
and manifest.json. The model's source is needed only for accuracy. Results are written below machines/<machine>/.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from optin_export import engines, measure
from optin_export.data import Dataset, load_sources
from optin_export.environment import describe
from optin_export.errors import EnvironmentLacks, InputError, OptinError
from optin_export.export import read_graph
from optin_export.recipe import MODELS, Recipe, Target, engine_names, load_recipe
from optin_export.report.schema import read_report
from optin_export.ship.manifest import add_files, is_as_written, read_manifest
from optin_export.workdir.files import refuse_links, regular, write_json
from optin_export.workdir.onnx_files import graph_files, sha256_graph

Arrays = Mapping[str, np.ndarray]
#: Axis of the classes in a task's output, if not the last; None: none, or it depends on the model, which is not here.
CLASSES = {
    "feature-extraction": None,
    "image-feature-extraction": None,
    "image-segmentation": 1,
    "object-detection": None,
    "depth-estimation": None,
    "automatic-speech-recognition": None,
}


class Continued:
    """A checked run folder, and the machine that it is on now.

    Raises InputError for a folder that is not a finished run, or has changed since it was written.
    """

    def __init__(self, folder: Path, machine: str | None, trust_python: bool = False) -> None:
        self.folder, self.trust_python = folder, trust_python
        self.manifest = read_manifest(folder)
        if not (folder / "report.json").is_file():
            raise InputError(f"{folder} has no report.json", "the run was not finished", "run the recipe to its end")
        read_report(folder)  # results are added to it, so refuse it before anything is built
        self.recipe: Recipe = load_recipe(folder / "recipe.yaml")
        self.environment = {**describe(), "gpu": engines.gpu_name()}
        self.machine = machine or _slug(str(self.environment["gpu"] or self.environment["cpu"]))
        self.reference = self._reference()

    def build_and_measure(self, target: Target, data: Dataset | None, accuracy_note: str | None) -> Path:
        """Build and measure both models for `target`; the file with everything, as machines/M/measure/TARGET.json."""
        place = self.folder / "machines" / self.machine
        versions, names = engines.versions(target), engine_names(self.recipe.export.precision)
        sources = {which: self._checked(engines.source_of(self.folder, target, which)) for which in names}
        paths = {which: engines.artefact(place, target, which) for which in names}
        built = []
        reason = engines.unavailable(target)
        for path in sources.values():
            if path.suffix == ".onnx":
                read_graph(path)  # the manifest shows that it is complete, not that it is harmless
            for weights in graph_files(path)[1:]:
                self._checked(weights)
        for which in names:
            start = time.perf_counter()
            facts = engines.build(sources[which], target, paths[which], self._shapes())
            seconds = round(time.perf_counter() - start, 3)
            built.append(
                {"target": target.name, "model": which, "build_seconds": seconds, "facts": facts, "unmeasured": reason}
            )
        measured = self._measured(target, paths, data) if reason is None else measure.Measured((), None, (), {})
        measured = measure.Measured(
            measured.parity, measured.accuracy, measured.latency, {} if reason is None else {target.name: reason}
        )
        gates = measure.judge(self.recipe.gates, self.recipe.budget, 0.0, measured)
        written = place / "measure" / f"{target.name}.json"
        write_json(
            written,
            {
                "version": 1,
                "machine": self.machine,
                "target": target.name,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "graphs": {which: sha256_graph(path) for which, path in sources.items()},
                "environment": {**self.environment, **versions},
                "options": target.model_dump(mode="json"),
                # The budget is the run's: it does not depend on the machine.
                "gates": [gate.to_json() for gate in gates if not gate.name.startswith("budget.")],
                "engines": built,
                "accuracy_note": None if measured.accuracy else accuracy_note,
                **measured.to_json(),
            },
        )
        files = [file for path in paths.values() for file in engines.files(path, target) if file.exists()]
        add_files(self.folder, [written, *files])
        return written

    def written(self, target: Target) -> Path:
        return self.folder / "machines" / self.machine / "measure" / f"{target.name}.json"

    def evaluation(self) -> tuple[Dataset | None, str | None]:
        """The recipe's evaluation data, if they can be read here, or the reason why not."""
        if self.recipe.data.evaluation is None:
            return None, "the recipe names no evaluation data"
        code = self._names_code()
        if code is not None and not self.trust_python:
            return None, f"the recipe names Python code ({code}); --trust-python runs it"
        try:
            return load_sources(self.recipe).evaluation(), None
        except OptinError as error:
            return None, f"the recipe's model or data cannot be read here: {error.what}: {error.why}"[:400]

    def _names_code(self) -> str | None:
        """Python that the untrusted recipe of this folder would run here."""
        model, data = self.recipe.model, self.recipe.data
        sources = [model.source, data.calibration.source, data.evaluation.source if data.evaluation else ""]
        named = next((source for source in sources if source.startswith("py:")), None)
        return named or (f"{model.source} with trust_remote_code" if model.trust_remote_code else None)

    def _measured(self, target: Target, paths: Mapping[str, Path], data: Dataset | None) -> measure.Measured:
        return measure.measure_engines(
            {target.name: {which: partial(engines.load, path, target) for which, path in paths.items()}},
            {which: self._answers(which) for which in MODELS},
            self._rows,
            data,
            measure.MeasureSettings(
                batches=self.recipe.export.batch,
                sequence=self.recipe.export.sequence if self.recipe.is_text else None,
                seed=self.recipe.seed,
                judged={target.name: target.mode},
                precision=self.recipe.export.precision,
                classes=CLASSES.get(self.recipe.model.task, -1),
                other_work=self.recipe.gates.most_other_work,
                blocks=self.recipe.measure.most_blocks,
                seconds=self.recipe.measure.seconds,
            ),
        )

    def _reference(self) -> dict[str, np.ndarray]:
        path = self._checked(self.folder / "measure" / "reference.safetensors")
        try:
            tensors = load_file(regular(path))
        except Exception as error:  # a header may name types that numpy lacks
            raise InputError(f"cannot read {path}", str(error)[:300], "copy the run folder again") from None
        rows = {len(array) if array.ndim else 0 for array in tensors.values()}
        answers = {"output.base", "output.pruned"} <= tensors.keys()
        if not answers or len(tensors) < 3 or len(rows) != 1 or min(rows) < max(self.recipe.export.batch):
            raise InputError(
                f"{path} holds no rows and answers",
                f"{len(tensors)} tensors of {', '.join(map(str, sorted(rows)))} rows",
                "run the recipe again",
            )
        return tensors

    def _inputs(self) -> dict[str, np.ndarray]:
        names = {name: name.removeprefix("input.") for name in self.reference if name.startswith("input.")}
        # In the order of the models' arguments, which is the order in the recipe's own engines.
        return {short: self.reference[name] for name, short in names.items()}

    def _rows(self, batch: int, distinct: bool) -> dict[str, np.ndarray]:
        chosen = np.arange(batch) if distinct else np.zeros(batch, int)
        return {name: array[chosen] for name, array in self._inputs().items()}

    def _answers(self, which: str) -> Callable[[Arrays], np.ndarray]:
        """The torch model's outputs for the rows of `_rows`."""
        known, outputs = self._inputs(), self.reference[f"output.{which}"]

        def answer(inputs: Arrays) -> np.ndarray:
            count = len(next(iter(inputs.values())))
            distinct = all(np.array_equal(array, known[name][:count]) for name, array in inputs.items())
            return outputs[np.arange(count) if distinct else np.zeros(count, int)]

        return answer

    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        one = {name: array.shape[1:] for name, array in self._inputs().items()}
        return [{name: (batch, *shape) for name, shape in one.items()} for batch in self.recipe.export.batch]

    def _checked(self, path: Path) -> Path:
        """The file, if it exists and is unchanged."""
        name = path.relative_to(self.folder).as_posix()
        entry = self.manifest["files"].get(name)
        if not path.is_file() or entry is None:
            engine = {".pt2": "torch", ".xml": "openvino"}.get(path.suffix)
            hint = f" a target engine: {engine} among its targets," if engine else ""
            raise InputError(
                f"{self.folder} has no {name}",
                "it is not in the folder or not in its manifest.json",
                f"run the recipe with{hint or ' this version,'} and copy the whole folder",
            )
        if not is_as_written(path, entry):
            raise InputError(f"{path} is not the file that the run wrote", "its sha256 is another", "copy it again")
        return path


def continue_run(
    folder: Path,
    targets: Sequence[Target] | None = None,
    *,
    machine: str | None = None,
    replace: bool = False,
    trust_python: bool = False,
    data: Dataset | None = None,
) -> list[Path]:
    """Measure the run in `folder` on this machine, for `targets` (default: the recipe's); the files written.

    trust_python: run Python that the folder's recipe names, to load its model and evaluation data.
    data: the evaluation data, if the caller has them.
    machine: name of this machine in the report; default: its GPU, or else its CPU. Raises InputError for a folder that
    is no finished run, and where there is such a measurement already and `replace` is false; EnvironmentLacks where a
    target's library is missing.
    """
    if machine is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", machine):
        raise InputError(f"'{machine}' names no machine", "it has to be a file's name", "use letters, digits and -")
    run = Continued(folder, machine, trust_python)
    for part in ("measure", "engines"):
        refuse_links(folder / "machines" / run.machine / part)
    chosen = run.recipe.targets if targets is None else targets
    if any(target.engine == "auto" for target in chosen):
        raise InputError("engine: auto chooses during a run", "this run has chosen", "name the engine to measure")
    for target in chosen:
        engines.versions(target)  # a missing package raises before anything is built
        if run.written(target).exists() and not replace:
            raise InputError(
                f"{target.name} has been measured on {run.machine} already",
                f"the results are in {run.written(target)}",
                "--replace them, or give another --machine NAME",
            )
    needs_data = any(engines.unavailable(target) is None for target in chosen)
    note = None
    if data is None:
        data, note = run.evaluation() if needs_data else (None, "no engine runs here")
    return [run.build_and_measure(target, data, note) for target in chosen]


def _slug(name: str) -> str:
    """'NVIDIA L4 (sm89)' -> 'nvidia-l4-sm89'."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise EnvironmentLacks("this machine has no name", "neither GPU nor CPU tells one", "give --machine NAME")
    return slug
