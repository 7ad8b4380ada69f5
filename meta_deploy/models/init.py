"""Initialization that several layers share."""

from torch import nn


def zero_bias(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Set a layer's bias to zero, where it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
