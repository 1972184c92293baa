"""Queries and keys of fewer dimensions: products q k^T of a lower rank, nearest to the original ones on real rows.

With the rows x of an attention's input (and 1 for the bias), Gram matrix C = E[x x^T], and C' the same of the rows less
their mean (a softmax ignores what all keys have in common), the mean squared change of a head's scores is

    E[(x^T (W_q - W_q')^T W_k x')^2] = || C^1/2 (W_q - W_q')^T W_k C'^1/2 ||^2

for queries and keys that are taken to be independent. Of all changes that leave a rank r, the projection of
M = C^1/2 W_q^T W_k C'^1/2 = U S V^T on its r first left vectors is the smallest (Eckart and Young, 1936). It is a
change of the queries' layer alone, W_q'^T = C^-1/2 U_r U_r^T C^1/2 W_q^T, so it has loss curves like that of any other
layer. CORP (arXiv 2602.05243) removes such dimensions of ViTs, the same share in every block, and corrects the scores;
here the search shares the budget, and the layers that follow are refitted as behind any other group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from optin_export.models import TaskModel
from optin_export.pruning.narrow_attention import rows_of
from optin_export.repair.least_squares import Moments
from optin_export.repair.model_pair import ModelPair
from optin_export.units import QueryKeys, get_layer, input_rows, tensor_in

#: Added to the Gram matrix, as a share of its mean diagonal, so that directions without rows can be inverted.
DAMPING = 1e-6


def of_lower_rank(
    query: torch.Tensor, key: torch.Tensor, gram: torch.Tensor, counts: Iterable[int]
) -> Iterator[torch.Tensor]:
    """For each count, the queries' rows with which the scores of every head have that rank.

    query, key: float64 [heads, dimensions, inputs + 1], weights and bias; gram: [inputs + 1, inputs + 1], whose last
    row and column belong to the constant 1.
    """
    share = DAMPING * gram.diagonal().mean()
    values, vectors = torch.linalg.eigh(gram + share * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    root = values.clamp(min=float(share)).sqrt()
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    centred = gram - torch.outer(gram[-1], gram[-1]) / gram[-1, -1]
    seen, directions = torch.linalg.eigh(key @ centred @ key.mT)  # [heads, dimensions, dimensions]
    given = half @ query.mT
    left = torch.linalg.svd(given @ (directions * seen.clamp(min=0.0).sqrt()[:, None]), full_matrices=False).U
    for count in counts:
        first = left[:, :, :count]
        yield (inverse @ first @ (first.mT @ given)).mT


def changes_of(
    model: TaskModel, one: QueryKeys, moments: Moments, counts: Iterable[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes of the weight [counts, outputs, inputs] and the bias [counts, outputs] of the queries' layer.

    moments: of the layer's inputs.
    """
    whole = tensor_in(get_layer(model, one.query), "weight")
    query, key = (one.heads_of(rows_of(model, one, which)) for which in ("query", "key"))
    at = one.rows(len(whole), "query")
    weights, biases = [], []
    for rows in of_lower_rank(query, key, moments.full_gram, counts):
        change = (rows - query).flatten(0, 1).float()
        weight, bias = torch.zeros_like(whole), whole.new_zeros(len(whole))
        weight[at], bias[at] = change[:, :-1].to(weight), change[:, -1].to(weight)
        weights.append(weight)
        biases.append(bias)
    if not weights:
        return whole.new_zeros(0, *whole.shape), whole.new_zeros(0, len(whole))
    return torch.stack(weights), torch.stack(biases)


@torch.no_grad()
def reduce_rank(pair: ModelPair, one: QueryKeys, count: int, moments: Moments | None) -> None:
    """Reduce the rank of an attention of the smaller model, in place, for the rows that it reads there.

    moments: sums over these, if they are known.
    """
    model = pair.target.model
    for index in range(len(pair.batches)) if moments is None else ():
        seen = pair.target.see(index, [(one.query, 0)], one.query)[one.query, 0]
        design = input_rows(seen, get_layer(model, one.query), pair.inputs(index), index)
        moments = Moments(design.shape[1], 0) if moments is None else moments
        moments.add(design, design.new_zeros(len(design), 0), pair.weight(index, [one.query]))
    assert moments is not None
    layer = get_layer(model, one.query)
    weights, biases = changes_of(model, one, moments, [count])
    layer.weight += weights[0]
    if layer.bias is None:
        layer.bias = torch.nn.Parameter(torch.zeros_like(biases[0]), requires_grad=False)
    layer.bias += biases[0]
