"""The audit's tables on the console, in CSV files, and as one HTML page with its figures inside."""

from __future__ import annotations

import csv
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from . import findings
from .targets import BANDWIDTH_REACHED, DEVICES, LAUNCH_SECONDS, MEMORY_LATENCY

Rows = Sequence[Mapping[str, Any]]

IMPLEMENTATIONS = {"eager": "#8C8C8C", "inductor": "#E69F00", "vgkern": "#0072B2"}
NAMES = {"eager": "PyTorch eager", "inductor": "torch.compile", "vgkern": "vgkern"}


def _span(values: Sequence[float], form: str = "{:g}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def code_summary(rows: Rows) -> list[list[str]]:
    """One line for each kernel and target: the range over its specialisations."""
    lines = []
    key = lambda row: (row["kernel"], row["target"])  # noqa: E731
    for (kernel, target), group in itertools.groupby(sorted(rows, key=key), key):
        many = list(group)
        low = [row for row in many if row["occupancy"] < findings.OCCUPANCY]
        reasons = sorted({findings.reason(row) or "none" for row in low}, key=len)
        widths = sorted({width for row in many for width in row["load_bytes"] + row["store_bytes"]}, reverse=True)
        lines.append([
            kernel, target, str(len(many)), _span([row["registers"] for row in many]),
            str(sum(row["spills"] for row in many)), _span([row["shared"] / 1024 for row in many], "{:.3g}"),
            _span([100 * row["occupancy"] for row in many], "{:.0f}"),
            ", ".join(map(str, widths)) or "-", str(sum(map(findings.narrow, many))),
            _span([row["loads_in_flight"] for row in many]), reasons[0] if reasons else "",
        ])  # fmt: skip
    return lines


CODE_COLUMNS = [
    "kernel", "target", "specialisations", "registers", "spills", "shared KB", "occupancy %", "bytes a thread",
    "narrow", "loads in flight", "reason where below half",
]  # fmt: skip


def traffic_summary(rows: Rows) -> list[list[str]]:
    lines = []
    key = lambda row: (row["kernel"], row["direction"], row["layout"], row["dtype"])  # noqa: E731
    for names, group in itertools.groupby(sorted(rows, key=key), key):
        many = list(group)
        ratios = [row["counted_bytes"] / row["stated_bytes"] for row in many if row["stated_bytes"]]
        lines.append([
            *names, _span([row["units"] for row in many], "{:.4g}"),
            _span(ratios, "{:.4f}") if ratios else "no tensor", _span([row["pass_units"] for row in many], "{:.4g}"),
            _span([row["floor_units"] for row in many], "{:.4g}"),
        ])  # fmt: skip
    return lines


TRAFFIC_COLUMNS = [
    "kernel",
    "pass",
    "format",
    "dtype",
    "units stated",
    "counted / stated",
    "units of the pass",
    "floor",
]


def time_summary(totals: Rows) -> list[list[str]]:
    lines = []
    for row in totals:
        ours = row["vgkern_ms"]
        lines.append([
            row["net"], row["device"], row["dtype"], row["layout"],
            *("-" if row[f"{name}_ms"] is None else f"{row[f'{name}_ms']:.3f}" for name in IMPLEMENTATIONS),
            *("-" if row[name] is None else f"{row[name] / ours:.2f}" for name in ("eager_ms", "inductor_ms")),
        ])  # fmt: skip
    return lines


TIME_COLUMNS = ["net", "device", "dtype", "format", "eager ms", "inductor ms", "vgkern ms", "eager / vgkern",
                "inductor / vgkern"]  # fmt: skip

CODE_CAPTION = (
    "Machine code of every specialisation. Occupancy: resident warps by the architecture's limits. Bytes a thread: "
    "widths of all loads and stores of tensors; narrow: specialisations with one narrower than its alignment allows. "
    "Loads in flight: before the first result is used. The bytes that keep memory busy assume a latency of "
    f"{MEMORY_LATENCY * 1e9:.0f} ns."
)
TRAFFIC_CAPTION = (
    "Bytes that the kernels loaded and stored in Triton's interpreter, against what they state. One unit is one read "
    "or write of a tensor of x's size; the floor is every tensor once."
)
TIME_CAPTION = (
    "Predicted, not measured: all batch norms of a net, forward and backward, in one training step. "
    f"{LAUNCH_SECONDS * 1e6:.0f} µs a launch, {BANDWIDTH_REACHED:.0%} of the data sheet's bandwidth, no cache."
)


def print_tables(console: Console, code: Rows, traffic: Rows, totals: Rows) -> None:
    for caption, columns, lines in _tables(code, traffic, totals):
        table = Table(*columns, caption=caption, box=rich.box.SIMPLE_HEAD, caption_justify="left")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def _tables(code: Rows, traffic: Rows, totals: Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    return [
        (CODE_CAPTION, CODE_COLUMNS, code_summary(code)),
        (TRAFFIC_CAPTION, TRAFFIC_COLUMNS, traffic_summary(traffic)),
        (TIME_CAPTION, TIME_COLUMNS, time_summary(totals)),
    ]


def write_csv(path: Path, rows: Rows) -> None:
    """A file of all rows; a list becomes its elements with spaces between."""
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({
                name: " ".join(map(str, value)) if isinstance(value, list) and name != "users"
                else "; ".join(value) if isinstance(value, list) else value
                for name, value in row.items()
            })  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _time_figure(totals: Rows, net: str) -> str:
    """Bars of the predicted times: a panel for each dtype, the two formats side by side in it."""
    from matplotlib.figure import Figure

    rows = [row for row in totals if row["net"] == net]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    figure = Figure(figsize=(11, 3.0 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(layouts), sharex=True, squeeze=False)
    for (i, dtype), (j, layout) in itertools.product(enumerate(dtypes), enumerate(layouts)):
        axes = panels[i][j]
        chosen = {row["device"]: row for row in rows if row["dtype"] == dtype and row["layout"] == layout}
        for k, (name, colour) in enumerate(IMPLEMENTATIONS.items()):
            values = [chosen[device.name][f"{name}_ms"] or 0.0 for device in DEVICES]
            places = [n + (k - 1) * 0.27 for n in range(len(values))]
            bars = axes.bar(places, values, 0.25, color=colour, label=NAMES[name])
            axes.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=7.5, padding=1)
        axes.set_xticks(range(len(DEVICES)), [device.name for device in DEVICES])
        axes.set_title(f"{dtype}, {layout}", loc="left", fontsize=10)
        axes.set_ylabel("ms a step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    panels[0][0].legend(frameon=False, fontsize=9)
    return _svg(figure)


def _units_figure(times: Rows) -> str:
    """Units that a pass moves, averaged over the layers of a net as often as they occur."""
    from matplotlib.figure import Figure

    rows = [row for row in times if row["device"] == DEVICES[0].name]
    groups = list(dict.fromkeys((row["net"], row["layout"], row["direction"]) for row in rows))
    figure = Figure(figsize=(11, 0.62 * len(groups) + 1), layout="constrained")
    axes = figure.subplots()
    for k, (name, colour) in enumerate(IMPLEMENTATIONS.items()):
        values = []
        for group in groups:
            chosen = [r for r in rows if (r["net"], r["layout"], r["direction"]) == group and r[f"{name}_units"]]
            weight = sum(r["count"] for r in chosen)
            values.append(sum(r[f"{name}_units"] * r["count"] for r in chosen) / weight if weight else 0.0)
        bars = axes.barh(
            [n + (k - 1) * 0.27 for n in range(len(groups))], values, 0.25, color=colour, label=NAMES[name]
        )
        axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], fontsize=7.5, padding=2)
    axes.set_yticks(
        range(len(groups)), [f"{net}\n{layout}, {direction}" for net, layout, direction in groups], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("units: reads and writes of a tensor of x's size, a layer, on average")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=len(IMPLEMENTATIONS))
    return _svg(figure)


def _occupancy_figure(code: Rows) -> str:
    """Every specialisation: registers across, occupancy up; one panel a target."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(row["target"] for row in code))
    kernels = sorted({row["kernel"] for row in code})
    single = sorted({kernel.removeprefix("double_") for kernel in kernels})  # a double has its colour and a square
    colours = [
        "#0072B2",
        "#E69F00",
        "#009E73",
        "#D55E00",
        "#CC79A7",
        "#56B4E9",
        "#8C8C8C",
        "#F0E442",
        "#000000",
        "#7A5195",
    ]
    rows = -(-len(targets) // 2)
    figure = Figure(figsize=(11, 2.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, min(len(targets), 2), sharex=True, sharey=True, squeeze=False).ravel()
    for axes, target in zip(panels, targets, strict=False):
        for kernel in kernels:
            chosen = [row for row in code if row["target"] == target and row["kernel"] == kernel]
            if chosen:
                axes.scatter(
                    [row["registers"] for row in chosen], [100 * row["occupancy"] for row in chosen],
                    s=16, color=colours[single.index(kernel.removeprefix("double_")) % len(colours)], alpha=0.7,
                    label=kernel, marker="s" if kernel.startswith("double_") else "o",
                )  # fmt: skip
        axes.axhline(100 * findings.OCCUPANCY, color="#8C8C8C", linewidth=1, linestyle=":")
        axes.set_title(target, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("registers a thread", fontsize=10)
    figure.supylabel("occupancy, %", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8.5, loc="outside upper center", ncols=5)
    return _svg(figure)


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1160px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 80ch; } .scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
td:last-child { white-space: normal; } th { border-bottom: 1px solid #888; }
.bad { color: #b00020; } .good { color: #00703c; }
"""


def write_html(
    path: Path, code: Rows, traffic: Rows, times: Rows, totals: Rows, found: Sequence[str], notes: str
) -> None:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>vgkern: audit of the GPU kernels</title>",
        f"<style>{_STYLE}</style><h1>Audit of the GPU kernels</h1><p>{html.escape(notes)}</p>",
    ]
    if found:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in found)
        parts.append(f"<h2 class='bad'>{len(found)} findings</h2><ul>{items}</ul>")
    else:
        parts.append("<p class='good'>No findings.</p>")
    figures = {
        CODE_CAPTION: [_occupancy_figure(code)],
        TRAFFIC_CAPTION: [_units_figure(times)],
        TIME_CAPTION: [_time_figure(totals, net) for net in dict.fromkeys(row["net"] for row in totals)],
    }
    titles = {CODE_CAPTION: "Machine code", TRAFFIC_CAPTION: "Memory traffic", TIME_CAPTION: "Predicted times"}
    for caption, columns, lines in _tables(code, traffic, totals):
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        parts.append(f"<h2>{titles[caption]}</h2><p>{html.escape(caption)}</p>")
        parts.extend(figures[caption])
        parts.append(f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
    path.write_text("\n".join(parts) + "</html>\n")
