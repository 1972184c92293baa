"""MLflow: a run in the experiment of MLFLOW_EXPERIMENT_NAME, where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import os
from pathlib import Path

from optin_export.tracking.values import Values

EXPERIMENT = "optin-export"
#: MLflow refuses longer values.
LONGEST = 500


def log(values: Values, run: Path) -> str:
    """See `tracking.log_run`."""
    import mlflow

    if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
        mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=values.name) as started:
        mlflow.log_params({name: value[:LONGEST] for name, value in values.params.items()})
        mlflow.log_metrics(values.metrics)
        mlflow.set_tags(values.tags)
        for file in values.files:
            folder = file.parent.relative_to(run).as_posix()
            mlflow.log_artifact(str(file), None if folder == "." else folder)
        return f"MLflow run {started.info.run_id} at {mlflow.get_tracking_uri()}"
