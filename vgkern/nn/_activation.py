"""What the layers share: an activation settled at construction, with its weight where it learns one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import activations


class ActivationMixin(nn.Module):
    activation: activations.ActivationSpec
    activation_weight: Tensor | None

    def _init_activation(
        self, activation: str | nn.Module | None, activation_args: Mapping[str, Any] | None, device: Any, dtype: Any
    ) -> None:
        given = dict(activation_args or {})
        weight_args = {}
        if isinstance(activation, str) and activation in activations.TABLE and activations.TABLE[activation].learnable:
            weight_args = {name: given.pop(name) for name in ("num_parameters", "init") if name in given}
        self.activation = activations.resolve(activation, given)
        if isinstance(activation, nn.PReLU):
            self.activation_weight = activation.weight  # the same Parameter: an optimiser may hold it already
        elif self.activation.row.learnable:
            size, value = weight_args.get("num_parameters", 1), weight_args.get("init", 0.25)
            self.activation_weight = nn.Parameter(torch.full((size,), value, device=device, dtype=dtype))
        else:
            # Not registered: state_dict and named_parameters are those of nn.BatchNorm*d to the letter.
            self.activation_weight = None
