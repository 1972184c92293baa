"""The latency table: monotone whatever the noise, a step where a sub-layer goes, the same exact knapsack over it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optin_export.errors import InputError
from optin_export.recipe import Budget
from optin_export.search import Anchor, LatencyTable, anchor_counts, check_budget, find_plan, signatures
from optin_export.units import Costs, Structure, Term, UnitGroup
from optin_export.units.declare import Producer

HEADS, NEURONS, LAST = "block00.heads", "block00.neurons", "block01.neurons"
UNITS = {HEADS: 4, NEURONS: 24, LAST: 24}
TERMS = (Term(100, (HEADS,)), Term(10, (NEURONS,)), Term(10, (LAST,)))
COSTS = Costs(1000, 1000, UNITS, {"macs": TERMS, "params": TERMS})
ALIGN = {HEADS: 1, NEURONS: 8, LAST: 8}


def anchor(kept: int, saved: float, width: float = 1000.0) -> Anchor:
    return Anchor(kept=kept, saved_ns=saved, low_ns=saved - width / 2, high_ns=saved + width / 2)


def table(**changes: object) -> LatencyTable:
    fields = {
        "target": "t",
        "batch": 1,
        "sequence": None,
        "base_ns": 1_000_000,
        "full_ns": 1_000_000,
        "floor_ns": 280_000,
        "floor": dict.fromkeys(UNITS, 0),
        "units": UNITS,
        "signatures": {HEADS: "h", NEURONS: "n", LAST: "n"},
        "anchors": {
            "h": (anchor(0, 200_000), anchor(1, 100_000), anchor(2, 80_000)),
            "n": (anchor(0, 260_000), anchor(8, 210_000), anchor(16, 30_000)),
        },
    }
    return LatencyTable.model_validate({**fields, **changes})


def test_anchors_are_met_and_all_units_save_nothing() -> None:
    one = table()
    assert one.saved(HEADS, [0, 1, 2, 4]).tolist() == [200_000, 100_000, 80_000, 0]
    assert one.saved(NEURONS, [0, 8, 16, 24]).tolist() == [260_000, 210_000, 30_000, 0]
    assert one.of({HEADS: 4}) == 1_000_000
    assert one.of({HEADS: 0, NEURONS: 8, LAST: 16}) == 1_000_000 - 200_000 - 210_000 - 30_000


@pytest.mark.parametrize("seed", range(20))
def test_fewer_units_never_take_longer(seed: int) -> None:
    """Whatever was measured; and nothing between two anchors saves more than the better of them."""
    generator = np.random.default_rng(seed)
    counts = sorted(generator.choice(np.arange(1, 200), 5, replace=False).tolist())
    noisy = [anchor(count, float(generator.normal(1e5, 1e5)), float(generator.uniform(1e3, 1e5))) for count in counts]
    dropped = anchor(0, float(generator.normal(1e5, 1e5)))
    one = table(units={NEURONS: 200}, signatures={NEURONS: "n"}, anchors={"n": (dropped, *noisy)})
    saved = one.saved(NEURONS, np.arange(201))
    assert (np.diff(saved) <= 0).all() and saved[-1] == 0
    assert saved[1:].max() <= max(0.0, *(one.saved_ns for one in noisy))


def test_a_dropped_sub_layer_is_a_step_that_is_not_interpolated_to() -> None:
    one = table(anchors={"h": (anchor(0, 400_000), anchor(1, 90_000)), "n": (anchor(12, 50_000),)})
    assert one.saved(HEADS, [0]).tolist() == [400_000]
    assert one.saved(HEADS, [1, 2, 3]).max() == 90_000
    # No anchor for 0: as much as the fewest that were measured.
    assert one.saved(NEURONS, [0, 12]).tolist() == [50_000, 50_000]


def test_an_uncertain_anchor_bends_less_than_it_is_bent() -> None:
    """Two anchors in the wrong order meet near the one with the narrow interval."""
    sure, unsure = anchor(8, 100_000, 100.0), anchor(16, 160_000, 50_000.0)
    saved = table(anchors={"h": (), "n": (sure, unsure)}).saved(NEURONS, [8, 16])
    assert saved[0] == saved[1] == pytest.approx(100_000, abs=500)


def test_a_correction_scales_savings_alone() -> None:
    one = table().model_copy(update={"scale": 0.5})
    assert one.of({HEADS: 4}) == 1_000_000 and one.of({HEADS: 0}) == 900_000


def test_costs_are_multiples_of_a_cell_so_that_the_knapsack_is_exact() -> None:
    one = table(base_ns=40_000_000, full_ns=40_000_000, anchors={"h": (anchor(1, 123_457),), "n": ()})
    saved = one.saved(HEADS, [1, 2, 3])
    assert saved[0] == 122_000 and not (saved % 2000).any()


SCORES = {key: np.linspace(1.0, 2.0, count) for key, count in UNITS.items()}
CURVES = {
    HEADS: np.array([[0, 9.0], [1, 3.0], [4, 0.0]]),
    NEURONS: np.array([[0, 5.0], [8, 1.0], [24, 0.0]]),
    LAST: np.array([[0, 5.0], [8, 4.5], [24, 0.0]]),
}


@pytest.mark.parametrize("curves", [None, CURVES], ids=["additive", "joint"])
@pytest.mark.parametrize("speedup", [1.0, 1.2, 1.5, 2.0, 3.0])
def test_the_plan_is_the_best_of_all_that_fit(speedup: float, curves: dict[str, np.ndarray] | None) -> None:
    one = table()
    plan = find_plan(SCORES, COSTS, Budget(speedup=speedup), ALIGN, None, curves, one)
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    assert one.of(kept) <= 1_000_000 / speedup
    assert plan.optimality_gap == 0.0 and plan.budget == {"speedup": speedup}

    def value(counts: dict[str, int]) -> float:
        if curves is not None:
            return -sum(float(np.interp(count, *curves[key].T)) for key, count in counts.items())
        return sum(float(np.sort(SCORES[key])[::-1][:count].sum()) for key, count in counts.items())

    options = [range(5), range(0, 25, 8), range(0, 25, 8)]
    every = [dict(zip(UNITS, counts, strict=True)) for counts in itertools.product(*options)]
    assert all(kept[key] % ALIGN[key] == 0 for key in kept)
    assert value(kept) == pytest.approx(max(value(one_) for one_ in every if one.of(one_) <= 1_000_000 / speedup))


def test_milliseconds_are_those_of_one_call() -> None:
    plan = find_plan(SCORES, COSTS, Budget(latency_ms=0.6), ALIGN, None, None, table())
    assert table().of({key: len(group.kept) for key, group in plan.groups.items()}) <= 600_000
    assert plan.budget == {"latency_ms": 0.6}


def test_the_clock_chooses_otherwise_than_macs_do() -> None:
    """Neurons from 24 to 16 are many MACs and no time; a MACs budget takes them, a latency budget does not."""
    anchors = {"h": (anchor(0, 500_000), anchor(2, 400_000)), "n": (anchor(16, 0.0),)}
    least = {HEADS: 0, NEURONS: 16, LAST: 16}
    scores = {**SCORES, HEADS: 100 * SCORES[HEADS]}  # dear to lose, and yet the only way to save time
    by_time = find_plan(scores, COSTS, Budget(speedup=1.5), ALIGN, least, None, table(anchors=anchors))
    assert len(by_time.groups[NEURONS].kept) == len(by_time.groups[LAST].kept) == 24
    by_macs = find_plan(scores, COSTS, Budget(macs=by_time.predicted.macs / 1000), ALIGN, least)
    assert len(by_macs.groups[HEADS].kept) > len(by_time.groups[HEADS].kept)


def test_a_budget_beyond_the_fastest_engine_says_what_is_possible() -> None:
    least = dict.fromkeys(UNITS, 0)
    with pytest.raises(InputError, match=r"no plan meets the budget speedup: 4") as error:
        check_budget(COSTS, Budget(speedup=4.0), least, table())
    assert "3.57x as fast" in error.value.why  # as measured: 1 / 0.28
    with pytest.raises(InputError, match=r"latency_ms: 0\.2") as error:
        check_budget(COSTS, Budget(latency_ms=0.2), least, table())
    assert "takes 0.28 ms" in error.value.why and error.value.exit_code == 2
    check_budget(COSTS, Budget(speedup=3.5), least, table())
    check_budget(COSTS, Budget(speedup=400.0), least)  # nothing is known before there is a table


def test_more_units_that_have_to_stay_take_longer_than_the_fastest_engine() -> None:
    assert table().fastest({**dict.fromkeys(UNITS, 0), HEADS: 1}) == 280_000 + 100_000


def test_what_is_measured_is_few_and_aligned() -> None:
    assert anchor_counts(12, 1, 0, 3) == [0, 1, 3, 6, 9]
    assert anchor_counts(1536, 8, 0, 3) == [0, 8, 384, 768, 1152]
    assert anchor_counts(64, 8, 8, 3) == [8, 16, 32, 48]
    assert anchor_counts(64, 8, 0, 1) == [0, 8, 32]
    assert anchor_counts(4, 8, 4, 3) == []  # nothing can go


def group(block: int, kind: str, count: int) -> UnitGroup:
    return UnitGroup(block, kind, count, 1, (Producer("a"),), "b", None, "c")  # type: ignore[arg-type]


def test_groups_of_equal_shapes_share_a_signature() -> None:
    structure = Structure("f", (), (group(0, "heads", 4), group(0, "neurons", 24), group(1, "neurons", 24)))
    found = signatures(structure, COSTS)
    assert found[NEURONS] == found[LAST] != found[HEADS]
    dearer = Costs(1000, 1000, UNITS, {"macs": (*TERMS[:2], Term(11, (LAST,))), "params": TERMS})
    assert signatures(structure, dearer)[NEURONS] != signatures(structure, dearer)[LAST]


def test_a_layer_between_two_groups_has_no_table() -> None:
    costs = Costs(1000, 1000, UNITS, {"macs": (Term(2, (NEURONS, LAST)),), "params": ()})
    with pytest.raises(InputError, match="latency budget") as error:
        signatures(Structure("f", (), ()), costs)
    assert "block00.neurons and block01.neurons" in error.value.why and "macs" in error.value.fix


def test_where_savings_do_not_add_up_to_the_fastest_engine_the_fewest_units_stay() -> None:
    """Each saves little alone, and all of them together were measured to save more."""
    modest = table(floor_ns=200_000)
    assert modest.of(dict.fromkeys(UNITS, 0)) == 280_000
    plan = find_plan(SCORES, COSTS, Budget(latency_ms=0.25), ALIGN, None, CURVES, modest)
    assert all(not group.kept for group in plan.groups.values()) and plan.optimality_gap is None
