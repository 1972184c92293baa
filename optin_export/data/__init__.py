"""Batches and labels from a recipe's data, preprocessed like in the model's own library. Independent of pruning.

`readers` reads files, folders and datasets, `in_memory` reads a caller's data; `batches`, `images` and `text` make
tensors; `labels` and `label_maps` map labels to the model's classes; `loading` combines a recipe's model and data,
`given` those in memory.
"""

from __future__ import annotations

from optin_export.data.batches import Batch
from optin_export.data.given import given_sources, usual_sequence
from optin_export.data.in_memory import given_rows
from optin_export.data.label_maps import LabelMaps
from optin_export.data.loading import Dataset, Sources, load_sources
from optin_export.data.readers import Examples
from optin_export.data.rows import read_data
from optin_export.data.training import Training

__all__ = [
    "Batch",
    "Dataset",
    "Examples",
    "LabelMaps",
    "Sources",
    "Training",
    "given_rows",
    "given_sources",
    "load_sources",
    "read_data",
    "usual_sequence",
]
