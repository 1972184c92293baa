"""Check a recipe as a run does at its start, but without loading weights and without downloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from optin_export.data import Sources, load_sources, read_data
from optin_export.errors import InputError, OptinError
from optin_export.models import Lookup, needs_download, no_downloads, not_cached
from optin_export.recipe import Recipe
from optin_export.stages.checks import CHECKS, Check
from optin_export.stages.context import RunContext, Surroundings
from optin_export.stages.structures import Measured, NotMeasured, units_of
from optin_export.units import find_structure, load_own_family
from optin_export.workdir.files import sha256_json

Result = TypeVar("Result")
State = Literal["ok", "warning", "refused", "not checked"]
#: The checks that need the model and the data.
_ON_SOURCES = ("placement", "units", "budget", "latency")
KINDS = ("heads", "neurons", "channels")


@dataclass(frozen=True)
class Finding:
    """The result of one check. detail: findings, a run's warnings, why it was refused, or why it was not checked."""

    name: str
    state: State
    detail: str
    error: OptinError | None = None

    def __str__(self) -> str:
        return f"{'checked' if self.state == 'ok' else self.state}: {self.name}: {self.detail}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "detail": self.detail}


@dataclass(frozen=True)
class Preflight:
    """The findings about a recipe. model: the task model without weights, if it was found; sources: the model with its
    data."""

    findings: tuple[Finding, ...]
    model: nn.Module | None = None
    sources: Sources | None = None

    @property
    def refusal(self) -> OptinError | None:
        """The error with which a run on this machine would fail at its start; None if none was found."""
        return next((one.error for one in self.findings if one.error is not None), None)

    @property
    def wrong(self) -> InputError | None:
        """The first error that would also occur on any other machine."""
        return next((one.error for one in self.findings if isinstance(one.error, InputError)), None)

    @property
    def not_checked(self) -> list[str]:
        return [one.detail for one in self.findings if one.state == "not checked"]


class Known:
    """Caches looked-up models and data for recipes that share them, as the runs of a sweep do.

    measured: the structures that were found on random weights.
    """

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.measured: Measured = {}
        self._last: tuple[str, Sources] | None = None

    def of(self, recipe: Recipe) -> Sources:
        """The sources of a recipe. Only the last ones are cached, because data is large; `lookup` lists what was not
        checked. Raises InputError."""
        key = shared_key(recipe)
        if self._last is None or self._last[0] != key:
            self.lookup, self._last = Lookup(), None
            self._last = key, load_sources(recipe, self.lookup)
        return dataclasses.replace(self._last[1], recipe=recipe)


def shared_key(recipe: Recipe) -> str:
    """A hash of the recipe's fields that loading uses; other fields are read when needed."""
    key = recipe.model_dump(mode="json", exclude={"name", "prune", "targets", "gates", "ship"})
    key["export"] = [recipe.export.sequence, recipe.export.seconds]
    key["searched"] = recipe.budget.accuracy_drop is not None
    return sha256_json(key)


def preflight(recipe: Recipe, known: Known | None = None) -> Preflight:
    """Run the checks of a run's start, with the same functions, on a model without weights.

    known: models and data looked up for other recipes. Checks that need a download, or the weights' values, are
    reported as not checked. Writes nothing, and does not raise for a wrong recipe: its errors are in the findings.
    """
    with no_downloads():
        return _Checking(recipe, known or Known()).result()


class _Checking:
    def __init__(self, recipe: Recipe, known: Known) -> None:
        self.recipe, self.known = recipe, known
        self.work = RunContext(recipe, Path(), False)
        self.sources: Sources | None = None
        self.warned: list[str] = []
        self.unmeasured = False

    def result(self) -> Preflight:
        findings: list[Finding] = []
        for name, check in CHECKS:
            if name in _ON_SOURCES and self.sources is None:
                continue
            found = list(self._done(name, check))
            findings += found
            if self.unmeasured or (name != "engines" and any(isinstance(one.error, InputError) for one in found)):
                break  # later checks would only repeat this
        return Preflight(tuple(findings), self.known.lookup.model, self.sources)

    def _done(self, name: str, check: Check) -> Iterator[Finding]:
        try:
            if name == "model and data":
                self.sources = self.known.of(self.recipe)
                around = Surroundings(sources=self.sources, measured=self.known.measured)
                self.work = RunContext(self.recipe, Path(), False, around=around)
            detail = check(self.work) if self.sources is None else _traced(self.sources, lambda: check(self.work))
        except OptinError as error:
            if name == "model and data" and needs_download(error):
                yield from self._without_downloads(error)
                return
            yield Finding(name, "refused", f"{error.what}: {error.why}", error)
            detail = ""
        except NotMeasured as error:
            self.unmeasured = True
            yield Finding("units", "not checked", str(error))
            return
        except Exception as error:  # a library that needs values although there are only shapes
            yield Finding(name, "not checked", f"the {name}, without weights: {type(error).__name__}: {error}"[:300])
            return
        if detail:
            yield Finding(name, "ok", detail)
        for text in self.work.cache.warnings:
            if text not in self.warned:
                self.warned.append(text)
                yield Finding(name, "warning", text)
        if name == "model and data":
            yield from (Finding(name, "not checked", text) for text in self.known.lookup.not_checked)

    def _units_without_data(self, model: nn.Module) -> Finding:
        """Raises InputError for streams (`prune.coupled`) that no family declares: they are not measured."""
        own, prune = load_own_family(self.recipe.model.family), self.recipe.prune
        try:
            find_structure(model, prune.coupled, prune.group_kinds, own=own)
        except InputError:
            if prune.coupled:
                raise
            return Finding("units", "not checked", "units are found by measurement when the run starts")
        return Finding("units", "ok", "the model's architecture is known, and has units")

    def _without_downloads(self, error: OptinError) -> Iterator[Finding]:
        """Findings about the data and the rest of the model, if the model or its tokenizer is only on the hub."""
        lookup, section = self.known.lookup, self.recipe.model
        missing = section.source if lookup.model is None else f"the tokenizer {section.tokenizer or section.source}"
        yield Finding("model and data", "not checked", not_cached(missing))
        try:
            if lookup.model is not None:
                yield self._units_without_data(lookup.model)
            read_data(self.recipe, lookup)
        except OptinError as other:
            yield Finding("model and data", "refused", f"{other.what}: {other.why}", other)
        yield from (Finding("model and data", "not checked", text) for text in lookup.not_checked)


def _traced(sources: Sources, check: Callable[[], Result]) -> Result:
    """The result of a check whose forward passes compute only shapes, if the model can be traced."""
    try:
        with sources.tracing(first=True):
            return check()
    except (OptinError, NotMeasured):
        raise
    except Exception:  # the pass depends on values: compute it instead, which raises the actual error
        with sources.tracing():
            return check()


def usable_units(found: Preflight, recipe: Recipe, known: Known) -> tuple[str, ...]:
    """The kinds of units that can be removed from a recipe's model, each kind separately."""
    sources, usable = found.sources, []
    if sources is None:
        return ()
    for kind in KINDS:
        try:
            _traced(sources, partial(units_of, sources, recipe.prune.coupled, (kind,), known.measured))
            usable.append(kind)
        except (InputError, NotMeasured):  # this kind cannot be removed
            continue
    return tuple(usable)
