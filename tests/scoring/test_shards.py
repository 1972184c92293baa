"""Scoring in shards: who does them, in what order and how often, changes nothing."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
import torch

from optin_export.objective import derived
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import Map, Partial, Scores, Shard, Spread, score
from optin_export.scoring.optin import Scorer
from optin_export.scoring.shards import Work
from optin_export.units import find_structure
from tests.units.models import batches_for, small_model


def scores_of(name: str, method: str = "optin", spread: Spread | None = None, probes: int | str = 10) -> Scores:
    model, _ = small_model(name)
    settings = PruneSection.model_validate({"budget": {"macs": 0.5}, "probes": probes})
    settings = settings.model_copy(update={"score": method})
    more = {} if spread is None else {"spread": spread}
    return score(model, find_structure(model), batches_for(model, 3, size=4), settings, 0, **more)  # type: ignore[arg-type]


def workers(count: int, seen: list[list[Shard]], backwards: bool) -> Spread:
    """`count` workers, each with its own copy of the model; shards are done in another order than they are given."""

    @contextlib.contextmanager
    def spread(work: Work) -> Iterator[Map]:
        copies: list[Work] = [pickle.loads(pickle.dumps(work)) for _ in range(count)]

        def run(shards: Sequence[Shard]) -> Iterable[Partial]:
            seen.append(list(shards))
            order = reversed(range(len(shards))) if backwards else range(len(shards))
            done = {index: copies[index % count](shards[index]) for index in order}
            return [done[index] for index in range(len(shards))]

        yield run

    return spread


@pytest.mark.parametrize("method", ["optin", "optin-exact"])
def test_scores_do_not_depend_on_the_number_of_workers(method: str) -> None:
    """To the last bit, with the same number of threads: the shards are the same, and so is the order of their sums."""
    alone = scores_of("bert", method)
    seen: list[list[Shard]] = []
    for count in (1, 2, 5):
        spread = scores_of("bert", method, workers(count, seen, backwards=count > 1))
        assert spread.info == alone.info
        for key, values in alone.values.items():
            assert np.array_equal(values, spread.values[key])
    flat = [shard for shards in seen for shard in shards]
    assert {shard.batch for shard in flat} == {0, 1, 2}
    if method == "optin":
        assert {shard.kind for shard in flat} == {"few", "pilot", "sizes", "probes"}


@pytest.mark.parametrize("name", ["vit", "resnet-timm"])
def test_other_families_and_an_automatic_number_of_probes(name: str) -> None:
    alone, spread = scores_of(name, probes="auto"), scores_of(name, spread=workers(2, [], True), probes="auto")
    assert spread.info == alone.info
    assert all(np.array_equal(values, spread.values[key]) for key, values in alone.values.items())


def test_a_shard_gives_the_same_whatever_was_done_before() -> None:
    model, _ = small_model("vit")
    settings = PruneSection(budget=Budget(macs=0.5), probes=8)
    work = Scorer(model, find_structure(model), batches_for(model, 2, size=4), settings, 0)
    shard = Shard("probes", 1, start=4, count=4, weight=2.0)
    fresh = pickle.loads(pickle.dumps(work))(shard)
    for other in (Shard("probes", 0, count=4, weight=1.0), Shard("pilot", 1, count=4), Shard("sizes", 0)):
        work(other)
    assert all(np.array_equal(array, fresh[name]) for name, array in work(shard).items())


def test_a_shards_sum_that_is_lost_or_counted_twice_shows() -> None:
    """The comparison above is worth something: another set of shards gives other scores."""
    alone = scores_of("vit")

    @contextlib.contextmanager
    def forgetful(work: Work) -> Iterator[Map]:
        yield lambda shards: [work(shards[0] if number == 1 else shard) for number, shard in enumerate(shards)]

    other = scores_of("vit", spread=forgetful)
    assert any(not np.array_equal(values, other.values[key]) for key, values in alone.values.items())


def test_another_number_of_threads_is_float32_rounding() -> None:
    """The documented bound: no score moves by more than 1e-4 of the largest one of its group."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(scores_of("bert", spread=workers(threads, [], False)).values)
    finally:
        torch.set_num_threads(before)
    for key, values in found[0].items():
        assert np.abs(values - found[1][key]).max() <= 1e-4 * values.max()


def test_derived_generators_differ_by_every_number() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1]
    drawn = {
        float(torch.rand((), generator=derived(torch.Generator().manual_seed(seed), *key), dtype=torch.float64))
        for seed in seeds
        for key in ((0, 0), (0, 1), (1, 0), (10, 0, 1), (10, 1, 0))
    }
    assert len(drawn) == len(seeds) * 5
