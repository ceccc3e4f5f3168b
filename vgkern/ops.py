"""The contract between autograd and the backends: the operators, their schemas, fakes and checks.

``vgkern::batch_norm_act_forward`` and ``vgkern::batch_norm_act_backward`` are functional (they change none of their
inputs) and each backend implements both with the signatures below; so are the two at the end, for statistics that
several processes share. They have no autograd formula of their own; that is ``vgkern.functional``'s part. Three modes
of normalisation:

=============  ==========  ============================  =======================================
mode           training    running_mean, running_var     x̂
=============  ==========  ============================  =======================================
batch          True        ignored                       (x − mean(x)) · rstd, over the channel
running        False       given                         (x − running_mean) · rstd
none           False       None                          x itself; weight and bias are None
=============  ==========  ============================  =======================================

Forward: ``z = weight·x̂ + bias + residual; y = φ(z)``.

* ``x``: (N, C, *) dense, contiguous or channels_last(_3d); float32, float64, bfloat16 or float16. Never empty.
  In mode "none" any rank: see :func:`geometry`.
* ``residual``: None, or of x's shape, dtype and strides.
* ``running_mean``, ``running_var``, ``weight``, ``bias``: (C,), the last two or None; of x's dtype, float32 beside a
  half-precision x, or float64. dweight and dbias have the dtype of weight and bias.
* ``activation_weight``: (1,) or (C,) for a learnable activation, else None.
* Returns ``y`` (like x); ``statistics``, float64 (float32 where the device has none), (3, C): mean, rstd and unbiased
  variance (NaN in mode "running"), or (0,) in mode "none"; ``mask``, uint8 bits, or (0,).

The mask is made where ``save_mask`` is true, a residual is there, and the activation's backward reads a mask; without a
residual the backward recomputes z from x, which it reads anyhow. Its shape is (outer, ceil(inner / 8)) for the
(outer, inner) of :func:`mask_geometry`; bit ``i % 8`` of byte ``i // 8`` belongs to element ``i`` of the run.

Backward: with ``dz = φ'(z)·dy`` and m elements a channel::

    dresidual = dz      dbias = Σ dz      dweight = Σ dz·x̂      dactivation_weight = Σ_{z<0} z·dy  (PReLU)
    dx = weight·rstd·(dz − dbias/m − x̂·dweight/m)      mode "batch"
    dx = weight·rstd·dz                                 modes "running" and "none" (there weight·rstd = 1)

* ``residual`` is given where z must be recomputed from it, ``mask`` where that suffices, and both are None in a layer
  without residual.
* ``x``: its values are not read in mode "none" where a mask is given or the activation is the identity; dy takes its
  place then, so that the graph need not keep x.
* ``min_norm``, ``max_norm``: bounds of the L2 norm of the whole dx; 0 and inf for none. dx is scaled by one factor so
  that its norm lies within; a zero or non-finite norm is left alone. Other gradients are not scaled.
* ``output_mask``: which of dx, dresidual, dweight, dbias, dactivation_weight and record are wanted. What is not comes
  back as an empty (0,) tensor and costs no write.
* ``record``: float64 (9,), additive over backward passes: see :data:`RECORD_FIELDS`.

Statistics that several processes share (``vgkern.synchronised``) come from each one's ``batch_norm_moments``, (3, C)
float64: the count of the channel's elements, their mean, and Σ(x − mean)²; zeros for an empty x. The forward and the
backward operator then run in mode "running", for all but dx, which is
``batch_norm_act_input_gradient``'s::

    dx = factor·weight·rstd·(dz − means[0] − x̂·means[1])      ‖dx‖², (1,)

* ``means``: float64 (2, C), those of dz and of dz·x̂ over the elements of all processes; ``factor``: float64, (1,).
* ``statistics`` are those that the forward operator returned; the other arguments mean what they mean above.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import backends
from .activations import TABLE, ActivationSpec

try:
    from ._C import are_unwatched, examine, use_tensor_types
except ImportError:  # nothing is in a hurry then

    def are_unwatched(*args: object) -> bool:
        return False

    def examine(*args: object) -> tuple[bool, bool]:
        return False, False
else:
    use_tensor_types(Tensor, nn.Parameter)


__all__ = ["RECORD_FIELDS", "geometry", "layout", "mask_geometry", "needs_mask", "statistics_dtype", "unwatched"]

#: What the record sums, in this order. ``dx`` is squared as handed on, after the bounds; ``dead`` counts elements with
#: φ'(z) = 0, ``nonfinite`` elements of dy that are inf or NaN, ``elements`` all of them; ``backwards`` adds one.
RECORD_FIELDS = (
    "grad_output_sq",
    "grad_preact_sq",
    "grad_input_sq",
    "grad_weight_sq",
    "grad_bias_sq",
    "dead",
    "nonfinite",
    "elements",
    "backwards",
)

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_library = torch.library.Library("vgkern", "DEF")
_library.define(
    "batch_norm_act_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    " Tensor? running_var, Tensor? activation_weight, bool training, float eps, str activation,"
    " float[] activation_args, bool save_mask) -> (Tensor y, Tensor statistics, Tensor mask)"
)
_library.define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor? statistics, Tensor? weight,"
    " Tensor? bias, Tensor? activation_weight, bool training, float eps, str activation, float[] activation_args,"
    " float min_norm, float max_norm, bool[6] output_mask)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dactivation_weight, Tensor record)"
)
_library.define("batch_norm_moments(Tensor x) -> Tensor")
_library.define(
    "batch_norm_act_input_gradient(Tensor dy, Tensor x, Tensor? residual, Tensor? mask, Tensor statistics,"
    " Tensor? weight, Tensor? bias, Tensor? activation_weight, str activation, float[] activation_args, Tensor means,"
    " Tensor factor) -> (Tensor dx, Tensor dx_squares)"
)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Per-channel statistics and the record are float64, which costs nothing at C values; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def geometry(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S) of x: batch, channels, elements of a plane. A tensor of rank 0 or 1 (mode "none") is one channel."""
    if x.dim() < 2:
        return 1, 1, x.numel()
    n, c, *plane = x.shape
    return n, c, math.prod(plane)


def layout(x: Tensor) -> tuple[bool, int, int, int]:
    """(:func:`is_rows`, N, C, S)."""
    n, c, s = geometry(x)
    return x.dim() >= 2 and (s == 1 or not x.is_contiguous()), n, c, s


def is_rows(x: Tensor) -> bool:
    """Whether x lies in memory as rows of C channels (channels_last, or planes of one element) and not as planes."""
    return layout(x)[0]


def is_dense(x: Tensor) -> bool:
    """Whether x's elements are a stretch of memory in some order: ``data_ptr()`` and ``numel()`` say all of it."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def without_repeats(x: Tensor) -> Tensor:
    """A view of x with each element of an expanded axis once, so that PyTorch agrees to write into it."""
    sizes = [min(size, 1) if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(sizes, x.stride())


def clip_factor(total: Tensor, max_norm: float) -> Tensor:
    """What brings a norm down to ``max_norm``, 1 where it is no larger, NaN where it is NaN; as PyTorch's clipping."""
    return (max_norm / (total + 1e-6)).clamp(max=1.0)


def merge_moments(parts: Tensor) -> Tensor:
    """Moments of all elements, (3, C), from those of their parts, (P, 3, C), of which some may be empty; in one order.

    Means are taken about the largest of them, so that a constant channel keeps its value to the bit. Source: Chan,
    Golub & LeVeque 1979.
    """
    counts, means, squares = parts.unbind(1)
    origin = means.where(counts > 0, -math.inf).amax(0)
    origin = origin.where(origin.isfinite(), 0.0)
    count = counts.sum(0)
    offset = (counts * (means - origin).where(counts > 0, 0.0)).sum(0) / count.clamp(min=1)
    mean = origin + offset
    deviations = (means - mean).where(counts > 0, 0.0)
    return torch.stack([count, mean, (squares + counts * deviations.square()).sum(0)])


def mask_geometry(x: Tensor) -> tuple[int, int]:
    """(outer, inner): x's memory as ``outer`` runs of ``inner`` elements, each with bytes of its own in the mask."""
    rows, n, c, s = layout(x)
    return (n * s, c) if rows else (n * c, s)


def needs_mask(activation: str, has_residual: bool) -> bool:
    """Whether the backward pass takes a mask, if one was saved."""
    return has_residual and TABLE[activation].backward_reads == "mask"


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty((0,), dtype=dtype)


def _forward_fake(
    x, residual, weight, bias, running_mean, running_var, activation_weight,
    training, eps, activation, activation_args, save_mask,
):  # fmt: skip
    statistics = _empty(x, statistics_dtype(x.device))
    if training or running_mean is not None:
        statistics = statistics.new_empty((3, x.shape[1]))
    mask = _empty(x, torch.uint8)
    if save_mask and needs_mask(activation, residual is not None):
        outer, inner = mask_geometry(x)
        mask = mask.new_empty((outer, (inner + 7) // 8))
    return torch.empty_like(x), statistics, mask


def _backward_fake(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    training, eps, activation, activation_args, min_norm, max_norm, output_mask,
):  # fmt: skip
    channels = geometry(x)[1]
    param_dtype = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    like = (
        lambda: torch.empty_like(x),
        lambda: torch.empty_like(x),
        lambda: x.new_empty((channels,), dtype=param_dtype),
        lambda: x.new_empty((channels,), dtype=param_dtype),
        lambda: torch.empty_like(activation_weight),
        lambda: x.new_empty((len(RECORD_FIELDS),), dtype=statistics_dtype(x.device)),
    )
    return tuple(make() if wanted else _empty(x) for make, wanted in zip(like, output_mask, strict=True))


def _moments_fake(x):
    return x.new_empty((3, x.shape[1]), dtype=statistics_dtype(x.device))


def _input_gradient_fake(
    dy, x, residual, mask, statistics, weight, bias, activation_weight,
    activation, activation_args, means, factor,
):  # fmt: skip
    return torch.empty_like(x), torch.empty_like(factor)


def _check_arguments(activation: str, arguments: Sequence[float]) -> None:
    """Of an operator that is called by itself: kernels read as many as the activation has."""
    if activation not in TABLE:
        raise ValueError(f"activation: expected one of {', '.join(TABLE)}, got {activation!r}")
    names = tuple(TABLE[activation].arguments)
    if len(arguments) != len(names):
        wanted = f"{len(names)} ({', '.join(names)})" if names else "none"
        raise ValueError(f"activation_args: expected {wanted} for {activation!r}, got {list(arguments)}")


def _forward(x, *args):
    _check_arguments(*args[8:10])
    if x.numel() == 0:
        y, statistics, mask = _forward_fake(x, *args)
        return y, statistics.zero_(), mask
    y, statistics, mask = backends.of(x).batch_norm_act_forward(x, *args)
    statistics = _empty(x, statistics_dtype(x.device)) if statistics is None else statistics
    return y, statistics, _empty(x, torch.uint8) if mask is None else mask


def _backward(dy, *args):
    _check_arguments(*args[9:11])
    if dy.numel() == 0:
        *gradients, record = _backward_fake(dy, *args)
        if record.numel():
            record.zero_()[RECORD_FIELDS.index("backwards")] = 1
        return *(gradient.zero_() for gradient in gradients), record
    gradients = backends.of(dy).batch_norm_act_backward(dy, *args)
    # Each its own: outputs of an operator must not alias.
    return tuple(_empty(dy) if gradient is None else gradient for gradient in gradients)


def _moments(x):
    return backends.of(x).batch_norm_moments(x) if x.numel() else _moments_fake(x).zero_()


def _input_gradient(dy, *args):
    _check_arguments(*args[7:9])
    if dy.numel() == 0:
        dx, dx_squares = _input_gradient_fake(dy, *args)
        return dx, dx_squares.zero_()
    return backends.of(dy).batch_norm_act_input_gradient(dy, *args)


for _name, _implementation, _fake in (
    ("batch_norm_act_forward", _forward, _forward_fake),
    ("batch_norm_act_backward", _backward, _backward_fake),
    ("batch_norm_moments", _moments, _moments_fake),
    ("batch_norm_act_input_gradient", _input_gradient, _input_gradient_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vgkern::{_name}", _fake, lib=_library)

batch_norm_act_forward = torch.ops.vgkern.batch_norm_act_forward.default
batch_norm_act_backward = torch.ops.vgkern.batch_norm_act_backward.default
batch_norm_moments = torch.ops.vgkern.batch_norm_moments.default
batch_norm_act_input_gradient = torch.ops.vgkern.batch_norm_act_input_gradient.default


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would take a call with these tensors straight to a CPU backend, seen by nobody.

    Then a caller may go to the backend itself, which costs 14 µs less a call; what that does not make is None.
    False where anything has to see the operator: ``torch.compile`` and ``export``, a ``TorchDispatchMode`` or
    ``TorchFunctionMode`` (``FakeTensorMode``, a FLOP counter, ``torch.device`` as a context), ``make_fx``,
    ``torch.jit.trace``, a transform of ``torch.func``, forward-mode AD, the profiler, a tensor subclass. Also where a
    tensor is on another device, not dense, empty or lazily negated, for what is no tensor, and without the extension.
    If this is true, all that is given are dense CPU tensors whose memory holds their values.
    """
    return not torch.compiler.is_dynamo_compiling() and are_unwatched(tensors)


def look(training: bool, tensors: tuple[Tensor | None, ...]) -> tuple[bool, bool]:
    """Whether a call is :func:`unwatched`, and whether it is plain that no check refuses its tensors.

    They are input, residual, running_mean, running_var, weight, bias and activation_weight. The look takes 1 µs; the
    checks, which find words, 14.
    """
    return (False, False) if torch.compiler.is_dynamo_compiling() else examine(training, tensors)


def are_plain_numbers(momentum: object, eps: object) -> bool:
    """Whether it is plain that no check refuses them."""
    return type(eps) is float and type(momentum) is float and eps > 0


def check_all(
    input: Tensor,
    residual: Tensor | None,
    spec: ActivationSpec,
    activation_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    shared: bool = False,
) -> bool:
    """:func:`check` and :func:`check_batch_norm`; returns whether the call is :func:`unwatched`, and not ``shared``."""
    tensors = (input, residual, running_mean, running_var, weight, bias, activation_weight)
    direct, common = (False, False) if shared else look(training, tensors)
    if not (common and are_plain_numbers(momentum, eps) and not spec.row.learnable):
        check(input, residual, spec, activation_weight)
        check_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, shared)
    return direct


def check(
    input: Tensor,
    residual: Tensor | None,
    spec: ActivationSpec,
    activation_weight: Tensor | None,
) -> None:
    """Refuse what neither function takes, before anything has changed."""
    _check_dense("input", input)
    if input.dtype not in FLOATING_DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise NotImplementedError(f'"batch_norm_act" not implemented for input of {input.dtype}; wanted: {wanted}')
    if residual is not None:
        _check_dense("residual", residual)
        if residual.shape != input.shape:
            raise RuntimeError(
                f"residual: expected the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
        if residual.device != input.device:
            raise RuntimeError(f"residual: expected on the device of input, {input.device}, got {residual.device}")
        if residual.is_complex() or (residual.is_floating_point() and residual.dtype not in FLOATING_DTYPES):
            raise NotImplementedError(
                f"residual: expected a dtype that promotes with {input.dtype}, got {residual.dtype}"
            )
    if spec.row.learnable != (activation_weight is not None):
        state = "needs" if spec.row.learnable else "takes no"
        raise ValueError(f"activation_weight: activation {spec.name!r} {state} weight, got {activation_weight!r}")
    if activation_weight is not None:
        _check_dense("activation_weight", activation_weight)
        channels = input.shape[1] if input.dim() >= 2 else 1
        if activation_weight.dim() > 1 or activation_weight.numel() not in (1, channels):
            raise RuntimeError(
                f"activation_weight: expected 1 or {channels} elements (the channels of input), "
                f"got shape {tuple(activation_weight.shape)}"
            )
        _check_beside("activation_weight", activation_weight, input)


def check_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    shared: bool = False,
    prefix: str = "",
) -> None:
    """Refuse what ``torch.nn.functional.batch_norm`` refuses, with its exception types, and what it should.

    ``shared``: other processes have a part in the statistics, so one value a channel is enough here. ``prefix``: of the
    arguments' names.
    """
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    given = {prefix + name: tensor for name, tensor in given.items()}
    per_channel = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in per_channel.items():
        _check_dense(name, tensor)
    if not isinstance(momentum, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"momentum: expected a number, got {momentum!r}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not training:
        for name in (f"{prefix}running_mean", f"{prefix}running_var"):
            if name not in per_channel:
                raise RuntimeError(f"{name} must be defined in evaluation mode, got None")
    if input.dim() < 2:
        # PyTorch compares the tensors of (C,) first, and looks for a second dimension only where there are none.
        kind = RuntimeError if per_channel else IndexError
        raise kind(f"input: expected at least 2 dimensions (N, C, ...), got {input.dim()}D")
    channels = input.shape[1]
    if training and not shared and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    if not (eps > 0 or (eps == 0 and not training)):  # written so that NaN is refused
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {wanted}, but got {eps}")

    for name, tensor in per_channel.items():
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements (the channels of input), got shape {tuple(tensor.shape)}"
            )
        _check_beside(name, tensor, input)
        if "running" in name and tensor.requires_grad:
            raise RuntimeError(f"{name}: batch_norm is not differentiable with respect to it; got requires_grad=True")
    if len({tensor.dtype for tensor in per_channel.values()}) > 1:
        given = ", ".join(f"{name} of {tensor.dtype}" for name, tensor in per_channel.items())
        raise RuntimeError(f"mixed dtype: expected one dtype for all tensors of (C,), got {given}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise RuntimeError(f"{name}: expected a dense (strided) tensor, got a nested tensor")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else tensor.layout
        raise NotImplementedError(f"{name}: expected a dense (strided) tensor, got {kind}")


def _check_beside(name: str, tensor: Tensor, input: Tensor) -> None:
    """Device and dtype of a parameter or statistic."""
    if tensor.device != input.device:
        raise RuntimeError(f"{name}: expected on the device of input, {input.device}, got {tensor.device}")
    if tensor.dtype not in _parameter_dtypes(input.dtype):
        raise RuntimeError(
            f"{name}: mixed dtype: expected {_either(input.dtype)} beside input of {input.dtype}, got {tensor.dtype}"
        )


def _parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)


def _either(dtype: torch.dtype) -> str:
    return " or ".join(str(candidate) for candidate in _parameter_dtypes(dtype))
