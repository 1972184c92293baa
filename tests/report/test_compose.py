"""Results become what the report says of them."""

from __future__ import annotations

from dataclasses import replace

from optin_export.measure import Latency, Measured
from optin_export.measure.latency import Quantiles, Speedup
from optin_export.measure.neighbours import Neighbours
from optin_export.report import busy_warnings


def test_a_measurement_on_a_busy_machine_is_warned_of() -> None:
    quiet = Latency(
        target="onnxruntime-cpu-1t",
        batch=8,
        sequence=None,
        base_ms=Quantiles(2.0, 2.0, 2.0),
        pruned_ms=Quantiles(1.0, 1.0, 1.0),
        speedup=Speedup(2.0, 1.9, 2.1),
        noise_floor=0.01,
        blocks=24,
        samples={},
        neighbours=Neighbours(others=0.02, stolen=0.01),
    )
    busy = replace(quiet, neighbours=Neighbours(others=0.5, stolen=0.02))
    found = Measured(
        (), None, (quiet, replace(quiet, neighbours=None), busy, replace(busy, mode="device", judged=False))
    )
    first, second = busy_warnings(found)
    assert first.startswith("while onnxruntime-cpu-1t was timed at batch 8, other work took 52% of")
    assert "at batch 8 (device)" in second and "measure" in first
