"""The figure, drawn from a :class:`DemoResult` and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figures import (
    BLUE,
    GREEN,
    LIGHT,
    ORANGE,
    PINK,
    decade_ticks,
    dotted,
    floor_of_zeros,
    panel_title,
    round_log_ticks,
    style,
)
from ..text import figures, first_epochs, percent
from .conclusion import headline
from .results import DemoResult, NetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save"]

# The dashes are for grey prints, and let through what lies underneath.
_LOOKS: dict[str, dict[str, Any]] = {
    "sigmoid": {"color": ORANGE},
    "relu": {"color": PINK, "dashes": (4, 1.5)},
    "batch_norm": {"color": BLUE, "dashes": (8, 1.2)},
    "residual": {"color": GREEN},
}
_SHORT_LABELS = {"sigmoid": "sigmoid", "relu": "ReLU", "batch_norm": "batch norm", "residual": "+ residual"}
_LABEL_SIZE = 9.5
_FAINT = LIGHT.faint
_DOTTED = dotted(LIGHT)


def save(result: DemoResult, path: Path) -> None:
    """Draw ``result`` into a PNG of 2000 × 1440 pixels."""
    draw(result).savefig(path, dpi=160, facecolor="white")


def draw(result: DemoResult) -> Figure:
    """Four panels: gradient norm against depth, gain against depth, training loss and test accuracy over epochs.

    Raises:
        ValueError: no net was trained.
    """
    if not result.nets:
        raise ValueError("result: no net was trained, there is nothing to draw")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(LIGHT)):
        # A figure of its own, not pyplot's: no window system is asked for and no global state is left behind.
        figure = Figure(figsize=(12.5, 9.0))
        FigureCanvasAgg(figure)
        figure.text(0.02, 0.975, headline(result), ha="left", va="top", fontsize=15, fontweight="bold")
        figure.text(0.02, 0.934, _subtitle(result), ha="left", va="top", fontsize=10, color=_FAINT)
        above = figure.add_gridspec(1, 1, left=0.06, right=0.985, bottom=0.47, top=0.84)
        below = figure.add_gridspec(1, 3, left=0.06, right=0.87, bottom=0.07, top=0.33, wspace=0.6)
        _gradient_panel(figure.add_subplot(above[0]), result)
        _gain_panel(figure.add_subplot(below[0]), result)
        _loss_panel(figure.add_subplot(below[1]), result)
        _accuracy_panel(figure.add_subplot(below[2]), result)
    return figure


def _subtitle(result: DemoResult) -> str:
    config = result.config
    text = (
        f"Four nets of {config.depth} weight layers on {result.train_images + result.test_images:,} handwritten digits "
        f"of 8×8 pixels, one optimiser for all: SGD, learning rate {config.learning_rate:g}, "
        f"batches of {config.batch_size}, {config.epochs} epoch{'s' * (config.epochs > 1)}, seed {config.seed}"
    )
    return text + (". Interrupted." if result.interrupted else ".")


def _gradient_panel(ax: Axes, result: DemoResult) -> None:
    panel_title(
        ax, "Gradient norm against depth",
        "L2 norm of the gradient of each layer's weight, on a log scale: median over the steps of "
        f"{first_epochs(result.early_epochs)}; band: 10th to 90th percentile",
    )  # fmt: skip
    depth, layers = result.config.depth, range(1, result.config.depth + 1)
    quantiles = [[net.early(name) for name in ("grad_norm_low", "grad_norm", "grad_norm_high")] for net in result.nets]
    # Zero has no place on a log scale: it is drawn as a hollow dot on a line of its own below all that is positive.
    floor = floor_of_zeros([v for of_net in quantiles for values in of_net for v in values])
    has_zero = any(v == 0 for _, median, _ in quantiles for v in median)
    for net, of_net in zip(result.nets, quantiles, strict=True):
        low, median, high = ([max(v, floor) if math.isfinite(v) else math.nan for v in values] for values in of_net)
        look = _LOOKS[net.key]
        ax.fill_between(layers, low, high, color=look["color"], alpha=0.16, linewidth=0)
        ax.plot(layers, median, label=net.label, **look)
        zeros = [layer for layer, v in zip(layers, of_net[1], strict=True) if v == 0]
        ax.plot(zeros, [floor] * len(zeros), "o", color=look["color"], markerfacecolor="white", markersize=4.5)
    ax.set_yscale("log")
    decade_ticks(ax)
    if has_zero:
        ax.plot([1, depth], [floor, floor], label="_zero", **_DOTTED)
        ax.annotate(
            "hollow: exactly 0, less than float32 can hold", (depth, floor), xytext=(0, 5),
            textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=_FAINT,
        )  # fmt: skip
    ax.set_xlim(1 - 0.25 * depth, 1.01 * depth)  # room for the labels left of the first layer
    step = next(step for step in (2, 5, 10, 20, 50, 100) if depth / step <= 12 or step == 100)
    ax.set_xticks([1, *range(step, depth - step // 2, step), depth])
    ax.set_xlabel("weight layer, from the input (1) to the output")
    _label_lines(
        ax, [(1, max(net.first_norm, floor)) for net in result.nets],
        [f"{net.label}:  {figures(net.first_norm)}" for net in result.nets], result.nets, side="left",
    )  # fmt: skip


def _gain_panel(ax: Axes, result: DemoResult) -> None:
    panel_title(ax, "Gain of each activation layer", "‖dx‖ / ‖dy‖ in grad_stats(), convolutions excluded")
    ends: list[tuple[float, float] | None] = []
    for net in result.nets:
        # Without a gradient there is no gain to draw.
        gain, look = [v if v > 0 else math.nan for v in net.early("gain")], _LOOKS[net.key]
        layers = range(1, len(gain) + 1)
        if net.residual:
            # Two kinds of layer by turns: a line would only zigzag. At the sum, the shortcut carries the rest.
            ax.plot(layers[1::2], gain[1::2], "o", markersize=2.8, color=look["color"], label=net.label)
            ax.plot(layers[::2], gain[::2], "o", markersize=3.2, markerfacecolor="white", color=look["color"],
                    label="_at the sums")  # fmt: skip
        else:
            ax.plot(layers, gain, linewidth=1.6, label=net.label, **look)
        inside = gain[1::2] if net.residual else gain
        points = [
            (layer, v) for layer, v in zip(layers[1::2] if net.residual else layers, inside, strict=True) if v > 0
        ]
        ends.append((len(gain), points[-1][1]) if points else None)
    ax.set_yscale("log")
    round_log_ticks(ax)
    ax.axhline(1, **_DOTTED)
    ax.set_xlim(0, result.config.depth)
    ax.set_xlabel("activation layer" + ("  (hollow: at a sum)" if any(net.residual for net in result.nets) else ""))
    _label_ends(ax, result, ends, [_SHORT_LABELS[net.key] for net in result.nets])


def _loss_panel(ax: Axes, result: DemoResult) -> None:
    panel_title(ax, "Training loss", "cross-entropy, log scale; dotted: guessing")
    ends = _curves(ax, result, lambda net: [epoch.train_loss for epoch in net.epochs])
    ax.set_yscale("log")
    round_log_ticks(ax)
    ax.axhline(math.log(10), **_DOTTED)
    _label_ends(ax, result, ends, [_SHORT_LABELS[net.key] for net in result.nets])


def _accuracy_panel(ax: Axes, result: DemoResult) -> None:
    panel_title(ax, "Test accuracy", f"% of {result.test_images} unseen digits; dotted: guessing")
    ends = _curves(ax, result, lambda net: [100 * epoch.test_accuracy for epoch in net.epochs])
    ax.set_ylim(0, 101)
    ax.axhline(10, **_DOTTED)
    labels = [f"{_SHORT_LABELS[net.key]} {percent(net.accuracy)}" for net in result.nets]
    _label_ends(ax, result, ends, labels)


def _curves(
    ax: Axes, result: DemoResult, of: Callable[[NetResult], Sequence[float]]
) -> list[tuple[float, float] | None]:
    """Draw one curve a net over the epochs; returns their ends, None where one has no finite value."""
    from matplotlib.ticker import MaxNLocator

    longest = max(len(net.epochs) for net in result.nets)
    ends: list[tuple[float, float] | None] = []
    for net in result.nets:
        values = of(net)
        ax.plot(range(1, len(values) + 1), values, label=net.label, **_LOOKS[net.key],
                marker="o" if len(values) == 1 else "")  # fmt: skip
        finite = [(float(longest), v) for v in values if math.isfinite(v)]
        ends.append(finite[-1] if finite else None)
    ax.set_xlim(1 - 0.04 * longest, max(2, longest) * 1.01)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    return ends


def _label_ends(ax: Axes, result: DemoResult, ends: list[tuple[float, float] | None], labels: list[str]) -> None:
    """Label the curves at their right ends, outside the axes; a curve without an end has none."""
    shown = [(end, label, net) for end, label, net in zip(ends, labels, result.nets, strict=True) if end is not None]
    if shown:
        points, texts, nets = zip(*shown, strict=True)
        edge = ax.get_xlim()[1]
        _label_lines(ax, [(edge, y) for _, y in points], texts, nets, side="right")


def _label_lines(
    ax: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], nets: Sequence[NetResult], *, side: str
) -> None:
    """Write each text beside its point in its net's colour, moved up or down so that none covers another."""
    ax.autoscale_view()
    pixels_per_point = ax.figure.dpi / 72
    gap = 1.45 * _LABEL_SIZE * pixels_per_point
    wanted = [ax.transData.transform(point)[1] for point in points]
    placed = _spread(wanted, gap, ax.bbox.y0 + gap / 3, ax.bbox.y1)
    for point, y, pixel, text, net in zip(points, wanted, placed, texts, nets, strict=True):
        colour = _LOOKS[net.key]["color"]
        ax.annotate(
            text, point, xytext=(-10 if side == "left" else 10, (pixel - y) / pixels_per_point),
            textcoords="offset points", ha="right" if side == "left" else "left", va="center", color=colour,
            fontsize=_LABEL_SIZE, fontweight="bold", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0,
                "relpos": (1, 0.5) if side == "left" else (0, 0.5),
            },
        )  # fmt: skip


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in the same order and at least ``gap`` apart, within the limits if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for _ in range(200):  # neighbours that are too close give way by half each
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 0:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
        placed[0], placed[-1] = max(placed[0], low), min(placed[-1], high)
    for i in reversed(range(len(placed) - 1)):  # what the limits have pushed back
        placed[i] = min(placed[i], placed[i + 1] - gap)
    positions = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        positions[i] = position
    return positions
