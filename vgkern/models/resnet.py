"""ResNets on fused layers: torchvision's five, and those for small images (6n + 2 layers), plain twins included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import Bounds
from ..init import init_weights_
from ..nn import AddAct, BasicBlock, BatchNormAct2d, Bottleneck, PreActBasicBlock, PreActBottleneck
from ..nn.plain import PlainAddAct, PlainBatchNormAct2d

__all__ = ["ResNet", "cifar_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

#: (bottleneck, preactivation) → block
_BLOCKS = {
    (False, False): BasicBlock,
    (True, False): Bottleneck,
    (False, True): PreActBasicBlock,
    (True, True): PreActBottleneck,
}
#: fused → what batch norms and sums outside of them are made of
_LAYERS: dict[bool, tuple[Callable[..., nn.Module], ...]] = {
    True: (BatchNormAct2d, AddAct),
    False: (PlainBatchNormAct2d, PlainAddAct),
}


class ResNet(nn.Module):
    """A ResNet: a stem, stages of residual blocks, global average pooling and a linear classifier.

    Args:
        blocks: how many blocks each stage has. From the second stage on the first block halves the resolution.
        width: channels inside the blocks of the first stage; each later stage has twice as many.
        num_classes: outputs.
        bottleneck: blocks of three convolutions, with four times the channels outside.
        preactivation: batch norm and activation before each convolution (arXiv 1603.05027); the stem then has no
            batch norm, and ``bn`` follows the last stage.
        small_images: a stem of one 3 × 3 convolution; else 7 × 7 with stride 2 and a max pooling.
        in_channels: channels of the images.
        shortcut: as in :class:`vgkern.nn.BasicBlock`.
        activation, activation_args: of every layer, as :class:`vgkern.nn.BatchNormAct2d` takes them. The name
            ``"prelu"`` gives each layer a slope of its own; an ``nn.PReLU`` is shared by all.
        zero_init_residual: γ = 0 in the last batch norm of each branch, so that every block starts as its shortcut
            (Goyal et al. 2017, arXiv 1706.02677). Without effect in a pre-activation net, whose branches end in a
            convolution.
        stochastic_depth: probability with which a sample skips the last block in training; that of block l of L is
            l / L of it (the linear decay rule of Huang et al. 2016, arXiv 1603.09382).
        grad_norm_bounds: of every batch norm, as :class:`vgkern.nn.BatchNormAct2d` takes them.
        fused: False builds the same net, keys included, of ``torch.nn`` layers only: the twin to compare with.

    Weights are He et al.'s (``init_weights_(model, "kaiming_normal")``); :func:`vgkern.init.init_weights_` has others.

    Shape:
        input: (N, in_channels, H, W); output: (N, num_classes).

    Raises:
        ValueError: what the blocks and layers refuse; ``grad_norm_bounds`` in a net that is not fused.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int = 64,
        num_classes: int = 1000,
        *,
        bottleneck: bool = False,
        preactivation: bool = False,
        small_images: bool = False,
        in_channels: int = 3,
        shortcut: str | None = "projection",
        activation: str | nn.Module | None = "relu",
        activation_args: Mapping[str, Any] | None = None,
        zero_init_residual: bool = False,
        stochastic_depth: float = 0.0,
        grad_norm_bounds: Bounds | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if zero_init_residual and shortcut is None:
            raise ValueError("zero_init_residual: with γ = 0 nothing passes a block without a shortcut")
        activated: dict[str, Any] = {"activation": activation, "activation_args": activation_args}
        norm, add_act = (functools.partial(layer, **activated) for layer in _LAYERS[fused])
        if grad_norm_bounds is not None:
            if not fused:
                raise ValueError(f"grad_norm_bounds: only fused layers have them, got {grad_norm_bounds}, fused=False")
            norm = functools.partial(norm, grad_norm_bounds=grad_norm_bounds)

        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, size, stride, size // 2, bias=False)
        self.bn1 = nn.Identity() if preactivation else norm(width)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        block = _BLOCKS[bottleneck, preactivation]
        channels, made, total = width, 0, sum(blocks)
        self._stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for stage, count in enumerate(blocks):
            stage_blocks = []
            for number in range(count):
                made += 1
                stage_blocks.append(
                    block(
                        channels, width << stage, 2 if number == 0 and stage > 0 else 1, shortcut=shortcut,
                        drop_path=stochastic_depth * made / total, norm=norm, add_act=add_act,
                    )
                )  # fmt: skip
                channels = (width << stage) * block.expansion
            self.add_module(self._stages[stage], nn.Sequential(*stage_blocks))
        self.bn = norm(channels) if preactivation else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, "kaiming_normal", zero_init_residual=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))
        for stage in self._stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.avgpool(self.bn(x)).flatten(1))


def _torchvision(name: str, blocks: tuple[int, ...], bottleneck: bool, parameters: int) -> Callable[..., ResNet]:
    def make(num_classes: int = 1000, **options: Any) -> ResNet:
        return ResNet(blocks, 64, num_classes, bottleneck=bottleneck, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""ResNet-{name[6:]} with the ``state_dict`` keys of torchvision's ({parameters:,} parameters).

    Args:
        num_classes: outputs.
        options: those of :class:`ResNet`: ``in_channels``, ``activation``, ``activation_args``, ``preactivation``,
            ``zero_init_residual``, ``stochastic_depth``, ``grad_norm_bounds``, ``fused``.

    Shape:
        input: (N, 3, H, W), in torchvision's training 224 × 224; output: (N, num_classes).

    Example:
        >>> import torch, vgkern
        >>> with torch.device("meta"):  # shapes only; leave this out for a net to train
        ...     net = vgkern.models.{name}()
        >>> f"{{sum(parameter.numel() for parameter in net.parameters()):,}}"
        '{parameters:,}'

    Source: He et al. 2016, arXiv 1512.03385; the stride of a bottleneck is in its 3 × 3 convolution, as in torchvision.
    """
    return make


resnet18 = _torchvision("resnet18", (2, 2, 2, 2), False, 11_689_512)
resnet34 = _torchvision("resnet34", (3, 4, 6, 3), False, 21_797_672)
resnet50 = _torchvision("resnet50", (3, 4, 6, 3), True, 25_557_032)
resnet101 = _torchvision("resnet101", (3, 4, 23, 3), True, 44_549_160)
resnet152 = _torchvision("resnet152", (3, 8, 36, 3), True, 60_192_808)


def cifar_resnet(
    depth: int, num_classes: int = 10, *, in_channels: int = 3, width: int = 16, shortcut: bool = True, **options: Any
) -> ResNet:
    """A ResNet for small images: a 3 × 3 stem and three stages of ``width``, twice and four times as many channels.

    Shortcuts have no parameters (option A of the source), so the net and its plain twin differ in nothing else. With
    ``bottleneck=True`` they are projections where the shape changes, as in arXiv 1603.05027.

    Args:
        depth: weight layers: 6n + 2 (20, 32, 44, 56, 110, 1202 in the source); 9n + 2 with ``bottleneck=True``
            (164, 1001 in arXiv 1603.05027).
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first stage.
        shortcut: False builds the plain net.
        options: those of :class:`ResNet`: ``bottleneck``, ``preactivation``, ``activation``, ``activation_args``,
            ``zero_init_residual``, ``stochastic_depth``, ``grad_norm_bounds``, ``fused``.

    Shape:
        input: (N, in_channels, H, W), 32 × 32 in the source; output: (N, num_classes).

    Raises:
        ValueError: a depth that is not of this form; the message names the nearest that are.

    Example:
        >>> import torch, vgkern
        >>> net = vgkern.models.cifar_resnet(20)
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> plain = vgkern.models.cifar_resnet(20, shortcut=False)  # the same parameters, no shortcuts
        >>> len(plain.state_dict()) == len(net.state_dict())
        True

    Source: He et al. 2016, arXiv 1512.03385, section 4.2.
    """
    bottleneck = options.get("bottleneck", False)
    blocks = (check_depth(depth, 9 if bottleneck else 6) - 2) // (9 if bottleneck else 6)
    kind = ("projection" if bottleneck else "pad") if shortcut else None
    return ResNet(
        (blocks,) * 3, width, num_classes, in_channels=in_channels, small_images=True, shortcut=kind, **options
    )


def check_depth(depth: int, step: int = 6) -> int:
    """``depth`` if it is step·n + 2 with n ≥ 1.

    Raises:
        ValueError: it is not; the message names the nearest depths that are.
    """
    if depth >= step + 2 and depth % step == 2:
        return depth
    below = max(step + 2, depth - (depth - 2) % step)
    near = f"{below}" if depth < step + 2 else f"{below} or {below + step}"
    examples = ", ".join(str(step * n + 2) for n in (1, 2, 3))
    raise ValueError(f"depth: expected {step}n + 2 weight layers ({examples}, ...); nearest to {depth}: {near}")
