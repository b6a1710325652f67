"""Kaiming initialisation of the reference networks."""

from __future__ import annotations

from typing import Literal

from torch import nn

__all__ = ["initialise"]


def initialise(model: nn.Module) -> None:
    """Draw weights in place for ReLU networks (He et al. 2015, "Delving Deep", equation 14).

    Convolutions keep the variance of gradients (fan-out); depthwise ones use fan-in, because
    ``torch`` counts the fan-out of a grouped convolution as if it were dense, which would
    start them far too small. Linear layers draw from a normal of 0.01, norms are identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            mode: Literal["fan_in", "fan_out"] = "fan_in" if module.groups > 1 else "fan_out"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
