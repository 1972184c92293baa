"""Which features of earlier layers belong to the units that a layer reads, in whatever order they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from optin_export.units.discover.candidates import Candidate, Leak, candidates
from optin_export.units.discover.local_graph import local_graph
from optin_export.units.discover.questions import Mixed, Questions
from tests.units.discover import nets


def found(model: nn.Module, inputs: nets.Inputs) -> tuple[dict[str, Candidate], list[Leak]]:
    with local_graph(model, {name: tensor[:1] for name, tensor in inputs.items()}) as graph:
        read_apart, _, leaks = candidates(graph)
    return read_apart, leaks


def each(count: int, size: int = 1, start: int = 0) -> list[list[int]]:
    """`count` units of `size` consecutive features."""
    return [[start + unit * size + offset for offset in range(size)] for unit in range(count)]


def slabs(count: int, size: int, slabs: int) -> list[list[int]]:
    return [
        [slab * count * size + unit * size + offset for slab in range(slabs) for offset in range(size)]
        for unit in range(count)
    ]


HEADS = each(4, 2)
#: net, layer that reads units -> their number, their width, rows of each layer that makes them.
TOKENS: dict[str, tuple[Callable[[], nn.Module], str, int, int, dict[str, list[list[int]]]]] = {
    "neurons": (nets.feed_forward, "fc2", 6, 1, {"fc1": each(6)}),
    "separate": (nets.attention, "proj", 4, 2, {"q": HEADS, "k": HEADS, "v": HEADS}),
    "fused": (lambda: nets.fused_attention(False), "proj", 3, 2, {"qkv": slabs(3, 2, 3)}),
    "interleaved": (lambda: nets.fused_attention(True), "proj", 3, 2, {"qkv": each(3, 6)}),
    "grouped queries": (
        lambda: nets.grouped_queries(3),
        "proj",
        3,
        4,
        {"q": each(3, 4), "k": each(3, 2), "v": each(3, 2)},
    ),
    "multi-query": (lambda: nets.grouped_queries(1), "proj", 6, 2, {"q": each(6, 2)}),
    "gated": (lambda: nets.gated(False), "down", 5, 1, {"gate": each(5), "up": each(5)}),
    "fused gate": (lambda: nets.gated(True), "down", 5, 1, {"both": slabs(5, 1, 2)}),
    "permuted": (nets.permuted, "fc2", 6, 1, {"fc1": [[3], [0], [5], [1], [4], [2]]}),
    "called twice": (nets.called_twice, "fc2", 6, 1, {"fc1": each(6), "other": each(6)}),
    "dead ReLU": (nets.dead_relu, "fc2", 6, 1, {"fc1": each(6)}),
    "normed heads": (lambda: nets.normed(True), "proj", 3, 4, {name: each(3, 4) for name in "qkv"}),
}
IMAGES: dict[str, tuple[Callable[[], nn.Module], str, int, int, dict[str, list[list[int]]]]] = {
    "in place": (nets.in_place, "conv2", 6, 1, {"conv1": each(6), "norm": each(6)}),
    "depthwise": (
        lambda: nets.convolutions(6),
        "last",
        6,
        1,
        {"middle": each(6), "norm": each(6)},
    ),
    "grouped": (
        lambda: nets.convolutions(2),
        "last",
        6,
        1,
        {"middle": each(6), "norm": each(6)},
    ),
    "gate": (nets.squeeze_excitation, "project", 6, 1, {"expand": each(6), "norm": each(6), "excite": each(6)}),
    "flattened": (nets.flattened, "fc", 6, 4, {"conv": each(6)}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_rows_of_every_unit_between_linear_layers(name: str) -> None:
    make, reader, count, width, rows = TOKENS[name]
    one = found(make(), nets.tokens())[0][reader]
    assert (one.count, one.width) == (count, width)
    assert one.rows == rows


@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_every_unit_between_convolutions(name: str) -> None:
    make, reader, count, width, rows = IMAGES[name]
    one = found(make(), nets.images())[0][reader]
    assert (one.count, one.width) == (count, width)
    assert one.rows == rows


def test_one_position_behind_a_relu_shows_every_unit() -> None:
    """A pooled map is one vector: half of its units would be off, and have no gradient."""
    one = found(nets.flattened(), nets.images())[0]["head"]
    assert one.rows == {"fc": each(8)}


def test_shared_keys_and_values_feed_the_layer_but_are_no_units_of_it() -> None:
    with local_graph(nets.grouped_queries(1), {name: tensor[:1] for name, tensor in nets.tokens().items()}) as graph:
        read, feeds, _ = candidates(graph)
    assert feeds.calls["proj", 0] == {("q", 0), ("k", 0), ("v", 0)}
    assert set(read["proj"].rows) == {"q"}


def test_a_norm_across_features_leaves_no_units() -> None:
    read_apart, leaks = found(nets.normed(False), nets.tokens())
    assert "fc2" not in read_apart
    assert leaks == [Leak("fc2", "fc1")]


def test_tables_by_head_in_any_dimension() -> None:
    """The outermost relative positions occur as well: every entry belongs to the head of its column."""
    one = found(nets.with_tables(), nets.tokens())[0]["proj"]
    assert one.tables == {"positions": (1, each(3)), "temperature": (0, each(3))}


def test_parameters_of_a_norm_per_head_are_no_tables() -> None:
    """All heads share them; and the bias of a norm of keys has no effect at all, but for rounding."""
    assert found(nets.normed(True), nets.tokens())[0]["proj"].tables == {}


def test_a_wrong_width_is_mixed_or_leaves_rows_without_a_unit() -> None:
    """Three heads of width two: neither single features nor triples are kept apart."""
    with local_graph(nets.fused_attention(False), {"x": nets.tokens()["x"][:1]}) as graph:
        questions = Questions(graph, "proj", 0)
        assert questions.features == 6
        with pytest.raises(Mixed, match="qkv"):
            questions.answer(1)
        # The head in the middle reaches both triples with its query and key, and each with one feature of its value.
        assert [len(rows) for rows in questions.answer(3).rows("qkv", 2)] == [7, 7]


def test_weights_and_outputs_stay_as_they_were() -> None:
    model, inputs = nets.in_place(), nets.images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(**inputs)
    found(model, inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(**inputs), wanted)


def test_a_parameter_without_entries_is_no_obstacle() -> None:
    """As a vision transformer has it for its register tokens, if there are none."""
    model = nets.net(
        lambda s, x: s.fc2(torch.cat([s.registers.expand(len(x), -1, -1), s.fc1(x)], 1).relu()),
        registers=nn.Parameter(torch.zeros(1, 0, 6)),
        fc1=nn.Linear(nets.WIDTH, 6),
        fc2=nn.Linear(6, nets.WIDTH),
    )
    read_apart, _ = found(model, nets.tokens())
    assert read_apart["fc2"].rows == {"fc1": each(6)}
