"""What is timed: sets of shapes, and the configurations that they make with dtypes, memory formats and activations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: Blocks and width of the four stages of a ResNet-50; a block's output has four times its width.
RESNET50_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Site:
    """A place in a network where a batch norm stands.

    Attributes:
        shape: (N, C, H, W) of its input.
        residual: whether a residual is added to its output.
        activated: whether an activation follows; it does not in the shortcut of a block.
        count: how often the network has it.
    """

    shape: Shape
    residual: bool = True
    activated: bool = True
    count: int = 1


def resnet50_sites(batch: int = 32, size: int = 224) -> list[Site]:
    """Every batch norm of torchvision's ResNet-50 on images of ``size`` × ``size``; the counts add up to 53.

    The stride of a block is in its 3 × 3 convolution, as in torchvision. ``size`` is a multiple of 32.
    """
    counts: dict[tuple[Shape, bool, bool], int] = {}

    def add(channels: int, side: int, *, residual: bool = False, activated: bool = True) -> None:
        key = ((batch, channels, side, side), residual, activated)
        counts[key] = counts.get(key, 0) + 1

    add(64, size // 2)  # the stem; a pooling of stride 2 follows
    side = size // 4
    for stage, (blocks, width) in enumerate(RESNET50_STAGES):
        for block in range(blocks):
            strided = block == 0 and stage > 0
            add(width, side)
            side = side // 2 if strided else side
            add(width, side)
            add(4 * width, side, residual=True)
            if block == 0:
                add(4 * width, side, activated=False)
    return [Site(shape, residual, activated, count) for (shape, residual, activated), count in counts.items()]


#: From 0.8 to 26 million elements, so some in every cache and some in none; all with residual.
STANDARD_SHAPES: tuple[Shape, ...] = (
    (32, 256, 56, 56), (32, 64, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28),
    (32, 256, 14, 14), (32, 2048, 7, 7), (128, 16, 32, 32),
)  # fmt: skip

#: Of a ResNet for CIFAR at batch 128; many channels of few elements, as a perceptron's or a single image's; and one so
#: small that the cost of the call is all there is.
SMALL_SHAPES: tuple[Shape, ...] = (
    (128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (32, 2048, 1, 1), (1, 512, 14, 14), (8, 16, 8, 8)
)  # fmt: skip

SETS = {
    "standard": [Site(shape) for shape in STANDARD_SHAPES],
    "resnet50": resnet50_sites(),
    "small": [Site(shape) for shape in SMALL_SHAPES],
}


@dataclass(frozen=True)
class Configuration:
    """One thing to time.

    Attributes:
        dtype: a name of torch's, of data and parameters.
        layout: ``"contiguous"`` or ``"channels_last"``.
        count: how often the network has it.
        net_activation: of the network's other layers, where this one has none.
    """

    shape: Shape
    dtype: str = "float32"
    layout: str = "contiguous"
    activation: str = "relu"
    residual: bool = True
    training: bool = True
    count: int = 1
    net_activation: str = "relu"

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        residual = " + residual" if self.residual else ""
        mode = "" if self.training else ", eval"
        return f"{self.shape_text} {self.dtype} {self.layout}, {self.activation}{residual}{mode}"


def configurations(
    sites: Iterable[Site],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    activations: Iterable[str],
    *,
    residual: bool = True,
    training: bool = True,
) -> Iterator[Configuration]:
    """All combinations, each once, sites innermost; ``residual=False`` leaves all residuals away.

    Where nothing follows the batch norm in the network, the activation is the identity, whichever is asked for.
    """
    for dtype, layout, activation in itertools.product(dtypes, layouts, activations):
        for site in sites:
            yield Configuration(
                site.shape, dtype, layout, activation if site.activated else "identity",
                site.residual and residual, training, site.count, activation,
            )  # fmt: skip
