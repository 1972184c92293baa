"""Units with all layers that make and read them, or the reason why they cannot be removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optin_export.units.discover.candidates import candidates
from optin_export.units.discover.components import Component, Obstacle, components
from optin_export.units.discover.local_graph import local_graph
from tests.units.discover import branches, nets


def joined(model: nn.Module, inputs: nets.Inputs) -> tuple[dict[str, Component], dict[str, Obstacle]]:
    """Components by their last reader, obstacles by their layer."""
    with local_graph(model, {name: tensor[:1] for name, tensor in inputs.items()}) as graph:
        read_apart, feeds, _ = candidates(graph)
        made, obstacles = components(graph, read_apart, feeds)
    return {one.readers[-1]: one for one in made}, {one.path: one for one in obstacles}


def test_hidden_units_go_and_the_stream_stays() -> None:
    made, obstacles = joined(nets.residual(), nets.tokens())
    assert {reader: tuple(one.rows) for reader, one in made.items()} == {"down1": ("up1",), "down2": ("up2",)}
    assert obstacles["head"] == Obstacle("head", "they are channels of a residual stream", False, quiet=True)


def test_a_gate_is_no_stream() -> None:
    """It is computed from the channels that it scales, as a block of a stream is, but for all positions at once."""
    made, _ = joined(nets.squeeze_excitation(), nets.images())
    one = made["project"]
    assert one.readers == ("squeeze", "project")
    assert list(one.rows) == ["expand", "norm", "excite"]


def test_units_that_the_model_returns_stay() -> None:
    made, obstacles = joined(nets.is_also_output(), nets.tokens())
    assert "fc2" not in made
    assert obstacles["fc2"].why == "the output of 'fc1' is also an output of the model"


def test_two_attentions_with_one_table_stay() -> None:
    made, obstacles = joined(nets.shared_table(), nets.tokens())
    assert not made
    assert obstacles["proj1"].why == "they share 'positions' with the units that 'proj2' reads"
    assert obstacles["proj2"].why == "they share 'positions' with the units that 'proj1' reads"
    assert obstacles["proj1"].heads
    assert not obstacles["proj1"].quiet


def test_two_readers_of_the_same_units_lose_the_same_columns() -> None:
    model = nets.net(
        lambda s, x: s.head(torch.cat([s.one(F.gelu(s.fc(x))), s.two(F.gelu(s.fc(x)))], -1)),
        fc=nn.Linear(nets.WIDTH, 6),
        one=nn.Linear(6, 4),
        two=nn.Linear(6, 4),
        head=nn.Linear(8, 3),
    )
    made, obstacles = joined(model, nets.tokens())
    assert made["two"].readers == ("one", "two")
    assert list(made["two"].rows) == ["fc"]
    assert not obstacles


def test_a_reader_of_running_sums_keeps_the_others_from_being_cut() -> None:
    model = nets.net(
        lambda s, x: s.head(s.one(s.fc(x)) + s.two(s.fc(x).cumsum(-1))),
        fc=nn.Linear(nets.WIDTH, 6),
        one=nn.Linear(6, 4),
        two=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
    )
    made, obstacles = joined(model, nets.tokens())
    assert "one" not in made
    assert obstacles["one"].why == "'two' reads 'fc' without keeping these units apart"


def test_a_reader_in_another_order_loses_the_columns_of_the_same_units() -> None:
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    model = nets.net(
        lambda s, x: s.head(s.one(s.fc(x)) + s.two(s.fc(x)[..., order])),
        fc=nn.Linear(nets.WIDTH, 6),
        one=nn.Linear(6, 4),
        two=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
    )
    made, obstacles = joined(model, nets.tokens())
    assert made["two"].columns == {"one": [[1], [0], [3], [2], [5], [4]], "two": [[0], [1], [2], [3], [4], [5]]}
    assert made["two"].rows == {"fc": [[1], [0], [3], [2], [5], [4]]}
    assert not obstacles


def test_a_layer_of_a_kind_that_is_never_cut_is_named() -> None:
    model = nets.net(
        lambda s, x: s.head(s.conv2(F.gelu(s.conv1(x.transpose(1, 2)))).mean(-1)),
        conv1=nn.ConvTranspose1d(nets.WIDTH, 6, 3, padding=1, groups=2),
        conv2=nn.Conv1d(6, 4, 3, padding=1),
        head=nn.Linear(4, 3),
    )
    made, obstacles = joined(model, nets.tokens())
    assert "conv2" not in made
    assert obstacles["conv2"].why == "'conv1' is a ConvTranspose1d"


def test_concatenated_features_are_units_of_the_layer_that_made_them() -> None:
    with local_graph(branches.dense(), nets.images()) as graph:
        read_apart, feeds, _ = candidates(graph)
        every, _ = components(graph, read_apart, feeds)
    columns = {next(iter(one.rows)): one.columns for one in every}
    assert columns == {
        "stem": {
            "conv1": [[0], [1], [2], [3]],
            "conv2": [[0], [1], [2], [3]],
            "head": [[0], [1], [2], [3]],
        },
        "conv1": {"conv2": [[at] for at in range(4, 10)], "head": [[at] for at in range(4, 10)]},
        "conv2": {"head": [[at] for at in range(10, 15)]},
    }


def test_parts_of_a_split_are_no_stream() -> None:
    """The first part's layer reads other features of the layer than those to which its output is added."""
    with local_graph(branches.parts(), nets.images()) as graph:
        read_apart, feeds, _ = candidates(graph)
        made, obstacles = components(graph, read_apart, feeds)
    assert [(one.count, [name for name in one.rows if name != "norm"], one.readers) for one in made] == [
        (4, ["reduce"], ("conv1",)),
        (4, ["reduce", "conv1"], ("conv2", "expand")),
        (4, ["conv2"], ("expand",)),
        (4, ["reduce"], ("expand",)),
        (4, ["expand"], ("head",)),
    ]
    assert not obstacles


def test_first_layers_first() -> None:
    made, _ = joined(nets.residual(), nets.tokens())
    assert list(made) == ["down1", "down2"]


@pytest.mark.parametrize(("groups", "width"), [(6, 1), (2, 3)])
def test_whole_groups_of_a_convolution_go_with_what_they_read(groups: int, width: int) -> None:
    made, obstacles = joined(nets.convolutions(groups), nets.images())
    units = [list(range(first, first + width)) for first in range(0, 6, width)]
    assert made["last"].rows == {"first": units, "middle": units, "norm": units}
    assert made["last"].columns == {"last": units}
    assert not obstacles


def test_a_cheap_branch_goes_with_the_features_that_it_filters() -> None:
    made, _ = joined(branches.gated_branches(), nets.images())
    assert made["last"].rows == {
        "primary": [[0], [1], [2], [3]],
        "cheap": [[0], [1], [2], [3]],
        "excite": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }
    pairs = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert made["last"].columns == {"squeeze": pairs, "last": pairs}


def test_a_depthwise_convolution_is_made_no_head() -> None:
    made, _ = joined(nets.convolutions(2), nets.images())
    assert not made["last"].heads
    assert joined(nets.attention(), nets.tokens())[0]["proj"].heads
