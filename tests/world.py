"""Processes for tests: gloo worlds of any size, forked from a server that has imported everything.

Importing torch takes a process seconds; a fork of the server starts in milliseconds, and has run nothing yet.
"""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "vgkern", "sklearn.datasets",
     "sklearn.model_selection", "rich.progress"]
)  # fmt: skip

#: A rank that waits for one that does not come fails the test and does not stop the suite.
_TIMEOUT = datetime.timedelta(seconds=60)


def run(function: Callable[[int], Any], size: int, folder: Path) -> list[Any]:
    """What ``function(rank)``, of a test module, returns in each of ``size`` processes that train together."""
    torch.multiprocessing.start_processes(_rank, (function, size, str(folder)), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, function: Callable[[int], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
