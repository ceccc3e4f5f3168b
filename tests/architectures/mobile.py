"""Nets of small convolutions: MobileNetV2 and V3, EfficientNet-B0, RegNetX and RegNetY, ShuffleNetV2."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNormActivation(nn.Sequential):
    """torchvision's: convolution, batch norm, activation unless it is None."""

    def __init__(self, inputs, outputs, kernel_size=3, stride=1, groups=1, activation=nn.ReLU, eps=1e-5, momentum=0.1):
        layers = [
            nn.Conv2d(inputs, outputs, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=eps, momentum=momentum),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)
        self.out_channels = outputs


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018, arXiv 1709.01507, as in torchvision."""

    def __init__(self, channels, squeezed, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, input: Tensor) -> Tensor:
        scale = self.avgpool(input)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, input: Tensor) -> Tensor:
        scale = self._scale(input)
        return scale * input


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, arXiv 1801.04381."""

    def __init__(self, inputs, outputs, stride, expand_ratio):
        super().__init__()
        hidden = round(inputs * expand_ratio)
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvNormActivation(inputs, hidden, 1, activation=nn.ReLU6))
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, divide=1, num_classes=1000):
        super().__init__()
        inputs, last = 32 // divide, 1280 // divide
        features: list[nn.Module] = [ConvNormActivation(3, inputs, 3, 2, activation=nn.ReLU6)]
        for expand, channels, repeats, first_stride in self.settings:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                features.append(InvertedResidual(inputs, channels // divide, stride, expand))
                inputs = channels // divide
        features.append(ConvNormActivation(inputs, last, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=0.0), nn.Linear(last, num_classes))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class InvertedResidualV3(nn.Module):
    """Howard et al. 2019, arXiv 1905.02244."""

    def __init__(self, inputs, kernel, expanded, outputs, use_se, activation, stride):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        norm = {"eps": 0.001, "momentum": 0.01}
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(ConvNormActivation(inputs, expanded, 1, activation=activation, **norm))
        layers.append(
            ConvNormActivation(expanded, expanded, kernel, stride, groups=expanded, activation=activation, **norm)
        )
        if use_se:
            layers.append(SqueezeExcitation(expanded, max(expanded // 4, 1), scale_activation=nn.Hardsigmoid))
        layers.append(ConvNormActivation(expanded, outputs, 1, activation=None, **norm))
        self.block = nn.Sequential(*layers)
        self.out_channels = outputs

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result += input
        return result


class MobileNetV3Large(nn.Module):
    settings = (
        (16, 3, 16, 16, False, nn.ReLU, 1), (16, 3, 64, 24, False, nn.ReLU, 2), (24, 3, 72, 24, False, nn.ReLU, 1),
        (24, 5, 72, 40, True, nn.ReLU, 2), (40, 5, 120, 40, True, nn.ReLU, 1), (40, 5, 120, 40, True, nn.ReLU, 1),
        (40, 3, 240, 80, False, nn.Hardswish, 2), (80, 3, 200, 80, False, nn.Hardswish, 1),
        (80, 3, 184, 80, False, nn.Hardswish, 1), (80, 3, 184, 80, False, nn.Hardswish, 1),
        (80, 3, 480, 112, True, nn.Hardswish, 1), (112, 3, 672, 112, True, nn.Hardswish, 1),
        (112, 5, 672, 160, True, nn.Hardswish, 2), (160, 5, 960, 160, True, nn.Hardswish, 1),
        (160, 5, 960, 160, True, nn.Hardswish, 1),
    )  # fmt: skip

    def __init__(self, divide=1, num_classes=1000):
        super().__init__()
        norm = {"eps": 0.001, "momentum": 0.01, "activation": nn.Hardswish}
        features: list[nn.Module] = [ConvNormActivation(3, 16 // divide, 3, 2, **norm)]
        for inputs, kernel, expanded, outputs, *rest in self.settings:
            features.append(InvertedResidualV3(inputs // divide, kernel, expanded // divide, outputs // divide, *rest))
        features.append(ConvNormActivation(160 // divide, 960 // divide, 1, **norm))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(960 // divide, 1280 // divide),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=0.0, inplace=True),
            nn.Linear(1280 // divide, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class StochasticDepth(nn.Module):
    """Huang et al. 2016, arXiv 1603.09382; a whole row of the batch is dropped."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        keep = torch.empty([input.shape[0], *[1] * (input.dim() - 1)], dtype=input.dtype).bernoulli_(1 - self.p)
        return input * keep.div_(1 - self.p)


class MBConv(nn.Module):
    """Tan & Le 2019, arXiv 1905.11946, as in torchvision."""

    def __init__(self, inputs, outputs, expand, kernel, stride, drop):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        expanded = inputs * expand
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(ConvNormActivation(inputs, expanded, 1, activation=nn.SiLU))
        layers.append(ConvNormActivation(expanded, expanded, kernel, stride, groups=expanded, activation=nn.SiLU))
        layers.append(SqueezeExcitation(expanded, max(1, inputs // 4), activation=lambda: nn.SiLU(inplace=True)))
        layers.append(ConvNormActivation(expanded, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)
        self.out_channels = outputs

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


class EfficientNetB0(nn.Module):
    settings = (
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
    )  # fmt: skip

    def __init__(self, divide=1, drop=0.2, num_classes=1000):
        super().__init__()
        total, done = sum(row[-1] for row in self.settings), 0
        layers: list[nn.Module] = [ConvNormActivation(3, 32 // divide, 3, 2, activation=nn.SiLU)]
        for expand, kernel, first_stride, inputs, outputs, repeats in self.settings:
            stage = []
            for repeat in range(repeats):
                source, stride = (outputs, 1) if repeat else (inputs, first_stride)
                stage.append(MBConv(source // divide, outputs // divide, expand, kernel, stride, drop * done / total))
                done += 1
            layers.append(nn.Sequential(*stage))
        layers.append(ConvNormActivation(320 // divide, 1280 // divide, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.0, inplace=True), nn.Linear(1280 // divide, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


class BottleneckTransform(nn.Sequential):
    """The residual branch of RegNet: a convolution of 1, of 3 in groups, squeeze-excite, and of 1."""

    def __init__(self, inputs, outputs, stride, group_width, se_ratio):
        super().__init__()
        self.add_module("a", ConvNormActivation(inputs, outputs, 1))
        self.add_module("b", ConvNormActivation(outputs, outputs, 3, stride, groups=outputs // group_width))
        if se_ratio:
            self.add_module("se", SqueezeExcitation(outputs, round(se_ratio * inputs)))
        self.add_module("c", ConvNormActivation(outputs, outputs, 1, activation=None))


class ResBottleneckBlock(nn.Module):
    """Radosavovic et al. 2020, arXiv 2003.13678, as in torchvision."""

    def __init__(self, inputs, outputs, stride, group_width, se_ratio):
        super().__init__()
        self.proj = None
        if inputs != outputs or stride != 1:
            self.proj = ConvNormActivation(inputs, outputs, 1, stride, activation=None)
        self.f = BottleneckTransform(inputs, outputs, stride, group_width, se_ratio)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class RegNet(nn.Module):
    """RegNetX-400MF by its depths; ``se_ratio=0.25`` makes it a Y."""

    def __init__(self, widths=(32, 64, 160, 400), depths=(1, 2, 7, 12), group_width=16, se_ratio=0.0, num_classes=1000):
        super().__init__()
        self.stem = ConvNormActivation(3, widths[0], 3, 2)
        blocks, inputs = [], widths[0]
        for number, (outputs, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            stage = nn.Sequential()
            for index in range(depth):
                stride = 1 if index else 2
                block = ResBottleneckBlock(inputs, outputs, stride, min(group_width, outputs), se_ratio)
                stage.add_module(f"block{number}-{index}", block)
                inputs = outputs
            blocks.append((f"block{number}", stage))
        self.trunk_output = nn.Sequential()
        for name, stage in blocks:
            self.trunk_output.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk_output(x)
        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        return self.fc(x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleBlock(nn.Module):
    """Ma et al. 2018, arXiv 1807.11164, as in torchvision."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, channels=(24, 48, 96, 192, 1024), repeats=(4, 8, 4), num_classes=1000):
        super().__init__()
        first, *stages, last = channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, made = first, []
        for outputs, repeat in zip(stages, repeats, strict=True):
            blocks = [ShuffleBlock(inputs, outputs, 2)] + [ShuffleBlock(outputs, outputs, 1) for _ in range(repeat - 1)]
            made.append(nn.Sequential(*blocks))
            inputs = outputs
        self.stage2, self.stage3, self.stage4 = made
        self.conv5 = nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        self.fc = nn.Linear(last, num_classes)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.stage4(x)
        x = self.conv5(x)
        x = x.mean([2, 3])  # globalpool
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)
