"""What torch.compile's kernels read and write for the same function on a CUDA GPU: lowered here, without one.

The graphs are traced on fake CPU tensors, as torch.compile traces them (the same decompositions and partitioner), then
lowered by Inductor for fake CUDA tensors; only a few questions that it asks of the GPU are answered by hand. Of each
kernel that it schedules, the bytes are those of the buffers that it takes, each once. Run as a process of its own
(``python -m benchmarks.audit.inductor full|small``), for what it replaces in torch stays replaced.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layers


class _H100:
    """The answers to what Inductor asks of the GPU when it cuts reductions."""

    name = "NVIDIA H100"
    major, minor = 9, 0
    multi_processor_count = 132
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    warp_size = 32
    total_memory = 80 * 2**30
    shared_memory_per_block = 48 * 2**10
    shared_memory_per_block_optin = 227 * 2**10
    L2_cache_size = 50 * 2**20


def _pretend() -> None:
    import torch._inductor.scheduler
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    triton.runtime.driver.set_active(Driver())
    properties = DeviceProperties(
        type="cuda", index=0, cc=90, major=9, multi_processor_count=_H100.multi_processor_count,
        regs_per_multiprocessor=_H100.regs_per_multiprocessor, warp_size=_H100.warp_size,
        max_threads_per_multi_processor=_H100.max_threads_per_multi_processor,
        max_threads_per_block=_H100.max_threads_per_block,
    )  # fmt: skip
    DeviceProperties.create = staticmethod(lambda device: properties)  # type: ignore[method-assign]
    torch._inductor.scheduler.has_triton = lambda *args: True
    torch.cuda.get_device_properties = lambda device=None: _H100  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0


def _graphs(case: layers.Case, training: bool) -> list[tuple[Any, list[Any]]]:
    """[(graph, example inputs)] of the forward and, in training, the backward; on fake CPU tensors."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[tuple[Any, list[Any]]] = []

    def keep(graph: Any, inputs: list[Any]) -> Any:
        found.append((graph, inputs))
        return make_boxed_func(graph.forward)

    def function(x: Tensor, residual: Tensor | None, *norms: Tensor) -> Tensor:
        def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)

        y = batch_norm(x, *norms[:4])
        if residual is not None:
            y = y + (batch_norm(residual, *norms[4:]) if case.layer.projection else residual)
        return torch.relu(y) if case.layer.activation == "relu" else y

    with FakeTensorMode():
        t = layers.tensors_of(case, "meta")
        inputs = []
        for name, meta in t.items():
            if name == "dy":
                continue
            fake = None
            if meta is not None:
                fake = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
                fake.requires_grad_(training and "running" not in name)
            inputs.append(fake)
        compiled = aot_function(
            function, fw_compiler=keep, bw_compiler=keep, inference_compiler=keep,
            partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
        )  # fmt: skip
        y = compiled(*inputs)
        if training:
            y.backward(torch.empty_strided(y.shape, y.stride(), dtype=y.dtype))
    return found


def _lower(graph: Any, inputs: list[Any], backward: bool) -> dict[str, float]:
    """{"launches", "bytes"} of the kernels that Inductor makes of a graph."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device="cuda") if isinstance(i, Tensor) else i
            for i in inputs
        ]
    FakeTensorProp(graph, mode=mode).propagate(*fakes)
    lowering = GraphLowering(graph, example_inputs=fakes, is_backward=backward)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), DebugContext():
        lowering.run(*fakes)
        lowering.codegen()
        nodes = [node for node in lowering.scheduler.nodes if type(node).__name__ != "NopKernelSchedulerNode"]
        return {"launches": len(nodes), "bytes": sum(node.get_read_write_buffers_sizes() for node in nodes)}


def traffic(which: layers.Selection) -> list[dict[str, Any]]:
    """Of each layer in float32 and bfloat16 (float16 is its like), format and direction: launches and bytes."""
    _pretend()
    rows = []
    for layer in which.layers:
        for dtype in ("float32", "bfloat16"):
            if dtype not in which.dtypes:
                continue
            for layout in layers.FORMATS:
                case = layers.Case(layer, dtype, layout, "")
                torch._dynamo.reset()
                directions = ["forward", "backward"]
                for graph, direction in zip(_graphs(case, True), directions, strict=True):
                    counted = _lower(*graph, backward=direction == "backward")
                    rows.append(
                        {"layer": layer.label, "dtype": dtype, "layout": layout, "direction": direction, **counted}
                    )
    return rows


if __name__ == "__main__":
    for row in traffic(layers.SELECTIONS[sys.argv[1]]):
        print(json.dumps(row), flush=True)
