"""Tiny modules in which units lie as users lay them: fused, interleaved, shared, permuted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Inputs = dict[str, torch.Tensor]
TOKENS, WIDTH = 5, 8


class Net(nn.Module):
    """Modules by name and what a pass does with them; `fields` are attributes that hold sizes."""

    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor], fields: dict[str, Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)
        vars(self).update(fields)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def net(run: Callable[[Any, torch.Tensor], torch.Tensor], fields: dict[str, Any] | None = None, **parts: Any) -> Net:
    """A net with random weights of which none is zero, and norms as training leaves them."""
    made = Net(run, fields or {}, **parts).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point() and name.endswith("var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            scale = max(1, tensor[0].numel() if tensor.dim() > 1 else 4) ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return made


def tokens(rows: int = 2, width: int = WIDTH) -> Inputs:
    return {"x": torch.randn(rows, TOKENS, width, generator=torch.Generator().manual_seed(1))}


def images(rows: int = 2, channels: int = 3, size: int = 6) -> Inputs:
    return {"x": torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(1))}


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, features] as [batch, heads, tokens, width]."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | float = 0) -> torch.Tensor:
    """Attention of [batch, heads, tokens, width], joined to [batch, tokens, features]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return joined(scores.softmax(-1) @ v)


def feed_forward(activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu) -> Net:
    return net(
        lambda s, x: s.head(s.fc2(activation(s.fc1(x)))),
        fc1=nn.Linear(WIDTH, 6),
        fc2=nn.Linear(6, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def attention(heads: int = 4, **more: Any) -> Net:
    """Separate layers; the number of heads is an attribute."""
    layers = {name: nn.Linear(WIDTH, 2 * heads) for name in ("q", "k", "v")}
    run = lambda s, x: s.head(  # noqa: E731
        s.proj(attend(split(s.q(x), s.heads), split(s.k(x), s.heads), split(s.v(x), s.heads)))
    )
    fields = {"heads": heads, **more}
    return net(run, fields, **layers, proj=nn.Linear(2 * heads, WIDTH), head=nn.Linear(WIDTH, 3))


def constant_heads() -> Net:
    """Four heads by the code, each with a slope of its own."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split(layer(x), 4) for layer in (s.q, s.k, s.v))
        slopes = 2.0 ** -torch.arange(4)[:, None, None]
        return s.head(s.proj(attend(q, k, v, slopes * torch.arange(x.shape[1]))))

    layers = {name: nn.Linear(WIDTH, 8) for name in ("q", "k", "v")}
    return net(run, **layers, proj=nn.Linear(8, WIDTH), head=nn.Linear(WIDTH, 3))


def fused_attention(interleaved: bool) -> Net:
    """Three heads of width two from one layer: all q, k, v one after another, or per head q, k, v."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        qkv = s.qkv(x)
        if interleaved:
            q, k, v = qkv.unflatten(-1, (s.heads, 3, 2)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.unflatten(-1, (3, s.heads, 2)).permute(2, 0, 3, 1, 4)
        return s.head(s.proj(attend(q, k, v)))

    parts = {"qkv": nn.Linear(WIDTH, 18), "proj": nn.Linear(6, WIDTH), "head": nn.Linear(WIDTH, 3)}
    return net(run, {"heads": 3}, **parts)


def grouped_queries(groups: int) -> Net:
    """Six query heads of width two that share `groups` key and value heads; one: multi-query attention."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split(s.q(x), s.heads), split(s.k(x), s.groups), split(s.v(x), s.groups)
        shared = s.heads // s.groups
        return s.head(s.proj(attend(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))))

    parts = {"q": nn.Linear(WIDTH, 12), "k": nn.Linear(WIDTH, 2 * groups), "v": nn.Linear(WIDTH, 2 * groups)}
    fields = {"heads": 6, "groups": groups}
    return net(run, fields, **parts, proj=nn.Linear(12, WIDTH), head=nn.Linear(WIDTH, 3))


def gated(fused: bool) -> Net:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = s.both(x).chunk(2, -1) if fused else (s.gate(x), s.up(x))
        return s.head(s.down(F.silu(gate) * up))

    parts: dict[str, nn.Module] = {"down": nn.Linear(5, WIDTH), "head": nn.Linear(WIDTH, 3)}
    if fused:
        return net(run, both=nn.Linear(WIDTH, 10), **parts)
    return net(run, gate=nn.Linear(WIDTH, 5), up=nn.Linear(WIDTH, 5), **parts)


def permuted() -> Net:
    """The features change places between the layers."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    return net(
        lambda s, x: s.head(s.fc2(F.gelu(s.fc1(x)).index_select(-1, order))),
        fc1=nn.Linear(WIDTH, 6),
        fc2=nn.Linear(6, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def called_twice() -> Net:
    """One layer reads the same units of two layers, or of one layer, in two calls."""
    return net(
        lambda s, x: s.head(s.fc2(F.gelu(s.fc1(x))) + s.fc2(F.silu(s.other(x)))),
        fc1=nn.Linear(WIDTH, 6),
        other=nn.Linear(WIDTH, 6),
        fc2=nn.Linear(6, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def dead_relu() -> Net:
    """Half of the units are off for every input that a test gives."""
    made = feed_forward(F.relu)
    made.fc1.bias[:3] = -1000.0
    return made


def in_place() -> Net:
    return net(
        lambda s, x: s.head(s.conv2(s.relu(s.norm(s.conv1(x)))).mean((2, 3))),
        conv1=nn.Conv2d(3, 6, 3, padding=1),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(6, 4, 3, padding=1),
        head=nn.Linear(4, 3),
    )


def convolutions(groups: int) -> Net:
    """A grouped convolution between two plain ones; as many groups as channels: a depthwise one."""
    return net(
        lambda s, x: s.head(s.last(F.relu6(s.norm(s.middle(F.relu(s.first(x)))))).mean((2, 3))),
        first=nn.Conv2d(3, 6, 1),
        middle=nn.Conv2d(6, 6, 3, padding=1, groups=groups),
        norm=nn.BatchNorm2d(6),
        last=nn.Conv2d(6, 4, 1),
        head=nn.Linear(4, 3),
    )


def squeeze_excitation() -> Net:
    """A gate that is computed from all channels, and scales each of them."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(s.norm(s.expand(x)))
        gate = s.excite(F.relu(s.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return s.head(s.project(x * gate).mean((2, 3)))

    return net(
        run,
        expand=nn.Conv2d(3, 6, 1),
        norm=nn.BatchNorm2d(6),
        squeeze=nn.Conv2d(6, 2, 1),
        excite=nn.Conv2d(2, 6, 1),
        project=nn.Conv2d(6, 4, 1),
        head=nn.Linear(4, 3),
    )


def flattened() -> Net:
    """Each channel is four inputs of the layer that reads the map as a vector."""
    return net(
        lambda s, x: s.head(F.relu(s.fc(F.adaptive_avg_pool2d(F.relu(s.conv(x)), 2).flatten(1)))),
        conv=nn.Conv2d(3, 6, 3, padding=1),
        fc=nn.Linear(24, 8),
        head=nn.Linear(8, 3),
    )


def normed(per_head: bool) -> Net:
    """A norm across all features between two layers, or one over the features of each of three heads of q and k."""
    if not per_head:
        return net(
            lambda s, x: s.head(s.fc2(s.norm(s.fc1(x)))),
            fc1=nn.Linear(WIDTH, 6),
            norm=nn.LayerNorm(6),
            fc2=nn.Linear(6, WIDTH),
            head=nn.Linear(WIDTH, 3),
        )
    parts: dict[str, nn.Module] = {name: nn.Linear(WIDTH, 12) for name in ("q", "k", "v")}
    parts |= {"q_norm": nn.LayerNorm(4), "k_norm": nn.LayerNorm(4)}
    return net(
        lambda s, x: s.head(
            s.proj(attend(s.q_norm(split(s.q(x), s.heads)), s.k_norm(split(s.k(x), s.heads)), split(s.v(x), s.heads)))
        ),
        {"heads": 3},
        **parts,
        proj=nn.Linear(12, WIDTH),
        head=nn.Linear(WIDTH, 3),
    )


def with_tables() -> Net:
    """A relative position bias [entries, heads] and a temperature [heads, 1, 1], each with a part per head."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        bias = s.positions[distance].permute(2, 0, 1)
        q, k, v = (split(layer(x), s.heads) for layer in (s.q, s.k, s.v))
        return s.head(s.proj(attend(q * s.temperature, k, v, bias)))

    parts: dict[str, Any] = {name: nn.Linear(WIDTH, 6) for name in ("q", "k", "v")}
    parts |= {
        "positions": nn.Parameter(torch.empty(2 * TOKENS - 1, 3)),
        "temperature": nn.Parameter(torch.empty(3, 1, 1)),
    }
    return net(run, {"heads": 3}, **parts, proj=nn.Linear(6, WIDTH), head=nn.Linear(WIDTH, 3))


def residual() -> Net:
    """Two blocks that add to a stream, each with its own hidden units."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.stem(x)
        x = x + s.down1(F.gelu(s.up1(s.norm1(x))))
        x = x + s.down2(F.gelu(s.up2(s.norm2(x))))
        return s.head(x)

    parts: dict[str, nn.Module] = {"stem": nn.Linear(WIDTH, 6), "head": nn.Linear(6, 3)}
    for number in (1, 2):
        parts |= {f"norm{number}": nn.Identity(), f"up{number}": nn.Linear(6, 10), f"down{number}": nn.Linear(10, 6)}
    return net(run, **parts)


def is_also_output() -> Net:
    """The hidden features are returned next to what is computed from them."""
    made = feed_forward()
    made.run = lambda s, x: torch.cat([s.head(s.fc2(F.gelu(s.fc1(x)))), F.gelu(s.fc1(x))], -1)
    return made


def shared_table() -> Net:
    """Two attentions with one table of positions, as in T5."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        bias = s.positions[distance].permute(2, 0, 1)
        for number in "12":
            q, k, v = (split(getattr(s, name + number)(x), 3) for name in "qkv")
            x = x + getattr(s, f"proj{number}")(attend(q, k, v, bias))
        return s.head(x)

    parts: dict[str, Any] = {f"{name}{number}": nn.Linear(WIDTH, 6) for name, number in itertools.product("qkv", "12")}
    parts |= {f"proj{number}": nn.Linear(6, WIDTH) for number in "12"}
    return net(run, **parts, positions=nn.Parameter(torch.empty(2 * TOKENS - 1, 3)), head=nn.Linear(WIDTH, 3))
