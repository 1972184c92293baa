"""Small convolutional networks of torchvision, as a user's file makes them (`py:` sources): narrow, five classes."""

from __future__ import annotations

import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet as EfficientNetOfTimm
from timm.models.regnet import RegNet as RegNetOfTimm
from timm.models.regnet import RegNetCfg
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers
from torchvision.ops import Conv2dNormActivation


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


def mobilenet_v2(classes: int = 5) -> MobileNetV2:
    """torchvision's MobileNetV2: a block without expansion, one that strides, two with a residual."""
    model = MobileNetV2(inverted_residual_setting=[[1, 8, 1, 1], [3, 16, 3, 2], [2, 24, 1, 2]])
    model.features[-1], model.classifier[1] = Conv2dNormActivation(24, 32, 1), nn.Linear(32, classes)
    return model


def mobilenet_v3(classes: int = 5) -> MobileNetV3:
    """torchvision's MobileNetV3: with and without squeeze-and-excitation and residual."""
    settings = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 1, 1, 1),
        InvertedResidualConfig(16, 3, 24, 16, True, "HS", 1, 1, 1),
        InvertedResidualConfig(16, 5, 48, 24, False, "HS", 2, 1, 1),
    ]
    return MobileNetV3(settings, last_channel=32, num_classes=classes)


def efficientnet(classes: int = 5) -> EfficientNet:
    """torchvision's EfficientNet of both generations' blocks."""
    settings = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        MBConvConfig(2, 3, 1, 16, 16, 2),
    ]
    return EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=classes, last_channel=32)


def regnet(classes: int = 5) -> RegNet:
    """torchvision's RegNetY: two stages of three blocks in all, groups of 4 channels."""
    params = BlockParams([2, 1], [16, 24], [4, 4], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(params, num_classes=classes, stem_width=8)


def convnext(classes: int = 5) -> ConvNeXt:
    settings = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
    return ConvNeXt(settings, layer_scale=0.5, num_classes=classes)


def resnext(classes: int = 5) -> ResNet:
    """torchvision's ResNeXt: bottlenecks with four groups."""
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=classes, groups=4, width_per_group=32)
    model.inplanes = 16
    model.conv1, model.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
    model.layer1 = model._make_layer(Bottleneck, 8, 2)
    model.layer2 = model._make_layer(Bottleneck, 16, 1, stride=2)
    model.layer3 = model.layer4 = nn.Sequential()
    model.fc = nn.Linear(64, classes)
    return model


def efficientnet_of(stages: list[list[str]], classes: int = 5) -> nn.Module:
    """timm's EfficientNet of these stages, in timm's notation of blocks, for grey images."""
    return EfficientNetOfTimm(
        decode_arch_def(stages), num_classes=classes, in_chans=1, stem_size=8, num_features=32, act_layer=nn.SiLU
    )


def regnet_of(se_ratio: float, classes: int = 5) -> nn.Module:
    """timm's RegNet: five blocks in four stages of 8 to 40 channels, groups of 4, for grey images."""
    config = RegNetCfg(depth=5, w0=8, wa=8.0, wm=1.5, group_size=4, se_ratio=se_ratio, stem_width=8)
    return RegNetOfTimm(config, in_chans=1, num_classes=classes)


def _mobile_backbone() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter

    features = mobilenet_v3().features
    low = next(str(index) for index, part in enumerate(features) if index and getattr(part, "out_channels", 0))
    return IntermediateLayerGetter(features, return_layers={low: "low", str(len(features) - 1): "high"})


def lraspp(classes: int = 5) -> nn.Module:
    """torchvision's LR-ASPP on a small MobileNetV3."""
    from torchvision.models.segmentation import LRASPP

    backbone = _mobile_backbone()
    with torch.no_grad():
        found = backbone.eval()(torch.zeros(2, 3, 32, 32))
    return LRASPP(backbone, found["low"].shape[1], found["high"].shape[1], classes, inter_channels=16)


def deeplab(classes: int = 5) -> nn.Module:
    """torchvision's DeepLabV3 on the same, with a narrow head."""
    from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3

    backbone = _mobile_backbone()
    backbone.return_layers = {list(backbone)[-1]: "out"}
    with torch.no_grad():
        channels = backbone.eval()(torch.zeros(2, 3, 32, 32))["out"].shape[1]
    head = nn.Sequential(
        ASPP(channels, [2, 3], 16),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, classes, 1),
    )
    return DeepLabV3(backbone, head)


def fcn(classes: int = 5) -> nn.Module:
    """torchvision's FCN on a small ResNet, with the auxiliary head of its training."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    backbone = basic_resnet()
    backbone.layer4 = nn.Identity()
    layers = IntermediateLayerGetter(backbone, return_layers={"layer2": "aux", "layer3": "out"})
    return FCN(layers, FCNHead(32, classes), FCNHead(16, classes))
