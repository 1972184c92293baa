"""Make a task module from a model's source: the network with everything that its library adds around it.

`loading` starts here: it reads the hub, a folder, timm or the user's own function. `given` takes a module that is
in memory. `tasks` holds the task modules.
This package is independent of rows and pruning.
"""

from __future__ import annotations

from optin_export.models.by_type import auto_class, task_of_class
from optin_export.models.class_names import ClassNames, names_of
from optin_export.models.float64 import in_float64
from optin_export.models.given import load_given, task_of_module, unwrapped
from optin_export.models.loading import LoadedModel, build, build_module, load_model
from optin_export.models.lookup import Lookup, needs_download, no_downloads, not_cached, traced, untraced
from optin_export.models.placement import Placement, device_of
from optin_export.models.reduced_precision import gains_by_bfloat16, passes_in
from optin_export.models.tasks import (
    IGNORED,
    Inputs,
    TaskModel,
    as_function,
    as_rows,
    block_inputs,
    class_axis,
    counted_rows,
    refuse_merging,
    wrap,
)
from optin_export.models.tokenizer import fitted_tokenizer
from optin_export.models.work_device import gathered, work_device

__all__ = [
    "IGNORED",
    "ClassNames",
    "Inputs",
    "LoadedModel",
    "Lookup",
    "Placement",
    "TaskModel",
    "as_function",
    "as_rows",
    "auto_class",
    "block_inputs",
    "build",
    "build_module",
    "class_axis",
    "counted_rows",
    "device_of",
    "fitted_tokenizer",
    "gains_by_bfloat16",
    "gathered",
    "in_float64",
    "load_given",
    "load_model",
    "names_of",
    "needs_download",
    "no_downloads",
    "not_cached",
    "passes_in",
    "refuse_merging",
    "task_of_class",
    "task_of_module",
    "traced",
    "untraced",
    "unwrapped",
    "work_device",
    "wrap",
]
