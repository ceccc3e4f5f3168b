"""Shared by all tests: which backends run here, and memory that shows what nobody wrote."""

from __future__ import annotations

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest  # noqa: E402

import vgkern  # noqa: E402

BACKENDS = ("cpu", "reference", "triton")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--exhaustive", action="store_true", help="sweep all of float32 where the suite takes a stride")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="not run: no CUDA or ROCm device here"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every ``torch.empty`` is filled with NaN (integers: the largest value), so an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Forces each backend in turn. One that is missing here fails the test: a skip would hide a broken build."""
    with vgkern.backends.use(request.param):
        yield request.param


@pytest.fixture
def device(request) -> str:
    """Where a test of the forced backend computes: triton on the GPU if there is one, else interpreted on the CPU."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    return "cuda" if backend == "triton" and HAS_GPU else "cpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """Cuts every tensor into many tiles, programs and splits; called with arguments, into others."""
    from triton_problems import small_limits
    from vgkern.kernels import tuning

    def use(**limits) -> None:
        for row in list(tuning.TABLE):
            monkeypatch.setitem(tuning.TABLE, row, small_limits(row, **limits))

    use()
    return use
