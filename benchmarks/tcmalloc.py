"""Eager PyTorch under tcmalloc, which keeps freed memory instead of paging fresh memory in at every step.

An allocator is chosen when a process starts. So the contest is held once more in a child that runs under tcmalloc,
vgkern as well as eager, and the child answers with its timings: one line of JSON asks, one line of JSON answers.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from .competitors import Contest, measure
from .shapes import Configuration
from .timing import Timing

#: Without the profiler first: it is the smaller one, and the two allocate alike.
LIBRARIES = ("tcmalloc_minimal", "tcmalloc")

MISSING = (
    "tcmalloc is not installed, so eager is not measured under it; on Debian and Ubuntu: "
    "apt-get install libtcmalloc-minimal4"
)


class WorkerError(RuntimeError):
    """The child did not start under tcmalloc, or did not answer."""


def find_library() -> str | None:
    """The name by which the loader finds tcmalloc, or None."""
    return next(filter(None, map(ctypes.util.find_library, LIBRARIES)), None)


class Worker:
    """A child process under ``library``; a context manager.

    Raises:
        WorkerError: the child does not run under the library.
    """

    def __init__(self, library: str, *, threads: int, rounds: int, device: str, record: bool, hot: bool) -> None:
        preload = " ".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
        # No report of large allocations: every tensor of a benchmark is one.
        environment = {**os.environ, "LD_PRELOAD": preload, "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**62)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=Path(__file__).parents[1], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )  # fmt: skip
        hello = self._ask({"threads": threads, "rounds": rounds, "device": device, "record": record, "hot": hot})
        if not hello["preloaded"]:
            self.close()
            raise WorkerError(f"the loader did not take {library}")

    def measure(self, configuration: Configuration) -> dict[str, dict[str, Timing]]:
        """As ``competitors.measure``, with variants "vgkern_tcmalloc" and "eager_tcmalloc"."""
        answer = self._ask(asdict(configuration))
        return {
            direction: {f"{name}_tcmalloc": Timing(tuple(seconds)) for name, seconds in timings.items()}
            for direction, timings in answer.items()
        }

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            raise WorkerError(f"the process under tcmalloc ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(questions: TextIO, answers: TextIO) -> None:
    """What the child does: read the settings, then a configuration a line, and answer each."""
    settings = json.loads(questions.readline())
    torch.set_num_threads(settings["threads"])
    print(json.dumps({"preloaded": _is_preloaded()}), file=answers, flush=True)
    for question in questions:
        fields = json.loads(question)
        configuration = Configuration(**{**fields, "shape": tuple(fields["shape"])})
        contest = Contest(configuration, settings["device"], record=settings["record"])
        timings = measure(contest, ["eager"], settings["rounds"], hot=settings["hot"])
        answer = {
            direction: {name: variants[name].seconds for name in ("vgkern", "eager")}
            for direction, variants in timings.items()
        }
        print(json.dumps(answer), file=answers, flush=True)


def _is_preloaded() -> bool:
    return "libtcmalloc" in Path("/proc/self/maps").read_text()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
