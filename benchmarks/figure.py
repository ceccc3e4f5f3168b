"""The roofline: the bandwidth that each variant reaches against the bytes it must move, under what the memory gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .floor import Roof, floor_bytes
from .report import DIRECTIONS, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which the common kinds of colour blindness tell apart. In the order of the legend, vgkern on
# top of all others.
_LOOKS: dict[str, dict[str, Any]] = {
    "vgkern": {"label": "vgkern", "color": "#0072B2", "marker": "o", "zorder": 3},
    "eager": {"label": "eager", "color": "#D55E00", "marker": "s"},
    "eager_tcmalloc": {"label": "eager under tcmalloc", "color": "#E69F00", "marker": "^"},
    "compile": {"label": "torch.compile", "color": "#009E73", "marker": "D"},
}
_INK, _FAINT, _GRID = "#222222", "#6E6E6E", "#E8E8E8"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "text.color": _INK, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.titlesize": 11.5, "xtick.color": _FAINT, "ytick.color": _FAINT,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True,
}  # fmt: skip


def save(results: Sequence[Result], roof: Roof | None, caption: str, path: Path) -> None:
    """Draw into a PNG of 2000 × 960 pixels."""
    draw(results, roof, caption).savefig(path, dpi=160, facecolor="white")


def draw(results: Sequence[Result], roof: Roof | None, caption: str) -> Figure:
    """A panel for each direction; filled marks are contiguous tensors, hollow ones channels_last."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # A figure of its own, not pyplot's: no window system is asked for and no global state is left behind.
        figure = Figure(figsize=(12.5, 6.0))
        FigureCanvasAgg(figure)
        figure.text(0.02, 0.965, "Bandwidth reached by act(batch_norm(x) + residual)", fontsize=15, fontweight="bold",
                    va="top")  # fmt: skip
        figure.text(0.02, 0.895, caption, fontsize=9, color=_FAINT, va="top")
        first = None
        for place, direction in enumerate(DIRECTIONS):
            ax = figure.add_axes((0.07 + 0.48 * place, 0.19, 0.43, 0.6), sharex=first, sharey=first)
            _panel(ax, results, direction, roof)
            first = first or ax
        handles, labels = first.get_legend_handles_labels()
        # Under both panels, where no mark can be.
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    return figure


def _panel(ax: Axes, results: Sequence[Result], direction: str, roof: Roof | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = [floor_bytes(direction, result.configuration) for result in results]
    ax.set_title(direction)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    if roof:
        points = _between(roof, min(sizes) / 1.5, max(sizes) * 1.5)
        ax.plot(*zip(*points, strict=True), color=_INK, linewidth=1.5, label="memory: a = b + k·c, measured", zorder=2)
    for variant, look in _LOOKS.items():
        points = [
            (size, size / timing.median / 1e9, result.configuration.layout == "channels_last")
            for size, result in zip(sizes, results, strict=True)
            if (timing := result.timings[direction].get(variant))
        ]
        for hollow in (False, True):
            marks = [(x, y) for x, y, is_hollow in points if is_hollow == hollow]
            if marks:
                label = "_hollow" if hollow and len(marks) < len(points) else look["label"]
                face = {"facecolors": "white"} if hollow else {"linewidths": 0.6}
                edge = {"edgecolors": look["color"] if hollow else "white"}
                ax.scatter(
                    *zip(*marks, strict=True), **{"s": 42, "zorder": 2.5, **look, **face, **edge, "label": label}
                )
    ax.set_xlabel("bytes moved in one pass (filled: contiguous, hollow: channels_last)")
    ax.set_ylabel("those bytes / time, GB/s")
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=30))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _between(roof: Roof, low: float, high: float) -> list[tuple[float, float]]:
    """(bytes, GB/s) of the roof from ``low`` to ``high``, with its own points in between."""
    sizes = [low, *(size for size, _ in roof.points if low < size < high), high]
    return [(size, roof.at(int(size)) / 1e9) for size in sizes]


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
