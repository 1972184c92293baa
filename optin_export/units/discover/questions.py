"""Ask which features of earlier layers reach which input features of a layer, by gradients.

With x the input of a layer and o the output of an earlier one, the non-zeros of d(x . w)/do, for random w on a set S of
x's features, are the features of o that reach S. Operations that keep features apart give exact zeros. Numbering the
units and asking for both values of every bit of the number names the unit of every feature of every layer and parameter
in 2 log2(units) backward passes, in whatever order they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from optin_export.units.discover.codes import codes, units_of
from optin_export.units.discover.local_graph import LocalGraph, feature_dim

#: Single units that are asked for, to distinguish "all units" from "several".
SINGLES = 4
#: Gradients of a parameter below this share of the largest are rounding: softmax cancels what all keys have in common.
ROUNDING = 1e-5
#: A feature that reaches no unit, or all of them.
NONE, ALL = -1, -2
Key = tuple[str, str]  # ("layer" or "parameter", path)
Call = tuple[str, int]  # path, number of the call


class Mixed(Exception):
    """Some features reach several units, but not all: these are not the units. The message names the source."""


@dataclass
class Answer:
    """Per source, the unit that each of its features reaches, or NONE or ALL.

    layers: path -> int64 [features]. tables: parameter name -> (dimension, int64 [entries along it]).
    """

    layers: dict[str, torch.Tensor] = field(default_factory=dict)
    tables: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)

    def rows(self, path: str, units: int) -> list[list[int]]:
        """Features of a layer, unit by unit."""
        return _by_unit(self.layers[path], units)

    def entries(self, name: str, units: int) -> list[list[int]]:
        """Entries of a parameter along its dimension, unit by unit."""
        return _by_unit(self.tables[name][1], units)


def _by_unit(numbers: torch.Tensor, units: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(units)]
    for position, unit in enumerate(numbers.tolist()):
        if unit >= 0:
            found[unit].append(position)
    return found


def _table(numbers: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """The dimension of a parameter along which its entries belong to units, and the unit of each; None if none does."""
    for dim in range(numbers.dim()):
        lines = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim])
        unit = lines.max(0).values  # entries that this pass does not use reach no unit
        if bool((unit >= 0).any()) and bool(((lines == unit) | (lines == NONE)).all()):
            return dim, unit
    return None


def _without_rounding(
    sources: Sequence[tuple[Key, torch.Tensor]], gradients: Sequence[torch.Tensor | None]
) -> Iterator[tuple[Key, torch.Tensor]]:
    """The sources that have a gradient; of the parameters, those whose gradient is more than rounding."""
    sizes = [0.0 if one is None or not one.numel() else float(one.abs().max()) for one in gradients]
    largest = max((size for ((kind, _), _), size in zip(sources, sizes, strict=True) if kind == "parameter"), default=0)
    for (key, tensor), one, size in zip(sources, gradients, sizes, strict=True):
        if one is not None and (key[0] == "layer" or size > ROUNDING * largest):
            yield key, tensor


class Questions:
    """Questions about the input of one layer in one call."""

    def __init__(self, graph: LocalGraph, path: str, call: int) -> None:
        self.graph, self.read = graph, graph.reads[path][call]
        self.generator = torch.Generator().manual_seed(graph.order[path])
        self.dim = feature_dim(graph.module(path), self.read) if path else self.read.dim() - 1
        self.features = self.read.shape[self.dim]
        self._shape = [self.features if dim == self.dim else 1 for dim in range(self.read.dim())]
        self.parts: dict[int, list[dict[Key, torch.Tensor]]] = {}  # per width, what reaches the first, others, last
        self.sources: list[tuple[Key, torch.Tensor]] = []
        self.touched: dict[str, torch.Tensor] = {}  # layer -> bool [features]: whether they reach the input at all
        if self.read.requires_grad:
            everything = [(("layer", name), one) for name, made in graph.makes.items() for one in made if name != path]
            everything += [(("parameter", name), one) for name, one in graph.parameters.items()]
            reached = self._gradients(list(range(self.features)), everything)
            self.sources = list(_without_rounding(everything, reached))
            for ((kind, name), _), gradient in zip(everything, reached, strict=True):
                if kind == "layer" and gradient is not None:
                    features = self._features(name, gradient != 0)
                    self.touched[name] = self.touched.get(name, features) | features

    @property
    def layers(self) -> list[str]:
        """Paths of the layers that feed this one."""
        return list(dict.fromkeys(path for (kind, path), _ in self.sources if kind == "layer"))

    @property
    def calls(self) -> set[Call]:
        """The calls of layers that feed this one."""
        calls = {id(one): (name, call) for name, made in self.graph.makes.items() for call, one in enumerate(made)}
        return {calls[id(one)] for (kind, _), one in self.sources if kind == "layer"}

    def mixed_throughout(self) -> str | None:
        """The path of the last layer before this one if no unit of any width can be kept apart; None if one may be.

        That is so if every feature that reaches the input at all reaches both its first and its last feature, as behind
        a layer norm: it then belongs to no single unit, however wide. This takes three backward passes.
        """
        first, _, last = self._parts(1)
        for key in first:
            if key[0] == "layer" and bool((self.touched[key[1]] & ~(first[key] & last[key])).any()):
                return None
        return max(self.layers, key=lambda path: self.graph.order.get(path, -1))

    def _parts(self, width: int) -> list[dict[Key, torch.Tensor]]:
        """What reaches the first unit, those between, and the last one."""
        if width not in self.parts:
            last = self.features // width - 1
            self.parts[width] = [self._reached(one, width) for one in ([0], list(range(1, last)), [last])]
        return self.parts[width]

    def leak(self, width: int) -> str | None:
        """The path of a layer that contradicts this width, or None.

        A feature contradicts it if it reaches the first unit and others, but not the last unit; one that reaches all
        units does not. This takes three backward passes, where `answer` takes many.
        """
        first, others, at_last = self._parts(width)
        for key, reached in first.items():
            if key[0] == "layer" and bool((reached & others[key] & ~at_last[key]).any()):
                return key[1]
        return None

    def answer(self, width: int) -> Answer:
        """The unit of every feature of every source, for units of `width` consecutive input features.

        Raises Mixed if features of a source reach several of them but not all.
        """
        units = self.features // width
        read = self._read_off(width)
        if read is not None:
            return self._answer_of(read)
        state: dict[Key, _State] = {}
        for bit in range((units - 1).bit_length()):
            sides = []
            for value in (0, 1):
                sides.append(self._reached([one for one in range(units) if (one >> bit & 1) == value], width))
            for key, low in sides[0].items():
                state.setdefault(key, _State(low.shape)).add(bit, low, sides[1][key])
            self._raise_if_mixed(state)
        generator = torch.Generator().manual_seed(units)
        for unit in torch.randperm(units, generator=generator)[:SINGLES].tolist():
            for key, reached in self._reached([unit], width).items():
                state[key].every &= reached
        self._raise_if_mixed(state)
        return self._answer_of({key: one.numbers() for key, one in state.items()})

    def _read_off(self, width: int) -> dict[Key, torch.Tensor] | None:
        """The unit of each feature or entry in four passes (see `codes`); None if one of them reaches several units.

        That others get no gradient at all is seen at the first unit, the last one, and all between them.
        """
        units = self.features // width
        factors = codes(units, self.generator)
        noise = torch.randn(self.read.shape, generator=self.generator)
        spread = [one.repeat_interleave(width).view(self._shape) for one in factors]
        sides = [self._weighted(noise * one, self.sources) for one in spread]
        found: dict[Key, torch.Tensor] = {}
        for (key, one), *gradients in zip(self.sources, *sides, strict=True):
            numbers = self._numbers(key, one, gradients, factors[-1])
            if numbers is None:
                return None
            known = found.get(key, numbers)
            if bool(((known >= 0) & (numbers >= 0) & (known != numbers)).any()):
                return None
            found[key] = torch.maximum(known, numbers)
        first, between, last = self._parts(width)
        for key, numbers in found.items():
            alone = [numbers == 0, (numbers > 0) & (numbers < units - 1), numbers == units - 1]
            if any(bool((part[key] != one).any()) for part, one in zip((first, between, last), alone, strict=True)):
                return None
        return found

    def _numbers(
        self, key: Key, one: torch.Tensor, gradients: Sequence[torch.Tensor | None], confirming: torch.Tensor
    ) -> torch.Tensor | None:
        there = [gradient for gradient in gradients if gradient is not None]
        dim = feature_dim(self.graph.module(key[1]), one) if key[0] == "layer" else 0
        if len(there) < len(gradients):
            return torch.full([one.shape[dim]] if key[0] == "layer" else one.shape, NONE)
        if key[0] == "layer":
            return units_of([each.movedim(dim, -1).reshape(-1, one.shape[dim]).cpu() for each in there], confirming)
        numbers = units_of([each.reshape(1, -1).cpu() for each in there], confirming)
        return None if numbers is None else numbers.view(one.shape)

    def _answer_of(self, found: dict[Key, torch.Tensor]) -> Answer:
        answer = Answer()
        for (kind, path), numbers in found.items():
            if kind == "layer":
                answer.layers[path] = numbers
                continue
            table = _table(numbers)
            if table is not None:
                answer.tables[path] = table
            elif (numbers >= 0).any():
                raise Mixed(path)
        return answer

    def _raise_if_mixed(self, state: dict[Key, _State]) -> None:
        for (_, path), one in state.items():
            if bool(one.is_mixed().any()):
                raise Mixed(path)

    def _reached(self, units: list[int], width: int) -> dict[Key, torch.Tensor]:
        """Per source, whether each of its features (of a parameter, entries) reaches one of these units."""
        features = [unit * width + offset for unit in units for offset in range(width)]
        found: dict[Key, torch.Tensor] = {}
        for (key, one), gradient in zip(self.sources, self._gradients(features, self.sources), strict=True):
            reached = torch.zeros(one.shape, dtype=torch.bool) if gradient is None else (gradient != 0).cpu()
            if key[0] == "layer":
                reached = self._features(key[1], reached)
            found[key] = found[key] | reached if key in found else reached
        return found

    def _features(self, path: str, reached: torch.Tensor) -> torch.Tensor:
        """bool [features of a layer]: whether any entry of its output is among these."""
        dim = feature_dim(self.graph.module(path), reached)
        return reached.movedim(dim, -1).reshape(-1, reached.shape[dim]).any(0).cpu()

    def _gradients(
        self, features: list[int], sources: list[tuple[Key, torch.Tensor]]
    ) -> tuple[torch.Tensor | None, ...]:
        chosen = torch.zeros(self.features)
        chosen[features] = 1
        return self._weighted(
            torch.randn(self.read.shape, generator=self.generator) * chosen.view(self._shape), sources
        )

    def _weighted(
        self, weights: torch.Tensor, sources: list[tuple[Key, torch.Tensor]]
    ) -> tuple[torch.Tensor | None, ...]:
        """d(x . weights)/do for every source o."""
        tensors = [one for _, one in sources]
        if not tensors:
            return ()
        return torch.autograd.grad(self.read, tensors, weights.to(self.read), retain_graph=True, allow_unused=True)


class _State:
    """What is known about the entries of one source after some bits.

    unit: the bits so far. single: every bit was seen with one value only; every: always with both; any: ever reached.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.unit = torch.zeros(shape, dtype=torch.int64)
        self.single = torch.ones(shape, dtype=torch.bool)
        self.every = torch.ones(shape, dtype=torch.bool)
        self.any = torch.zeros(shape, dtype=torch.bool)

    def add(self, bit: int, low: torch.Tensor, high: torch.Tensor) -> None:
        self.unit += high.long() << bit
        self.single &= low ^ high
        self.every &= low & high
        self.any |= low | high

    def is_mixed(self) -> torch.Tensor:
        """Entries that reach several units but not all."""
        return self.any & ~self.single & ~self.every

    def numbers(self) -> torch.Tensor:
        return torch.where(self.single & self.any, self.unit, torch.where(self.any, ALL, NONE))
