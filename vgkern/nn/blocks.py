"""Residual blocks of fused layers: the sum and the activation after it are inside the block's last batch norm.

``BasicBlock`` and ``Bottleneck`` are He et al. 2016, arXiv 1512.03385, with torchvision's parameter names and its place
for the stride; ``PreActBasicBlock`` and ``PreActBottleneck`` are He et al. 2016, arXiv 1603.05027, where batch norm and
activation come before each convolution and the sum is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .add_act import AddAct
from .batch_norm_act import BatchNormAct2d
from .double_batch_norm import add_held, hold, released

__all__ = ["BasicBlock", "Bottleneck", "DropPath", "PreActBasicBlock", "PreActBottleneck"]

SHORTCUTS = ("projection", "pad", None)


class DropPath(nn.Module):
    """Stochastic depth: in training each sample is zeroed with probability ``p``, and the others divided by 1 − p.

    So the expected value is the input, and in evaluation the layer does nothing.

    Args:
        p: probability with which a sample is dropped, 0 ≤ p < 1.

    Shape:
        input, output: (N, ...).

    Raises:
        ValueError: p outside [0, 1).

    Example:
        >>> import torch, vgkern
        >>> sorted(set(vgkern.nn.DropPath(0.5)(torch.ones(100, 3)).flatten().tolist()))
        [0.0, 2.0]

    Source: Huang et al. 2016, arXiv 1603.09382; divided in training, not in evaluation, as dropout is.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: expected a probability in [0, 1), got {p!r}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        kept = input.new_empty((input.shape[0],) + (1,) * (input.dim() - 1)).bernoulli_(1 - self.p)
        return input * kept.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _SubsampleAndPad(nn.Module):
    """Every ``stride``-th row and column, and zeros for the channels that are new: a shortcut without parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _convolution(in_channels: int, channels: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)


class _Block(nn.Module):
    """What the four blocks share: their convolutions ``conv1``... and batch norms ``bn1``..., and the shortcut."""

    #: Of each convolution: its size, whether the block's stride is in it, its channels as a multiple of ``channels``.
    convolutions: ClassVar[tuple[tuple[int, bool, int], ...]]
    #: Output channels as a multiple of ``channels``.
    expansion: ClassVar[int]
    #: Whether batch norm and activation come before the convolution of the same number.
    preactivation: ClassVar[bool]

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        shortcut: str | None = "projection",
        drop_path: float = 0.0,
        norm: Callable[..., nn.Module] = BatchNormAct2d,
        add_act: Callable[..., nn.Module] = AddAct,
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: expected one of {SHORTCUTS}, got {shortcut!r}")
        if shortcut is None and drop_path:
            raise ValueError(f"drop_path: a block without a shortcut cannot be dropped, got {drop_path!r}")
        out_channels = channels * self.expansion
        if shortcut == "pad" and out_channels < in_channels:
            raise ValueError(f"shortcut: 'pad' cannot make {out_channels} channels of {in_channels}")
        self.has_shortcut = shortcut is not None
        # Stochastic depth zeroes a branch after its batch norm: the sum is then a layer of its own.
        self._sum_is_apart = drop_path > 0 and not self.preactivation
        before = in_channels
        for number, (size, strided, multiple) in enumerate(self.convolutions, start=1):
            after = channels * multiple
            conv = _convolution(before, after, size, stride if strided else 1)
            if self.preactivation:
                self.add_module(f"bn{number}", norm(before))
                self.add_module(f"conv{number}", conv)
            else:
                activated = not (self._sum_is_apart and number == len(self.convolutions))
                self.add_module(f"conv{number}", conv)
                self.add_module(f"bn{number}", norm(after) if activated else _without_activation(norm, after))
            before = after
        self.downsample: nn.Module | None = None
        if shortcut == "pad" and (stride != 1 or in_channels != out_channels):
            self.downsample = _SubsampleAndPad(in_channels, out_channels, stride)
        elif shortcut == "projection" and (stride != 1 or in_channels != out_channels):
            projection = _convolution(in_channels, out_channels, 1, stride)
            # After the activation that comes first there is nothing left to normalise (arXiv 1603.05027, figure 4e).
            self.downsample = (
                projection if self.preactivation else nn.Sequential(projection, _without_activation(norm, out_channels))
            )
        self.drop_path: nn.Module | None = DropPath(drop_path) if drop_path else None
        self.add_act: nn.Module | None = add_act() if self._sum_is_apart else None

    def _layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs of convolution and batch norm, in order."""
        modules: dict[str, Any] = self._modules  # a tenth of get_submodule's time, which counts with small images
        return [(modules[f"conv{number}"], modules[f"bn{number}"]) for number in range(1, len(self.convolutions) + 1)]


def _without_activation(norm: Callable[..., nn.Module], channels: int) -> nn.Module:
    return norm(channels, activation=None, activation_args=None)


class _PostActivationBlock(_Block):
    preactivation = False

    def forward(self, x: Tensor) -> Tensor:
        # The batch norm of a projection may wait for the sum.
        shortcut: Any = x if self.downsample is None else hold(self.downsample, x)
        *layers, (conv, norm) = self._layers()
        y = x
        for inner_conv, inner_norm in layers:
            y = inner_norm(inner_conv(y))
        if self.drop_path is not None and self.add_act is not None:
            return self.add_act(self.drop_path(norm(conv(y))), released(shortcut))
        return add_held(norm, conv(y), shortcut) if self.has_shortcut else norm(conv(y))


class _PreActivationBlock(_Block):
    preactivation = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        y = x
        for number, (conv, norm) in enumerate(self._layers()):
            y = norm(y)
            if number == 0 and self.downsample is not None:
                shortcut = self.downsample(y)
            y = conv(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return y + shortcut if self.has_shortcut else y


_DOC = """{what}

    Args:
        in_channels: channels of the input.
        channels: channels of the convolutions inside; the output has {expansion}.
        stride: of {strided}.
        shortcut: what the input passes where the block changes its shape: ``"projection"``, a 1 × 1 convolution{after};
            ``"pad"``, no parameters (rows and columns left out, channels of zeros added); None: the block has no
            shortcut at all.
        drop_path: probability with which a sample skips the block in training ({drop}:class:`DropPath`).
        norm: makes the batch norm with its activation: called with the channels{keywords}.
            For another activation: ``functools.partial(BatchNormAct2d, activation="gelu")``.
        add_act: makes the layer that ends a block with ``drop_path``, where the sum is outside of the batch norm.

    Shape:
        input: (N, in_channels, H, W); output: (N, {expansion}, ⌈H / stride⌉, ⌈W / stride⌉).

    Raises:
        ValueError: an unknown shortcut, ``drop_path`` without one or outside [0, 1), or ``"pad"`` to fewer channels.

    Example:
        >>> import torch, vgkern
        >>> vgkern.nn.{name}(16, 32, stride=2)(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, {example}, 4, 4])

    Source: {source}.
    """

_POST = {
    "after": " with a batch norm",
    "drop": "its sum is then an ``AddAct``: ",
    "keywords": ", and with\n            ``activation=None`` where none follows",
    "source": "He et al. 2016, arXiv 1512.03385",
}
_PRE = {"after": "", "drop": "", "keywords": "", "source": "He et al. 2016, arXiv 1603.05027"}
_BASIC = {"expansion": "channels", "strided": "the first convolution", "example": 32}
_BOTTLENECK = {"expansion": "4 · channels", "strided": "the 3 × 3 convolution", "example": 128}


class BasicBlock(_PostActivationBlock):
    __doc__ = _DOC.format(
        name="BasicBlock", what="Two 3 × 3 convolutions around a shortcut: ``act(bn(conv(...)) + x)``.",
        **_BASIC, **_POST,
    )  # fmt: skip
    convolutions = ((3, True, 1), (3, False, 1))
    expansion = 1


class Bottleneck(_PostActivationBlock):
    __doc__ = _DOC.format(
        name="Bottleneck", what="1 × 1, 3 × 3 and 1 × 1 convolutions around a shortcut: ``act(bn(conv(...)) + x)``.",
        **_BOTTLENECK, **_POST,
    )  # fmt: skip
    convolutions = ((1, False, 1), (3, True, 1), (1, False, 4))
    expansion = 4


class PreActBasicBlock(_PreActivationBlock):
    __doc__ = _DOC.format(
        name="PreActBasicBlock",
        what="Two 3 × 3 convolutions, each after its batch norm and activation, plus the input.",
        **_BASIC, **_PRE,
    )  # fmt: skip
    convolutions = BasicBlock.convolutions
    expansion = BasicBlock.expansion


class PreActBottleneck(_PreActivationBlock):
    __doc__ = _DOC.format(
        name="PreActBottleneck",
        what="1 × 1, 3 × 3 and 1 × 1 convolutions, each after its batch norm and activation, plus the input.",
        **_BOTTLENECK, **_PRE,
    )  # fmt: skip
    convolutions = Bottleneck.convolutions
    expansion = Bottleneck.expansion
