"""Hooks see what a plain loop sees, may change it, may end the pass, and are gone afterwards, whatever happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optin_export.units import Calls, block_outputs, capture, captured, layer_inputs, layer_outputs


class Net(nn.Module):
    """Runs `again` twice, and hands `scale` to `last` by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.again(self.first(x))), scale=2.0)


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return scale * x


@pytest.fixture
def net() -> Net:
    return Net().requires_grad_(False)


X = torch.arange(6.0).view(2, 3)


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_values_are_seen_call_by_call_in_the_order_of_the_pass(net: Net) -> None:
    first = net.first(X)
    second = net.again(first)
    with captured(net, [("last", "call"), ("again", 0), ("again", "output"), ("first", 0)]) as seen:
        result = net(X)
    assert list(seen) == [("first", 0), ("again", 0), ("again", "output"), ("last", "call")]
    assert torch.equal(seen["first", 0][0], X) and len(seen["again", 0]) == 2
    assert torch.equal(seen["again", 0][1], second) and torch.equal(seen["again", "output"][0], second)
    (args, kwargs) = seen["last", "call"][0]
    assert kwargs == {"scale": 2.0} and torch.equal(2 * args[0], result)


def test_arguments_and_outputs_can_be_changed_and_named_arguments_stay(net: Net) -> None:
    plain = net(X)

    def zeros(path: str, args: tuple[torch.Tensor, ...], kwargs: Any) -> tuple[torch.Tensor, ...]:
        return (0 * args[0],)

    with capture(net, {"last": zeros}, {"last": lambda path, args, output: output + 1}):
        assert torch.equal(net(X), torch.ones(2, 4))
    assert torch.equal(net(X), plain)


@pytest.mark.parametrize(("calls", "seen"), [(1, 1), (2, 2)])
def test_a_pass_ends_after_the_call_that_was_asked_for(net: Net, calls: int, seen: int) -> None:
    after = False
    with captured(net, [("again", "output"), ("last", 0)], stop="again", calls=calls) as values:
        net(X)
        after = True
    assert len(values["again", "output"]) == seen and ("last", 0) not in values
    assert not after and hooks(net) == 0


def test_hooks_are_removed_when_the_model_fails(net: Net) -> None:
    with pytest.raises(RuntimeError), captured(net, [("first", 0), ("again", "output")], stop="last"):
        net(X[:, :2])
    assert hooks(net) == 0


def test_hooks_are_removed_when_a_module_is_not_there(net: Net) -> None:
    with pytest.raises(AttributeError), captured(net, [("first", 0), ("none", 0)]):
        pass
    assert hooks(net) == 0


def test_a_stop_ends_only_its_own_body(net: Net) -> None:
    with captured(net, [("last", "output")]) as whole:
        with captured(net, [("again", "output")], stop="first") as part:
            net(X)
        net(X)
    assert part == {} and len(whole["last", "output"]) == 1


@pytest.mark.parametrize(("outer", "inner"), [("first", "again"), ("again", "first")])
def test_a_stop_within_a_stop_ends_only_its_own_body(net: Net, outer: str, inner: str) -> None:
    ended = {"outer": True, "inner": True}
    with capture(net, stop=outer):
        with capture(net, stop=inner):
            net(X)
            ended["inner"] = False
        ended["outer"] = False
    # The pass ends at whichever layer runs first; the body of the other capture goes on only if that was the inner one.
    assert ended == {"outer": outer == "first", "inner": True} and hooks(net) == 0


def test_what_layers_read_is_that_of_the_last_pass(net: Net) -> None:
    with layer_inputs(net, ["first", "again"]) as seen:
        net(X + 1)
        net(X)
    assert torch.equal(seen["first"], X) and isinstance(seen["again"], Calls) and len(seen["again"]) == 2


def test_outputs_of_layers_are_in_the_graph(net: Net) -> None:
    x = X.clone().requires_grad_(True)
    with layer_outputs(net, ["again"]) as seen:
        result = net(x).sum()
    (gradient,) = torch.autograd.grad(result, seen["again"][1])
    assert torch.equal(gradient, torch.full((2, 4), 2.0))


def test_a_block_that_is_written_over_is_copied(net: Net) -> None:
    def overwrite(path: str, args: Any, output: torch.Tensor) -> None:
        output.zero_()

    for rewritten, expected in (({"first"}, net.first(X)), (set(), torch.zeros(2, 4))):
        later = capture(net, outputs={"first": overwrite})
        with torch.no_grad(), block_outputs(net, ["first"], rewritten) as seen, later:
            net(X)
        assert torch.equal(seen["first"], expected)
