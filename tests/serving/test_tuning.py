"""Which setting is suggested: the best throughput but for noise, then few instances, then a low p99."""

from __future__ import annotations

from dataclasses import replace

from optin_export.serving.tuning import Row, best

ROW = Row(1, 1, 1, 100.0, 90.0, 110.0, 5.0, 9.0, 1.0)


def test_the_fewest_instances_that_are_as_fast_but_for_noise() -> None:
    rows = [ROW, replace(ROW, instances=2, throughput=196.0), replace(ROW, instances=4, throughput=200.0)]
    assert best(rows) == rows[1]


def test_the_lower_p99_among_equals_and_a_limit_of_it() -> None:
    rows = [replace(ROW, clients=8, throughput=300.0, p99=40.0), replace(ROW, clients=4, throughput=295.0, p99=20.0)]
    assert best([ROW, *rows]) == rows[1]
    assert best([ROW, *rows], latency=10.0) == ROW
    assert best(rows, latency=10.0) is None
