"""Models whose blocks are no chain, as users write them: a recipe or a test names a function of this file."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optin_export.units import Family, Producer, UnitGroup, register

WIDTH, HIDDEN = 16, 24


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


class UNet(nn.Module):
    """Each decoder block reads the encoder block of its size beside what comes from below."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = BasicBlock(3, 8), BasicBlock(8, 12), BasicBlock(12, 16)
        self.up2, self.up1 = BasicBlock(28, 12), BasicBlock(20, 8)
        self.pool, self.grow, self.rows = nn.MaxPool2d(2), nn.Upsample(scale_factor=2), rows
        self.head = nn.Conv2d(8, 5, 1) if rows else nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        y = self.up2(torch.cat([self.grow(self.bottom(self.pool(b))), b], 1))
        y = self.up1(torch.cat([self.grow(y), a], 1))
        return self.head(y if self.rows else y.mean((2, 3)))


class Recurrent(nn.Module):
    """The second block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = BasicBlock(3, 8), BasicBlock(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.again(self.first(x))).mean((2, 3)))


class Mixer(nn.Module):
    """A residual block on tokens; `bias` mixes them. returns: how it hands the bias on."""

    def __init__(self, returns: str = "tensor", makes_bias: bool = False) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.returns, self.table = returns, nn.Embedding(40, 1) if makes_bias else None

    def forward(self, stream: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if self.table is not None:
            place = torch.arange(stream.shape[1], device=stream.device)
            bias = self.table((place[:, None] - place[None]).abs())[..., 0][None] + 0.1 * place
        x = stream if bias is None else stream + bias.softmax(-1) @ stream
        y = self.narrow(nn.functional.gelu(self.widen(self.norm(x))))
        if self.returns == "in place":
            stream += y
            return stream
        stream = x + y
        if self.returns == "dict":
            return {"hidden": stream, "bias": bias}
        if self.returns == "dataclass":
            return Handed(stream, bias)
        return (stream, bias) if self.returns == "tuple" else stream


@dataclasses.dataclass
class Handed:
    hidden: torch.Tensor
    bias: torch.Tensor | None


def _parts(handed: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(handed, Handed):
        return handed.hidden, handed.bias
    return (handed["hidden"], handed["bias"]) if isinstance(handed, dict) else handed


class Tower(nn.Module):
    """Mixers on the patches of an image, or on the tokens of a text, wired as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.patch, self.words = kind, nn.Conv2d(3, WIDTH, 8, 8), nn.Embedding(64, WIDTH)
        plain = ("in place",) * 3 if kind == "in place" else ("tensor",) * 3
        returns = {"tuple": "tuple", "dict": "dict", "dataclass": "dataclass"}.get(kind)
        count = 4 if kind in ("auxiliary", "dense") else 3
        makes_bias = [number == 0 and (returns is not None or kind == "state") for number in range(count)]
        self.blocks = nn.ModuleList(
            Mixer(returns or (plain[0] if number else "tensor"), makes_bias[number]) for number in range(count)
        )
        self.norm = nn.LayerNorm(WIDTH * (2 if kind == "branches" else 1))
        self.head = nn.Linear(WIDTH * (2 if kind == "branches" else 1), 5)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.patch(pixel_values).flatten(2).mT if pixel_values is not None else self.words(input_ids)
        return self.head(self.norm(self.run(x)).mean(1))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        kind, blocks = self.kind, self.blocks
        if kind in ("tuple", "dict", "dataclass"):
            bias = None
            for block in blocks:
                handed = block(x, bias=bias)
                x, bias = _parts(handed)
            return x
        if kind == "reversed":
            for block in reversed(blocks):
                x = block(x)
        elif kind == "branches":  # the second branch starts from the input, as the third block does
            x = torch.cat([blocks[1](blocks[0](x)), blocks[2](x)], -1)
        elif kind == "dense":
            seen = [x]
            for block in blocks:
                seen.append(block(torch.stack(seen).mean(0)))
            x = seen[-1] + seen[1]
        elif kind == "auxiliary":  # the last block is that of a head for the training
            for block in blocks[:-1]:
                x = block(x)
        elif kind == "layers":  # the second block is never called, its layers are
            x = blocks[0](x)
            second: Any = blocks[1]
            x = blocks[2](x + second.narrow(nn.functional.gelu(second.widen(second.norm(x)))))
        elif kind == "time first":
            x = x.transpose(0, 1).contiguous()
            for block in blocks:
                x = block(x)
            x = x.transpose(0, 1)
        elif kind == "parts":  # each half of a sample is a row of its own
            count, tokens = x.shape[:2]
            x = x.reshape(count * 2, tokens // 2, -1)
            for block in blocks:
                x = block(x)
            x = x.reshape(count, tokens, -1)
        elif kind == "checkpoint":
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            for block in blocks:
                x = block(x)
        return x


class Keeper(Mixer):
    """Leaves the bias of its pass where the blocks behind find it, rather than handing it on."""

    kept: SimpleNamespace
    first: bool

    def forward(self, stream: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        if self.first:
            self.kept.bias = stream.mean(-1, keepdim=True).mT.softmax(-1).expand(-1, stream.shape[1], -1)
        x = stream + 0.3 * self.kept.bias @ stream
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


def tower(kind: str) -> nn.Module:
    register(FAMILY)  # not by the import alone: other tests of this process know the package's own families
    torch.manual_seed(0)
    model = Tower(kind)
    if kind == "state":
        kept = SimpleNamespace()
        model.blocks = nn.ModuleList(Keeper() for _ in range(3))
        for number, block in enumerate(model.blocks):
            block.kept, block.first = kept, number == 0  # type: ignore[assignment]
    return model.eval()


def unet(rows: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return _lively(UNet(rows))


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return _lively(Recurrent())


def _lively(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    return (
        UnitGroup(
            block=index,
            kind="neurons",
            count=block.widen.out_features,
            width=1,
            producers=(Producer(f"{path}.widen"),),
            consumer=f"{path}.narrow",
            residual=(f"{path}.norm", 0),
            sublayer=None,
        ),
    )


FAMILY = Family(
    name="mixer-tower",
    library="timm",
    examples="this file",
    units=("neurons",),
    is_block=lambda module: type(module).__name__ in ("Mixer", "Keeper"),
    groups=_groups,
)
