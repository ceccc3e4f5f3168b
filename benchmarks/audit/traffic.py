"""Run every kind of layer in Triton's interpreter and count the bytes that its kernels really load and store.

Run as a process of its own under TRITON_INTERPRET=1: ``python -m benchmarks.audit.traffic full|small``. Small tensors,
cut into blocks as a GPU's are. bfloat16 and float16, which are cut alike, are counted once for both.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from . import layers

#: Elements of the tensors, about: some tens of tiles.
ELEMENTS = 16000


def _small(layer: layers.Layer) -> layers.Layer:
    """The layer on fewer images and channels; where there are 16 or more channels, 16 are left."""
    _, channels, height, width = layer.shape
    channels = min(channels, 16)
    return replace(
        layer, net="", count=1, shape=(max(ELEMENTS // (channels * height * width), 1), channels, height, width)
    )


def floor_units(case: layers.Case) -> float:
    """The fewest units that the pass can move: every tensor once, and the mask where a residual makes one useful."""
    relu, residual = case.layer.activation == "relu", case.layer.residual
    mask = 1 / 8 / layers.DTYPES[case.dtype].itemsize if relu and residual else 0.0
    if case.direction == "backward":
        return 3.0 + residual + case.layer.projection + mask  # dy, x, dx; dresidual; residual
    if case.direction == "synchronised":
        return 3.0 + mask
    return 2.0 + residual + (mask if case.direction == "forward" else 0.0)


def count(which: layers.Selection) -> list[dict[str, Any]]:
    from vgkern.kernels import batch_norm, launching, tuning

    from .. import interpreter

    rows: list[dict[str, Any]] = []
    done: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for full in layers.cases(which):
        element = {4: "float32", 2: "half"}[layers.DTYPES[full.dtype].itemsize]
        for layout, size in (("planes", "small"), ("planes", "large"), ("rows", "small"), ("rows", "large")):
            tuning.TABLE[layout, "interpreted", size] = tuning.TABLE[layout, element, size]
        names = [launch.name for launch in layers.launches_of(full, layers.tensors_of(full))]
        case = replace(full, layer=_small(full.layer))
        key = (case, *names)
        if key in done:
            continue
        other = replace(case, dtype={"bfloat16": "float16", "float16": "bfloat16"}.get(case.dtype, case.dtype))
        if counted := done.get((other, *names)):  # of the same width, so cut into the same blocks
            done[key] = [{**row, "dtype": case.dtype} for row in counted]
            rows += done[key]
            continue
        if not any("channel" in name for name in names):  # few elements would fit a program where many do not
            for row, limits in tuning.TABLE.items():
                if row[1] == "interpreted":
                    tuning.TABLE[row] = replace(limits, resident=0)
        launches = layers.launches_of(case, layers.tensors_of(case, "cpu"))
        mine = done[key] = []
        for launch in launches:
            with interpreter.count_bytes() as traffic:
                launching.launch([launch], torch.device("cpu"))
            moved = traffic.bytes(names=launch.moved)
            mine.append({
                "kernel": launch.name.removesuffix("_kernel"), "dtype": case.dtype, "layout": case.layout,
                "layer": case.layer.label, "direction": case.direction, "units": batch_norm.units(launch),
                "stated_bytes": launch.bytes, "counted_bytes": moved, "other_bytes": traffic.bytes() - moved,
                "pass_units": sum(map(batch_norm.units, launches)), "floor_units": floor_units(case),
            })  # fmt: skip
        rows += mine
    return [*rows, *(row for dtype in which.dtypes for row in _gradient_rows(dtype))]


def _gradient_rows(dtype: str) -> list[dict[str, Any]]:
    from vgkern.kernels import launching

    from .. import interpreter

    tensors = [torch.randn(size).to(layers.DTYPES[dtype]) for size in (64, 64, 20000, 9001, 7)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    rows = []
    for launch in layers.gradient_launches(dtype, tensors):
        units = {"norm_partial_kernel": 1.0, "norm_merge_kernel": 0.0, "gradient_scale_kernel": 2.0}[launch.name]
        with interpreter.count_bytes() as traffic:
            launching.launch([launch], torch.device("cpu"))
        counted = traffic.bytes(names=[None])  # no argument: the table holds their addresses
        rows.append({
            "kernel": launch.name.removesuffix("_kernel"), "dtype": dtype, "layout": "list", "layer": "five gradients",
            "direction": "clip", "units": units, "stated_bytes": units * size, "counted_bytes": counted,
            "other_bytes": traffic.bytes() - counted, "pass_units": 3.0, "floor_units": 3.0,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    for row in count(layers.SELECTIONS[sys.argv[1]]):
        print(json.dumps(row), flush=True)
