"""What the audit holds against the kernels: the bars, and the reasons that may stand in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .targets import TARGETS

#: Kernels whose occupancy says nothing, or is the price of something worth more.
REASONS = {
    "backward_finish": "one program: it has a multiprocessor to itself",
    "norm_merge": "a few small programs, which wait for one another's latency and not for bandwidth",
    "forward_channel": "keeps the channel in registers, which saves a read of x",
    "backward_channel": "keeps the channel in registers, which saves a read of x and of dy",
}
#: The same for planes of an odd number of halves, whose loads are 2 bytes wide, less than an asynchronous copy moves.
ODD_REASONS = {
    "backward_reduce": "2 bytes a load, so no asynchronous copies, and the registers that float64 sums take",
    "double_backward_apply": "2 bytes a load, so no asynchronous copies, and the registers of two batch norms",
}
ODD_OCCUPANCY = 0.25  # which they must have

#: Kernels that read a tensor's first and last tile masked, element by element: their widest access is the usual one.
#: And one whose load of a factor, 8 bytes, has in machine code the line of a call that is handed the tensors too.
RAGGED = {"norm_partial", "gradient_scale", "input_gradient"}

TRAFFIC_TOLERANCE = 0.02
OCCUPANCY = 0.5
LAUNCHES = 2


def reason(row: Mapping[str, Any]) -> str:
    """Why a specialisation may have less than half of the warps; empty if there is none."""
    kernel = row["kernel"].removeprefix("double_")
    if kernel in REASONS:
        return REASONS[kernel]
    odd = row["aligned_bytes"] == 2 and row["occupancy"] >= ODD_OCCUPANCY
    for name in (row["kernel"], kernel):
        if odd and name in ODD_REASONS:
            return ODD_REASONS[name]
    needed = TARGETS[row["target"]].needed_in_flight
    if row["bytes_in_flight"] >= needed:
        return f"{row['bytes_in_flight'] / 1024:.0f} KB in flight, {needed / 1024:.0f} KB keep memory busy"
    return ""


def narrow(row: Mapping[str, Any]) -> bool:
    """Whether a load or store of a tensor is narrower than its alignment allows."""
    pick = max if row["kernel"] in RAGGED else min
    return any(pick(row[name]) < row["aligned_bytes"] for name in ("load_bytes", "store_bytes") if row[name])


def of_code(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        who = f"{row['target']} {row['kernel']} {row['dtype']} {row['layout']} {row['block']} ({row['users'][0]})"
        if row["spills"]:
            found.append(f"{who}: spills {row['spills']} times")
        if narrow(row):
            found.append(
                f"{who}: loads {row['load_bytes']} and stores {row['store_bytes']} bytes, "
                f"alignment allows {row['aligned_bytes']}"
            )
        if row["occupancy"] < OCCUPANCY and not reason(row):
            found.append(
                f"{who}: occupancy {row['occupancy']:.0%} by {row['limited_by']}, "
                f"{row['bytes_in_flight'] / 1024:.0f} KB in flight"
            )
    return found


def of_traffic(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        off = abs(row["counted_bytes"] - row["stated_bytes"])
        if off > TRAFFIC_TOLERANCE * row["stated_bytes"]:
            found.append(
                f"{row['kernel']} {row['dtype']} {row['layout']} {row['layer']}: states {row['stated_bytes']} bytes, "
                f"moves {row['counted_bytes']}"
            )
    return found


def of_launches(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({
        f"{row['layer']} {row['direction']}: {row['vgkern_launches']} launches"
        for row in rows
        if row["vgkern_launches"] > LAUNCHES
    })  # fmt: skip
