"""What the report says first: the change of the metric, of the speed and of the size, each with its uncertainty."""

from __future__ import annotations

from optin_export.recipe.tasks import is_lower_better
from optin_export.report.schema import AccuracyResult, Report


def accuracy_change(accuracy: AccuracyResult) -> str:
    """The change of the metric; a difference whose interval contains 0 is not measurable."""
    lower = ", lower is better" if is_lower_better(accuracy.metric) else ""
    change = f"{accuracy.base:.2f} to {accuracy.pruned:.2f}"
    interval = f"95 % interval of the loss {accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f}, {accuracy.rows} rows"
    if accuracy.drop_low <= 0 <= accuracy.drop_high:
        return f"no measurable difference in {accuracy.metric} ({change}{lower}; {interval})"
    if lower:
        return f"{accuracy.metric} {change} (lower is better; {interval})"
    verb = "lost" if accuracy.drop >= 0 else "gained"
    return f"{abs(accuracy.drop):.2f} points of {accuracy.metric} {verb} ({change}; {interval})"


def headlines(report: Report) -> dict[str, str]:
    """Name -> one line: accuracy first, because it decides whether the rest matters."""
    found = {}
    if report.accuracy is not None:
        found["Accuracy"] = accuracy_change(report.accuracy)
    else:
        found["Accuracy"] = "not measured: the recipe names no evaluation data"
    for one in report.latency:
        if one.judged:
            speedup = one.judged_speedup
            found[f"Latency, batch {one.batch}"] = (
                f"{one.base_ms.p50:.3g} to {one.pruned_ms.p50:.3g} ms (median call on {one.target}), "
                f"{speedup.median:.2f}x, 95 % interval {speedup.ci_low:.2f} to {speedup.ci_high:.2f}"
                f"{f', quick: only {one.blocks} blocks' if report.quick else ''}"
            )
    found["Size"] = f"{report.params.ratio:.1%} of the parameters and {report.macs.ratio:.1%} of the MACs are left"
    return found
