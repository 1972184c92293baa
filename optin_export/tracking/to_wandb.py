"""Weights & Biases: a run in the project of WANDB_PROJECT; with WANDB_MODE=offline in the folder wandb/."""

from __future__ import annotations

import os
import re
from pathlib import Path

from optin_export.tracking.values import Values

PROJECT = "optin-export"


def log(values: Values, run: Path) -> str:
    """See `tracking.log_run`."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(silent=True)
    with wandb.init(project=project, name=values.name, config=values.params, settings=settings) as started:
        started.log(values.metrics)
        started.summary.update(values.tags)
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", values.name), type="model")
        for file in values.files:
            artifact.add_file(str(file), file.relative_to(run).as_posix())
        started.log_artifact(artifact)
        return f"W&B run {started.id} in {started.url or Path(started.dir).parent}"
