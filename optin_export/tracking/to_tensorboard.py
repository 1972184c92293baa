"""TensorBoard: event files in the run folder; `tensorboard --logdir runs` shows all runs side by side."""

from __future__ import annotations

from pathlib import Path

from optin_export.tracking.values import Values

FOLDER = "tensorboard"


def log(values: Values, run: Path) -> str:
    """See `tracking.log_run`. TensorBoard takes no files: those are in the run folder itself."""
    from torch.utils.tensorboard import SummaryWriter

    from optin_export.workdir.files import remove

    folder = run / FOLDER
    remove(folder)  # of an earlier log: its points would be drawn as further steps
    with SummaryWriter(str(folder)) as writer:
        for name, value in values.metrics.items():
            writer.add_scalar(name, value, 0)
        for name, text in {**values.tags, **values.params}.items():
            writer.add_text(name, text, 0)
    return f"{folder}; to see it: tensorboard --logdir {folder}"
