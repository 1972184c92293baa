"""labels.txt of a served model: the recipe's class names, or the model's own."""

from __future__ import annotations

from pathlib import Path

from optin_export.errors import InputError
from optin_export.ship.config import LABELS
from optin_export.ship.origin import Origin
from optin_export.ship.signature import Signature


def labels_of(origin: Origin, signature: Signature) -> list[str]:
    """One name per class. Raises InputError if their number differs from that of the outputs."""
    path = origin.folder / "preprocess" / LABELS
    given = origin.recipe.ship.labels
    own = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    labels = [" ".join(label.split()) for label in given] if given else own  # the server reads one name per line
    dims = signature.outputs[0].dims
    if labels and (len(dims) != 2 or dims[1] != len(labels)):
        raise InputError(
            f"{len(labels)} labels do not fit the output '{signature.outputs[0].name}'",
            f"it has dims {list(dims)}",
            "correct ship.labels: one name per class",
        )
    return labels


def write_labels(folder: Path, origin: Origin, signature: Signature) -> bool:
    """Write labels.txt into a model's folder; returns whether there are labels. Raises InputError as `labels_of`."""
    labels = labels_of(origin, signature)
    if labels:
        (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return bool(labels)
