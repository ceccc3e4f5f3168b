"""The layers whose kernels are audited, and the launches that they make. Meta tensors: no GPU, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    """``count`` layers of a net that are alike: ``act(batch_norm(x) + residual)`` on x of ``shape``.

    ``projection``: the residual has a batch norm too, so that it is two of the net's.
    """

    net: str
    shape: tuple[int, int, int, int]
    activation: str
    residual: bool
    count: int
    projection: bool = False

    @property
    def label(self) -> str:
        residual = " + batch norm" if self.projection else " + residual" if self.residual else ""
        return f"{'x'.join(map(str, self.shape))} {self.activation}{residual}"


def resnet50(batch: int) -> list[Layer]:
    """The 53 batch norms of a ResNet-50 on 224 × 224 (He et al., arXiv 1512.03385), strides in 3 × 3 convolutions.

    A projection's is part of the layer in which its block ends, as ``vgkern.fuse`` has it: 49 layers.
    """
    counts: dict[tuple[int, int, bool, bool], int] = {(64, 112, False, False): 1}

    def add(channels: int, size: int, residual: bool = False, projection: bool = False) -> None:
        key = channels, size, residual, projection
        counts[key] = counts.get(key, 0) + 1

    size = 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            add(width, size)
            size = {64: 56, 128: 28, 256: 14, 512: 7}[width]
            add(width, size)
            add(4 * width, size, residual=True, projection=block == 0)
    name = f"resnet50, batch {batch}"
    return [
        Layer(name, (batch, c, s, s), "relu", residual, n, double) for (c, s, residual, double), n in counts.items()
    ]


def cifar_resnet(batch: int, depth: int = 56) -> list[Layer]:
    """The batch norms of a CIFAR ResNet of depth 6n + 2 without projections (the same paper, section 4.2)."""
    n = (depth - 2) // 6
    name = f"cifar resnet{depth}, batch {batch}"
    layers = []
    for width, size in ((16, 32), (32, 16), (64, 8)):
        stem = 1 if width == 16 else 0
        layers.append(Layer(name, (batch, width, size, size), "relu", False, n + stem))
        layers.append(Layer(name, (batch, width, size, size), "relu", True, n))
    return layers


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the sizes of a ResNet-50's 161 gradients, as meta tensors."""
    sizes: list[tuple[int, ...]] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        sizes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(channels, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(channels, 4 * width, 1)
            channels = 4 * width
    sizes += [(1000, 2048), (1000,)]
    return [torch.empty(size, dtype=dtype, device="meta") for size in sizes]


class Selection(NamedTuple):
    """What is audited: these layers in these dtypes."""

    layers: list[Layer]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "backward", "eval")


#: Every kind of pass; "synchronised": dx over statistics that processes share.
DIRECTIONS = ("forward", "backward", "eval", "synchronised")

SELECTIONS = {
    # Channels that are walked in many programs, and channels that fit one.
    "full": Selection([*resnet50(256), *cifar_resnet(128)], tuple(DTYPES)),
    # As few as reach every kernel; for tests.
    "small": Selection(
        [
            Layer("small", (256, 64, 56, 56), "relu", True, 1),
            Layer("small", (32, 2048, 7, 7), "relu", True, 1),
            Layer("small", (256, 256, 56, 56), "relu", True, 1, projection=True),
            Layer("small", (16, 2048, 7, 7), "relu", True, 1, projection=True),
        ],
        ("bfloat16",),
        DIRECTIONS,
    ),
}


@dataclass(frozen=True)
class Case:
    """One pass of a layer in one dtype and memory format."""

    layer: Layer
    dtype: str
    layout: str
    direction: str  # one of DIRECTIONS


def cases(selection: Selection) -> Iterator[Case]:
    for layer in selection.layers:
        for dtype in selection.dtypes:
            for layout in FORMATS:
                for direction in selection.directions:
                    if not (layer.projection and direction == "synchronised"):  # processes share one batch norm's
                        yield Case(layer, dtype, layout, direction)


def tensors_of(case: Case, device: str = "meta", shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """x, residual, dy, weight, bias and running statistics: float32 parameters, as autocast leaves them.

    With a projection also residual_weight and so on.
    """
    dtype = DTYPES[case.dtype]
    shape = shape or case.layer.shape

    def like_x() -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        x = x.contiguous(memory_format=FORMATS[case.layout])
        return x if device == "meta" else x.copy_(torch.randn(shape))

    def channels() -> Tensor:
        return torch.ones(shape[1], device=device)

    norms = ("", "residual_") if case.layer.projection else ("",)
    return {
        "x": like_x(), "residual": like_x() if case.layer.residual else None, "dy": like_x(),
        **{f"{norm}{name}": channels() for norm in norms for name in ("weight", "bias", "running_mean", "running_var")},
    }  # fmt: skip


def launches_of(case: Case, tensors: dict[str, Any]) -> list[Any]:
    """The launches of a pass, forward before backward being run if the tensors are real."""
    from vgkern.kernels import launching

    from vgkern.backends import triton as backend

    layer, t = case.layer, tensors
    if layer.projection:
        return _projection_launches(case, tensors)
    training = case.direction != "eval"
    running = (None, None) if training else (t["running_mean"], t["running_var"])
    (_, statistics, mask), forward = backend.forward_launches(
        t["x"], t["residual"], t["weight"], t["bias"], *running, None, training, 1e-5, layer.activation, [], training
    )
    if case.direction in ("forward", "eval"):
        return forward
    if t["x"].device.type != "meta":
        launching.launch(forward, t["x"].device)
    if case.direction == "synchronised":
        means, factor = (t["x"].new_zeros(size, dtype=torch.float64) for size in ((2, t["x"].shape[1]), (1,)))
        return backend.input_gradient_launches(
            t["dy"], t["x"], None, mask if mask.numel() else None, statistics, t["weight"], t["bias"], None,
            layer.activation, [], means, factor + 1,
        )[1]  # fmt: skip
    _, backward = backend.backward_launches(
        t["dy"], t["x"], None, mask if mask.numel() else None, statistics, t["weight"], t["bias"], None,
        True, 1e-5, layer.activation, [], 0.0, float("inf"), (True, layer.residual, True, True, False, True),
    )  # fmt: skip
    return backward


def _projection_launches(case: Case, tensors: dict[str, Any]) -> list[Any]:
    """As ``launches_of``, of a layer whose residual has a batch norm of its own."""
    from vgkern.kernels import launching

    from vgkern.backends import triton as backend

    layer, t = case.layer, tensors
    training = case.direction != "eval"

    def norm(prefix: str) -> list[Any]:
        running = (None, None) if training else (t[f"{prefix}running_mean"], t[f"{prefix}running_var"])
        return [t[f"{prefix}weight"], t[f"{prefix}bias"], *running]

    (_, statistics, mask), forward = backend.double_forward_launches(
        t["x"], t["residual"], *norm(""), *norm("residual_"), None, training, 1e-5, 1e-5, layer.activation, [], training
    )
    if case.direction != "backward":
        return forward
    if t["x"].device.type != "meta":
        launching.launch(forward, t["x"].device)
    wanted = (True,) * 6 + (False, True, True)  # all but the gradient of a slope; two records
    return backend.double_backward_launches(
        t["dy"], t["x"], t["residual"], mask if mask.numel() else None, statistics, *norm("")[:2],
        *norm("residual_")[:2], None, True, 1e-5, 1e-5, layer.activation, [], wanted,
    )[1]  # fmt: skip


def gradient_launches(dtype: str, tensors: list[Tensor] | None = None) -> list[Any]:
    """The launches of the norms of a ResNet-50's gradients, and of scaling them."""
    from vgkern.kernels import gradient_norm

    tensors = tensors or gradients(DTYPES[dtype])
    (_, _, factor), launches = gradient_norm.norm_launches(tensors, 2.0, 1.0)
    return [*launches, *gradient_norm.scale_launches(tensors, factor)]
