"""Make a smaller dense model from a model and a plan, and save it. Repairs are separate (`repair`)."""

from __future__ import annotations

from optin_export.pruning.checkpoint import Architecture, PythonSource, difference, load_model, save_model, save_places
from optin_export.pruning.family_check import Checked, check_family
from optin_export.pruning.narrow_attention import narrow, narrowable
from optin_export.pruning.rebuild import rebuild
from optin_export.pruning.token_merging import count_tokens, insert_merging
from optin_export.pruning.verify import verified

__all__ = [
    "Architecture",
    "Checked",
    "PythonSource",
    "check_family",
    "count_tokens",
    "difference",
    "insert_merging",
    "load_model",
    "narrow",
    "narrowable",
    "rebuild",
    "save_model",
    "save_places",
    "verified",
]
