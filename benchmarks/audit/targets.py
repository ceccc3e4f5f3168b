"""The GPUs: what a kernel may take of a multiprocessor, and how fast memory is. By the makers' public documents.

NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; data sheets of A100 80GB SXM,
H100 SXM, H200 SXM, B200. AMD: CDNA 3 instruction set architecture, data sheet of the MI300X.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An instruction set. Of a multiprocessor (AMD: compute unit): 32-bit registers, warps, blocks, shared bytes."""

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int  # for each lane of a warp that is resident, over all warps
    granule: int  # registers of a thread are given out in multiples of this
    warps: int
    blocks: int
    shared: int
    reserved: int  # shared memory that the system keeps of each block
    multiprocessors: int  # of the product with the fastest memory,
    bandwidth: float  # whose bytes a second these are

    def occupancy(self, registers: int, shared: int, warps: int) -> tuple[float, str]:
        """(resident warps / possible warps, what limits them) of a kernel."""
        taken = -(-max(registers, 1) // self.granule) * self.granule
        # NVIDIA: four partitions share the warps of a block; AMD: a SIMD has its own registers.
        by = {
            "registers": (self.registers // (taken * 4) * 4) // warps if self.backend == "cuda"
            else min(self.registers // taken, self.warps // 4) * 4 // warps,
            "shared memory": self.shared // (shared + self.reserved) if shared + self.reserved else self.blocks,
            "warps": self.warps // warps,
            "blocks": self.blocks,
        }  # fmt: skip
        limit = min(by, key=lambda name: by[name])
        return by[limit] * warps / self.warps, limit

    @property
    def needed_in_flight(self) -> float:
        """Bytes that a multiprocessor must have asked for at any time to keep its share of the memory busy."""
        return self.bandwidth / self.multiprocessors * MEMORY_LATENCY


#: Seconds from a load to its data while memory is busy. Assumed, of the order of what microbenchmarks give.
MEMORY_LATENCY = 700e-9

TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 65536 // 32, 8, 64, 32, 164 * 1024, 1024, 108, 2.039e12),
        Target("sm_90", "cuda", 90, 32, 65536 // 32, 8, 64, 32, 228 * 1024, 1024, 132, 4.8e12),
        Target("sm_100", "cuda", 100, 32, 65536 // 32, 8, 64, 32, 228 * 1024, 1024, 148, 8e12),
        Target("gfx942", "hip", "gfx942", 64, 512, 8, 32, 32, 64 * 1024, 0, 304, 5.3e12),
    )
}


@dataclass(frozen=True)
class Device:
    """A product: bytes a second that its data sheet gives for memory."""

    name: str
    target: str
    bandwidth: float


DEVICES = (
    Device("A100", "sm_80", 2.039e12),
    Device("H100", "sm_90", 3.35e12),
    Device("H200", "sm_90", 4.8e12),
    Device("MI300X", "gfx942", 5.3e12),
)

#: The model of time: a launch costs this much beside its bytes, and these come at this part of the bandwidth.
#: Assumed, the same for every implementation; to be measured by `python -m benchmarks micro --device cuda`.
LAUNCH_SECONDS = 2e-6
BANDWIDTH_REACHED = 0.9


def seconds(device: Device, launches: float, moved: float) -> float:
    return launches * LAUNCH_SECONDS + moved / (BANDWIDTH_REACHED * device.bandwidth)
