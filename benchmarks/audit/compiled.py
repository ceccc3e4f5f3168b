"""Compile every specialisation for one GPU that is not here, and read its machine code.

Run as a process of its own: ``python -m benchmarks.audit.compiled TARGET full|small``, without TRITON_INTERPRET, which
triton reads when it is imported. Prints one JSON object a line, for each specialisation of each kernel. Compilations
are kept in Triton's cache.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import layers, machine_code
from .targets import TARGETS, Target


def _activate(target: Target) -> None:
    """A driver that says which GPU there is, and is asked for no more; blocks are cut for its warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from vgkern.kernels import batch_norm

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(target.backend, target.arch, target.warp)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    batch_norm.LANES = target.warp
    if isinstance(target.arch, int):
        batch_norm._capability = functools.cache(lambda: target.arch)


def _resources(kernel: Any, target: Target) -> dict[str, Any]:
    """Registers and shared memory, and the machine code."""
    import triton
    from vgkern.kernels import batch_norm

    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        fields = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        code = machine_code.amdgcn(text, Path(batch_norm.__file__).parent)
        # Scalar registers that do not suffice go to lanes of vector registers, not to memory: no spills.
        return {"registers": fields["vgpr_count"], "stack": fields["private_segment_fixed_size"],
                "spills": max(fields["vgpr_spill_count"], code.spills), "code": code}  # fmt: skip
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(folder / "cuobjdump", "-res-usage", file.name)
        text = _output(folder / "nvdisasm", "-ndf", "-c", "-gi", file.name)  # no data flow analysis: for time
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    code = machine_code.sass(text)
    return {"registers": registers, "stack": stack, "spills": code.spills, "code": code}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _row(launch: Any, kernel: Any, target: Target, dtype: str, layout: str) -> dict[str, Any]:
    resources = _resources(kernel, target)
    code = resources.pop("code")
    warps = kernel.metadata.num_warps
    occupancy, limit = target.occupancy(resources["registers"], kernel.metadata.shared, warps)
    item = layers.DTYPES[dtype].itemsize
    args = launch.args
    return {
        "kernel": launch.name.removesuffix("_kernel"), "hash": kernel.hash, "target": target.name,
        "dtype": dtype, "layout": layout, "warps": warps,
        "block": f"{args['RUNS']}x{args['INNER']}" if "RUNS" in args else str(args.get("TILE", "")),
        **resources, "shared": kernel.metadata.shared, "occupancy": occupancy, "limited_by": limit,
        "load_bytes": code.widths(False), "store_bytes": code.widths(True),
        "mask_bytes": sorted({*code.widths(False, "mask"), *code.widths(True, "mask")}),
        "aligned_bytes": min(16, args.get("ALIGN", 16) * item),
        "loads_in_flight": code.in_flight,
        "bytes_in_flight": round(occupancy * target.warps * target.warp * code.bytes_in_flight),
    }  # fmt: skip


def compile_all(target: Target, which: layers.Selection) -> list[dict[str, Any]]:
    _activate(target)
    rows: dict[str, dict[str, Any]] = {}

    def add(launch: Any, dtype: str, layout: str, user: str) -> None:
        kernel = launch.kernel.run(grid=launch.grid, warmup=True, **launch.args, **launch.options)
        if kernel.hash not in rows:
            rows[kernel.hash] = {**_row(launch, kernel, target, dtype, layout), "users": []}
        if user not in rows[kernel.hash]["users"]:
            rows[kernel.hash]["users"].append(user)

    for case in layers.cases(which):
        for launch in layers.launches_of(case, layers.tensors_of(case)):
            add(launch, case.dtype, case.layout, f"{case.layer.label}, {case.direction}")
    for dtype in which.dtypes:
        for launch in layers.gradient_launches(dtype):
            add(launch, dtype, "list", "gradients of resnet50")
    return list(rows.values())


if __name__ == "__main__":
    for row in compile_all(TARGETS[sys.argv[1]], layers.SELECTIONS[sys.argv[2]]):
        print(json.dumps(row), flush=True)
