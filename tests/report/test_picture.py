"""The picture of the network, and the plot of accuracy against cost: what is drawn is what the report says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optin_export.report.html import render_html
from optin_export.report.picture import MARKS, network
from optin_export.report.schema import GroupResult
from optin_export.report.tradeoff import Panel, Point, _stacked, interval, panels_of, tradeoff
from tests.report.test_html import latency_result, make_report


def group(block: int, kind: str, count: int, kept: int) -> GroupResult:
    return GroupResult(block=block, kind=kind, count=count, kept=kept, score_kept=0.5)


def marks(svg: str) -> int:
    return sum(path.count("M") for path in re.findall(r'class="stays"[^>]* d="([^"]*)"', svg))


def test_units_that_stay_are_where_the_plan_has_them() -> None:
    svg = network([group(0, "heads", 4, 2)], {(0, "heads"): [1, 3]})
    assert marks(svg) == 2 and "2 of 4 stay" in svg
    starts = [float(x) for x in re.findall(r"M([\d.]+) ", re.findall(r' d="(M[^"]*)"', svg)[-1])]
    room = float(re.findall(r'width="([\d.]+)" height="15" class="gone"', svg)[0])
    assert starts[1] - starts[0] == pytest.approx(2 * room / 4, abs=0.2)


def test_many_units_share_marks_and_a_removed_sublayer_is_said() -> None:
    svg = network([group(0, "neurons", 512, 256), group(1, "neurons", 512, 0)], {(0, "neurons"): range(256)})
    assert marks(svg) == MARKS // 2 and "removed whole" in svg
    one = network([group(0, "neurons", 512, 1)], {(0, "neurons"): [511]})
    assert marks(one) == 1, "a single unit of a mark still shows"


def test_merged_tokens_and_hostile_kinds() -> None:
    svg = network([group(0, "<b>", 4, 2), group(1, "<b>", 4, 2)], {}, (3,))
    assert "3 merged" in svg and "all stay" in svg and "<b>" not in svg
    assert network([], {}) == ""


def test_a_plan_of_another_shape_is_drawn_without(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    for text in ("[1]", '{"groups": 3}', '{"groups": {"block00.heads": [1]}}'):
        (tmp_path / "plan" / "plan.json").write_text(text)
        assert "4 of 12 stay" in render_html(make_report(), tmp_path)


def test_accuracy_stands_only_against_the_target_it_was_measured_on() -> None:
    report = make_report(latency=[latency_result(1), latency_result(8), {**latency_result(1), "target": "torch-cpu"}])
    panels = panels_of(report.macs, report.accuracy, report.latency)
    assert [len(panel.points) for panel in panels] == [2, 2, 2] and "torch" not in str(panels)
    assert panels[0].points[1].cost == pytest.approx(49.88) and panels[1].points[1].cost == pytest.approx(4.9876)
    assert panels_of(report.macs, None, report.latency) == []


def test_the_interval_turns_round_where_lower_is_better() -> None:
    accuracy = make_report().accuracy
    assert accuracy is not None
    assert interval(accuracy) == pytest.approx((81.01, 82.14))
    worse = accuracy.model_copy(update={"metric": "perplexity", "base": 10.0, "drop_low": 1.0, "drop_high": 2.0})
    assert interval(worse) == pytest.approx((11.0, 12.0))


def test_points_in_one_place_are_all_labelled() -> None:
    points = tuple(Point(f"run {index}", 1.0, 99.0, front=True) for index in range(3))
    svg = tradeoff([Panel("here", "ms", points)], "accuracy")
    assert all(f"run {index}" in svg for index in range(3))
    assert _stacked(points) == [0, 1, 2] and _stacked((points[0], Point("far", 9.0, 1.0))) == [0, 0]
    four = tuple(Point("", cost, 99.0) for cost in (1.5, 1.07, 0.94, 0.86))
    assert _stacked(four) == [0, 2, 1, 0], "a label that ends before another begins takes its row"
