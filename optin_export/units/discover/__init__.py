"""Find units in any model by measurement: which layers make features that others read without mixing them.

`local_graph` runs the model once with its graph cut at every mixing layer; `questions` asks by gradients which features
reach which; `candidates` names the layers that read separate units; `components` joins all layers around one set of
units; `groups` makes `UnitGroup`s of them, and `residuals` finds the residual streams next to them. What is found is
verified on rebuilt models before use (`pruning.verify`).
"""

from __future__ import annotations

from optin_export.units.discover.candidates import Leak
from optin_export.units.discover.groups import NAME, Discovered, discover_groups

__all__ = ["NAME", "Discovered", "Leak", "discover_groups"]
