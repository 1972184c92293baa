"""VGG with batch norm (Simonyan and Zisserman, 2015) for 32x32 images: five halvings end in one position.

Parameter names are those of torchvision (features.*, classifier.*), with a classifier of 512 neurons twice.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS_16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    def __init__(self, widths: tuple[tuple[int, ...], ...], neurons: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in widths:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels, neurons), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(neurons, neurons), nn.ReLU(True), nn.Dropout()),
            nn.Linear(neurons, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def vgg16(classes: int = 10, neurons: int = 512, divisor: int = 1) -> VGG:
    """VGG-16; divisor: all widths divided by it, for a quick trial."""
    return VGG(tuple(tuple(width // divisor for width in stage) for stage in WIDTHS_16), neurons // divisor, classes)
