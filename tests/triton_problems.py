"""Shared by the tests of the Triton kernels: one call of both operators, small blocks, comparisons to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from vgkern.kernels import batch_norm, tuning

import vgkern
from vgkern.backends import triton as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(not batch_norm.INTERPRETED, reason="looks into the interpreter; this run has a GPU")

ALL = (True,) * 6
INF = math.inf


def small_limits(row, elements=64, inner=16, programs=64, splits=4, resident=0) -> tuning.Limits:
    """Tiles of a few elements: every tensor is many tiles, programs and splits, and no channel fits one program."""
    return tuning.Limits(inner if row[0] == "planes" else 8, elements, resident, programs, splits, 512, 1, 1)


class Problem:
    """One call of both operators, with inputs from a fixed seed."""

    def __init__(
        self, shape=(6, 3, 34), layout="planes", mode="batch", activation="relu", residual=True,
        dtype=torch.float32, bounds=(0.0, INF), wanted=ALL, mean=0.0, scale=1.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def activations_of(values):
            values = values.to(DEVICE, dtype)
            return values.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" else values

        channels = shape[1]
        spec = vgkern.activations.resolve(activation)
        self.x = activations_of(normal(*shape) + mean)
        self.residual = activations_of(normal(*shape)) if residual else None
        self.dy = activations_of(normal(*shape) * scale)
        normalise = mode != "none"
        self.weight, self.bias = normal(2, channels).to(DEVICE, dtype) if normalise else (None, None)
        self.running = (None, None)
        if mode == "running":
            self.running = (normal(channels) + mean).to(DEVICE), normal(channels).square().add(0.5).to(DEVICE)
        self.slope = normal(channels).to(DEVICE, dtype) if spec.row.learnable else None
        self.training = mode == "batch"
        self.activation = activation, list(spec.args)
        self.bounds = bounds
        present = (True, residual, normalise, normalise, spec.row.learnable, True)
        self.wanted = [a and b for a, b in zip(present, wanted, strict=True)]

    def forward_args(self):
        return (
            self.x, self.residual, self.weight, self.bias, *self.running, self.slope, self.training, 1e-5,
            *self.activation, True,
        )  # fmt: skip

    def backward_args(self, statistics, mask):
        reads_z = vgkern.activations.TABLE[self.activation[0]].backward_reads == "z"
        return (
            self.dy, self.x, self.residual if reads_z else None, mask if mask.numel() else None,
            statistics if statistics.numel() else None, self.weight, self.bias, self.slope, self.training, 1e-5,
            *self.activation, *self.bounds, self.wanted,
        )  # fmt: skip

    def forward(self, implementation=backend):
        return implementation.batch_norm_act_forward(*self.forward_args())

    def backward(self, statistics, mask, implementation=backend):
        return implementation.batch_norm_act_backward(*self.backward_args(statistics, mask))

    def input_gradient(self, statistics, mask, implementation=backend):
        """As for statistics that processes share, of a problem over the batch."""
        dy, x, residual, mask, statistics, weight, bias, slope, *_ = self.backward_args(statistics, mask)
        means = torch.ones((2, x.shape[1]), dtype=torch.float64, device=DEVICE)
        return implementation.batch_norm_act_input_gradient(
            dy, x, residual, mask, statistics, weight, bias, slope, *self.activation, means, means[0, :1]
        )

    def run(self, implementation=backend):
        """(y, statistics, mask, dx, dresidual, dweight, dbias, dactivation_weight, record)."""
        y, statistics, mask = self.forward(implementation)
        return y, statistics, mask, *self.backward(statistics, mask, implementation)


class DoubleProblem(Problem):
    """The same of ``act(batch_norm(x) + batch_norm(residual))``; there is no mode "none"."""

    def __init__(self, shape=(6, 3, 34), layout="planes", mode="batch", *, wanted=(True,) * 9, **options):
        super().__init__(shape, layout, mode, **options)
        self.residual_weight, self.residual_bias = (t.flip(0) for t in (self.weight, self.bias))
        self.residual_running = tuple(None if t is None else t.flip(0) for t in self.running)
        self.eps = 1e-5, 1e-3
        self.wanted = [*wanted[:6], wanted[6] and self.slope is not None, *wanted[7:]]

    def forward_args(self):
        return (
            self.x, self.residual, self.weight, self.bias, *self.running, self.residual_weight, self.residual_bias,
            *self.residual_running, self.slope, self.training, *self.eps, *self.activation, True,
        )  # fmt: skip

    def backward_args(self, statistics, mask):
        return (
            self.dy, self.x, self.residual, mask if mask.numel() else None, statistics, self.weight, self.bias,
            self.residual_weight, self.residual_bias, self.slope, self.training, *self.eps, *self.activation,
            self.wanted,
        )  # fmt: skip

    def forward(self, implementation=backend):
        return implementation.double_batch_norm_act_forward(*self.forward_args())

    def backward(self, statistics, mask, implementation=backend):
        return implementation.double_batch_norm_act_backward(*self.backward_args(statistics, mask))


def assert_close(ours, theirs, rtol=2e-5, atol=2e-6):
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, equal_nan=True)


def bits(tensors):
    return [t.contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in tensors if t.numel()]
