"""Computed weights and batch norms become plain ones, with the output of the user's model in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from optin_export.errors import InputError
from optin_export.models.adapt import checked
from optin_export.models.normalizations import plain_batch_norms
from optin_export.models.parametrizations import fold_weights, folded_state


class Net(nn.Module):
    def __init__(
        self, wrap: Callable[[nn.Module], Any] = lambda layer: None, norm: type[nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.mid, self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Linear(8, 4)
        for layer in (self.conv, self.mid, self.head):
            wrap(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mid(torch.relu(self.bn(self.conv(x))))).mean((2, 3)))


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs() + weight.mean()


class Noisy(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + torch.randn_like(weight)


def both(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", Symmetric()) if layer.bias is not None else None


def masked(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "weight", 0.2)
    if layer.bias is not None:
        prune.random_unstructured(layer, "bias", 0.5)


def by_hook(layer: Any) -> None:
    """As libraries did before there were parametrisations."""
    raw = nn.Parameter(layer.weight.detach().clone())
    del layer._parameters["weight"]
    layer.register_parameter("weight_raw", raw)

    def compute(module: Any, inputs: Any) -> None:
        module.weight = module.weight_raw / module.weight_raw.flatten(1).norm(dim=1).clamp(min=1).view(
            -1, *[1] * (module.weight_raw.dim() - 1)
        )

    compute(layer, ())
    layer.register_forward_pre_hook(compute)


def in_place(layer: Any) -> None:
    """A hook that changes the parameter itself, to the same every time."""

    def clamp(module: Any, inputs: Any) -> None:
        module.weight.data.clamp_(-0.1, 0.1)

    layer.register_forward_pre_hook(clamp)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, dim 1": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight_norm, all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "two tensors": both,
    "old weight_norm": nn.utils.weight_norm,
    "old weight_norm, all": lambda layer: nn.utils.weight_norm(layer, dim=None),
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": masked,
    "hook": by_hook,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPS)
def test_the_output_is_that_of_the_users_model(kind: str) -> None:
    net, x = Net(WRAPS[kind]), torch.randn(4, 3, 8, 8)
    net.train()(x)  # statistics and power iterations move
    with torch.no_grad():
        expected = net.eval()(x)
    names = fold_weights(net)
    assert {"conv.weight", "mid.weight", "head.weight"} <= set(names)
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    assert type(net.conv) is nn.Conv2d and type(net.head) is nn.Linear
    for layer in (net.conv, net.mid, net.head):
        assert isinstance(layer.weight, nn.Parameter) and not layer._forward_pre_hooks
    assert {name for name in net.state_dict() if not name.endswith("_raw")} == set(Net().state_dict())
    copy.deepcopy(net)
    assert fold_weights(net) == []


def test_a_hook_that_changes_its_parameter_in_place() -> None:
    net, x = Net(in_place), torch.randn(2, 3, 8, 8)
    fold_weights(net)
    with torch.no_grad():
        found = net(x)
        wanted = Net(in_place).eval()(x)
    assert torch.equal(found, wanted) and not net.conv._forward_pre_hooks


def test_weights_that_were_tied_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            for layer in (self.a, self.b):
                parametrize.register_parametrization(layer, "weight", Symmetric())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    net, x = Tied(), torch.randn(3, 4)
    with torch.no_grad():
        expected = net(x)
        fold_weights(net)
        assert torch.equal(net(x), expected) and net.a.weight is net.b.weight


def test_copies_of_a_layer_share_its_class() -> None:
    """torch makes one class for a parametrised layer, and copies of the layer keep it."""
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    net, x = nn.Sequential(layer, copy.deepcopy(layer), nn.ReLU(), copy.deepcopy(layer)), torch.randn(3, 4)
    kept = copy.deepcopy(net)
    with torch.no_grad():
        expected = net(x)
        assert len(fold_weights(net)) == 3
        assert torch.equal(net(x), expected) and torch.equal(kept(x), expected)


def test_half_precision_is_folded_in_single() -> None:
    net = Net(parametrizations.weight_norm).half()
    wide = copy.deepcopy(net).float()
    fold_weights(net)
    assert torch.equal(net.conv.weight, wide.conv.weight)


def test_weights_that_are_no_constants_are_refused_by_name() -> None:
    def refused(net: nn.Module) -> InputError:
        with pytest.raises(InputError) as caught:
            fold_weights(net)
        assert str(caught.value).count("\n") == 2
        return caught.value

    noisy = Net()
    parametrize.register_parametrization(noisy.mid, "weight", Noisy(), unsafe=True)
    assert "'mid.weight'" in refused(noisy).what and "another value every time" in refused(noisy).why

    def of_inputs(layer: Any) -> None:
        by_hook(layer)
        layer._forward_pre_hooks.clear()
        layer.register_forward_pre_hook(
            lambda module, inputs: setattr(module, "weight", module.weight_raw * inputs[0].mean())
        )

    assert "'conv.weight'" in refused(Net(of_inputs)).what and "inputs" in refused(Net(of_inputs)).why

    def shrink(module: Any, inputs: Any) -> None:
        module.weight.data.mul_(0.9)

    shrinking = Net()
    shrinking.head.register_forward_pre_hook(shrink)
    assert "'head.weight'" in refused(shrinking).what and "at every call" in refused(shrinking).why


def test_hooks_that_compute_no_weight_stay() -> None:
    net = Net()
    net.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    before = net.conv.weight.detach().clone()
    assert fold_weights(net) == [] and len(net.conv._forward_pre_hooks) == 1
    assert torch.equal(net.conv.weight, before)


def test_the_positional_convolution_of_wav2vec2() -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8,),
        conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    net, x = transformers.Wav2Vec2Model(config).eval(), torch.randn(2, 200)
    with torch.no_grad():
        expected = net(x).last_hidden_state
        assert fold_weights(net) == ["encoder.pos_conv_embed.conv.weight"]
        assert torch.equal(net(x).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardised_convolutions_of_timm(name: str) -> None:
    import timm.layers

    torch.manual_seed(0)
    layer, x = getattr(timm.layers, name)(4, 8, 3, stride=2).eval(), torch.randn(2, 4, 9, 9)
    net = nn.Sequential(layer)
    with torch.no_grad():
        expected = net(x)
        assert fold_weights(net) == ["0.weight"]
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm, all", "old weight_norm", "prune"])
def test_a_checkpoint_of_computed_weights_fits_a_plain_model(kind: str) -> None:
    wrapped, plain = Net(WRAPS[kind]).eval(), Net().eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.1)
    state = folded_state(wrapped.state_dict(), plain.state_dict())
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), wrapped(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_an_old_checkpoint_of_a_weight_norm_fits_the_new_form() -> None:
    old, new = Net(nn.utils.weight_norm), Net(parametrizations.weight_norm)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.1)
    state = folded_state(old.state_dict(), new.state_dict())
    assert state.keys() == new.state_dict().keys()
    new.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(new.eval()(x), old.eval()(x))


# --- batch norms -----------------------------------------------------------------------------------------------------


def moved(net: nn.Module) -> nn.Module:
    """Statistics and factors that are not those of a new layer."""
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point() and ("bn" in name or name.startswith("1.")):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net.eval()


def test_synchronised_batch_norms_become_plain_ones() -> None:
    net, x = moved(nn.SyncBatchNorm.convert_sync_batchnorm(Net())), torch.randn(2, 3, 8, 8)
    names = list(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        plain_batch_norms(net)
        assert torch.equal(net(x), expected)
    assert type(net.bn) is nn.BatchNorm2d and list(net.state_dict()) == names


@pytest.mark.parametrize(("layer", "norm", "shape"), [
    (nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
    (nn.Conv1d(4, 6, 1), nn.BatchNorm1d, (3, 4, 5)),
    (nn.Conv3d(4, 6, 1), nn.BatchNorm3d, (3, 4, 2, 2, 2)),
])  # fmt: skip
def test_by_what_comes_before(layer: nn.Module, norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    net = moved(nn.Sequential(layer, nn.SyncBatchNorm(6)))
    x = torch.randn(shape)
    with torch.no_grad():
        expected = net(x)
        plain_batch_norms(net)
        assert type(net[1]) is norm and torch.equal(net(x), expected)


def test_frozen_and_activating_batch_norms() -> None:
    import timm.layers
    import torchvision

    x = torch.randn(2, 8, 5, 5)
    synchronised = timm.layers.convert_sync_batchnorm(nn.Sequential(timm.layers.BatchNormAct2d(8)))
    for norm, kind in (
        (torchvision.ops.FrozenBatchNorm2d(8), nn.BatchNorm2d),
        (timm.layers.FrozenBatchNormAct2d(8), timm.layers.BatchNormAct2d),
        (synchronised[0], timm.layers.BatchNormAct2d),
    ):
        net = moved(nn.Sequential(nn.Identity(), norm))
        with torch.no_grad():
            expected = net(x)
            plain_batch_norms(net)
            torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
        assert type(net[1]) is kind and isinstance(net[1].weight, nn.Parameter)


def test_a_shared_batch_norm_stays_shared() -> None:
    norm = nn.SyncBatchNorm(4)
    net = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    plain_batch_norms(net)
    assert type(net["a"][0]) is nn.BatchNorm2d and net["a"][0] is net["b"][0]  # type: ignore[index]


def test_statistics_of_the_batch_are_refused_by_name() -> None:
    net = Net()
    net.bn = nn.BatchNorm2d(8, track_running_stats=False)  # type: ignore[assignment]
    with pytest.raises(InputError, match="'bn'"):
        plain_batch_norms(net)
    plain_batch_norms(nn.Sequential(nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False)))  # of one row each


def test_lazy_layers_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LazyConv2d(4, 1))
    with pytest.raises(InputError, match="are missing") as caught:
        checked(net, "py:x.py:make")
    assert "'1' is a LazyConv2d" in caught.value.why
    net(torch.ones(1, 1, 4, 4))
    checked(net, "py:x.py:make")


def test_a_base_layer_alone_is_no_adapter() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Conv2d(1, 2, 1)

    checked(Stage(), "x")
    adapter = type("IA3Layer", (nn.Module,), {"__module__": "peft.tuners.ia3"})
    with pytest.raises(InputError, match="adapters"):
        checked(nn.Sequential(adapter()), "x")
