"""Small convolutional networks of torchvision, as a user's file makes them (`py:` sources): narrow, five classes."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, make_layers


def basic_resnet(classes: int = 5) -> ResNet:
    """torchvision's ResNet of basic blocks, four blocks in three stages of 8, 16 and 32 channels."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    model.inplanes = 8
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
    model.layer1 = model._make_layer(BasicBlock, 8, 2)
    model.layer2 = model._make_layer(BasicBlock, 16, 1, stride=2)
    model.layer3 = model._make_layer(BasicBlock, 32, 1, stride=2)
    model.layer4 = nn.Sequential()
    model.fc = nn.Linear(32, classes)
    return model


def vgg(batch_norm: bool = True, classes: int = 5) -> VGG:
    """torchvision's VGG with four convolutions and three fully connected layers, for 32x32 images.

    A channel of the last convolution is 4 inputs of the first fully connected layer.
    """
    with torch.device("meta"):  # its fully connected layers are large whatever the convolutions are
        model = VGG(nn.Sequential(), init_weights=False)
    model.features = make_layers([8, "M", 16, "M", 24, 24, "M"], batch_norm)
    model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(
        nn.Linear(24 * 4, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(),
        nn.Linear(16, classes),
    )  # fmt: skip
    return model
