"""Tiny convolutional networks of several branches: features concatenated, split, at several resolutions, transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.units.discover.nets import Net, net


def fire() -> Net:
    """Two layers of different widths whose features one layer reads next to each other."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(s.squeeze(x))
        return s.head(s.last(torch.cat([F.relu(s.one(x)), F.relu(s.three(x))], 1)).mean((2, 3)))

    return net(
        run,
        squeeze=nn.Conv2d(3, 4, 1),
        one=nn.Conv2d(4, 5, 1),
        three=nn.Conv2d(4, 6, 3, padding=1),
        last=nn.Conv2d(11, 4, 1),
        head=nn.Linear(4, 3),
    )


def dense() -> Net:
    """Every layer reads, after a norm of its own, what all layers before it made."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        made = [s.stem(x)]
        for norm, layer in ((s.norm1, s.conv1), (s.norm2, s.conv2)):
            made.append(layer(F.relu(norm(torch.cat(made, 1)))))
        return s.head(F.relu(s.norm3(torch.cat(made, 1))).mean((2, 3)))

    return net(
        run,
        stem=nn.Conv2d(3, 4, 3, padding=1),
        norm1=nn.BatchNorm2d(4),
        conv1=nn.Conv2d(4, 6, 3, padding=1),
        norm2=nn.BatchNorm2d(10),
        conv2=nn.Conv2d(10, 5, 3, padding=1),
        norm3=nn.BatchNorm2d(15),
        head=nn.Linear(15, 3),
    )


def flattened_branches() -> Net:
    """A vector of two maps of four positions each, of different layers."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        maps = [F.adaptive_avg_pool2d(F.relu(layer(x)), 2) for layer in (s.one, s.two)]
        return s.head(F.relu(s.fc(torch.cat(maps, 1).flatten(1))))

    return net(run, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(3, 6, 1), fc=nn.Linear(40, 8), head=nn.Linear(8, 3))


def gated_branches() -> Net:
    """A gate over the concatenation of two branches, one of them depthwise, as in GhostNet."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        first = F.relu(s.primary(x))
        both = torch.cat([first, F.relu(s.cheap(first))], 1)
        gate = s.excite(F.relu(s.squeeze(both.mean((2, 3), keepdim=True)))).sigmoid()
        return s.head(s.last(both * gate).mean((2, 3)))

    return net(
        run,
        primary=nn.Conv2d(3, 4, 1),
        cheap=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        squeeze=nn.Conv2d(8, 2, 1),
        excite=nn.Conv2d(2, 8, 1),
        last=nn.Conv2d(8, 4, 1),
        head=nn.Linear(4, 3),
    )


def parts() -> Net:
    """The output of one layer is split into equal parts; every part is added to the previous one, as in Res2Net."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        first, second, third = F.relu(s.norm(s.reduce(x))).split(s.size, 1)
        first = F.relu(s.conv1(first))
        second = F.relu(s.conv2(first + second))
        return s.head(s.expand(torch.cat([first, second, third], 1)).mean((2, 3)))

    return net(
        run,
        {"size": 4},
        reduce=nn.Conv2d(3, 12, 1),
        norm=nn.BatchNorm2d(12),
        conv1=nn.Conv2d(4, 4, 3, padding=1),
        conv2=nn.Conv2d(4, 4, 3, padding=1),
        expand=nn.Conv2d(12, 4, 1),
        head=nn.Linear(4, 3),
    )


def listed_parts() -> Net:
    """The sizes of a split are in a list; the parts are filtered by kernels of different sizes, as in MixNet."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = F.relu(s.first(x)).split(s.sizes, 1)
        return s.head(s.last(torch.cat([F.relu(s.three(first)), F.relu(s.five(second))], 1)).mean((2, 3)))

    return net(
        run,
        {"sizes": [4, 4]},
        first=nn.Conv2d(3, 8, 1),
        three=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        five=nn.Conv2d(4, 4, 5, padding=2, groups=4),
        last=nn.Conv2d(8, 4, 1),
        head=nn.Linear(4, 3),
    )


def upsampled() -> Net:
    """A transposed convolution between convolutions, and its output next to a skipped map, as in U-Net."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(s.down1(x))
        deep = F.relu(s.down2(skip))
        up = F.relu(s.norm(s.up(deep)))
        return s.head(F.relu(s.last(torch.cat([skip, up], 1))).mean((2, 3)))

    return net(
        run,
        down1=nn.Conv2d(3, 4, 3, padding=1),
        down2=nn.Conv2d(4, 6, 2, 2),
        up=nn.ConvTranspose2d(6, 5, 2, 2),
        norm=nn.BatchNorm2d(5),
        last=nn.Conv2d(9, 6, 3, padding=1),
        head=nn.Linear(6, 3),
    )


def volumes() -> Net:
    """Images as volumes of one position in depth."""
    return net(
        lambda s, x: s.head(F.relu(s.conv2(F.relu(s.norm(s.conv1(x[:, :, None]))))).mean((2, 3, 4))),
        conv1=nn.Conv3d(3, 6, (1, 3, 3)),
        norm=nn.BatchNorm3d(6),
        conv2=nn.Conv3d(6, 5, (1, 3, 3)),
        head=nn.Linear(5, 3),
    )


def sounds() -> Net:
    """Rows of pixels as sequences, made longer again by a transposed convolution that overlaps."""
    return net(
        lambda s, x: s.head(F.relu(s.up(F.relu(s.down(x.mean(2))))).mean(2)),
        down=nn.Conv1d(3, 6, 3, 2),
        up=nn.ConvTranspose1d(6, 5, 4, 2, padding=1),
        head=nn.Linear(5, 3),
    )


class Pooled(nn.Module):
    """Linear attention with heads: its matrix products outside the layers cost the same per position."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.heads, self.stride = 4, stride
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :: self.stride]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = q.sigmoid() @ (k.softmax(-2).mT @ v)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


def stages() -> Net:
    """Blocks of one class, count and width at three resolutions."""
    return net(
        lambda s, x: s.head(s.blocks(s.stem(x).flatten(2).mT).mean(1)),
        stem=nn.Conv2d(3, 8, 1),
        blocks=nn.Sequential(Pooled(1), Pooled(2), Pooled(3)),
        head=nn.Linear(8, 3),
    )


def zero_norm(gamma: float = 0.0) -> Net:
    """A response norm over all features, x + gamma * x * |x| / mean |x|, as training starts: gamma is zero."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(s.conv1(x))
        size = x.norm(dim=(2, 3), keepdim=True)
        return s.head(s.conv2(x + s.gamma * x * size / (size.mean(1, keepdim=True) + 1)).mean((2, 3)))

    made = net(
        run,
        conv1=nn.Conv2d(3, 6, 1),
        gamma=nn.Parameter(torch.zeros(1, 6, 1, 1)),
        conv2=nn.Conv2d(6, 4, 1),
        head=nn.Linear(4, 3),
    )
    made.gamma.fill_(gamma)
    return made
