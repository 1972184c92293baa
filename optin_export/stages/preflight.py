"""A recipe checked as a run would check it at its start, without loading weights and without downloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from optin_export.data import Sources, load_sources, read_data
from optin_export.errors import InputError, OptinError
from optin_export.models import Lookup, needs_download, no_downloads, not_cached
from optin_export.recipe import Recipe
from optin_export.stages.checks import CHECKS, Check
from optin_export.stages.context import RunContext, Surroundings
from optin_export.units import find_structure
from optin_export.workdir.files import sha256_json

State = Literal["ok", "warning", "refused", "not checked"]
#: Checks that need the model and the data.
_ON_SOURCES = ("placement", "units", "budget", "latency")
KINDS = ("heads", "neurons", "channels")


@dataclass(frozen=True)
class Finding:
    """One check. detail: what was found, what a run would warn of, why it was refused, or why it was not checked."""

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
    """What was found out about a recipe. model: the task model, without weights, where it was found; sources: with its
    data."""

    findings: tuple[Finding, ...]
    model: nn.Module | None = None
    sources: Sources | None = None

    @property
    def refusal(self) -> OptinError | None:
        """The error that a run on this machine would end with at its start; None where none was found."""
        return next((one.error for one in self.findings if one.error is not None), None)

    @property
    def wrong(self) -> InputError | None:
        """The first error that no other machine would mend."""
        return next((one.error for one in self.findings if isinstance(one.error, InputError)), None)

    @property
    def not_checked(self) -> list[str]:
        return [one.detail for one in self.findings if one.state == "not checked"]


class Known:
    """Models and data that were looked up, for recipes that share them: the runs of a sweep."""

    def __init__(self) -> None:
        self.lookup = Lookup()
        self._last: tuple[str, Sources] | None = None

    def of(self, recipe: Recipe) -> Sources:
        """Raises InputError. Only the last one is kept, because data is large; `lookup` says what was not checked."""
        key = shared_key(recipe)
        if self._last is None or self._last[0] != key:
            self.lookup, self._last = Lookup(), None
            self._last = key, load_sources(recipe, self.lookup)
        return dataclasses.replace(self._last[1], recipe=recipe)


def shared_key(recipe: Recipe) -> str:
    """A hash of all that loading looks at; the rest of a recipe is read off it when it is needed."""
    key = recipe.model_dump(mode="json", exclude={"name", "prune", "targets", "gates", "ship"})
    key["export"] = recipe.export.sequence
    key["searched"] = recipe.budget.accuracy_drop is not None
    return sha256_json(key)


def preflight(recipe: Recipe, known: Known | None = None) -> Preflight:
    """Go through the checks of a run's start, by the same functions, with a model without weights.

    known: what was looked up for other recipes. What needs a download, or the weights' values, is told as not checked.
    Writes nothing, and raises nothing for a wrong recipe: its errors are in the findings.
    """
    with no_downloads():
        return _Checking(recipe, known or Known()).result()


class _Checking:
    def __init__(self, recipe: Recipe, known: Known) -> None:
        self.recipe, self.known = recipe, known
        self.work = RunContext(recipe, Path(), False)
        self.sources: Sources | None = None
        self.warned: list[str] = []

    def result(self) -> Preflight:
        findings: list[Finding] = []
        for name, check in CHECKS:
            if name in _ON_SOURCES and self.sources is None:
                continue
            found = list(self._done(name, check))
            findings += found
            if name != "engines" and any(isinstance(one.error, InputError) for one in found):
                break  # what follows would only say so again
        return Preflight(tuple(findings), self.known.lookup.model, self.sources)

    def _done(self, name: str, check: Check) -> Iterator[Finding]:
        try:
            if name == "model and data":
                self.sources = self.known.of(self.recipe)
                around = Surroundings(sources=self.sources)
                self.work = RunContext(self.recipe, Path(), False, around=around)
            detail = check(self.work) if self.sources is None else self._traced(check)
        except OptinError as error:
            if name == "model and data" and needs_download(error):
                yield from self._without_downloads(error)
                return
            yield Finding(name, "refused", f"{error.what}: {error.why}", error)
            detail = ""
        except Exception as error:  # a library that needs values where there are only shapes
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

    def _traced(self, check: Check) -> str:
        """The result of a check whose forward passes give shapes alone, where the model can be traced."""
        assert self.sources is not None
        try:
            with self.sources.tracing(first=True):
                return check(self.work)
        except OptinError:
            raise
        except Exception:  # it depends on values: computed instead, which raises what is wrong
            with self.sources.tracing():
                return check(self.work)

    def _without_downloads(self, error: OptinError) -> Iterator[Finding]:
        """The model, or its tokenizer, is on the hub: what can be said of the other one, and of the data."""
        lookup, section = self.known.lookup, self.recipe.model
        missing = section.source if lookup.model is None else f"the tokenizer {section.tokenizer or section.source}"
        yield Finding("model and data", "not checked", not_cached(missing))
        try:
            if lookup.model is not None:
                find_structure(lookup.model, self.recipe.prune.coupled, self.recipe.prune.units)
                yield Finding("units", "ok", "the model's architecture is known, and has units")
            read_data(self.recipe, lookup)
        except OptinError as other:
            yield Finding("model and data", "refused", f"{other.what}: {other.why}", other)
        yield from (Finding("model and data", "not checked", text) for text in lookup.not_checked)


def usable_units(model: nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """The kinds of units that can be removed from a task model, one kind alone."""
    usable = []
    for kind in KINDS:
        try:
            find_structure(model, recipe.prune.coupled, (kind,))
            usable.append(kind)
        except InputError:  # this kind is none of them
            continue
    return tuple(usable)
