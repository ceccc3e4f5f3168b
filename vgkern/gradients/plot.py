"""The figure of a monitor: norm and gain against depth, layer × step, and dead units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import DARK, LIGHT, Theme, decade_ticks, dotted, floor_of_zeros, panel_title, round_log_ticks, style
from .history import History, median, quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_side_by_side"]

_NAMED = 30  # layers up to which their names are written at the axis
_ROWS = 400  # steps and layers that a heat map can show


def draw(history: History, *, dark: bool = False, title: str = "") -> Figure:
    """Four panels.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: there is nothing to draw.
    """
    return draw_side_by_side({title: history}, dark=dark)


def draw_side_by_side(histories: dict[str, History], *, dark: bool = False) -> Figure:
    """Four panels for each history, under its title."""
    if not all(len(history.steps) and history.layers for history in histories.values()):
        raise ValueError("nothing was recorded yet, there is nothing to draw")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the figure needs matplotlib: pip install 'vgkern[monitor]'") from error
    theme = DARK if dark else LIGHT
    with matplotlib.rc_context(style(theme)):
        # A figure of its own, not pyplot's: no window system is asked for and no global state is left behind.
        figure = Figure(figsize=(10.0 * len(histories), 14.0), dpi=110)
        FigureCanvasAgg(figure)
        parts = figure.subfigures(1, len(histories), squeeze=False)[0]
        for part, (title, history) in zip(parts, histories.items(), strict=True):
            _draw(part, history, theme, title)
    return figure


def _draw(part: Any, history: History, theme: Theme, title: str) -> None:
    if title:
        part.text(0.09, 0.985, title, ha="left", va="top", fontsize=15, fontweight="bold")
    flow = history.has_flow()
    knows_dead = ~np.isnan(median(history.dead_fraction))
    panels = [_norm_panel, _heat_panel]
    if flow.any():
        panels.insert(1, _gain_panel)
    if knows_dead.any():
        panels.append(_dead_panel)
    heights = {_norm_panel: 1.25, _gain_panel: 0.8, _heat_panel: 1.1, _dead_panel: 0.6}
    # All panels share the axis of layers; the names stand below the last alone.
    grid = part.add_gridspec(
        len(panels), 1, left=0.09, right=0.92, bottom=_room_for_names(history), top=0.92 if title else 0.945,
        hspace=0.42, height_ratios=[heights[panel] for panel in panels],
    )  # fmt: skip
    axes: list[Axes] = []
    for i, panel in enumerate(panels):
        ax = part.add_subplot(grid[i], sharex=axes[0] if axes else None)
        panel(ax, history, theme)
        axes.append(ax)
    _name_layers(axes, history)


def _places(history: History) -> np.ndarray:
    return np.arange(1, len(history.layers) + 1)


def _norm_panel(ax: Axes, history: History, theme: Theme) -> None:
    panel_title(
        ax, "Gradient norm against depth",
        f"median of {len(history.steps)} step{'s' * (len(history.steps) > 1)}, log scale; bands and bars: "
        "10th to 90th percentile",
        theme,
    )  # fmt: skip
    series = (
        ("of the parameters", history.grad_norm, ~np.isnan(median(history.grad_norm)), theme.warning),
        ("that arrives", history.grad_output_norm, history.has_flow(), theme.accent),
    )
    quantiles = [[quantile(values, q)[shown] for q in (0.1, 0.5, 0.9)] for _, values, shown, _ in series]
    everything = np.concatenate([values for of_one in quantiles for values in of_one])
    # Zero has no place on a log scale: it is drawn as a hollow dot on a line of its own below all that is positive.
    floor = floor_of_zeros(everything.tolist())
    size = 2.2 if len(history.layers) > 2 * _NAMED else 4.0
    for (label, _, shown, colour), of_one in zip(series, quantiles, strict=True):
        if not shown.any():
            continue
        places = _places(history)[shown]
        low, middle, high = (np.maximum(values, floor) for values in of_one)
        if label == "that arrives":
            ax.fill_between(places, low, high, color=colour, alpha=0.22, linewidth=0)
            ax.plot(places, middle, color=colour, label=label)
        else:  # layers of several kinds by turns: a line would only zigzag
            ax.vlines(places, low, high, color=colour, alpha=0.45, linewidth=size / 2)
            ax.plot(places, middle, "o", markersize=size, color=colour, label=label)
        zeros = places[of_one[1] == 0]
        ax.plot(zeros, [floor] * len(zeros), "o", color=colour, markerfacecolor=theme.paper, markersize=4.5)
    if (everything == 0).any():
        ax.axhline(floor, **dotted(theme))
        ax.annotate(
            "hollow: exactly 0", (1, floor), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=theme.faint,
        )  # fmt: skip
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if not high > 2 * low:  # nothing but zeros, or one value
        ax.set_ylim(low / 2, high * 2)
    if high / low > 1e3:
        decade_ticks(ax)
    else:
        round_log_ticks(ax)
    ax.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2,
        labelcolor="linecolor",
    )  # fmt: skip


def _gain_panel(ax: Axes, history: History, theme: Theme) -> None:
    panel_title(ax, "Gain of each layer", "‖dx‖ / ‖dy‖, median, as bars from 1, log scale", theme)
    gain = median(history.gain)
    shown = np.isfinite(gain) & (gain > 0)
    places = _places(history)[shown]
    ax.set_yscale("log")
    ax.bar(
        places, gain[shown] - 1, bottom=1, width=0.8, linewidth=0,
        color=[theme.accent if value >= 1 else theme.warning for value in gain[shown]],
    )  # fmt: skip
    # The same distance to either side, so that what shrinks and what grows can be compared.
    reach = max(2.0, float(np.exp(np.abs(np.log(gain[shown])).max(initial=0.0)))) * 1.1
    ax.set_ylim(1 / reach, reach)
    _ticks_around_1(ax, reach)
    ax.axhline(1, color=theme.faint, linewidth=1.0)
    ax.grid(visible=False, axis="x")


def _ticks_around_1(ax: Axes, reach: float) -> None:
    """At most four powers of 2, 5, 10, 100, ... to either side."""
    from matplotlib.ticker import NullLocator

    base = next(base for base in (2, 5, 10, 100, 10**4, 10**8, 10**20, 10**80) if base**4.5 > reach or base == 10**80)
    count = int(np.log(reach) / np.log(base))
    powers = [float(base) ** power for power in range(-count, count + 1)]
    ax.set_yticks(powers, [f"{power:g}" for power in powers])
    ax.yaxis.set_minor_locator(NullLocator())


def _heat_panel(ax: Axes, history: History, theme: Theme) -> None:
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    flow = history.has_flow()
    of_all, known, what = (
        (history.grad_output_norm, np.flatnonzero(flow), "that arrives") if flow.any()
        else (history.grad_norm, np.flatnonzero(~np.isnan(median(history.grad_norm))), "of the parameters")
    )  # fmt: skip
    panel_title(
        ax, "Layer × step", f"norm of the gradient {what}, log scale; grey: exactly 0; crosses: inf or NaN", theme
    )
    rows = np.unique(np.linspace(0, len(of_all) - 1, min(len(of_all), _ROWS)).astype(int))
    steps, values = history.steps[rows], of_all[np.ix_(rows, known)]
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    if high / low < 10:
        low, high = low / 3, high * 3
    # Layers of which nothing is known leave no gap: the one before them is drawn wider.
    edges = np.concatenate([[0.5], known[1:] + 0.5, [len(history.layers) + 0.5]])
    ax.grid(visible=False)
    ax.pcolormesh(
        edges, _edges(steps), np.where(values == 0, 1.0, np.nan), cmap=ListedColormap([theme.faint]), rasterized=True
    )
    drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    mesh = ax.pcolormesh(edges, _edges(steps), drawn, norm=LogNorm(low, high), cmap="viridis", rasterized=True)
    bad_rows, bad_columns = np.nonzero(~np.isfinite(values))
    centres = (edges[:-1] + edges[1:]) / 2
    ax.plot(centres[bad_columns], steps[bad_rows], "x", color=theme.warning, markersize=4, linewidth=0)
    ax.set_ylabel("step")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    # Beside the axes and not out of their width: the layers of all panels stand below each other.
    bar = ax.figure.colorbar(mesh, cax=ax.inset_axes((1.012, 0, 0.014, 1)))
    bar.outline.set_visible(False)
    if high / low > 1e3:
        bar.ax.minorticks_off()
    else:
        round_log_ticks(bar.ax)
    bar.ax.tick_params(labelsize=8.5)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around these centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _dead_panel(ax: Axes, history: History, theme: Theme) -> None:
    panel_title(ax, "Dead units", "share of elements with φ'(z) = 0, median in %; dotted: half, usual for ReLU", theme)
    dead = 100 * median(history.dead_fraction)
    shown = np.isfinite(dead)
    colours = [theme.warning if value >= 90 else theme.accent for value in dead[shown]]
    ax.bar(_places(history)[shown], dead[shown], width=0.8, linewidth=0, color=colours)
    ax.axhline(50, **dotted(theme))
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 50, 100])
    ax.grid(visible=False, axis="x")


def _room_for_names(history: History) -> float:
    if len(history.layers) > _NAMED:
        return 0.055
    longest = max(len(_label(layer.name)) for layer in history.layers)
    return 0.045 + 0.0055 * longest


def _label(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"


def _name_layers(axes: list[Axes], history: History) -> None:
    count = len(history.layers)
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    last = axes[-1]
    last.set_xlim(0.4, count + 0.6)
    if count <= _NAMED:
        names = [_label(layer.name) for layer in history.layers]
        last.set_xticks(_places(history), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8.5)
    else:
        step = next(step for step in (5, 10, 20, 50, 100, 200, 500, 1000, 2000) if count / step <= 12)
        last.set_xticks([1, *range(step, count - step // 2, step), count])
    last.set_xlabel("layer, from the input to the output")
