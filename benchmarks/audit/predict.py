"""Predicted times: bytes over bandwidth, plus a price a launch, the same for vgkern, Inductor and eager PyTorch.

The model knows no cache: a tensor that the last kernel left in L2 counts as read from memory. That is fair to large
layers; of small ones it overstates every implementation's time, that of many passes the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import layers
from .targets import DEVICES, Device, seconds

DIRECTIONS = ("forward", "backward")


def eager(case: layers.Case) -> tuple[float, float]:
    """(launches, units) of PyTorch's operations, by their definitions; none is fused, each tensor goes through memory.

    Batch norm: x for the statistics, then x to y; backward dy and x for the sums, then dy and x to dx. Add: two tensors
    to one, and its backward hands dy on as it is. ReLU: one to one; its backward dy and y to dz.
    """
    relu, residual, norms = case.layer.activation == "relu", case.layer.residual, 1 + case.layer.projection
    if case.direction == "forward":
        return 2 * norms + residual + relu, 3 * norms + 3 * residual + 2 * relu
    return 2 * norms + relu, 5 * norms + 3 * relu


def unit(case: layers.Case) -> int:
    batch, channels, height, width = case.layer.shape
    return batch * channels * height * width * layers.DTYPES[case.dtype].itemsize


def vgkern(case: layers.Case) -> tuple[float, float]:
    launches = layers.launches_of(case, layers.tensors_of(case))
    return len(launches), sum(launch.bytes for launch in launches)


def times(which: layers.Selection, inductor: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each layer, dtype, format, direction and device: launches, units and seconds of each implementation."""
    found = {(r["layer"], r["dtype"], r["layout"], r["direction"]): (r["launches"], r["bytes"]) for r in inductor}
    rows = []
    for layer in which.layers:
        for dtype in which.dtypes:
            for layout in layers.FORMATS:
                for direction in DIRECTIONS:
                    case = layers.Case(layer, dtype, layout, direction)
                    launches, units = eager(case)
                    costs = {"eager": (launches, units * unit(case)), "vgkern": vgkern(case)}
                    # In float16 Inductor makes the kernels that it makes in bfloat16.
                    key = layer.label, {"float16": "bfloat16"}.get(dtype, dtype), layout, direction
                    if key in found:
                        costs["inductor"] = found[key]
                    for device in DEVICES:
                        rows.append(_row(case, device, costs))
    return rows


def _row(case: layers.Case, device: Device, costs: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": device.name, "net": case.layer.net, "layer": case.layer.label, "count": case.layer.count,
        "dtype": case.dtype, "layout": case.layout, "direction": case.direction,
    }  # fmt: skip
    for name in ("eager", "inductor", "vgkern"):
        launches, moved = costs.get(name, (None, None))
        known = launches is not None and moved is not None
        row |= {
            f"{name}_launches": launches, f"{name}_units": moved / unit(case) if known else None,
            f"{name}_us": seconds(device, launches, moved) * 1e6 if known else None,
        }  # fmt: skip
    return row


def totals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds of all batch norms of a net in a training step, by net, device, dtype and format."""
    sums: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["net"], row["device"], row["dtype"], row["layout"]
        total = sums.setdefault(key, dict(zip(("net", "device", "dtype", "layout"), key, strict=True)))
        for name in ("eager", "inductor", "vgkern"):
            value = row[f"{name}_us"]
            before = total.get(f"{name}_ms", 0.0)
            total[f"{name}_ms"] = None if value is None or before is None else before + value * row["count"] / 1e3
    return list(sums.values())
