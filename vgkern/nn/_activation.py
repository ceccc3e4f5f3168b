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
        self.activation = activations.resolve(activation, activation_args)
        if isinstance(activation, nn.PReLU):
            self.activation_weight = activation.weight  # the same Parameter: an optimiser may hold it already
        elif self.activation.row.learnable:
            given = dict(activation_args or {})
            size, value = given.get("num_parameters", 1), given.get("init", 0.25)
            self.activation_weight = nn.Parameter(torch.full((size,), value, device=device, dtype=dtype))
        else:
            # Not registered: state_dict and named_parameters are those of nn.BatchNorm*d to the letter.
            self.activation_weight = None
