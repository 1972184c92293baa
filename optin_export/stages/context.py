"""The context of a run: the recipe, the run folder, and shared objects that several stages need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optin_export import pruning, repair, scoring, search
from optin_export.data import Sources, load_sources
from optin_export.environment import describe
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.models import Placement, TaskModel
from optin_export.objective import Reference
from optin_export.recipe import Recipe, Target, engine_name, engine_names
from optin_export.stages.choice import Candidates
from optin_export.stages.structures import Measured, units_of
from optin_export.units import Costs, QueryKeys, Structure, find_query_keys, measured, notices, steps_of
from optin_export.workdir.cache import StepCache
from optin_export.workdir.files import remove

#: The files of a saved model.
FILES = ("architecture.json", "model.safetensors")


@dataclass(frozen=True)
class Surroundings:
    """State that a run shares with other runs or workers (see `sweep` and `distributed`).

    spread: hash of all that the scores depend on -> what executes the scoring's shards. quiet: a context held while
    latency is measured. shared: folder of steps that the runs of a sweep share. sources: already loaded sources.
    measured: structures of looked-up models (see `structures`).
    """

    spread: Callable[[str], scoring.Spread] = lambda key: scoring.in_process
    quiet: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    shared: Path | None = None
    sources: Sources | None = None
    measured: Measured | None = None


class RunContext:
    """One recipe, its run folder, and what has been loaded so far."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        force: bool,
        warn: Callable[[str], None] = lambda text: None,
        around: Surroundings | None = None,
    ) -> None:
        self.recipe, self.folder = recipe, folder
        #: With `engine: auto`, the engines in its place (set by the first check).
        self.candidates: Candidates | None = None
        self.around = around = around or Surroundings()
        self.cache = StepCache(folder, force, self._forget_conclusions, warn, around.shared)

    # Shared objects, loaded only on first use: a completely reused run loads no pruned model.

    @cached_property
    def sources(self) -> Sources:
        return self.around.sources or load_sources(self.recipe)

    @cached_property
    def digest(self) -> dict[str, str]:
        return self.sources.digest()

    @cached_property
    def declared(self) -> Structure:
        """The structure as declared by its families, or found and verified by measurement."""
        return units_of(self.sources, self.recipe.prune.coupled, self.recipe.prune.group_kinds, self.around.measured)

    @cached_property
    def structure(self) -> Structure:
        """The structure, with how its blocks run and depend on each other measured on two calibration rows."""
        model = self.sources.model
        if self.sources.loaded.looked_up:  # without the weights' values nothing can be measured
            return replace(self.declared, attentions=self._attentions(self.declared))
        with self.placement(model):
            structure = measured(model, self.declared, self.sources.fixed(2))
        for text in notices(structure):
            self.cache.warn(text)
        # Not where the model runs: weights that are kept elsewhere could not be exchanged.
        return replace(structure, attentions=self._attentions(structure))

    def _attentions(self, structure: Structure) -> tuple[QueryKeys, ...]:
        """The attentions whose queries and keys may lose dimensions in this run; warns of those that may not."""
        if not self.recipe.narrows:
            return ()
        model, listed = self.sources.model, self.recipe.prune.lists_dimensions
        found = find_query_keys(model, structure)
        if listed and not found:
            self.cache.warn(
                "queries and keys keep all dimensions: no attention of this model is known to work with fewer"
            )
        if self.sources.loaded.looked_up:
            return found
        usable = pruning.narrowable(model, found, self.sources.fixed(2))
        if len(usable) < len(found):
            kept = f"{len(found) - len(usable)} of {len(found)} attentions"
            self.cache.warn(
                f"queries and keys of {kept} keep all dimensions: a smaller attention computes something else there"
            )
        return usable

    @cached_property
    def scheduled(self) -> tuple[tuple[int, ...], Costs]:
        """Tokens merged per block as the recipe says (none yet if the search decides), and the units' costs then."""
        return repair.scheduled(self.sources.model, self.structure, self.recipe.tokens, self.sources.fixed(1))

    @property
    def costs(self) -> Costs:
        return self.scheduled[1]

    @cached_property
    def steps(self) -> dict[str, int]:
        """The numbers of units in whose multiples each group is kept."""
        structure, alignment = self.structure, self.recipe.alignment
        return steps_of(structure.searched_groups, alignment)

    @cached_property
    def least(self) -> dict[str, int]:
        """Units that must stay in each group: none if the whole sub-layer can be removed, otherwise one step."""
        groups = self.structure.searched_groups
        return {group.key: 0 if group.sublayer else min(self.steps[group.key], group.count) for group in groups}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return describe()

    @cached_property
    def dense(self) -> TaskModel:
        return pruning.load_model(self.folder / "model", self.python)

    @property
    def python(self) -> pruning.PythonSource:
        """The Python that a saved model may run: the recipe's, because the folder is not trusted."""
        return pruning.PythonSource(self.recipe.model.source, self.recipe.model.args)

    def _forget_conclusions(self) -> None:
        """Delete an earlier verdict and shipped repository, which become invalid when a step is executed."""
        for name in ("report.json", "report.html", "manifest.json"):
            remove(self.folder / name)
        remove(self.folder / "triton")

    @contextlib.contextmanager
    def attempt(self, target: Target) -> Iterator[None]:
        """Make an engine; one of several candidates that cannot be made is refused, and does not end the run."""
        try:
            yield
        except (EnvironmentLacks, InputError, ParityError) as error:
            candidates = self.candidates
            if candidates is None or target not in candidates.targets or len(candidates.targets) == 1:
                raise
            self.candidates = candidates.without(target, f"{error.what}: {error.why}")
            targets = tuple(one for one in self.recipe.targets if one != target)
            self.recipe = self.recipe.model_copy(update={"targets": targets})

    def operation(self, plan: search.Plan) -> repair.PrunedModel:
        """Apply the plan to the model, and repair the result as the recipe says."""
        sources, prune = self.sources, self.recipe.prune
        return repair.apply_plan(
            sources.model,
            self.structure,
            plan,
            sources.calibration if prune.compensate else (),
            sources.fixed(2),
            self.repair_settings,
            weights=self.sensitivities if prune.compensate else None,
            reference=self.outputs if self.refines else None,
            at_work=self.placement,
        )

    def tried(self, plan: search.Plan) -> TaskModel:
        """The plan's model, repaired by least squares on a few calibration rows that no loss curve is measured on."""
        sources, prune = self.sources, self.recipe.prune
        chosen = self.trial_batches if prune.compensate else ()
        return repair.apply_plan(
            sources.model,
            self.structure,
            plan,
            [sources.calibration[index] for index in chosen],
            sources.fixed(2),
            replace(self.repair_settings, gauss_newton=False),
            weights=repair.Weights([self.sensitivities.values[index] for index in chosen]) if chosen else None,
            at_work=self.placement,
        ).dense

    @property
    def trial_batches(self) -> list[int]:
        return repair.trial_batches(self.sources.calibration, self.sources.curves)

    @property
    def repair_settings(self) -> repair.RepairSettings:
        prune = self.recipe.prune
        return repair.RepairSettings(prune.compensate, self.refines, prune.temperature, self.recipe.seed, self.autocast)

    @property
    def refines(self) -> bool:
        """Whether the repair ends with Gauss-Newton on the output; `auto` decides as in docs/results.md."""
        prune = self.recipe.prune
        if prune.compensate is not True:
            return False
        return self.structure.convolutional if prune.gauss_newton == "auto" else prune.gauss_newton

    @cached_property
    def scored_in(self) -> str | None:
        """The torch.autocast precision of scores; None: the model's own."""
        sources, prune, seed = self.sources, self.recipe.prune, self.recipe.seed
        given = (sources.model, self.structure, sources.scoring, prune, seed, self.placement)
        return scoring.precision_of(*given)[0]

    @property
    def autocast(self) -> str | None:
        """ "bfloat16" for the repair's passes whose gradients are estimates; None: as the model is. In float16 small
        gradients would need the scale that only the scores have."""
        return "bfloat16" if self.scored_in == "bfloat16" else None

    @cached_property
    def sensitivities(self) -> repair.Weights:
        sources, seed = self.sources, self.recipe.seed
        with self.placement(sources.model):
            return repair.sensitivities(sources.model, self.structure, sources.calibration, seed, self.autocast)

    @cached_property
    def outputs(self) -> Reference:
        """Outputs of the unpruned model on the calibration rows, shared by all plans that are tried."""
        return repair.outputs_of(self.sources.model, self.structure, self.sources.calibration, self.recipe.seed)

    @property
    def placement(self) -> Placement:
        section = self.recipe.model
        return Placement(section.device_map, section.max_memory, self.declared.blocks, section.device)

    @property
    def calibration_digest(self) -> dict[str, str]:
        """Hashes of all that scores and repairs depend on."""
        return {key: value for key, value in self.digest.items() if key not in ("evaluation", "finetune")}

    @property
    def engine_names(self) -> tuple[str, ...]:
        """'base' and 'pruned' in fp32, and both in the recipe's precision if that is another."""
        return engine_names(self.recipe.export.precision)

    @property
    def shipped(self) -> str:
        """The name of the shipped engine: the pruned model in the recipe's precision."""
        return engine_name("pruned", self.recipe.export.precision)

    def onnx(self, which: str) -> Path:
        return self.folder / "onnx" / f"{which}.onnx"
