"""Initialisation of whole models: the schemes of the field, with the gain of the activation that follows each layer."""

from .gains import gain
from .weights import init_weights_

__all__ = ["gain", "init_weights_"]
