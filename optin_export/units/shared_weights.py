"""Weights and modules that are used in several places, so that their units cannot be removed from only one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Refusal, UnitGroup
from optin_export.units.trace import Pass


class Uses:
    """The places where the modules and parameters of a model are used.

    seen: a pass of the model; None: each module is assumed to run once under every name.
    """

    def __init__(self, model: nn.Module, seen: Pass | None) -> None:
        self.model, self.seen = model, seen
        self.owners: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
        self.names: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(path)

    def calls(self, module: nn.Module) -> int:
        return len(self.names[id(module)]) if self.seen is None else self.seen.calls.get(id(module), 0)

    def refusal(self, group: UnitGroup) -> Refusal | None:
        """The reason why the units of this group cannot be removed, if one of its layers is also used elsewhere."""
        paths = [*(producer.path for producer in group.producers), *group.reads]
        paths += [producer.norm for producer in group.producers if producer.norm is not None]
        for path in paths:
            module = self.model.get_submodule(path)
            calls = self.calls(module)
            # Found groups were found over all calls of their layers.
            if calls != 1 and not (group.found and calls > 1):
                return Refusal(group.kind, calls_error(path, calls, self.names[id(module)]))
        for path in (*paths, *(table.path.rpartition(".")[0] for table in group.tables)):
            for parameter in self.model.get_submodule(path).parameters(recurse=False):
                if len(owners := self.owners[id(parameter)]) > 1:
                    return Refusal(group.kind, _tied_error(owners, group.kind))
        sublayer = None if group.sublayer is None else self.model.get_submodule(group.sublayer)
        if sublayer is not None and (calls := self.calls(sublayer)) != 1:
            assert group.sublayer is not None
            return Refusal(group.kind, calls_error(group.sublayer, calls, self.names[id(sublayer)]))
        return None


def calls_error(path: str, calls: int, names: Sequence[str] = ()) -> InputError:
    """The error for a module that does not run exactly once in a forward pass."""
    others = [name for name in names if name != path]
    where = f" (also under the name '{others[0]}')" if others else ""
    if calls == 0:
        return InputError(
            f"the units of '{path}' cannot be removed",
            f"the output of the model does not depend on the module '{path}'{where}, so its units have no effect",
            "remove the module from the model, or do not prune it",
        )
    return InputError(
        f"the units of '{path}' cannot be removed",
        f"the module '{path}'{where} runs {calls} times in one forward pass, and every call would lose its units",
        "give every use its own module (copy.deepcopy)",
    )


def _tied_error(owners: Sequence[str], kind: str) -> InputError:
    names = " and ".join(f"'{owner}'" for owner in owners)
    return InputError(
        f"the {kind} around {names} cannot be removed",
        "they share one parameter, so a unit would be removed from all of them",
        "give every layer its own parameter (clone it)",
    )
