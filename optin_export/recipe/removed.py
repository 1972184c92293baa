"""What recipes could say in earlier versions: a default passes, anything else is refused with the reason."""

from __future__ import annotations

from typing import Any

#: Values of `prune.score` that were there to compare with.
COMPARISONS = ("optin-reference", "obs", "fisher", "random")


def no_comparison(value: Any) -> Any:
    """Refuse a scorer that only comparisons need; raises ValueError."""
    if isinstance(value, str) and value in COMPARISONS:
        raise ValueError(
            f"{value} is not in recipes any more: it was there to compare with, and its code is in "
            "tools/studies/comparison_scorers.py of the repository; use auto, optin, optin-exact, magnitude or "
            "activation"
        )
    return value


def without_rounds(section: Any) -> Any:
    """The section `prune` without its former field `rounds`; raises ValueError for more than one round."""
    if not isinstance(section, dict) or "rounds" not in section:
        return section
    if section["rounds"] != 1 or isinstance(section["rounds"], bool):
        raise ValueError(
            "prune.rounds was removed: several rounds of score, prune and repair were no sure gain over one (measured: "
            "docs/results.md, 'Rounds of score, prune and repair'); leave the field out"
        )
    return {name: value for name, value in section.items() if name != "rounds"}


def without_quantizer(section: Any) -> Any:
    """The section `export` without its former field `quantizer`; raises ValueError for another than the default."""
    if not isinstance(section, dict) or "quantizer" not in section:
        return section
    if section["quantizer"] != "onnxruntime":
        raise ValueError(
            "export.quantizer was removed: int8 graphs by NVIDIA's Model Optimizer lost clearly more accuracy on one "
            "of three models and as much on the others (measured: docs/results.md, 'Graphs for TensorRT: ours or "
            "ModelOpt'); leave the field out"
        )
    return {name: value for name, value in section.items() if name != "quantizer"}
