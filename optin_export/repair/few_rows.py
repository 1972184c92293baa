"""Ridge regression of layers with many more inputs than there are rows, as behind a flattened image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

#: Inputs from which rows are kept as long as they are few; a Gram matrix of fewer inputs is small anyway.
WIDE = 1024
#: Rows per input up to which they take less memory and work than a Gram matrix.
FEW = 0.25
#: Bytes of the products of units and outputs that are held at once.
CHUNK = 1 << 28


class FewRows:
    """The weighted rows themselves, in place of sums over them.

    A [rows, inputs + 1]: the inputs and 1, each row times the root of its weight; T [rows, outputs]: so the targets.
    The ridge regression near X0 is

        X0 + A^T (A A^T + rho I)^-1 (T - A X0)  =  (A^T A + rho I)^-1 (A^T T + rho X0)

    On the left a matrix of rows x rows is factored, on the right one of inputs x inputs.
    """

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self.inputs))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Rows that are weighted already."""
        self.inputs.append(inputs)
        self.targets.append(targets)

    def __add__(self, other: FewRows) -> FewRows:
        both = FewRows()
        both.inputs, both.targets = self.inputs + other.inputs, self.targets + other.targets
        return both

    def with_targets(self, solution: torch.Tensor) -> FewRows:
        """The same rows; the targets are what `solution` [inputs + 1, outputs] predicts."""
        other = FewRows()
        other.inputs, other.targets = self.inputs, [one.double() @ solution for one in self.inputs]
        return other

    @property
    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(one).all()) for one in (*self.inputs, *self.targets))

    @property
    def mean_diagonal(self) -> float:
        """Of the Gram matrix A^T A."""
        total = sum(float(one.double().square().sum()) for one in self.inputs)
        return total / max(1, self.inputs[0].shape[1] if self.inputs else 1)

    def squared_error(self, solution: torch.Tensor) -> float:
        """|A X - T|^2 of X [inputs + 1, outputs]."""
        parts = zip(self.inputs, self.targets, strict=True)
        return sum(float((one.double() @ solution - target).square().sum()) for one, target in parts)

    def solve(self, start: torch.Tensor, rho: float) -> torch.Tensor | None:
        """The solution near `start` [inputs + 1, outputs], float64; None if the matrix has no Cholesky factor."""
        inputs, targets = torch.cat(self.inputs).double(), torch.cat(self.targets)
        part = _dual(inputs @ inputs.T, targets - inputs @ start, rho)
        return None if part is None else start + inputs.T @ part

    def errors_on(self, held: FewRows, start: torch.Tensor, rhos: Iterable[float]) -> Iterator[float | None]:
        """For each damping rho, the squared error of its solution X on held-out rows, |A' X - T'|^2; None without one.

        X, which is as large as the weight, is not computed: A' X = A' X0 + (A' A^T) (A A^T + rho I)^-1 (T - A X0)
        """
        inputs, others = torch.cat(self.inputs).double(), torch.cat(held.inputs).double()
        rest, error = torch.cat(self.targets) - inputs @ start, others @ start - torch.cat(held.targets)
        products, between = inputs @ inputs.T, others @ inputs.T
        for rho in rhos:
            part = _dual(products, rest, rho)
            yield None if part is None else float((error + between @ part).square().sum())

    def refitted(self, start: torch.Tensor, sets: Sequence[torch.Tensor], rho: float) -> Iterator[torch.Tensor | None]:
        """How `start` [inputs + 1, outputs] changes when it is refitted on each of these sets of inputs and the bias to
        what it computes on all of them: float32 [the set, in its order, and the bias; outputs]. Each set contains the
        one before."""
        inputs = torch.cat(self.inputs).double()
        last, known = inputs[:, -1:], torch.zeros(len(start), dtype=torch.bool)
        products, rest = last @ last.T, inputs @ start - last * start[-1]
        for some in sets:
            added = some[~known[some]]
            new = inputs[:, added]
            products, rest, known[some] = products + new @ new.T, rest - new @ start[added], True
            part = _dual(products, rest, rho)
            columns = torch.cat([some, torch.tensor([len(start) - 1])])
            yield None if part is None else inputs[:, columns].float().T @ part.float()

    def of_units(
        self, columns: torch.Tensor, weights: torch.Tensor, width: int, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The system for one factor per unit: (products of the units' outputs [units, units], and with T [units]).

        columns: the units' inputs, `width` consecutive ones each; weights: [columns, outputs]; bias: taken off T.
        """
        units, outputs = len(columns) // width, weights.shape[1]
        matrix = weights.view(units, width, outputs)
        products, wanted = weights.new_zeros(units, units), weights.new_zeros(units)
        step = max(1, CHUNK // (8 * max(1, units * outputs)))
        for inputs, targets in zip(self.inputs, self.targets, strict=True):
            for one, target in zip(inputs.split(step), targets.double().split(step), strict=True):
                made = torch.einsum("ruw,uwo->ruo", one[:, columns].double().view(-1, units, width), matrix)
                rest = target if bias is None else target - one[:, -1:].double() * bias
                products += torch.einsum("ruo,rvo->uv", made, made)
                wanted += torch.einsum("ruo,ro->u", made, rest)
        return products, wanted


def _dual(products: torch.Tensor, rest: torch.Tensor, rho: float) -> torch.Tensor | None:
    """(A A^T + rho I)^-1 rest"""
    factor, info = torch.linalg.cholesky_ex(products + rho * torch.eye(len(products)).to(products))
    return None if int(info) else torch.cholesky_solve(rest, factor)
