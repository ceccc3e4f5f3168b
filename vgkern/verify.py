"""``vgkern.verify()``: the grid of cases that the test suite runs, on the user's own machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from . import activations, backends
from . import nn as fused
from .testing import Row, compare, format_rows

__all__ = ["Case", "VerifyReport", "verify"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("contiguous", "channels_last")

# Sizes at which a body and a tail meet: planes of 99 elements and 19 channels are no multiple of any vector or block.
# Ten thousand elements or so: over a hundred, how large PyTorch's largest error is depends on luck.
_SHAPE = (6, 19, 9, 11)
# What else the full grid visits, with float32 and bfloat16.
_MORE_SHAPES = (
    (129, 70),  # no spatial dimension
    (6, 7, 257),  # 1d, a plane longer than a block
    (6, 9, 5, 7, 5),  # 3d
    (9, 1, 30, 31),  # one channel: contiguous and channels_last at once
    (131, 67, 1, 1),  # one value a plane
    (1, 16, 32, 32),  # a batch of one, planes of whole vectors
    (40, 2, 33, 31),  # few channels with much in each
)


@dataclass(frozen=True)
class Case:
    """One configuration of a fused layer, with an input made from a fixed seed.

    Attributes:
        activation: a name of ``vgkern.activations.names()``.
        dtype: of the input: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        layout: ``"contiguous"`` or ``"channels_last"``.
        training: batch statistics, or running statistics.
        residual: whether there is one.
        shape: of the input, (N, C, ...).
        affine: whether the layer has γ and β.
        parameters: dtype of the parameters; None for the input's.
        activation_args: as the layer's.
        mean: of the input; its standard deviation is 1.
        layer: ``"batch_norm_act"``, ``"add_act"``, or ``"double_batch_norm_act"``: the residual has a batch norm too.
    """

    activation: str = "relu"
    dtype: str = "float32"
    layout: str = "contiguous"
    training: bool = True
    residual: bool = True
    shape: tuple[int, ...] = _SHAPE
    affine: bool = True
    parameters: str | None = None
    activation_args: tuple[tuple[str, Any], ...] = ()
    mean: float = 0.0
    layer: str = "batch_norm_act"

    def check(self, backend: str) -> list[Row]:
        """Run the case and judge it."""
        with backends.use(backend):
            layer, x, residual = self.make()
            shortcut = self._shortcut() if self.layer == "double_batch_norm_act" else None
            return compare(layer, x, residual, shortcut=shortcut)

    def assert_passes(self, backend: str) -> None:
        """Run the case; raises AssertionError with its rows if it fails."""
        rows = self.check(backend)
        if not all(row.ok for row in rows):
            raise AssertionError(f"{self} on {backend}:\n{format_rows(rows)}")

    def make(self) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """(layer, input, residual)."""
        generator = torch.Generator().manual_seed(0)
        device = _device()

        def normal(*size: int, mean: float = 0.0) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64) + mean

        dtype = getattr(torch, self.dtype)
        parameter_dtype = getattr(torch, self.parameters or self.dtype)
        channels = self.shape[1]
        args = dict(self.activation_args)
        if self.activation == "prelu":
            args.setdefault("num_parameters", channels)
        if self.layer == "add_act":
            layer: Any = fused.AddAct(activation=self.activation, activation_args=args)
        else:
            kind = {2: fused.BatchNormAct1d, 3: fused.BatchNormAct1d, 4: fused.BatchNormAct2d, 5: fused.BatchNormAct3d}
            layer = kind[len(self.shape)](
                channels, affine=self.affine, activation=self.activation, activation_args=args
            )
            with torch.no_grad():
                for tensor in filter(lambda t: t is not None, (layer.weight, layer.bias, layer.running_mean)):
                    tensor.copy_(normal(channels))
                layer.running_mean.add_(self.mean)
                layer.running_var.copy_(normal(channels).square() + 0.5)
        if layer.activation_weight is not None:
            with torch.no_grad():
                layer.activation_weight.copy_(normal(layer.activation_weight.numel()) * 0.3)
        layer.to(device, parameter_dtype).train(self.training)

        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        channels_last = self.layout == "channels_last" and len(self.shape) in formats
        memory_format = formats[len(self.shape)] if channels_last else torch.contiguous_format
        x = normal(*self.shape, mean=self.mean).to(device, dtype).contiguous(memory_format=memory_format)
        residual = None
        if self.residual:
            residual = normal(*self.shape).to(device, dtype).contiguous(memory_format=memory_format)
        return layer, x, residual

    def _shortcut(self) -> Any:
        """The batch norm of the residual: with parameters, statistics, ε and momentum of its own."""
        other = replace(self, activation="identity", activation_args=(), mean=0.0, layer="batch_norm_act")
        shortcut, _, _ = other.make()
        shortcut.eps, shortcut.momentum = 1e-3, 0.3
        for name, tensor in shortcut.state_dict().items():
            if tensor.dim():
                tensor.copy_(tensor.flip(0) + (0.25 if name == "running_var" else 0.0))
        return shortcut

    def __str__(self) -> str:
        default = Case()
        given = ", ".join(f"{k}={v!r}" for k, v in self.__dict__.items() if v != getattr(default, k))
        return f"Case({given})"


def _device() -> str:
    """Where the backend in force computes."""
    return "cuda" if torch.cuda.is_available() and backends.name_of("cuda") == "triton" else "cpu"


def cases(names: Sequence[str], *, full: bool) -> Iterator[Case]:
    """The grid: every activation × dtype × layout × training × residual; ``full`` adds what is listed below."""
    for activation, dtype, layout, training, residual in itertools.product(
        names, DTYPES, LAYOUTS, (True, False), (True, False)
    ):
        yield Case(activation, dtype, layout, training, residual)
    for activation, dtype in itertools.product(names, ("float32", "bfloat16")):
        yield Case(activation, dtype, layer="add_act")
        yield Case(activation, dtype, residual=False, layer="add_act")
    for activation in names:
        yield Case(activation, "float32", layer="double_batch_norm_act")
    if not full:
        return
    for activation, dtype, layout, training in itertools.product(names, DTYPES, LAYOUTS, (True, False)):
        yield Case(activation, dtype, layout, training, layer="double_batch_norm_act")
    for activation, shape, dtype, training in itertools.product(
        names, _MORE_SHAPES, ("float32", "bfloat16"), (True, False)
    ):
        layouts = LAYOUTS if len(shape) > 3 else LAYOUTS[:1]
        for layout in layouts:
            yield Case(activation, dtype, layout, training, residual=dtype == "float32", shape=shape)
    for activation, layout, training in itertools.product(names, LAYOUTS, (True, False)):
        for dtype in ("bfloat16", "float16"):
            yield Case(activation, dtype, layout, training, parameters="float32")
        yield Case(activation, "float32", layout, training, affine=False)
        yield Case(activation, "float32", layout, training, mean=1e4)
        yield Case(activation, "float64", layout, training, mean=1e4)
    for name, variants in _VARIANTS.items():
        if name in names:
            for args, dtype, layout in itertools.product(variants, DTYPES, LAYOUTS):
                yield Case(name, dtype, layout, activation_args=args)


# Arguments other than PyTorch's defaults.
_VARIANTS: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {
    "leaky_relu": ((("negative_slope", 0.2),), (("negative_slope", -0.5),)),
    "elu": ((("alpha", 0.5),),),
    "celu": ((("alpha", 2.0),),),
    "gelu": ((("approximate", "tanh"),),),
    "softplus": ((("beta", 2.0), ("threshold", 5.0)),),
    "prelu": ((("num_parameters", 1),),),
}


@dataclass(frozen=True)
class CaseResult:
    """A case on a backend with its rows, or the exception that it raised."""

    backend: str
    case: Case
    rows: tuple[Row, ...] = ()
    exception: str = ""

    @property
    def ok(self) -> bool:
        return not self.exception and all(row.ok for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest error beyond PyTorch's, as a share of what is allowed; at most 1 where all is well."""
        return max((row.excess for row in self.rows if "record." not in row.name), default=float("inf"))

    @property
    def reproduce(self) -> str:
        """A line of Python that runs this case alone and raises."""
        return f"from vgkern.verify import Case; {self.case}.assert_passes({self.backend!r})"

    def __str__(self) -> str:
        detail = self.exception or format_rows([row for row in self.rows if not row.ok])
        return f'{self.backend}: {self.case}\n{detail}\nreproduce: python -c "{self.reproduce}"'

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend, "case": asdict(self.case), "ok": self.ok, "exception": self.exception,
            "rows": [row.to_dict() for row in self.rows], "reproduce": self.reproduce,
        }  # fmt: skip


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found. ``str()`` is a table with a line an activation and backend.

    Attributes:
        rows: one :class:`CaseResult` a case and backend.
        seconds: how long it took.
        skipped: backends that were not run, with the reason.
    """

    rows: tuple[CaseResult, ...]
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every case is right; False where nothing was run."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[CaseResult, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok, "seconds": self.seconds, "torch": torch.__version__, "skipped": self.skipped,
            "rows": [row.to_dict() for row in self.rows],
        }  # fmt: skip

    def __str__(self) -> str:
        names = list(dict.fromkeys(row.backend for row in self.rows))
        lines = ["Largest error beyond PyTorch's own, as a share of what is allowed: one unit in the last place"]
        lines += [f"{'':14}" + "".join(f"{name:>22}" for name in names)]
        for activation in dict.fromkeys(row.case.activation for row in self.rows):
            cells = []
            for name in names:
                group = [row for row in self.rows if (row.backend, row.case.activation) == (name, activation)]
                failed = sum(not row.ok for row in group)
                verdict = f"{failed} of {len(group)} FAILED" if failed else f"{len(group)} ok"
                cells.append(f"{verdict}{max((row.worst for row in group), default=0.0):8.2f}")
            lines.append(f"{activation:14}" + "".join(f"{cell:>22}" for cell in cells))
        lines += [f"not run: {name}: {reason}" for name, reason in self.skipped.items()]
        failed = len(self.failures)
        lines.append(
            f"{len(self.rows)} cases in {self.seconds:.1f} s against float64 autograd: "
            + (f"{failed} FAILED" if failed else "all passed" if self.rows else "nothing was run")
        )
        return "\n".join(lines)


def verify(
    backend: str | None = None,
    full: bool = False,
    *,
    activations: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check the fused layers of this installation, on this machine, against float64 reference autograd.

    Every case compares output, all gradients, running statistics and the gradient record. A case passes if no error is
    larger than that of PyTorch's own operations in the same dtype on the same input by more than one unit in the last
    place of the largest value, and the record's norms are within 1e-5.

    Args:
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; by default all that are usable here.
        full: also other shapes, float32 parameters beside half-precision data, no affine parameters, a mean of 1e4,
            and other arguments of the activations; and float16 in Triton's interpreter.
        activations: only these.
        progress: called as ``progress(done, total)`` after each case.

    Raises:
        ValueError: an unknown backend or activation. RuntimeError: a backend that is not usable here.

    Example:
        >>> import vgkern
        >>> vgkern.verify("reference", activations=["relu"]).ok
        True
    """
    names = _activation_names(activations)
    skipped = {}
    if backend is None:
        states = backends.available()
        skipped = {name: reason for name, reason in states.items() if reason != "usable"}
        chosen = [name for name, reason in states.items() if reason == "usable"]
    else:
        chosen = [backend]
        with backends.use(backend):
            pass
    todo = [(name, case) for name in chosen for case in cases(names, full=full) if full or not _is_left_out(name, case)]
    start = time.perf_counter()
    results = []
    for done, (name, case) in enumerate(todo, start=1):
        try:
            results.append(CaseResult(name, case, rows=tuple(case.check(name))))
        except Exception as error:  # reported as this case's failure; the others still run
            results.append(CaseResult(name, case, exception=f"{type(error).__name__}: {error}"))
        if progress:
            progress(done, len(todo))
    return VerifyReport(tuple(results), time.perf_counter() - start, skipped)


def _is_left_out(backend: str, case: Case) -> bool:
    """float16 in Triton's interpreter, which takes a tenth of a second a case; bfloat16 stands for it."""
    return backend == "triton" and not torch.cuda.is_available() and case.dtype == "float16"


def _activation_names(given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return activations.names()
    return tuple(activations.resolve(name).name for name in given)
