"""What the figures share: colours, light and dark, ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE", "DARK", "GREEN", "LIGHT", "ORANGE", "PINK", "SKY", "Theme", "decade_ticks", "dotted", "floor_of_zeros",
    "panel_title", "round_log_ticks", "style",
]  # fmt: skip

# Okabe & Ito's colours, which the common kinds of colour blindness tell apart.
ORANGE, PINK, BLUE, GREEN, SKY = "#D55E00", "#CC79A7", "#0072B2", "#009E73", "#56B4E9"


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink; ``accent`` and ``warning`` are those of Okabe & Ito that read best on that paper."""

    paper: str
    ink: str
    faint: str
    grid: str
    accent: str
    warning: str


LIGHT = Theme("white", "#222222", "#6E6E6E", "#E8E8E8", BLUE, ORANGE)
DARK = Theme("#15181C", "#E8E8E8", "#A2A7AD", "#2C3137", SKY, "#E69F00")


def style(theme: Theme) -> dict[Any, Any]:
    """matplotlib's settings."""
    return {
        "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": theme.faint, "axes.labelcolor": theme.ink, "axes.titlesize": 11.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": theme.ink, "axes.titlepad": 22.0,
        "text.color": theme.ink, "xtick.color": theme.faint, "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink, "ytick.labelcolor": theme.ink, "axes.grid": True, "grid.color": theme.grid,
        "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 2.0, "lines.dash_capstyle": "butt",
        "ytick.minor.size": 0, "ytick.minor.width": 0, "axes.facecolor": theme.paper, "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
    }  # fmt: skip


def dotted(theme: Theme) -> dict[str, Any]:
    """The look of a line that only marks a place."""
    return {"color": theme.faint, "linewidth": 1.0, "dashes": (1, 2), "zorder": 0.9}


def panel_title(ax: Axes, title: str, explanation: str, theme: Theme = LIGHT) -> None:
    """A title with a fainter line of explanation below it."""
    ax.set_title(title)
    ax.annotate(explanation, (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points",
                ha="left", va="bottom", fontsize=8.5, color=theme.faint)  # fmt: skip


def floor_of_zeros(values: Iterable[float]) -> float:
    """Where zeros are drawn: a good tenth of the range below the smallest positive value."""
    positive = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    return 10 ** (low - max(0.5, 0.12 * (high - low)))


def decade_ticks(ax: Axes) -> None:
    """Ticks at every power of ten, or at every second, fifth, ... of them, so that there are at most nine."""
    low, high = (math.log10(max(limit, 1e-300)) for limit in ax.get_ylim())
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if (high - low) / step <= 9)
    ax.set_yticks([10.0**power for power in range(math.ceil(low / step) * step, math.floor(high) + 1, step)])


def round_log_ticks(ax: Axes) -> None:
    """Ticks at 1, 2.5, 5 times powers of ten, or at powers of ten alone where the range is wide; in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2.5, 5) if high / low < 200 else (1,), numticks=12))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1e-4 else f"{value:.0e}"))
